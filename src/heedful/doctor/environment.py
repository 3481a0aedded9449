"""An environment as a value: all that decides which kernels can be installed and run, here or on an invented machine.

Nothing is looked up here (see ``look``) and nothing decided (see ``decision``).
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

from heedful.facts import DeviceFacts

Fault = Literal["", "raises", "ends the process", "hangs", "fails a tiny problem", "warns"]
Layout = Literal["virtual environment", "conda", "embedded", "system"]
_NUMBERS = re.compile(r"\d+(?:\.\d+)*")
USABLE: tuple[Fault, ...] = ("", "warns")


@dataclass(frozen=True)
class Found:
    """An installed package with kernels, as it behaved in a process of its own.

    ``fault``: what went wrong there, "" for nothing; ``text``: its own words. ``module``: what was imported.
    ``failed``: the strategies that a tiny problem failed; others of the same package may work.
    """

    distribution: str
    version: str
    module: str = ""
    fault: Fault = ""
    text: str = ""
    failed: tuple[str, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether it could be imported, and computed what it was asked."""
        return self.fault in USABLE

    def usable_for(self, strategy: str) -> bool:
        """Whether it could be imported, and computed what it was asked by this strategy."""
        return self.usable or (bool(self.failed) and strategy not in self.failed)

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}".strip()


@dataclass(frozen=True)
class Environment:
    """A machine, its Python and its torch. "" is what is not there or not known.

    ``python_tag`` is that of wheels (``cp312``, ``cp313t`` where Python is free-threaded); ``device`` torch's type of
    the first accelerator, else "cpu"; ``gpus`` the accelerators in torch's order; ``processor`` the CPU's name;
    ``driver`` NVIDIA's or AMD's; ``nvcc`` and ``cuda_home`` the CUDA compiler's version and folder; ``memory_gib`` what
    is free; ``index`` the host that pip asks; ``online`` whether it can be reached; ``writable`` whether packages can
    be put beside torch; ``managed`` whether the system forbids pip there (PEP 668).
    """

    executable: str = "python"
    layout: Layout = "virtual environment"
    system: str = "Linux"
    machine: str = "x86_64"
    libc: str = "glibc 2.35"
    python: str = "3.12.4"
    python_tag: str = "cp312"
    torch: str = "2.8.0+cu128"
    cuda: str = "12.8"
    hip: str = ""
    cxx11_abi: bool = True
    device: str = "cuda"
    gpus: tuple[DeviceFacts, ...] = ()
    processor: str = ""
    driver: str = ""
    nvcc: str = ""
    cuda_home: str = ""
    compiler: str = ""
    headers: bool = True
    memory_gib: float = 32.0
    cores: int = 8
    pip: str = "25.0"
    writable: bool = True
    managed: bool = False
    online: bool = True
    index: str = "pypi.org"
    packages: tuple[Found, ...] = ()

    @property
    def torch_release(self) -> tuple[int, ...]:
        """torch's version in numbers, without the local part."""
        return numbers(self.torch.partition("+")[0])

    @property
    def torch_minor(self) -> str:
        """``2.8`` of ``2.8.0+cu128``."""
        return ".".join(map(str, self.torch_release[:2]))

    @property
    def free_threaded(self) -> bool:
        """Whether this Python has no GIL: most wheels do not fit it."""
        return self.python_tag.endswith("t")

    @property
    def best(self) -> DeviceFacts | None:
        """The most capable GPU; the first one where none has a compute capability."""
        return max(self.gpus, key=lambda gpu: gpu.capability or (0, 0), default=None)

    def package(self, distribution: str) -> Found | None:
        """What was found of a distribution, by its name in any spelling."""
        wanted = canonical(distribution)
        return next((one for one in self.packages if canonical(one.distribution) == wanted), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (12, 8) of ``12.8``; none of ""."""
    found = _NUMBERS.search(version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def canonical(distribution: str) -> str:
    """A distribution's name as the package index compares it."""
    return re.sub(r"[-_.]+", "-", distribution).lower()
