"""``heedful replay``: the call of a bug report, run again here, by the backend that failed and by others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from heedful.bundle import Bundle, read_bundle
from heedful.cli.tables import table
from heedful.errors import InvalidArgument
from heedful.replaying import Replay, run_again

_STATUS = {"right": 0, "wrong": 1, "absent": 3}


def replay(
    file: Annotated[Path, typer.Argument(help="A bundle that heedful wrote.", metavar="FILE")],
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Beside the recorded one; may be repeated. native and reference by default."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run a recorded call again, and hold every answer to the formula.

    Exit status: 0 where the recorded backend is right here, 1 where it is wrong again, 3 where it takes no such call
    here; 2 for a file that is no bundle.
    """
    try:
        bundle = read_bundle(file)
    except InvalidArgument as error:
        raise typer.BadParameter(str(error), param_hint="FILE") from error
    names = dict.fromkeys([bundle.strategy, *(backend or ["native", "reference"])])
    replays = [run_again(bundle, name) for name in names]
    if as_json:
        print(json.dumps(_data(bundle, replays), indent=2))
    else:
        _print(bundle, replays)
    raise typer.Exit(_STATUS[_outcome(replays[0])])


def _outcome(one: Replay) -> str:
    return "absent" if one.refused else "right" if one.right else "wrong"


def _print(bundle: Bundle, replays: list[Replay]) -> None:
    console = Console(highlight=False)
    mask = "" if bundle.mask is None else f", attn_mask {type(bundle.mask).__name__}"
    words = ", ".join(f"{name}={value!r}" for name, value in bundle.call.items())
    recorded = [
        f"{bundle.path}",
        f"call      {bundle.problem}",
        f"given     {words or 'nothing beside the tensors'}{mask}",
        f"recorded  {bundle.strategy}{_after(bundle.steps)}, version {bundle.version}, {bundle.time}",
        f"machine   {', '.join(f'{name} {value}' for name, value in bundle.machine.items())}",
        f"fault     {bundle.fault}",
        "",
    ]
    for line in recorded:
        console.print(Text(line), soft_wrap=True)
    rows = [_row(one) for one in replays]
    styles = ["bold red" if one.wrong else "dim" if one.refused else "" for one in replays]
    console.print(
        table(("backend", "answer", "error", "allowed", "what"), rows, console.width, wraps=True, styles=styles)
    )
    first = replays[0]
    if not first.refused and first.steps != bundle.steps:
        console.print(Text(f"it took other rewrites here: {', '.join(first.steps) or 'none'}"), soft_wrap=True)
    closing = {
        "right": f"{first.backend} is right here",
        "wrong": f"the fault of {first.backend} is here, too",
        "absent": f"{first.backend} does not take this call here, so nothing is known of its fault",
    }
    console.print(Text(closing[_outcome(first)]), soft_wrap=True)


def _row(one: Replay) -> tuple[str, ...]:
    if one.verdict is None:
        return (one.backend, "refused" if one.refused else "raised", "", "", one.refused or one.raised)
    verdict = one.verdict
    what = verdict.fault or f"{len(verdict.rows)} queries{_after(one.steps)}"
    answer = "right" if verdict.right else "WRONG"
    return (one.backend, answer, f"{verdict.error:.2e}", f"{verdict.allowed:.2e}", what)


def _after(steps: tuple[str, ...]) -> str:
    return f" after {', '.join(steps)}" if steps else ""


def _data(bundle: Bundle, replays: list[Replay]) -> dict[str, Any]:
    recorded = {name: getattr(bundle, name) for name in ("strategy", "version", "steps", "fault", "machine", "time")}
    return {
        "file": str(bundle.path),
        "problem": bundle.problem.to_dict(),
        "call": dict(bundle.call),
        "recorded": recorded,
        "outcome": _outcome(replays[0]),
        "replays": [_data_of(one) for one in replays],
    }


def _data_of(one: Replay) -> dict[str, Any]:
    verdict = one.verdict
    numbers = (
        {"error": None, "allowed": None, "relative": None}
        if verdict is None
        else {
            name: number if number < float("inf") else None  # JSON has no infinity
            for name, number in (("error", verdict.error), ("allowed", verdict.allowed), ("relative", verdict.relative))
        }
    )
    return {
        "backend": one.backend,
        "answer": "refused" if one.refused else "raised" if one.raised else "right" if one.right else "wrong",
        "steps": list(one.steps),
        "rows": 0 if verdict is None else len(verdict.rows),
        **numbers,
        "fault": "" if verdict is None else verdict.fault,
        "refused": one.refused,
        "raised": one.raised,
    }
