"""Where a kernel comes from: an installed package, the Hub at a pinned version, or a folder of one's own.

A source is looked at in three steps, the cheapest first. ``lack`` reads facts and imports nothing. ``load`` imports,
and keeps the text of what went wrong. Running a tiny problem (``probing``) comes last. Nothing is downloaded unless the
user allowed it, nor what a kernel names as its dependency; a Hub kernel that ``LOCAL_KERNELS`` (``org/name=/folder``,
see the ``kernels`` library) maps to a folder is read from there.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from heedful.errors import CannotLoad
from heedful.facts import Facts
from heedful.refusal import Refusal

DOWNLOADS = "HEEDFUL_DOWNLOADS"  # the environment variable by which a user allows them
_KERNELS = "0.12"  # of the `kernels` library, the first with versions
_METADATA = ("metadata.json", "*/metadata.json", "build/*/metadata.json")  # a variant, its build, the whole kernel
_RELEASE = re.compile(r"v?(?:\d+!)?(\d+(?:\.\d+)*)")
Kernels = SimpleNamespace


@dataclass(frozen=True)
class Package:
    """An installed package. ``names`` are the functions in ``module`` that the strategy calls.

    ``distribution`` and ``minimum``: its name on the package index and the first version that works. ``optional``:
    names that only extras need; where one is missing it is None, and the plain path stays whole.
    """

    kind: ClassVar[str] = "package"
    module: str
    names: tuple[str, ...]
    distribution: str = ""
    minimum: str = ""
    install: str = ""
    optional: tuple[str, ...] = ()

    def lack(self, facts: Facts, downloads: bool) -> Refusal | None:  # noqa: ARG002
        """Why it cannot be loaded, as far as that can be told without importing it."""
        name = self.distribution or self.module.partition(".")[0]
        wanted = f"{name} {self.minimum} or newer" if self.minimum else name
        have = facts.package(self.distribution, self.module)
        if have is None:
            return Refusal("package", f"{name} not installed", wanted, self.install)
        if have and self.minimum and _older(have, self.minimum):
            return Refusal("package", f"{name} {have}", wanted, self.install)
        return None

    def load(self) -> Kernels:
        """Its functions by name. Raises CannotLoad with the import's own words."""
        with _as_cannot_load(self.module):
            return _named(importlib.import_module(self.module), self.names, self.optional, self.module)

    def named_version(self, facts: Facts) -> str:
        """Its name and version, as locks and bug reports say them."""
        return f"{self} {facts.package(self.distribution, self.module) or ''}".strip()

    def __str__(self) -> str:
        return self.distribution or self.module


@dataclass(frozen=True)
class Hub:
    """A kernel of the Hugging Face Hub, by the ``kernels`` library: code from the network, pinned to a version.

    ``repo`` is ``org/name``. It is loaded only where downloads are allowed, or ``LOCAL_KERNELS`` names a folder for it.
    """

    kind: ClassVar[str] = "hub"
    repo: str
    version: int
    names: tuple[str, ...]
    optional: tuple[str, ...] = ()

    def lack(self, facts: Facts, downloads: bool) -> Refusal | None:
        """See ``Package.lack``."""
        if (lack := _lacks_kernels(facts)) is not None or downloads or facts.packages is None:
            return lack
        return self.would_download()

    def would_download(self) -> Refusal | None:
        """That loading it fetches something from the network; None where it lies here."""
        folder = _local_folders().get(self.repo)
        return _no_download([f"{self} is"] if folder is None else _wanted_beside(folder))

    def load(self) -> Kernels:
        """See ``Package.load``. The user has asked for this repository by name, so it is trusted, and no other."""
        with _as_cannot_load(str(self)):
            from kernels import get_kernel

            asks = "trust_remote_code" in inspect.signature(get_kernel).parameters  # the first versions did not
            trust = {"trust_remote_code": [self.repo]} if asks else {}
            module = get_kernel(self.repo, version=self.version, **trust)
            return _named(module, self.names, self.optional, self.repo)

    def named_version(self, facts: Facts) -> str:  # noqa: ARG002
        """See ``Package.named_version``."""
        return str(self)

    def __str__(self) -> str:
        return f"{self.repo} version {self.version}"


@dataclass(frozen=True)
class Folder:
    """A kernel in a folder on this machine, laid out as the ``kernels`` library wants it (``build/<variant>/…``)."""

    kind: ClassVar[str] = "folder"
    path: str
    names: tuple[str, ...]
    optional: tuple[str, ...] = ()

    def lack(self, facts: Facts, downloads: bool) -> Refusal | None:
        """See ``Package.lack``."""
        if (lack := _lacks_kernels(facts)) is not None:
            return lack
        if not Path(self.path).is_dir():
            return Refusal("folder", f"{self.path} missing", "a folder with a kernel's build", "see kernels' docs")
        return None if downloads else _no_download(_wanted_beside(self.path))

    def load(self) -> Kernels:
        """See ``Package.load``."""
        with _as_cannot_load(self.path):
            from kernels import get_local_kernel

            return _named(get_local_kernel(Path(self.path)), self.names, self.optional, self.path)

    def named_version(self, facts: Facts) -> str:  # noqa: ARG002
        """See ``Package.named_version``."""
        return self.path

    def __str__(self) -> str:
        return self.path


Source = Package | Hub | Folder


def load_first(sources: Iterable[Source], facts: Facts, downloads: bool) -> Kernels:
    """The functions of the first source that can be loaded. Raises CannotLoad with what each one said."""
    texts = []
    for source in sources:
        lack = source.lack(facts, downloads)
        if lack is None and not downloads and isinstance(source, Hub):  # whatever the facts leave open
            lack = source.would_download()
        if lack is not None:
            texts.append(str(lack))
            continue
        try:
            return source.load()
        except CannotLoad as error:
            texts.append(str(error))
    raise CannotLoad("; ".join(texts))


def downloads_allowed(environ: Mapping[str, str]) -> bool:
    """Whether an environment allows downloads."""
    return environ.get(DOWNLOADS, "").strip().lower() in {"1", "true", "yes", "on"}


class _as_cannot_load:
    """What an import raises, whatever it is, becomes CannotLoad with its text; its warnings are not the user's."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.quiet = warnings.catch_warnings()

    def __enter__(self) -> None:
        self.quiet.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self.quiet.__exit__(kind, error, trace)
        if isinstance(error, (Exception, SystemExit)) and not isinstance(error, CannotLoad):
            raise CannotLoad(f"{self.what} cannot be loaded: {type(error).__name__}: {error}") from error


def _named(module: Any, names: tuple[str, ...], optional: tuple[str, ...], what: str) -> Kernels:
    """The functions by name. One that a failed import left as None is missing, too."""
    missing = [name for name in names if getattr(module, name, None) is None]
    if missing:
        raise CannotLoad(f"{what} has no {', '.join(missing)}: a version that heedful does not know")
    found = {name: getattr(module, name) for name in names}
    return Kernels(**found, **{name: _if_there(module, name) for name in optional})


def _if_there(module: Any, name: str) -> Any:
    """What a module has by that name; None where it has nothing, or finds nothing when it looks for it."""
    try:
        return getattr(module, name, None)
    except Exception:
        return None


def _older(have: str, minimum: str) -> bool:
    """Whether a version is before another, by their release numbers; what cannot be read counts as new."""
    one, other = (_RELEASE.match(text.strip()) for text in (have, minimum))
    if one is None or other is None:
        return False
    pairs = itertools.zip_longest(one[1].split("."), other[1].split("."), fillvalue="0")
    return next((int(a) < int(b) for a, b in pairs if int(a) != int(b)), False)


def _lacks_kernels(facts: Facts) -> Refusal | None:
    have = facts.package("kernels", "kernels")
    if have is not None and not (have and _older(have, _KERNELS)):
        return None
    observed = f"kernels {have}" if have else "kernels not installed"
    wanted = f"the kernels library {_KERNELS} or newer"
    return Refusal("package", observed, wanted, f"pip install 'kernels>={_KERNELS}'")


def _no_download(wanted: list[str]) -> Refusal | None:
    """The refusal to download these; None where there are none."""
    if not wanted:
        return None
    remedy = f"name it, and set {DOWNLOADS}=1: {', '.join(wanted)} then downloaded and its code is run"
    return Refusal("download", "not allowed", "kernels of the Hub with permission only", remedy)


def _local_folders() -> dict[str, str]:
    """What ``LOCAL_KERNELS`` maps to folders, in the syntax of the ``kernels`` library."""
    entries = os.environ.get("LOCAL_KERNELS", "").split(":")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def _wanted_beside(folder: str) -> list[str]:
    """The kernels that one in a folder needs and that ``kernels`` would download for it."""
    local, folders, wanted = _local_folders(), [folder], {}
    for one in folders:  # grows on the way
        for path in (path for where in _METADATA for path in Path(one).glob(where)):
            for repo in _depends(path):
                if repo not in local:
                    wanted[repo] = f"{repo}, which the kernel in {folder} needs, is"
                elif local[repo] not in folders:
                    folders.append(local[repo])
    return list(wanted.values())


def _depends(metadata: Path) -> list[str]:
    """The repositories that a build's metadata names; where it cannot be read, it may name any."""
    try:
        named = json.loads(metadata.read_text(encoding="utf-8")).get("kernel-depends", [])
        return [str(one["repo-id"]) for one in named]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [f"whatever {metadata} names (it cannot be read)"]
