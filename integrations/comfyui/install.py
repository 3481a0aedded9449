"""Installs heedful for this Python, and never touches torch. ComfyUI-Manager runs it; so can you:

    python install.py                      heedful from the checkout that this folder is part of
    python install.py ../heedful           from a folder or a wheel
    python install.py heedful==0.1.0       from the package index, pinned

``HEEDFUL_SOURCE`` names the same. It asks nothing, reads no input and ends by itself. heedful is installed with
--no-deps, and of what it needs only what is missing, with the installed torch pinned. Exit code 0: heedful can be
imported, and torch is as it was. 1: not so; the text says why and what to do. The nodes load either way.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

HERE = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 6)
NEEDS = {"typer": "typer>=0.12", "rich": "rich>=13.8", "platformdirs": "platformdirs>=4.0",
         "filelock": "filelock>=3.12", "jinja2": "jinja2>=3.1"}  # fmt: skip
# The requirement once releases of heedful are on the package index. Empty until then: nothing is installed under a
# name there that is not known to be ours.
RELEASE = ""
SECONDS = 900
Run = Callable[[Sequence[str]], "Ran"]


@dataclass(frozen=True)
class Ran:
    """What a command ended with."""

    code: int
    text: str


@dataclass(frozen=True)
class Python:
    """What this Python has: versions by distribution, None where it is not there. ``installer``: pip, or uv, or ()."""

    executable: str
    versions: Mapping[str, str | None]
    installer: tuple[str, ...]


class Failed(Exception):
    """What went wrong, and what to do, in plain words."""


def main(
    arguments: Sequence[str] | None = None,
    environ: Mapping[str, str] | None = None,
    look: Callable[[], Python] | None = None,
    run: Run | None = None,
    checkout: Path | None = None,
) -> int:
    """Install what is missing and say what is so; 0 or 1. What it knows of the machine can be given, for tests."""
    arguments = sys.argv[1:] if arguments is None else arguments
    environ, look, run = (os.environ if environ is None else environ), look or this_python, run or ran
    try:
        text = install(wanted(arguments, environ, checkout or HERE.parent.parent), look, run)
    except Failed as failure:
        say(f"heedful is not installed. {failure}")
        say("ComfyUI works as before; heedful's nodes say this again when they are used.")
        return 1
    say(text)
    return 0


def install(source: str, look: Callable[[], Python], run: Run) -> str:
    """Installs and checks; returns what to tell. ``source`` is "" where nobody named one. Raises Failed."""
    before = look()
    check_torch(before)
    missing = [need for name, need in NEEDS.items() if before.versions[name] is None]
    if before.versions["heedful"] is not None and not missing:
        version = works(before, run)
        return f"heedful {version} is there already, beside torch {before.versions['torch']}. Nothing was changed."
    if not before.installer:
        raise Failed(f"This Python has neither pip nor uv: {before.executable}. Install pip for it, then run me again.")
    if before.versions["heedful"] is None:
        if not source:
            raise Failed(
                f'Name where it is: clone its repository and run: "{before.executable}" "{HERE / "install.py"}" '
                "<folder of the clone>"
            )
        command([*before.installer, "--no-deps", source], run, source)
    if missing:
        pinned(before, missing, run)
    return finished(before, look(), run)


def wanted(arguments: Sequence[str], environ: Mapping[str, str], checkout: Path) -> str:
    """Where heedful comes from: what was named, the checkout around this folder, or a release. Raises Failed."""
    if len(arguments) > 1:
        raise Failed(f"Give one folder, wheel or requirement, not {len(arguments)}: {' '.join(arguments)}")
    named = arguments[0] if arguments else environ.get("HEEDFUL_SOURCE", "").strip()
    if named:
        if Path(named).exists():
            return str(Path(named).resolve())
        if re.fullmatch(r"heedful\s*==\s*[\w.+!-]+", named):
            return named
        raise Failed(f"{named!r} is neither a folder nor a wheel here, nor a pinned version such as heedful==0.1.0.")
    project = checkout / "pyproject.toml"
    if project.is_file() and re.search(r'^name = "heedful"$', project.read_text(encoding="utf-8"), re.MULTILINE):
        return str(checkout)
    return RELEASE


def check_torch(python: Python) -> None:
    """Raises Failed where torch is missing or too old: replacing it is the user's to decide."""
    have = python.versions["torch"]
    oldest = ".".join(map(str, OLDEST_TORCH))
    if have is None:
        raise Failed(f"This Python has no torch: {python.executable}. Run me with the Python that runs ComfyUI.")
    numbers = tuple(int(part) for part in re.findall(r"\d+", have)[:2])
    if have and numbers < OLDEST_TORCH:
        raise Failed(f"It needs torch {oldest} or newer, and ComfyUI has {have}. Update ComfyUI, then run me again.")


def pinned(python: Python, missing: Sequence[str], run: Run) -> None:
    """Install small packages beside the torch that is there."""
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder) / "torch.txt"
        have = python.versions["torch"]
        pins.write_text(f"torch=={have}\n" if have else "", encoding="utf-8")
        command([*python.installer, "-c", str(pins), *missing], run, ", ".join(missing))


def command(words: Sequence[str], run: Run, what: str) -> None:
    """Run an installer. Raises Failed with its last words."""
    say(f"installing {what} ...")
    done = run(words)
    if done.code:
        tail = "\n  ".join(line for line in done.text.strip().splitlines()[-8:])
        shown = " ".join(f'"{word}"' if re.search(r"[\s<>]", word) else word for word in words)
        raise Failed(
            f"The command\n  {shown}\nended with code {done.code}:\n  {tail}\n"
            "Without a network, copy heedful and its wheels here and name the folder; else run the command again."
        )


def finished(before: Python, after: Python, run: Run) -> str:
    """What to tell after installing. Raises Failed where torch changed or heedful cannot be imported."""
    if before.versions["torch"] != after.versions["torch"]:
        was, now = before.versions["torch"], after.versions["torch"]
        raise Failed(f"torch was {was} and is {now} now. Put it back with: pip install torch=={was}")
    version = works(after, run)
    return f"heedful {version} is installed, beside torch {after.versions['torch']}, unchanged. Restart ComfyUI."


def works(python: Python, run: Run) -> str:
    """heedful's version, by importing it in a process of its own. Raises Failed with what the import said."""
    done = run([python.executable, "-c", "import heedful; print(heedful.__version__)"])
    if done.code:
        last = (done.text.strip().splitlines() or ["no text"])[-1]
        raise Failed(f"It is there and cannot be imported: {last}. Reinstall it with --no-deps.")
    return done.text.strip().splitlines()[-1]


def this_python() -> Python:
    """The Python that runs this, looked at without importing anything of it."""
    importlib.invalidate_caches()
    versions = {name: version_of(name) for name in ("torch", "heedful", *NEEDS)}
    return Python(sys.executable, versions, installer_of(sys.executable))


def version_of(name: str) -> str | None:
    """A package's version, "" where it is there without one, None where it is not there."""
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def installer_of(executable: str) -> tuple[str, ...]:
    """The words that install into this Python: pip's, or uv's where it has no pip."""
    if PathFinder.find_spec("pip") is not None:  # setuptools' own finder would take pip for being run
        return (executable, "-m", "pip", "install", "--no-input", "--disable-pip-version-check")
    found = shutil.which("uv")
    return (found, "pip", "install", "--python", executable) if found else ()


def ran(words: Sequence[str]) -> Ran:
    """Run a command with stdin closed, and keep what it says."""
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=SECONDS,
            check=False,
            env={**os.environ, "PIP_NO_INPUT": "1", "PYTHONIOENCODING": "utf-8"},
        )
    except subprocess.TimeoutExpired:
        return Ran(1, f"it did not end within {SECONDS} seconds")
    except OSError as error:
        return Ran(1, str(error))
    return Ran(done.returncode, done.stdout.decode("utf-8", errors="replace"))


def say(text: str) -> None:
    """Print at once: ComfyUI-Manager shows lines as they come."""
    encoding = sys.stdout.encoding or "utf-8"
    print(f"[heedful] {text}".encode(encoding, "replace").decode(encoding), flush=True)  # a console may know ASCII only


if __name__ == "__main__":
    sys.exit(main())
