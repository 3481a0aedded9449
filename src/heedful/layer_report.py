"""What a model's attention layers were asked to use, what they use, and why: values that print as a table."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from heedful.errors import HeedfulError
from heedful.policy import Wish
from heedful.run_report import THE_MODEL, stars


@dataclass(frozen=True)
class LayerReport:
    """One attention layer.

    ``active``: the backends that computed its calls; before the first, those it will choose from; "its own" where it
    does not go to heedful. ``covered``: whether it does; not so where it was asked to and ran without calling SDPA.
    ``reason``: who ordered it, or why it is not so. ``role``: one of ``layers.ROLES``, empty
    where the layer does not tell. ``counted``: False where it computes no softmax attention, which no backend could.
    ``conflict``: what others have set on it since that the order does not go with. ``ran``: calls by backend.
    ``lowerings``: the rewrites that these calls took. ``seconds``: what the calls took together, estimated from those
    that the guard and learning timed; 0 where none was. ``guard``: what became of its checks.
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
    role: str = ""
    counted: bool = True
    conflict: str = ""

    @property
    def calls(self) -> int:
        """How many attention calls of this layer heedful computed."""
        return sum(count for _, count in self.ran)


class Coverage(NamedTuple):
    """How many layers go to heedful, of how many."""

    covered: int
    total: int

    def __str__(self) -> str:
        return f"{self.covered} of {self.total}"


@dataclass(frozen=True)
class AttentionReport:
    """Every attention layer of a model. Iterates as layers; prints one line for layers that differ by number only.

    That of ``set_attention_backend`` is a context manager, too, whose end undoes that call.
    """

    layers: tuple[LayerReport, ...]
    block: AbstractContextManager[object] | None = field(default=None, repr=False, compare=False)

    @property
    def covered(self) -> int:
        """How many layers go to heedful."""
        return sum(layer.covered for layer in self.layers)

    @property
    def total(self) -> int:
        """How many layers were found that compute softmax attention."""
        return sum(layer.counted for layer in self.layers)

    @property
    def components(self) -> dict[str, Coverage]:
        """The coverage of every component that has attention layers, by name; "" is a model that is not part of any."""
        parts: dict[str, list[LayerReport]] = {}
        for layer in self.layers:
            parts.setdefault(layer.component, []).append(layer)
        return {
            name: Coverage(sum(layer.covered for layer in part), sum(layer.counted for layer in part))
            for name, part in parts.items()
        }

    @property
    def conflicts(self) -> tuple[LayerReport, ...]:
        """The layers that others have changed since they were set, or that are at odds with themselves."""
        return tuple(layer for layer in self.layers if layer.conflict)

    def __enter__(self) -> AttentionReport:
        """Raises HeedfulError for a report that no ``set_attention_backend`` returned."""
        if self.block is None:
            raise HeedfulError("only the report that set_attention_backend returns can be entered with 'with'")
        self.block.__enter__()
        return self

    def __exit__(self, *_error: object) -> None:
        if self.block is not None:
            self.block.__exit__(None, None, None)

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
        parts = {name: part._asdict() for name, part in self.components.items()}
        return {"covered": self.covered, "total": self.total, "components": parts, "layers": layers}

    def __str__(self) -> str:
        head = (
            "layers",
            "path",
            "module",
            "role",
            "requested",
            "active",
            "calls",
            "time",
            "lowerings",
            "guard",
            "reason",
        )
        total = sum(layer.seconds for layer in self.layers)
        rows = [head, *(_line(alike, total) for alike in _grouped(self.layers))]
        shown = [any(row[column] for row in rows[1:]) for column in range(len(head))]
        cells = [list(itertools.compress(row, shown)) for row in rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
        return "\n".join([*lines, self.coverage()])

    def coverage(self) -> str:
        """One line: of all layers, and of each component; layers that compute no softmax attention beside it."""
        parts = ", ".join(f"{name} {part}" for name, part in self.components.items() if name)
        beside = len(self.layers) - self.total
        return "".join(
            (
                f"covered {Coverage(self.covered, self.total)}",
                f": {parts}" if parts else "",
                f"; beside them {beside} that compute no softmax attention" if beside else "",
            )
        )


def wish_text(wish: Wish) -> str:
    """A wish as reports print it."""
    return wish if isinstance(wish, str) else " > ".join(wish)


def _grouped(layers: tuple[LayerReport, ...]) -> list[list[LayerReport]]:
    groups: dict[Any, list[LayerReport]] = {}
    for layer in layers:
        fault = layer.guard if layer.guard.startswith("WRONG") else ""
        said = (layer.requested, layer.active, layer.reason, layer.lowerings, fault)
        alike = (stars(layer.path), layer.module, layer.role, *said)
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
        first.role,
        first.requested,
        first.active,
        count,
        f"{seconds / total:.0%}" if seconds else "",
        ", ".join(first.lowerings),
        first.guard,
        first.reason,
    )
