"""What machine this is: probed once, and injectable, so that a test can be an sm_75 laptop or an H200.

A fact is read, never decided here: what a backend needs stands in its limits.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import pkgutil
import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from typing import Any

import torch

INTERPRETED = "interpreter"  # a CPU's architecture where Triton interprets its kernels on it


@dataclass(frozen=True)
class DeviceFacts:
    """One device: its torch type, and on GPUs its compute capability and architecture.

    ``capability`` is (major, minor) on NVIDIA devices and None elsewhere; ``architecture`` is ``sm_90`` or ``gfx942``,
    on a CPU INTERPRETED or nothing.
    """

    type: str
    name: str = ""
    capability: tuple[int, int] | None = None
    architecture: str = ""

    @classmethod
    def parse(cls, text: str) -> DeviceFacts:
        """A device one does not have, from its short name: ``cpu``, ``mps``, ``sm_75`` (``sm75``), ``gfx942``."""
        word = text.strip().lower().replace("_", "")
        if word.startswith("sm") and word[2:].isdigit():
            number = int(word[2:])
            return cls("cuda", f"sm_{number}", (number // 10, number % 10), f"sm_{number}")
        if word.startswith("gfx") and len(word) > 3:
            return cls("cuda", word, None, word)
        if word.isalpha():
            return cls(word, word)
        raise ValueError(f"device: got {text!r}; give a name such as cpu, mps, sm_75, sm_90 or gfx942")


@dataclass(frozen=True)
class Facts:
    """The machine: versions, and every device by torch's name for it (``cpu``, ``cuda:0``, …).

    ``packages``: the version of each installed module, by its full name (``xformers.ops``); "" where it has none. None
    supposes that everything is installed, in every version: what to ask of a machine that one does not have.
    """

    torch_version: str
    python_version: str
    system: str
    devices: dict[str, DeviceFacts] = field(default_factory=dict, hash=False)
    packages: Mapping[str, str] | None = field(default=None, hash=False)

    def device(self, device: torch.device) -> DeviceFacts:
        """The facts of one device; a type that was not probed is known by its type alone."""
        exact = self.devices.get(str(device)) or self.devices.get(f"{device.type}:0")
        return exact or DeviceFacts(device.type, device.type)

    def package(self, distribution: str, module: str) -> str | None:
        """The version of an installed module, "" if unknown, None if it is not there. Nothing is imported."""
        if self.packages is None:
            return ""
        found = self.packages.get(module)
        if found is None or not distribution:
            return found
        return self.packages.get(distribution, found)

    @classmethod
    def pretend(cls, device: str) -> Facts:
        """This machine, but with the named device (``sm_75``, ``gfx942``, …) as its first one of that type."""
        made = DeviceFacts.parse(device)
        here = probe()
        return cls(here.torch_version, here.python_version, here.system, {f"{made.type}:0": made, made.type: made})


class Installed(Mapping[str, str]):
    """The versions of installed modules and distributions, looked up once when asked for, without importing any.

    A module counts as there if its file is: ``flash_attn.flash_attn_interface`` tells flash-attn 2 from the namespace
    package of the same name that FA4 installs.
    """

    def __init__(self) -> None:
        self._found: dict[str, str | None] = {}

    def __getitem__(self, name: str) -> str:
        if name not in self._found:
            version = _version(name)
            self._found[name] = "" if version is None and _has_module(name) else version
        found = self._found[name]
        if found is None:
            raise KeyError(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(one.name for one in importlib.metadata.distributions() if one.name))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Installed)  # there is one machine

    __hash__ = None  # type: ignore[assignment]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution) or None
    except Exception:  # not there, or its metadata is broken in one of many ways
        return None


def _has_module(name: str) -> bool:
    """Whether a module's file is on the path; a folder without ``__init__.py`` is none.

    ``importlib.util.find_spec`` would import the packages around it.
    """
    words = name.split(".")
    if not all(word.isidentifier() for word in words):
        return False
    path: list[str] = []
    file = False
    for count in range(1, len(words) + 1):
        word = ".".join(words[:count])
        if word in sys.modules:
            if sys.modules[word] is None:
                return False
            path, file = list(getattr(sys.modules[word], "__path__", ())), True
            continue
        specs = [spec for spec in (_at_the_top(word) if count == 1 else _within(word, path)) if spec is not None]
        found = next((spec for spec in specs if spec.loader is not None), None)
        file = found is not None
        path = [place for spec in ([found] if found else specs) for place in spec.submodule_search_locations or ()]
        if not file and not path:
            return False
    return file


def _at_the_top(name: str) -> Iterator[ModuleSpec | None]:
    return (_asked(finder, name, None) for finder in sys.meta_path)  # all of them: editable installs have their own


def _within(name: str, path: list[str]) -> Iterator[ModuleSpec | None]:
    """``PathFinder`` would ask for the package around it as a module where it is a namespace."""
    return (_asked(pkgutil.get_importer(entry), name) for entry in path)


def _asked(finder: Any, *question: Any) -> ModuleSpec | None:
    """What a finder finds; somebody's own may have no such method, or raise to forbid an import."""
    find = getattr(finder, "find_spec", None)
    with contextlib.suppress(Exception):
        found: ModuleSpec | None = find(*question) if find is not None else None
        return found
    return None


def _gpu(index: int) -> DeviceFacts:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return DeviceFacts("cuda", properties.name, None, properties.gcnArchName.partition(":")[0])
    capability = (properties.major, properties.minor)
    return DeviceFacts("cuda", properties.name, capability, f"sm_{capability[0]}{capability[1]}")


def _interprets(environ: Mapping[str, str]) -> bool:
    """Whether Triton, should it be imported, will interpret its kernels: it reads the variable likewise."""
    return environ.get("TRITON_INTERPRET", "").lower() in {"1", "true", "on"}


@functools.lru_cache(maxsize=1)
def probe() -> Facts:
    """Look at this machine, once a process. Initialises CUDA only where torch sees a GPU."""
    interpreted = INTERPRETED if _interprets(os.environ) else ""
    devices = {"cpu": DeviceFacts("cpu", platform.processor() or platform.machine(), None, interpreted)}
    if torch.cuda.is_available():
        devices |= {f"cuda:{index}": _gpu(index) for index in range(torch.cuda.device_count())}
    if torch.backends.mps.is_available():
        devices["mps:0"] = DeviceFacts("mps", "Apple GPU")
    return Facts(torch.__version__, platform.python_version(), platform.system(), devices, Installed())
