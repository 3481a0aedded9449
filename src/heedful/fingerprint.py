"""What measured times depend on: the device and its driver, torch, Triton, threads, the packages with kernels.

Times of one fingerprint say nothing about another one, so each has a file of its own. Nothing is imported to make one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from heedful.facts import Facts
from heedful.sources import Package
from heedful.strategy import AttentionStrategy

_TRITONS = ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm", "triton-windows")
# torch has no public name for the driver's version, and CUDA's own number is the newest CUDA that it can run only.
_DRIVERS = ("/sys/module/nvidia/version", "/sys/module/amdgpu/version")
_CPU = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Fingerprint:
    """One device of one machine, as far as times depend on it; "" is what is unknown or means nothing there.

    ``architecture``: ``sm_90``, ``gfx942``, or ``x86_64 AVX512``. ``runtime``: the version of CUDA or HIP. ``threads``:
    torch's on a CPU, else 0. ``packages``: the version of each installed package with kernels, by name.
    """

    device: str
    architecture: str
    driver: str
    torch: str
    runtime: str
    triton: str
    threads: int
    system: str
    packages: tuple[tuple[str, str], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; ``from_dict`` gives the equal fingerprint back."""
        return {**dataclasses.asdict(self), "packages": dict(self.packages)}

    @classmethod
    def from_dict(cls, data: Any) -> Fingerprint:
        """A fingerprint out of JSON data that may come from anywhere. Raises ValueError for any other than its own."""
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(data, Mapping) or set(data) != set(names):
            raise ValueError(f"fingerprint: not a table of {', '.join(names)}")
        packages, threads = data["packages"], data["threads"]
        if not isinstance(threads, int) or isinstance(threads, bool) or not 0 <= threads <= 1 << 20:
            raise ValueError("fingerprint: threads is no such number")
        if not isinstance(packages, Mapping):
            raise ValueError("fingerprint: packages is no table")
        texts = [data[name] for name in names if name not in ("packages", "threads")]
        if not all(isinstance(text, str) for text in (*texts, *packages, *packages.values())):
            raise ValueError("fingerprint: a text is none")
        return cls(**{**data, "packages": tuple(sorted(packages.items()))})

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that stand for it."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def likeness(self) -> dict[str, Any]:
        """What machines must have in common for one's times to be a first guess on the other."""
        release = ".".join(self.torch.split(".")[:2])
        return {
            "device": self.device,
            "architecture": self.architecture,
            "torch": release,
            "threads": self.threads,
        }

    def __str__(self) -> str:
        parts = [
            f"{self.device} ({self.architecture})" if self.architecture else self.device,
            f"driver {self.driver}" if self.driver else "",
            f"torch {self.torch}",
            f"runtime {self.runtime}" if self.runtime else "",
            f"triton {self.triton}" if self.triton else "",
            f"{self.threads} threads" if self.threads else "",
            self.system,
            *(f"{name} {version}".strip() for name, version in self.packages),
        ]
        return ", ".join(filter(None, parts))


def fingerprint(facts: Facts, device: torch.device, strategies: Mapping[str, AttentionStrategy]) -> Fingerprint:
    """The fingerprint of one device here, with the packages that these strategies take their kernels from."""
    found = facts.device(device)
    on_cpu = device.type == "cpu"
    return Fingerprint(
        device=_cpu_named(found.name) if on_cpu else found.name,
        architecture=_cpu_architecture() if on_cpu else found.architecture,
        driver=_driver(device.type),
        torch=facts.torch_version,
        runtime=(torch.version.cuda or torch.version.hip or "") if device.type == "cuda" else "",
        triton=next(filter(None, (facts.package(name, "triton") for name in _TRITONS)), ""),
        threads=torch.get_num_threads() if on_cpu else 0,
        system=facts.system,
        packages=tuple(sorted(_packages(facts, strategies.values()).items())),
    )


def _packages(facts: Facts, strategies: Iterable[AttentionStrategy]) -> dict[str, str]:
    found = {"heedful": facts.package("heedful", "heedful") or ""}
    for source in (source for one in strategies for source in one.sources if isinstance(source, Package)):
        version = facts.package(source.distribution, source.module)
        if version is not None:  # several strategies may use one package, each another module of it
            found[str(source)] = max(version, found.get(str(source), ""))
    return found


def _cpu_named(known: str) -> str:
    """The CPU's name: the facts', unless that is only the name of its instruction set."""
    vague = {"", "cpu", platform.machine(), platform.processor()}
    return (_cpu_in(_CPU) if known in vague else "") or known


@functools.lru_cache(maxsize=8)
def _cpu_in(path: Path) -> str:
    """What ``/proc/cpuinfo`` calls the first CPU; ARM's have only numbers."""
    lines = _text(path).partition("\n\n")[0].splitlines()
    values = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    numbers = (values.get(name, "") for name in ("CPU implementer", "CPU part"))
    return values.get("model name") or " ".join(filter(None, numbers))


def _cpu_architecture() -> str:
    """With the instructions that torch's own kernels use: ``x86_64 AVX512``."""
    used = torch.backends.cpu.get_cpu_capability()
    return platform.machine() if used == "DEFAULT" else f"{platform.machine()} {used}"


def _driver(device: str) -> str:
    if device == "mps":
        return platform.mac_ver()[0]  # it comes with the system
    if device != "cuda":
        return ""
    version = next(filter(None, (_text(Path(path)).strip() for path in _DRIVERS)), "")
    asked = getattr(torch._C, "_cuda_getDriverVersion", None)  # absent without CUDA
    return version or (str(asked()) if asked is not None else "")


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text("utf-8", errors="replace")
    return ""
