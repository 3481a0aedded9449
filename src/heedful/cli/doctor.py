"""``heedful doctor``: this machine, every backend on it, what is broken and why, and the command that it needs."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from heedful.cli.tables import table
from heedful.doctor import Report, examine
from heedful.doctor.apart import SECONDS, tried
from heedful.doctor.look import look
from heedful.doctor.report import Row

STYLES = {"usable": "green", "broken": "bold red", "too old": "yellow", "missing": "", "not for this device": "dim"}
_PICTURE_WIDTH = 110


def doctor(
    seconds: Annotated[
        float, typer.Option("--timeout", min=1.0, help="Seconds that the import of one package may take.")
    ] = SECONDS,
    picture: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Draw the page into this file, too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print what this machine has, which backends run on it, what is broken and why, and what to install.

    Every package with kernels is imported in a process of its own: one that raises, aborts or hangs is only reported.
    """
    with Console(stderr=True).status("importing packages with kernels, each in a process of its own …"):
        found = examine(looked=functools.partial(look, trial=functools.partial(tried, seconds=seconds)))
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        print_page(found, Console(highlight=False))
    if picture is not None:
        draw(found, picture)


def draw(found: Report, picture: Path) -> None:
    """The page as SVG. Raises BadParameter where the file cannot be written."""
    console = Console(record=True, width=_PICTURE_WIDTH, file=io.StringIO(), highlight=False, force_terminal=True)
    print_page(found, console)
    try:
        console.save_svg(str(picture), title="heedful doctor")
    except OSError as error:
        raise typer.BadParameter(f"{picture} cannot be written: {error}", param_hint="--picture") from error


def print_page(found: Report, console: Console) -> None:
    """The page, with colours where the console has any."""
    for heading, entries in found.sections().items():
        console.print(Text(f"\n{heading}", style="bold"))
        if heading == "Backends":
            console.print(_backends(found.lines(), console.width))
            continue
        console.print(_lines(entries))


def _lines(entries: list[tuple[str, str]]) -> Table:
    made = Table.grid(padding=(0, 2, 0, 0))
    made.add_column(no_wrap=True, style="cyan")
    made.add_column(overflow="fold")
    for label, text in entries:
        made.add_row(Text(label), Text(text))
    return made


def _backends(rows: list[Row], width: int) -> Table:
    styles = [STYLES[row.state] for row in rows]
    cells = [(row.name, row.state, row.text) for row in rows]
    return table(
        ("backend", "state", "what it is, why not, or what it would add"), cells, width, wraps=True, styles=styles
    )
