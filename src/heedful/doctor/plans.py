"""What `heedful install` would do: steps of pip as values, written out as the commands that a user could type."""

from __future__ import annotations

import re
import shlex
import subprocess
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from heedful.doctor.environment import Environment

PINS = "{pins}"  # where the file of pins goes
_PASSWORD = re.compile(r"(?<=://)[^/?#\s]*@")
Outcome = Literal["nothing", "install", "by hand", "impossible"]


@dataclass(frozen=True)
class Step:
    """One call of ``python -m <arguments>``, with variables set for it alone."""

    arguments: tuple[str, ...]
    variables: tuple[tuple[str, str], ...] = ()

    def argv(self, executable: str, pins: str) -> list[str]:
        """What to run; ``pins`` is the path of the file of pins."""
        return [executable, "-m", *(pins if word == PINS else word for word in self.arguments)]

    def command(self, environment: Environment, pins: str) -> str:
        """The same as a line for the shell of that system, to be shown: without the passwords of its addresses."""
        argv = [_PASSWORD.sub("***@", word) for word in self.argv(environment.executable, pins)]
        if environment.system == "Windows":
            line = subprocess.list2cmdline(argv)
            line = line if line.startswith('"') else f'"{argv[0]}"{line[len(argv[0]) :]}'
            return "".join(f'set "{name}={value}" && ' for name, value in self.variables) + line
        return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in self.variables), shlex.join(argv)])


def pip(*arguments: str, alone: bool = True, variables: tuple[tuple[str, str], ...] = ()) -> Step:
    """``pip install`` that never asks and never replaces what is there; ``alone`` leaves dependencies out."""
    words = ("pip", "install", "--no-input", *(("--no-deps",) if alone else ()), "-c", PINS)
    return Step((*words, *arguments), variables)


@dataclass(frozen=True)
class Decision:
    """The answer to `heedful install <backend>` for one environment.

    ``rule``: the row of the table that gave it. ``use``: the backend to name afterwards. ``reason``: sentences.
    ``distribution``: what the steps install, with ``version`` "" where the newest is taken. ``urls`` are asked for
    before anything is changed. ``passed_over``: better ways, and why they are closed. ``notes``: what else to know.
    """

    backend: str
    rule: str
    outcome: Outcome
    use: str
    reason: str
    steps: tuple[Step, ...] = ()
    distribution: str = ""
    version: str = ""
    urls: tuple[str, ...] = ()
    passed_over: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def commands(self, environment: Environment, pins: str) -> list[str]:
        """Its steps as shell lines."""
        return [step.command(environment, pins) for step in self.steps]

    def after(self, passed_over: tuple[str, ...]) -> Decision:
        """The same, after other ways were found closed."""
        return replace(self, passed_over=(*passed_over, *self.passed_over))

    def to_dict(self, environment: Environment, pins: str) -> dict[str, Any]:
        """Plain JSON data."""
        return {**asdict(self), "steps": self.commands(environment, pins)}
