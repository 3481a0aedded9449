"""Looking at this machine: the one place where the doctor reads files, environment, programs and the network.

What is not there is "", never an error: a doctor comes when things are broken. Packages with kernels are imported in
processes of their own (see ``apart``).
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import torch

from heedful import facts as machine
from heedful.doctor.apart import Job, tried
from heedful.doctor.decision import Strategies, refusals_of
from heedful.doctor.environment import Environment, Found, Layout, canonical
from heedful.doctor.ways import LOOKED_FOR
from heedful.facts import DeviceFacts, Facts
from heedful.fingerprint import fingerprint
from heedful.sources import Package

BESIDE = (("triton-windows", "triton"), ("kernels", "kernels"))  # what others' kernels need
_GIB = 2**30
_CGROUP = Path("/sys/fs/cgroup")
Trial = Callable[[Iterable[Job]], tuple[Found, ...]]


def look(
    strategies: Strategies,
    *,
    facts: Facts | None = None,
    environ: Mapping[str, str] | None = None,
    trial: Trial = tried,
) -> Environment:
    """This machine as a value; ``trial`` is what imports and tries the packages."""
    environ = os.environ if environ is None else environ
    facts = machine.probe() if facts is None else facts
    gpus = tuple(one for name, one in facts.devices.items() if name != "cpu")
    device = gpus[0].type if gpus else "cuda" if torch.version.cuda or torch.version.hip else "cpu"
    home = _cuda_home(environ)
    index = _index(environ)
    found = (*trial(jobs(facts, strategies, gpus)), *_tools(facts))
    return Environment(
        executable=sys.executable,
        layout=_layout(),
        system=platform.system(),
        machine=platform.machine(),
        libc=_libc(),
        python=platform.python_version(),
        python_tag=_python_tag(),
        torch=facts.torch_version,
        cuda=torch.version.cuda or "",
        hip=torch.version.hip or "",
        cxx11_abi=torch.compiled_with_cxx11_abi(),
        device=device,
        gpus=gpus,
        processor=fingerprint(facts, torch.device("cpu"), {}).device,
        driver=_driver(),
        nvcc=_nvcc(home),
        cuda_home=home,
        compiler=_compiler(),
        headers=Path(sysconfig.get_path("include"), "Python.h").is_file(),
        memory_gib=round(_free_bytes() / _GIB, 1),
        cores=_cores(),
        pip=facts.package("pip", "pip") or "",
        writable=_writable(Path(sysconfig.get_path("purelib"))),
        managed=_managed(),
        online=_reachable(index),
        index=_host(index, {})[0] or "the package index",
        packages=found,
    )


def jobs(facts: Facts, strategies: Strategies, gpus: tuple[DeviceFacts, ...]) -> list[Job]:
    """One for each installed package that strategies take kernels from, with those that this machine's GPU can run."""
    by_package: dict[str, tuple[Package, list[str]]] = {}
    for name, strategy in strategies.items():
        for source in (one for one in strategy.sources if isinstance(one, Package)):
            takes = any(not refusals_of(strategy, gpu) for gpu in gpus)
            place = by_package.setdefault(source.distribution or source.module, (source, []))
            place[1].extend([name] * takes)
    listed = {canonical(one.name): one.version for one in importlib.metadata.distributions() if one.name}
    made = []
    for distribution, (source, names) in by_package.items():
        version = facts.package(source.distribution, source.module)
        if version is None:  # half an install: listed, and its module is not there
            version = listed.get(canonical(distribution))
        if version is not None and (names or canonical(distribution) != "torch"):  # torch itself is imported already
            device = f"{gpus[0].type}:0" if names else "cpu"
            made.append(Job(distribution, version, source.module, _known(facts, strategies, names), device))
    beside = ((name, facts.package(name, module), module) for name, module in BESIDE)
    return [*made, *(Job(name, version or "", module) for name, version, module in beside if canonical(name) in listed)]


def _known(facts: Facts, strategies: Strategies, names: list[str]) -> tuple[str, ...]:
    """Those whose package is new enough to be tried: what an old one lacks is told by its version."""
    return tuple(
        name for name in names if any(source.lack(facts, False) is None for source in strategies[name].sources)
    )


def _tools(facts: Facts) -> tuple[Found, ...]:
    versions = ((name, facts.package(name, name)) for name in LOOKED_FOR)
    return tuple(Found(name, version) for name, version in versions if version is not None)


def _layout() -> Layout:
    if list(Path(sys.executable).parent.glob("python*._pth")):
        return "embedded"
    if sys.prefix != sys.base_prefix:
        return "virtual environment"
    return "conda" if Path(sys.prefix, "conda-meta").is_dir() else "system"


def _libc() -> str:
    if platform.system() != "Linux":
        return ""
    name, version = platform.libc_ver()
    if name:
        return f"{name} {version}"
    return "musl" if list(Path("/lib").glob("ld-musl-*")) else ""


def _python_tag() -> str:
    free = "t" if sysconfig.get_config_var("Py_GIL_DISABLED") else ""
    return f"cp{sys.version_info.major}{sys.version_info.minor}{free}"


def _managed() -> bool:
    return sys.prefix == sys.base_prefix and Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED").is_file()


def _writable(folder: Path) -> bool:
    """Tried, for Windows' permissions are not what ``os.access`` says."""
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=folder):
        return True
    return False


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _free_bytes() -> int:
    """Memory that a build could take: what the system has free, or what a container may still use."""
    free = _system_free_bytes()
    limit, used = (_text(_CGROUP / name) for name in ("memory.max", "memory.current"))
    if limit.isdigit() and used.isdigit():
        free = min(free, max(0, int(limit) - int(used)))
    return free


def _system_free_bytes() -> int:
    if sys.platform == "win32":
        return _windows_free_bytes()
    found = re.search(r"MemAvailable:\s+(\d+) kB", _text(Path("/proc/meminfo")))
    if found:
        return int(found[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _windows_free_bytes() -> int:
    import ctypes

    status = (ctypes.c_ulonglong * 8)()
    ctypes.memset(status, 0, ctypes.sizeof(status))
    ctypes.cast(status, ctypes.POINTER(ctypes.c_ulong))[0] = ctypes.sizeof(status)
    ctypes.windll.kernel32.GlobalMemoryStatusEx(status)  # type: ignore[attr-defined,unused-ignore]
    return int(status[2])  # length and load, then total, then what is available


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text("utf-8", errors="replace").strip()
    return ""


def variables_here() -> dict[str, str]:
    """The environment's variables, for a process that gets some more."""
    return dict(os.environ)


def said(*command: str) -> str:
    """What a program prints; "" where it is not there, fails or does not answer."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=10, check=True)
        return done.stdout.decode("utf-8", errors="replace").strip()
    return ""


def _driver() -> str:
    told = (
        said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if shutil.which("nvidia-smi") else ""
    )
    return (
        told.partition("\n")[0].strip()
        or _text(Path("/sys/module/nvidia/version"))
        or _text(Path("/sys/module/amdgpu/version"))
    )


def _cuda_home(environ: Mapping[str, str]) -> str:
    """The CUDA toolkit's folder: where the environment says, where nvcc is, or where it usually is."""
    nvcc = shutil.which("nvcc")
    places = (
        environ.get("CUDA_HOME", ""),
        environ.get("CUDA_PATH", ""),
        str(Path(nvcc).resolve().parent.parent) if nvcc else "",
    )
    name = "nvcc.exe" if sys.platform == "win32" else "nvcc"
    return next((place for place in (*places, "/usr/local/cuda") if place and Path(place, "bin", name).is_file()), "")


def _nvcc(home: str) -> str:
    found = re.search(r"release (\d+\.\d+)", said(str(Path(home, "bin", "nvcc")), "--version")) if home else None
    return found[1] if found else ""


def _compiler() -> str:
    for name in ("cl",) if sys.platform == "win32" else ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return f"{name} {'' if name == 'cl' else said(path, '-dumpversion')}".strip()
    return ""


def _index(environ: Mapping[str, str]) -> str:
    """The address that pip asks: a mirror, where the environment or pip's own configuration names one."""
    if address := environ.get("PIP_INDEX_URL", ""):
        return address
    lines = said(sys.executable, "-m", "pip", "config", "list").splitlines()
    configured = dict(line.partition("=")[::2] for line in lines)
    found = (configured.get(f"{section}.index-url", "").strip("'\"") for section in ("install", "global"))
    return next(filter(None, found), "https://pypi.org/simple")


def _host(address: str, ports: Mapping[str, int]) -> tuple[str, int]:
    """Host and port of an address; no host where it is malformed."""
    with contextlib.suppress(ValueError):
        parts = urlsplit(address)
        return parts.hostname or "", parts.port or ports.get(parts.scheme, 443)
    return "", 0


def _reachable(address: str) -> bool:
    """Whether the index, or the proxy before it, takes a connection."""
    place = _host(address, {"http": 80})
    proxies = urllib.request.getproxies()
    proxy = _host(proxies.get("https") or proxies.get("http") or "", {"http": 80})
    if proxy[0] and not urllib.request.proxy_bypass(place[0]):
        place = proxy
    with contextlib.suppress(OSError, ValueError), socket.create_connection(place, timeout=2.0):
        return True
    return False
