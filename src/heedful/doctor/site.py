"""The packages beside one Python: which versions are there, and their files kept so that they can be put back.

What is kept is linked, not copied: it takes no room, so that putting it back needs none on a full disk. pip removes a
file before it writes another of the same name, which leaves the link as it was. Where a file system has no links, the
one distribution is copied; of the others' files it is only told that they changed.
"""

from __future__ import annotations

import contextlib
import filecmp
import importlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heedful.doctor.environment import canonical
from heedful.files import write_json

FOLDER = ".heedful-install"  # among the packages, so that links work; no name of a module or package
ASIDE = ".heedful-cut-off-"
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
_NO_STRAYS = (".egg", ".egg-info", ".egg-link", ".pth", ".pyc")  # no file list may name them, and they are somebody's
_ASK = "import json, sys, sysconfig; print(json.dumps([sysconfig.get_path('purelib'), [p for p in sys.path if p]]))"


@dataclass(frozen=True)
class Kept:
    """What is known of an install that has not ended: its distribution, all versions before it, and ``owned``: what it
    has installed itself, with the version, "" as long as that is not known.
    """

    distribution: str
    versions: Mapping[str, str]
    owned: Mapping[str, str]


@dataclass(frozen=True)
class Site:
    """One Python: its executable, the folder that pip installs to, and all folders that it imports from."""

    executable: str
    folder: Path
    paths: tuple[str, ...]

    @classmethod
    def of(cls, executable: str = "") -> Site:
        """That of this process, or of another Python, which is asked. Raises OSError, ValueError."""
        if not executable or executable == sys.executable:
            return cls(sys.executable, _real(sysconfig.get_path("purelib")), tuple(path for path in sys.path if path))
        told = subprocess.run(
            [executable, "-c", _ASK], capture_output=True, stdin=subprocess.DEVNULL, timeout=60, check=True
        )
        folder, paths = json.loads(told.stdout)
        return cls(executable, _real(folder), tuple(paths))

    def versions(self) -> dict[str, str]:
        """What is installed, by its canonical name; the first that Python would find counts."""
        found: dict[str, str] = {}
        for name, one in self._distributions():
            with contextlib.suppress(Exception):  # broken metadata breaks in many ways, and is none of this install's
                found.setdefault(name, one.version)
        return {name: version for name, version in found.items() if version}

    def keep(self, distribution: str) -> None:
        """Link every file of a distribution, and of the others in this folder, into the folder of kept ones.

        Lists say where each one belongs, which versions there are, and which files: what an install that was killed has
        changed can be told by them.
        """
        store, wanted = self.folder / FOLDER, canonical(distribution)
        self.drop()
        store.mkdir(parents=True)
        files: list[tuple[str, str, str, int]] = []
        for owner, path in self._listed(wanted):
            saved = store / str(len(files))
            linked = _link(path, saved, copy=owner == wanted)
            files.append((owner, str(path), saved.name if linked else "", path.stat().st_mtime_ns))
        tops = {path for path in (self._top(file) for owner, file, _, _ in files if owner == wanted) if path}
        there = sorted(self._present(tops))
        write_json(store / "files.json", {"files": files, "tops": sorted(tops), "there": there})
        self.own({})
        write_json(store / "kept.json", {"distribution": distribution, "versions": self.versions()})

    def own(self, names: Mapping[str, str]) -> None:
        """Write down what the install installs itself: that, and nothing else, is undone."""
        path = self.folder / FOLDER / "owned.json"
        known = _read(path) if path.is_file() else {}
        write_json(path, {**known, **names})

    def is_unfinished(self) -> bool:
        """Whether there is an install that has not ended."""
        return (self.folder / FOLDER / "kept.json").is_file()

    def unfinished(self) -> Kept:
        """What that install was about. Raises OSError where there is none."""
        store = self.folder / FOLDER
        data = _read(store / "kept.json")
        return Kept(data["distribution"], data["versions"], _read(store / "owned.json"))

    def files_of(self, names: Collection[str]) -> frozenset[str]:
        """The files that distributions say are theirs."""
        return frozenset(
            str(path) for name, one in self._distributions() if name in names for path in _files(one) if path.is_file()
        )

    def set_aside(self) -> tuple[Path, list[str]] | None:
        """Move what pip has left half written to a folder beside: what is new and no distribution's. Nothing is lost,
        for it could be somebody else's.
        """
        data = _read(self.folder / FOLDER / "files.json")
        owned = self._owned()
        new = self._present(data["tops"]) - set(data["there"]) - owned
        strays = sorted(name for name in new if not name.startswith(".heedful-") and not name.endswith(_NO_STRAYS))
        if not strays:
            return None
        aside = Path(tempfile.mkdtemp(prefix=ASIDE, dir=self.folder))
        for name in strays:
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(self.folder / name, aside / name)
        return aside, strays

    def put_back(self, owners: Collection[str], touched: Collection[str] = ()) -> None:
        """Every kept file of some distributions where it was, and those of others that are among ``touched``.

        Raises OSError.
        """
        store = self.folder / FOLDER
        for owner, place, name, _ in _read(store / "files.json")["files"]:
            path, beside = Path(place), Path(f"{place}.heedful")
            if not name or (owner not in owners and place not in touched):
                continue
            if path.exists() and path.samefile(store / name):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            beside.unlink(missing_ok=True)
            _link(store / name, beside)
            os.replace(beside, path)

    def differing(self) -> list[tuple[str, str]]:
        """Owner and path of each kept file that is gone or another one."""
        store = self.folder / FOLDER
        files = _read(store / "files.json")["files"]
        return [
            (owner, place) for owner, place, name, time in files if not _same(Path(place), name and store / name, time)
        ]

    def drop(self) -> None:
        """Forget what was kept."""
        shutil.rmtree(self.folder / FOLDER, ignore_errors=True)

    def _distributions(self) -> Iterator[tuple[str, importlib.metadata.Distribution]]:
        """What pip takes for installed, each by its canonical name."""
        importlib.invalidate_caches()
        for one in importlib.metadata.distributions(path=list(self.paths)):
            if name := _name(one):
                yield name, one

    def _listed(self, wanted: str) -> Iterator[tuple[str, Path]]:
        """The files of a distribution wherever it is, and those of all others in this folder, but for byte code."""
        seen = set()
        for name, one in self._distributions():
            if name in seen or (name != wanted and not self._is_here(one)):
                continue
            seen.add(name)
            for path in _files(one):
                if path.is_file() and (name == wanted or path.suffix != ".pyc"):
                    yield name, path

    def _is_here(self, one: importlib.metadata.Distribution) -> bool:
        return _real(str(one.locate_file(""))) == self.folder

    def _top(self, path: str) -> str:
        """The folder or file directly among the packages that a path is in; "" where it is elsewhere."""
        inside = path.removeprefix(f"{self.folder}{os.sep}")
        return "" if inside == path else inside.partition(os.sep)[0]

    def _present(self, tops: Iterable[str]) -> set[str]:
        """What lies directly among the packages, and all files within some of the folders there."""
        found = {path.name for path in self.folder.iterdir() if path.name != "__pycache__"}
        for top in tops:
            for path in (self.folder / top).rglob("*"):
                if path.is_file():
                    found.add(str(path.relative_to(self.folder)))
        return found

    def _owned(self) -> set[str]:
        """What the distributions say is theirs, and the folders directly among the packages that it is in.

        One without a list of files, which pip writes last, owns nothing.
        """
        found = set()
        for _, one in self._distributions():
            for path in _files(one) if self._is_here(one) else ():
                found |= {self._top(str(path)), str(path).removeprefix(f"{self.folder}{os.sep}")}
        return found


def _name(one: importlib.metadata.Distribution) -> str:
    """As pip has it, by its folder; "" for what pip ignores: leftovers of its own that begin with ~, odd names."""
    place = Path(str(getattr(one, "_path", "")))  # not public, and pip's own way
    name = place.stem.partition("-")[0] if place.suffix in (".dist-info", ".egg-info") else one.name
    return canonical(name) if _NAME.fullmatch(name or "") else ""


def _files(one: importlib.metadata.Distribution) -> list[Path]:
    base = _real(str(one.locate_file("")))
    return [Path(os.path.normpath(base / file)) for file in one.files or ()]


def _real(folder: str) -> Path:
    """One path for a folder that links lead to, such as lib64."""
    return Path(os.path.realpath(folder))


def _same(path: Path, kept: Path | str, time: int) -> bool:
    if not path.is_file():
        return False
    return path.stat().st_mtime_ns == time or (bool(kept) and filecmp.cmp(path, kept, shallow=False))


def _link(source: Path, target: Path, *, copy: bool = True) -> bool:
    with contextlib.suppress(OSError):
        os.link(source, target)
        return True
    if copy:
        shutil.copy2(source, target)  # some file systems have no links
    return copy


def _read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))
