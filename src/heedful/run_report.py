"""What a process computed: a row for each plan of each kind of call, by layer where layers are known; saved and read.

Times are estimates: calls times the time of one, as the guard and learning measured it. Calls of a class that nobody
timed show none, and compiled calls are not counted at all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from heedful.files import read_json, write_json
from heedful.measuring import spoken
from heedful.tally import Tally, joined_guard

FORMAT, KIND = 1, "report"
THE_MODEL = "(the model)"  # the path of a layer that is the model itself; "" is that of calls outside of layers


@dataclass(frozen=True)
class RunRow:
    """Calls of one kind, computed by one candidate. ``layer``: the path of the layers, with a star for each number.

    ``seconds``: of all its calls together, 0 where none was timed; ``share`` of the report's whole time.
    """

    layer: str
    problem: str
    backend: str
    lowerings: tuple[str, ...]
    rung: str
    calls: int
    seconds: float
    share: float
    guard: str


@dataclass(frozen=True)
class RunReport:
    """All rows, those that took most time first. Iterates as rows and prints as a table."""

    rows: tuple[RunRow, ...]

    def __iter__(self) -> Iterator[RunRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def calls(self) -> int:
        """How many calls there were."""
        return sum(row.calls for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """All of it in types that JSON has."""
        return {"format": FORMAT, "kind": KIND, "rows": [asdict(row) for row in self.rows]}

    def save(self, path: Path) -> None:
        """Write it whole, or leave what was there. Raises OSError."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: Path) -> RunReport:
        """A report from its file. Raises InvalidArgument."""
        return read_json(Path(path), KIND, FORMAT, lambda data: cls(tuple(map(_row_from, data["rows"]))))

    def __str__(self) -> str:
        head = ("calls", "time", "a call", "backend", "lowerings", "guard", "layer", "problem")
        cells = [head, *(_cells(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
        return "\n".join([*lines, f"{self.calls} calls of {len(self.rows)} kinds"])


def run_report(tallies: Iterable[Tally], by_layer: Mapping[Tally, Mapping[str, int]]) -> RunReport:
    """The report of these tallies. ``by_layer``: how many of a tally's calls were whose layer's, by path."""
    parts: dict[tuple[str, str, str, tuple[str, ...]], list[tuple[Tally, int]]] = {}
    for tally in tallies:
        layers: dict[str, int] = {}
        for path, calls in by_layer.get(tally, {}).items():
            layer = stars(path) or THE_MODEL
            layers[layer] = layers.get(layer, 0) + calls
        rest = tally.calls - sum(layers.values())
        for layer, calls in {**layers, "": rest}.items():
            if calls > 0:
                key = (layer, str(tally.plan.problem), tally.plan.backend, tally.lowerings)
                parts.setdefault(key, []).append((tally, calls))
    total = sum(tally.time_of(calls) for part in parts.values() for tally, calls in part)
    rows = [_row(*key, part, total) for key, part in parts.items()]
    return RunReport(tuple(sorted(rows, key=lambda row: (-row.seconds, -row.calls, row.layer, row.problem))))


def stars(path: str) -> str:
    """A layer's path with a star for each number, so that layers of one stack look alike."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", path)


def _row(
    layer: str, problem: str, backend: str, lowerings: tuple[str, ...], part: list[tuple[Tally, int]], total: float
) -> RunRow:
    seconds = sum(tally.time_of(calls) for tally, calls in part)
    rung, guard = part[0][0].plan.rung, joined_guard([tally for tally, _ in part])
    calls = sum(calls for _, calls in part)
    share = seconds / total if total else 0.0
    return RunRow(layer, problem, backend, lowerings, rung, calls, seconds, share, guard)


def _cells(row: RunRow) -> tuple[str, ...]:
    timed = bool(row.seconds)
    return (
        str(row.calls),
        f"{row.share:.0%}" if timed else "",
        spoken(row.seconds / row.calls) if timed else "",
        row.backend,
        ", ".join(row.lowerings),
        row.guard,
        row.layer,
        row.problem,
    )


_MOST_CALLS = 1 << 62
_TYPES = {
    "layer": str, "problem": str, "backend": str, "lowerings": list, "rung": str, "calls": int, "seconds": float,
    "share": float, "guard": str,
}  # fmt: skip


def _row_from(data: Mapping[str, Any]) -> RunRow:
    for name, kind in _TYPES.items():
        if type(data[name]) is not kind:
            raise ValueError(f"{name} is {data[name]!r}")
    if set(data) != set(_TYPES) or not all(isinstance(one, str) for one in data["lowerings"]):
        raise ValueError("a row has other fields than a report's")
    if not (1 <= data["calls"] <= _MOST_CALLS and 0 <= data["seconds"] < math.inf and 0 <= data["share"] < math.inf):
        raise ValueError("calls, seconds or a share of the time are no such numbers")
    return RunRow(**{**data, "lowerings": tuple(data["lowerings"])})
