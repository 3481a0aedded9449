"""``heedful report``: what a run computed, by whom, how long it took, and what the guard found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from heedful.cli.tables import table
from heedful.measuring import spoken
from heedful.run_report import RunReport, RunRow

COLUMNS = ("calls", "time", "a call", "backend", "guard", "layer", "problem")


def report(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="What report.save(), or trace --report, wrote.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the report of a run: for each kind of call its layers, backend, rewrites, share of time and checks.

    Exits with 1 where the guard found a wrong answer.
    """
    found = RunReport.load(path)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        print_report(found, Console(highlight=False))
    if any(row.guard.startswith("WRONG") for row in found):
        raise typer.Exit(1)


def print_report(found: RunReport, console: Console) -> None:
    """A line for each row, those that took most time first."""
    styles = ["bold red" if row.guard.startswith("WRONG") else "" for row in found]
    if found.rows:
        console.print(table(COLUMNS, [_cells(row) for row in found], console.width, wraps=True, styles=styles))
    console.print(Text(f"{found.calls} calls of {len(found)} kinds"))


def _cells(row: RunRow) -> tuple[str, ...]:
    timed = bool(row.seconds)
    return (
        str(row.calls),
        f"{row.share:.0%}" if timed else "",
        spoken(row.seconds / row.calls) if timed else "",
        "\n".join([row.backend, *(f"  {name}" for name in row.lowerings)]),
        row.guard,
        row.layer,
        row.problem,
    )
