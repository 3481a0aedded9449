"""What a model's attention layers were asked to use, what they use, and why: values that print as a table."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from heedful.policy import Wish
from heedful.run_report import THE_MODEL, stars


@dataclass(frozen=True)
class LayerReport:
    """One attention layer.

    ``active``: the backends that computed its calls; before the first, those it will choose from; "its own" where it
    does not go to heedful. ``reason``: who ordered it, or why it is not so. ``ran``: calls by backend. ``lowerings``:
    the rewrites that these calls took. ``seconds``: what the calls took together, estimated from those that the guard
    and learning timed; 0 where none was. ``guard``: what became of its checks.
    """

    path: str
    component: str
    module: str
    requested: str
    active: str
    reason: str
    covered: bool
    ran: tuple[tuple[str, int], ...] = ()
    lowerings: tuple[str, ...] = ()
    seconds: float = 0.0
    guard: str = ""

    @property
    def calls(self) -> int:
        """How many attention calls of this layer heedful computed."""
        return sum(count for _, count in self.ran)


@dataclass(frozen=True)
class AttentionReport:
    """Every attention layer of a model. Iterates as layers; prints one line for layers that differ by number only."""

    layers: tuple[LayerReport, ...]

    @property
    def covered(self) -> int:
        """How many layers go to heedful."""
        return sum(layer.covered for layer in self.layers)

    @property
    def total(self) -> int:
        """How many layers were found."""
        return len(self.layers)

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, path: str) -> LayerReport:
        for layer in self.layers:
            if layer.path == path:
                return layer
        raise KeyError(path)

    def to_dict(self) -> dict[str, Any]:
        """All of it in types that JSON has."""
        layers = [{**asdict(layer), "ran": dict(layer.ran), "calls": layer.calls} for layer in self.layers]
        return {"covered": self.covered, "total": self.total, "layers": layers}

    def __str__(self) -> str:
        head = ("layers", "path", "module", "requested", "active", "calls", "time", "lowerings", "guard", "reason")
        total = sum(layer.seconds for layer in self.layers)
        rows = [head, *(_line(alike, total) for alike in _grouped(self.layers))]
        shown = [any(row[column] for row in rows[1:]) for column in range(len(head))]
        cells = [list(itertools.compress(row, shown)) for row in rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
        return "\n".join([*lines, f"covered {self.covered} of {self.total}"])


def wish_text(wish: Wish) -> str:
    """A wish as reports print it."""
    return wish if isinstance(wish, str) else " > ".join(wish)


def _grouped(layers: tuple[LayerReport, ...]) -> list[list[LayerReport]]:
    groups: dict[Any, list[LayerReport]] = {}
    for layer in layers:
        fault = layer.guard if layer.guard.startswith("WRONG") else ""
        alike = (stars(layer.path), layer.module, layer.requested, layer.active, layer.reason, layer.lowerings, fault)
        groups.setdefault(alike, []).append(layer)
    return list(groups.values())


def _line(alike: list[LayerReport], total: float) -> tuple[str, ...]:
    first, calls = alike[0], sorted({layer.calls for layer in alike})
    path = first.path if len(alike) == 1 else stars(first.path)
    count = str(calls[0]) if len(calls) == 1 else f"{calls[0]}-{calls[-1]}"
    seconds = sum(layer.seconds for layer in alike)
    return (
        str(len(alike)),
        path or THE_MODEL,
        first.module,
        first.requested,
        first.active,
        count,
        f"{seconds / total:.0%}" if seconds else "",
        ", ".join(first.lowerings),
        first.guard,
        first.reason,
    )
