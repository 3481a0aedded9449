"""The page of a verification: one HTML file that loads nothing, drawn from the JSON record alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BADGES = {"wrong": "WRONG", "crashed": "CRASHED", "hung": "HUNG", "invalid": "INVALID"}
SHADES = 4  # of a right cell, by how much of what is allowed was used


def page(record: Mapping[str, Any]) -> str:
    """The page of a run's record (``Run.record``, or what ``--json`` prints)."""
    from heedful.bench.page import environment, facts_of, shown

    columns = [column for column in record["backends"] if column["status"] != "absent"]
    machine = record["machine"]
    given = shown(record["bench"]) if record["bench"] else {"charts": [], "summary": {}}
    return (
        environment("heedful.verify")
        .get_template("verify.html.j2")
        .render(
            **{
                **given,
                "record": record,
                "machine": machine,
                "hardware": machine.get("gpu") or machine["cpu"],
                "facts": facts_of(machine),
                "columns": columns,
                "absent": [column for column in record["backends"] if column["status"] == "absent"],
                "rows": [(name, [cell_of(column, name) for column in columns]) for name in record["features"]],
                "settings": settings_text(record["settings"]),
                "faults": sum(len(column["faults"]) for column in columns),
                "flags": BADGES,
            }
        )
    )


def cell_of(column: Mapping[str, Any], feature: str) -> dict[str, Any]:
    """What stands in a cell: its kind, its text, what stands small below it, and the shade of a right one."""
    cell = column["cells"].get(feature)
    if cell is None:
        return {"kind": "none", "text": "", "small": "", "shade": 0}
    made = sum(cell.get(word, 0) for word in ("right", "refused", "wrong", "crashed", "hung"))
    limits = ", ".join(cell["limits"])
    kind = cell["outcome"]
    if kind in BADGES:
        return {"kind": "wrong", "text": BADGES[kind], "small": f"{cell[kind]} of {made}", "shade": 0}
    if kind == "refused":
        return {"kind": "refused", "text": f"refused: {limits}", "small": "", "shade": 0}
    refused = f", {cell['refused']} of {made} refused: {limits}" if cell.get("refused") else ""
    if cell["units"] is None:
        return {"kind": "right", "text": "right", "small": refused.removeprefix(", "), "shade": 0}
    shade = min(SHADES - 1, int(cell["units"] * SHADES))
    return {"kind": "right", "text": f"{cell['units']:.2f}", "small": f"{cell['error']:.0e}{refused}", "shade": shade}


def settings_text(settings: Mapping[str, Any]) -> str:
    """Which checks were made, in words."""
    words = {"quick": "a few checks of every feature", "usual": "every sample of the contract",
             "all": "every sample of the contract in every dtype"}  # fmt: skip
    told = [words[settings["size"]]]
    told += [f"in {', '.join(settings['dtypes'])}"] if settings["dtypes"] else []
    told += [f"only {', '.join(settings['only'])}"] if settings["only"] else []
    told += [f"seed {settings['seed']}"] if settings["seed"] else []
    return ", ".join(told)
