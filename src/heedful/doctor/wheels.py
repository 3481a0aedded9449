"""Names of wheels: which official flash-attn wheel fits an environment, and why a given wheel does not.

The matrix is that of flash-attn's own release workflow (``.github/workflows/publish.yml``): at the tags v2.8.3 and
v2.8.3.post1 it has torch to 2.8, CUDA 12.9 and x86_64; on the main branch of August 2026 torch 2.6 to 2.10, CUDA 13
from torch 2.9 on, and arm. The newer part may not be published: it is asked for before it is installed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from heedful.doctor.environment import Environment, numbers

FLASH = "2.8.3"  # the release whose functions heedful knows
RELEASES = "https://github.com/Dao-AILab/flash-attention/releases/download"
_TORCHES = ((2, 6), (2, 10))
_PUBLISHED = (2, 8)  # the last torch in the matrix of the tag itself
_PYTHONS = ("cp310", "cp311", "cp312", "cp313")
_LIBC = (2, 35)  # they are built on Ubuntu 22.04
_NAME = re.compile(
    r"(?P<name>[^-]+)-(?P<version>[^-]+)(?:-\d[^-]*)?-(?P<python>[^-]+)-(?P<abi>[^-]+)-(?P<platform>[^-]+)\.whl"
)
_BUILT = (
    ("torch", re.compile(r"(?:torch|pt)\.?(\d+\.\d+|\d{2,3})")),
    ("CUDA", re.compile(r"cu(\d+)")),
    ("C++11 ABI", re.compile(r"cxx11abi(TRUE|FALSE)", re.IGNORECASE)),
)
_PLATFORMS = {"Linux": ("linux", "manylinux", "musllinux"), "Windows": ("win",), "Darwin": ("macosx",)}
_MACHINES = {"AMD64": "amd64", "arm64": "arm64", "ARM64": "arm64"}
# torch's own index: the xFormers release for each torch. From 0.0.34 on one build serves torch 2.10 and newer.
_XFORMERS = (
    ((2, 6), "0.0.29.post3"), ((2, 7, 0), "0.0.30"), ((2, 7, 1), "0.0.31.post1"), ((2, 8), "0.0.32.post2"),
    ((2, 9, 0), "0.0.33.post1"), ((2, 9, 1), "0.0.33.post2"),
)  # fmt: skip
_XFORMERS_NOW, _XFORMERS_FROM = "0.0.35", (2, 10)
# The Triton that torch's own wheels ask for, by their metadata on the package index.
_TRITON = {"2.6": "3.2", "2.7": "3.3", "2.8": "3.4", "2.9": "3.5", "2.10": "3.6", "2.11": "3.6", "2.13": "3.7"}
_TRITON_WINDOWS = {"2.6": "3.2", "2.7": "3.3", "2.8": "3.4", "2.9": "3.5", "2.10": "3.6"}


@dataclass(frozen=True)
class Wheel:
    """A file to install: its name, its address, and whether it is known to be there."""

    name: str
    url: str
    published: bool


def flash_wheel(environment: Environment) -> Wheel | str:
    """The official flash-attn wheel, or the sentence why there is none."""
    lack = _not_in_the_matrix(environment)
    if lack:
        return lack
    abi = "TRUE" if environment.cxx11_abi else "FALSE"
    cuda = environment.cuda.partition(".")[0]
    tags = f"cu{cuda}torch{environment.torch_minor}cxx11abi{abi}"
    python = environment.python_tag
    name = f"flash_attn-{FLASH}+{tags}-{python}-{python}-linux_{environment.machine}.whl"
    sure = environment.torch_release[:2] <= _PUBLISHED and cuda == "12" and environment.machine == "x86_64"
    return Wheel(name, f"{RELEASES}/v{FLASH}/{name.replace('+', '%2B')}", sure)


def _not_in_the_matrix(here: Environment) -> str:
    release, cuda = here.torch_release[:2], here.cuda.partition(".")[0]
    low, high = (".".join(map(str, bound)) for bound in _TORCHES)
    libc = numbers(here.libc) if here.libc.startswith("glibc") else _LIBC
    official = "the official flash-attn wheels"
    sentences = (
        (here.system != "Linux", f"{official} are for Linux, this is {here.system}"),
        (here.machine not in ("x86_64", "aarch64"), f"{official} are for x86_64 and aarch64, this is {here.machine}"),
        (here.free_threaded, f"{official} do not fit free-threaded Python ({here.python_tag})"),
        (here.python_tag not in _PYTHONS, f"{official} are for Python 3.10 to 3.13, not {here.python}"),
        (not _TORCHES[0] <= release <= _TORCHES[1], f"{official} are for torch {low} to {high}, not {here.torch}"),
        (cuda not in ("12", "13"), f"{official} are for CUDA 12 and 13, not {here.cuda or 'none'}"),
        (cuda == "13" and release < (2, 9), f"{official} for CUDA 13 begin with torch 2.9"),
        (release >= (2, 7) and not here.cxx11_abi, f"{official} have the C++11 ABI only, from torch 2.7 on"),
        (release == (2, 6) and here.machine == "aarch64", f"{official} for aarch64 begin with torch 2.7"),
        (here.libc.startswith("musl"), f"{official} need glibc, this system has musl"),
        (libc < _LIBC, f"{official} need glibc 2.35, this system has {here.libc}"),
    )
    return next((sentence for wrong, sentence in sentences if wrong), "")


def xformers_release(environment: Environment) -> str:
    """The xFormers that belongs to this torch; "" where none is known to."""
    release = environment.torch_release
    known = next((version for torch, version in _XFORMERS if release[: len(torch)] == torch), "")
    return known or (_XFORMERS_NOW if release >= _XFORMERS_FROM else "")


def triton(environment: Environment) -> str:
    """The Triton that fits this torch, as a requirement; "" where none is known."""
    if environment.system == "Windows":
        return triton_windows(environment)
    known = _TRITON.get(environment.torch_minor, "") if environment.system == "Linux" and not environment.hip else ""
    return f"triton=={known}.*" if known else ""


def triton_windows(environment: Environment) -> str:
    """The triton-windows that fits this torch, as a requirement; "" where none is known or needed."""
    if environment.system != "Windows":
        return ""
    known = _TRITON_WINDOWS.get(environment.torch_minor, "")
    return f"triton-windows=={known}.*" if known else ""


def community_name(environment: Environment, package: str, version: str) -> str:
    """How a community wheel for this environment is called, as far as their projects agree: with the exact CUDA."""
    cuda, python = environment.cuda.replace(".", ""), environment.python_tag
    platform = "win_amd64" if environment.system == "Windows" else f"linux_{environment.machine}"
    return f"{package}-{version}+cu{cuda}torch{environment.torch_minor}-{python}-{python}-{platform}.whl"


def mismatches(name: str, environment: Environment) -> tuple[str, ...]:
    """Why a wheel of this name does not fit, each reason a sentence; empty where it does, as far as its name tells."""
    found = _NAME.fullmatch(name.replace("%2B", "+"))
    if found is None:
        return (f"{name} is no wheel's name: <package>-<version>-<python>-<abi>-<platform>.whl",)
    pairs = (
        _wrong_python(found["python"], found["abi"], environment),
        _wrong_platform(found["platform"], environment),
        *_wrong_build(found["version"].partition("+")[2], environment),
    )
    return tuple(filter(None, pairs))


def _wrong_python(python: str, abi: str, here: Environment) -> str:
    tags = python.split(".")
    plain = here.python_tag.removesuffix("t")
    older = any(tag[:2] in ("cp", "py") and _minor(tag) <= _minor(plain) for tag in tags)
    stable = abi == "abi3" and older and not here.free_threaded
    pure = abi == "none" and older and any(tag.startswith("py") or tag == plain for tag in tags)
    exact = plain in tags and abi == here.python_tag
    return "" if stable or pure or exact else f"it is for Python {python} ({abi}), this one is {here.python_tag}"


def _minor(tag: str) -> int:
    digits = re.sub(r"\D", "", tag)
    return int(digits[1:] or 0)


def _wrong_platform(platform: str, here: Environment) -> str:
    machine = _MACHINES.get(here.machine, here.machine)
    for one in platform.split("."):
        system = one.startswith(_PLATFORMS.get(here.system, ("?",)))
        if one == "any" or (system and one.endswith((f"_{machine}", "universal2"))):
            return ""
    return f"it is for {platform}, this is {here.system} {here.machine}"


def _wrong_build(local: str, here: Environment) -> list[str]:
    """What the local part of the version says that it was built with."""
    found = []
    have = {"torch": here.torch_minor, "CUDA": here.cuda, "C++11 ABI": str(here.cxx11_abi).upper()}
    for what, pattern in _BUILT:
        match = pattern.search(local)
        if match is None:
            continue
        text = match[1].upper()
        if what == "torch" and "." not in text:
            text = f"{text[0]}.{text[1:]}"
        if what == "CUDA":
            wanted = text if len(text) < 3 else f"{text[:-1]}.{text[-1]}"
            fits = have[what].partition(".")[0] == text[:2]
        else:
            wanted, fits = text, have[what] == text
        if not fits:
            found.append(f"it was built for {what} {wanted}, this torch has {have[what] or 'none'}")
    return found
