"""What ``kernels.py`` prints: every call with its backends, what was not timed and why, and the targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kernel_targets import targets
from measuring import Figures
from rich.table import Table

STYLES = {"wrong": "bold red", "failed": "red"}
CAPTION = (
    "Medians of the rounds ± half the quartile gap; only right answers have a time. Roofline, matmul: shares of what "
    "the device could do, and of a plain matmul in the same rounds. Notes: rewrites, or what is wrong."
)
OUTCOMES = {"reached": "green", "missed": "red", "not measured": "dim"}


def tables(record: Mapping[str, Any]) -> list[Table]:
    """A table for each call; what refused or was skipped in one of reasons; and the targets of this device."""
    drawn = [*map(_call, record["calls"]), _reasons(record)]
    return [*drawn, _targets(record)] if record["targets"] else drawn


def _call(call: Mapping[str, Any]) -> Table:
    shape = call["shape"]
    letters = {"B": "batch", "H": "heads", "N": "kv_heads", "Q": "query_length", "K": "key_length", "D": "head_dim"}
    sizes = " ".join(f"{letter} {shape[name]}" for letter, name in letters.items())
    matmul = call.get("matmul_tflops")
    more = f"; matmul {matmul:.3g} TFLOP/s" if matmul else ""
    title = f"{call['name']} ({sizes}, {call['dtype']}{more})"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("backend", "a call", "TFLOP/s", "roofline", "matmul"):
        table.add_column(column, justify="left" if column == "backend" else "right", no_wrap=True)
    table.add_column("note", overflow="fold")
    for row in call["rows"]:
        if row["median_us"] or row["status"] in STYLES:
            table.add_row(*_cells(row), style=STYLES.get(row["status"], "green" if row["ours"] else ""))
    return table


def _cells(row: Mapping[str, Any]) -> list[str]:
    exactness = "" if row["exactness"] == "exact" else f" ({row['exactness']})"
    name = f"{row['backend']}{exactness}"
    if row["median_us"] is None:
        return [name, row["status"].upper(), "", "", "", row["reason"]]
    time = str(Figures(row["median_us"], row["spread_us"]))
    shares = (share(row["share_of_roofline"]), share(row["share_of_matmul"]))
    return [name, time, f"{row['tflops']:.3g}", *shares, ", ".join(row["lowerings"])]


def share(part: float | None) -> str:
    """In percent; nothing where it is not known."""
    return "" if part is None else f"{part:.0%}"


def _reasons(record: Mapping[str, Any]) -> Table:
    """Why backends have no time, each reason once."""
    found: dict[tuple[str, str, str], list[str]] = {}
    absent = [((name, "not here", reason), ["-"]) for name, reason in record["absent"].items()]
    for call in record["calls"]:
        for row in call["rows"]:
            if row["median_us"] is None and row["status"] not in STYLES:
                found.setdefault((row["backend"], row["status"], row["reason"]), []).append(call["name"])
    left = f"; {len(record['left'])} calls left" if record["left"] else ""
    table = Table(title="not timed", caption=f"{CAPTION} Ended: {record['ended']}{left}.")
    for column in ("backend", "", "calls", "reason"):
        table.add_column(column, overflow="fold")
    for (backend, status, reason), names in sorted([*found.items(), *absent]):
        table.add_row(backend, status, "" if status == "not here" else str(len(names)), reason)
    return table


def _targets(record: Mapping[str, Any]) -> Table:
    table = Table(title=f"targets on {targets()['device']}")
    for column in ("step", "call", "wanted", "measured", "", "by"):
        table.add_column(column, justify="right" if column in ("wanted", "measured") else "left")
    for one in record["targets"]:
        wanted = f"≥ {one['wanted']:g} {one['unit']}" if one["unit"] == "TFLOP/s" else "> 1 times"
        found = "" if one["found"] is None else f"{one['found']:.3g}"
        table.add_row(
            one["step"], one["cell"], wanted, found, one["outcome"], one["by"], style=OUTCOMES[one["outcome"]]
        )
    return table
