"""``heedful list``: every backend, whether this machine can run it, and why not, a line each."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from heedful.cli.machines import HELP, Machine, machine
from heedful.cli.tables import table
from heedful.dispatch import AttentionDispatcher
from heedful.errors import InvalidArgument
from heedful.listing import BackendRow, BackendTable
from heedful.refusal import Refusal

# The most decisive first: on the wrong device it does not matter which packages are there.
_DECISIVE = ("device", "architecture", "compute capability", "package", "folder", "download", "import", "probe")


def list_(
    device: Annotated[str | None, typer.Option(help=f"{HELP} This one by default, its GPU if it has one.")] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Every reason with its remedy, and all other names.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print every backend: what it is, or the reason why it cannot run here."""
    place = machine(device)
    try:
        backends = AttentionDispatcher(facts=place.facts).list_backends(place.device.type)
    except InvalidArgument as error:
        remedy = f"`heedful explain --device {device}` takes it"
        raise typer.BadParameter(f"{error}; {remedy}", param_hint="--device") from error
    if as_json:
        print(json.dumps(_data(backends, place), indent=2))
        return
    console = Console(highlight=False)
    title = f"{place.device.architecture or place.device.type}"
    title += ", packages taken as installed" if place.supposed else ", this machine"
    problem = str(backends.problem).partition(" on ")[0]
    console.print(Text(f"{title}: {problem}", style="italic"), no_wrap=True, overflow="ellipsis")
    if verbose:
        for row in backends:
            _print_wholly(row, console)
    else:
        console.print(_lines(backends, place, console.width))


def _lines(backends: BackendTable, place: Machine, width: int) -> Table:
    """A line a backend, however narrow the screen."""
    rows = [(row.name, "yes" if row.available else "no", row.exactness, _in_short(row)) for row in backends]
    styles = ["" if row.available else "dim" for row in backends]
    columns = ("backend", "there" if place.supposed else "here", "exactness", "what it is, or why not")
    return table(columns, rows, width, styles=styles)


def _in_short(row: BackendRow) -> str:
    """What it is, or the decisive reason, in about 30 characters: the room that 80 columns leave."""
    if row.available:
        return row.description
    refusal = min(row.refusals, key=_rank)
    observed, required = refusal.observed, refusal.required.replace("at least ", "≥ ").replace("at most ", "≤ ")
    if refusal.field in {"package", "folder"}:
        absent = observed.endswith((" not installed", " missing"))
        needs = required.removeprefix(f"{observed.partition(' ')[0]} ").removesuffix(" or newer")
        text = observed if absent else f"{observed}, needs {needs}"
    elif refusal.field == "download":
        text = f"download {observed}"
    elif refusal.field == "architecture":
        text = f"{observed}, takes {required}"
    elif refusal.field == "compute capability":
        text = f"capability {observed}, takes {required}"
    elif refusal.field in {"import", "probe"}:
        text = observed
    else:
        text = f"{refusal.field} is {observed}, it takes {required}"
    return " ".join(text.split())


def _rank(refusal: Refusal) -> int:
    return _DECISIVE.index(refusal.field) if refusal.field in _DECISIVE else len(_DECISIVE)


def _print_wholly(row: BackendRow, console: Console) -> None:
    state = "yes" if row.available else "no"
    console.print()
    console.print(Text.assemble((row.name, "bold"), f"  {state}, {row.exactness}"))
    lines = [row.description, *(f"also called {', '.join(row.aliases)}" for _ in row.aliases[:1])]
    for line in (*lines, *(f"- {refusal}" for refusal in row.refusals)):
        console.print(Text(f"  {line}"), soft_wrap=True)


def _data(backends: BackendTable, place: Machine) -> dict[str, Any]:
    rows = [
        {
            "name": row.name,
            "aliases": list(row.aliases),
            "exactness": row.exactness,
            "available": row.available,
            "description": row.description,
            "reasons": [str(refusal) for refusal in row.refusals],
        }
        for row in backends
    ]
    return {"machine": str(place), "supposed": place.supposed, "problem": backends.problem.to_dict(), "backends": rows}
