"""``heedful install``: the right command for this machine, run without questions, tried, and undone if it fails."""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from heedful.doctor.decision import AUTO, check, decide, from_wheel
from heedful.doctor.environment import Environment
from heedful.doctor.install import carry_out, settled, write_pins
from heedful.doctor.look import look
from heedful.doctor.plans import Decision
from heedful.doctor.report import advised
from heedful.doctor.site import Site
from heedful.doctor.ways import NAMES
from heedful.errors import InvalidArgument
from heedful.factory import AttentionStrategyFactory
from heedful.policy import Policy, folder_of

_FAILS = ("by hand", "impossible")


def install(
    backend: Annotated[
        str, typer.Argument(help="A backend of `heedful list`; auto takes the best for this GPU.")
    ] = AUTO,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command; change and download nothing.")] = False,
    wheel: Annotated[
        str | None, typer.Option(metavar="FILE_OR_URL", help="This wheel, if its name fits this machine.")
    ] = None,
    way: Annotated[str, typer.Option(help=f"Only this way: {', '.join(NAMES)}.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; pip's lines go to standard error.")] = False,
) -> None:
    """Install a backend's package for this Python, torch and GPU. Never asks, never replaces torch.

    Afterwards the package is tried in a process of its own, and taken away again if it does not work. Exit status: 0
    where it works, or nothing is needed; 1 where it could not be installed; 2 for a wrong argument.
    """
    strategies = AttentionStrategyFactory.default().strategies()
    check(strategies, backend, way)
    with Console(stderr=True).status("looking at this machine …"):
        here = look(strategies)
    if wheel is not None:
        decision = from_wheel(here, strategies, backend, wheel)
    else:
        decision = decide(here, strategies, backend, way=way) if dry_run else settled(here, strategies, backend, way)
    if wheel is not None and decision.outcome == "install" and "://" not in wheel and not Path(wheel).is_file():
        raise InvalidArgument("wheel", repr(wheel), "there is no such file; give a wheel's file or address")
    pins = _pins(decision, here)
    told = {"decision": decision.to_dict(here, pins), "dry_run": dry_run}
    if not as_json:
        print("\n".join(f"{label:<10}{text}" for label, text in advised(decision, here, pins)))  # commands stay whole
    if decision.outcome != "install" or dry_run:
        if as_json:
            print(json.dumps({**told, "result": None}, indent=2))
        raise typer.Exit(decision.outcome in _FAILS)
    result = carry_out(decision, strategies, here, say=lambda line: print(line, file=sys.stderr, flush=True))
    print(json.dumps({**told, "result": result.to_dict()}, indent=2) if as_json else f"\n{result.text}")
    raise typer.Exit(not result.done)


def _pins(decision: Decision, here: Environment) -> str:
    """The path of the constraints that the printed command names: written, so that it can be pasted as it stands."""
    if decision.outcome != "install":
        return "pins.txt"
    folder = folder_of(Policy.from_environment().cache)
    assert folder is not None
    name = f"pins-{hashlib.sha256(here.executable.encode()).hexdigest()[:12]}.txt"  # each Python has its own
    versions = Site.of(here.executable).versions()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return write_pins(folder, versions, decision.distribution, name)
    except OSError:  # a home that cannot be written
        return write_pins(Path(tempfile.mkdtemp(prefix="heedful-")), versions, decision.distribution, name)
