"""``heedful list``: every backend, whether this machine can run it, and why not."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import heedful


def list_(
    device: Annotated[
        str | None, typer.Option(help="A device type of torch, such as cpu or cuda. The GPU if there is one.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print every backend: what it is, or the reason why it cannot run here."""
    backends = heedful.list_backends(device)
    if as_json:
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
        print(json.dumps({"problem": backends.problem.to_dict(), "backends": rows}, indent=2))
        return
    table = Table(title=f"backends, asked about {backends.problem}", title_justify="left")
    for column in ("backend", "here", "exactness", "what it is, or why not"):
        table.add_column(column)
    for row in backends:
        reason = "; ".join(map(str, row.refusals))
        table.add_row(row.name, "yes" if row.available else "no", row.exactness, reason or row.description)
    Console().print(table)
