"""What a model's attention layers were asked to use, what they use, and why: values that print as a table."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from heedful.policy import Wish


@dataclass(frozen=True)
class LayerReport:
    """One attention layer.

    ``active``: the backends that computed its calls; before the first, those it will choose from; "its own" where it
    does not go to heedful. ``reason``: who ordered it, or why it is not so. ``ran``: calls by backend; a
    name with "?" is not certain: a backend that checks every call itself and may have passed some on to the next wanted
    one, or the wish of a layer that calls ``heedful.attention`` itself.
    """

    path: str
    component: str
    module: str
    requested: str
    active: str
    reason: str
    covered: bool
    ran: tuple[tuple[str, int], ...] = ()

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
        head = ("layers", "path", "module", "requested", "active", "calls", "reason")
        rows = [head, *(_line(alike) for alike in _grouped(self.layers))]
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, f"covered {self.covered} of {self.total}"])


def wish_text(wish: Wish) -> str:
    """A wish as reports print it."""
    return wish if isinstance(wish, str) else " > ".join(wish)


def _grouped(layers: tuple[LayerReport, ...]) -> list[list[LayerReport]]:
    groups: dict[Any, list[LayerReport]] = {}
    for layer in layers:
        alike = (_pattern(layer.path), layer.module, layer.requested, layer.active, layer.reason)
        groups.setdefault(alike, []).append(layer)
    return list(groups.values())


def _line(alike: list[LayerReport]) -> tuple[str, ...]:
    first, calls = alike[0], sorted({layer.calls for layer in alike})
    path = first.path if len(alike) == 1 else _pattern(first.path)
    count = str(calls[0]) if len(calls) == 1 else f"{calls[0]}-{calls[-1]}"
    return (str(len(alike)), path or "(the model)", first.module, first.requested, first.active, count, first.reason)


def _pattern(path: str) -> str:
    """The path with a star for each number, so that layers of one stack look alike."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", path)
