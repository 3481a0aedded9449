"""What our own kernels are wanted to reach, as data in ``targets.json``, and what became of it in a record.

A target is judged on one device alone, in one dtype. A rate is reached by the fastest of our own backends of that
exactness; the targets of two steps over one call are judged by the same figure. "fastest" is reached where the fastest
exact one of ours is faster than every exact backend of others that gave the right answer there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Outcome = Literal["reached", "missed", "not measured"]
TARGETS = Path(__file__).with_name("targets.json")


@dataclass(frozen=True)
class Verdict:
    """One target. ``wanted`` and ``found`` are in TFLOP/s, or in times as fast as the fastest other backend.

    ``wanted`` is 1 there. ``by``: which of our backends it was, and the other one it was held to.
    """

    step: str
    cell: str
    work: str
    unit: str
    wanted: float
    found: float | None
    outcome: Outcome
    by: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self)


def targets() -> dict[str, Any]:
    """The file."""
    found: dict[str, Any] = json.loads(TARGETS.read_text("utf-8"))
    return found


def verdicts(record: Mapping[str, Any], wanted: Mapping[str, Any] | None = None) -> list[Verdict]:
    """Of every target; none on another device than theirs."""
    wanted = targets() if wanted is None else wanted
    if record["machine"].get("gpu") != wanted["device"]:
        return []
    calls = {call["name"]: call for call in record["calls"] if call["dtype"] == wanted["dtype"]}
    return [*_rates(wanted["rates"], calls), *_fastest(wanted["fastest"], calls)]


def _rates(wanted: list[dict[str, Any]], calls: Mapping[str, Any]) -> Iterator[Verdict]:
    for one in wanted:
        call = calls.get(one["work"])
        ours = best(call, ours=True, exactness=one["exactness"])
        common = (one["step"], one["cell"], one["work"], "TFLOP/s", one["tflops"])
        if ours is None:
            yield Verdict(*common, None, *_without_time(call, one["exactness"]))
        else:
            outcome: Outcome = "reached" if ours["tflops"] >= one["tflops"] else "missed"
            yield Verdict(*common, ours["tflops"], outcome, ours["backend"])


def _fastest(wanted: Mapping[str, Any], calls: Mapping[str, Any]) -> Iterator[Verdict]:
    for name in wanted["works"]:
        ours, other = (best(calls.get(name), ours=whose) for whose in (True, False))
        common = (wanted["step"], name, name, "times", 1.0)
        if ours is None:
            yield Verdict(*common, None, *_without_time(calls.get(name), "exact"))
        elif other is None:
            yield Verdict(*common, None, "reached", f"{ours['backend']}; no other one is right there")
        else:
            times = other["median_us"] / ours["median_us"]
            by = f"{ours['backend']} over {other['backend']}"
            yield Verdict(*common, times, "reached" if times > 1 else "missed", by)


def _without_time(call: Mapping[str, Any] | None, exactness: str) -> tuple[Outcome, str]:
    """A target is missed where our own backend took the call and failed, or refused it; else it was not measured."""
    rows = [] if call is None else [row for row in call["rows"] if row["ours"] and row["exactness"] == exactness]
    failed = [f"{row['backend']}: {row['status']}" for row in rows if row["status"] in ("wrong", "failed", "refused")]
    return ("missed" if failed else "not measured"), ", ".join(failed)


def best(call: Mapping[str, Any] | None, *, ours: bool, exactness: str = "exact") -> dict[str, Any] | None:
    """The fastest row of a call that has a time, of our own backends or the others'."""
    rows = [] if call is None else call["rows"]
    fitting = [row for row in rows if row["median_us"] and row["ours"] is ours and row["exactness"] == exactness]
    return min(fitting, key=lambda row: row["median_us"], default=None)
