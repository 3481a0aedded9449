"""What padded keys cost when half of them are padding: heedful leaves them out, SDPA computes and hides them.

Without a mask, SDPA gives another answer (all keys): it is what the sizes alone cost. Then one answer six ways: SDPA
with the mask broadcast (B, 1, 1, K) and with it written out (B, H, Q, K), heedful with either tensor, and with
``KeyPadding``. heedful's first call looks at the mask, and is timed by itself; the rounds are those of later calls.
Wanted for SDXL's self-attention: at least 1.7 times as fast as SDPA with the broadcast mask, and 3 times as fast as
with the one written out, by the slowest of heedful's ways.

    python benchmarks/padding.py [--rounds 4] [--quick] [--json] [--out FOLDER | --no-save]

Shapes: B batch, H heads, Q query length, K key length, D head dim.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from measuring import (
    Bar,
    Call,
    Figures,
    check_by_formula,
    check_ways,
    finish,
    first_us,
    machine,
    measure,
    options,
    parsed,
    ratio,
    spoken,
)
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import heedful

BROADCAST, WRITTEN_OUT = "SDPA, broadcast", "SDPA, written out"
OURS = ("heedful, broadcast", "heedful, written out", "heedful, KeyPadding")
TARGETS = {BROADCAST: 1.7, WRITTEN_OUT: 3.0}
SIDES = ("right", "interior")


class Shape(NamedTuple):
    """One call's sizes."""

    batch: int
    heads: int
    query_length: int
    key_length: int
    head_dim: int = 64


SHAPES = {
    "SDXL self, 64²": Shape(2, 10, 4096, 4096),  # the first is the one that has targets
    "SDXL self, 32²": Shape(2, 20, 1024, 1024),
    "SDXL cross, 32²": Shape(2, 20, 1024, 77),
}
QUICK = {"self": Shape(2, 2, 64, 64), "cross": Shape(2, 2, 64, 10)}


@dataclass(frozen=True)
class Row:
    """One shape and side: each way's figures, heedful's first calls, how many times as fast its slowest way is."""

    name: str
    shape: Shape
    side: str
    figures: dict[str, dict[str, float]]
    first_call_us: dict[str, float]
    faster: dict[str, float]


def kept(shape: Shape, side: str) -> Tensor:
    """(B, K), True for the keys that are real: the first half, or every second one."""
    places = torch.arange(shape.key_length)
    keep = places < shape.key_length // 2 if side == "right" else places % 2 == 0
    return keep.expand(shape.batch, -1).contiguous()


def row(name: str, shape: Shape, side: str, rounds: int, bar: Bar) -> Row:
    """Check every way, then time it."""
    torch.manual_seed(0)
    batch, heads, query_length, key_length, head_dim = shape
    query = torch.randn(batch, heads, query_length, head_dim)
    key, value = (torch.randn(batch, heads, key_length, head_dim) for _ in range(2))
    keep = kept(shape, side)
    broadcast = keep[:, None, None, :]
    full = broadcast.expand(batch, heads, query_length, key_length).contiguous()
    padding = heedful.KeyPadding(keep)

    def ours(mask: object) -> Call:
        return lambda: heedful.attention(query, key, value, attn_mask=mask, backend="native")

    calls: dict[str, Call] = {
        BROADCAST: lambda: sdpa(query, key, value, broadcast),
        WRITTEN_OUT: lambda: sdpa(query, key, value, full),
        **dict(zip(OURS, (ours(broadcast.clone()), ours(full), ours(padding)), strict=True)),
    }
    first = {way: first_us(calls[way]) for way in OURS}
    check_ways(calls, query, key, value, broadcast, of=f"{name}, {side}")
    unmasked = "SDPA, no mask"
    calls = {unmasked: lambda: sdpa(query, key, value), **calls}
    check_by_formula(unmasked, calls[unmasked](), query, key, value, None)
    times = measure(calls, rounds, bar=bar)
    figures = {way: Figures.of(times[way]) for way in calls}
    faster = {way: min(ratio(times, way, one) for one in OURS) for way in (unmasked, *TARGETS)}
    return Row(name, shape, side, {way: one._asdict() for way, one in figures.items()}, first, faster)


def table(rows: list[Row]) -> Table:
    """The rows, as one reads them: a line for each way."""
    drawn = Table(
        title="half of the keys padded, float32: median ± half the quartile gap",
        caption=f"(B, H, Q, K, D); wanted of the first call: {', '.join(f'{n}x {way}' for way, n in TARGETS.items())}",
    )
    for column in ("call", "way", "a call", "first call", "heedful's slowest way is faster by"):
        drawn.add_column(column)
    for one in rows:
        calls = [f"{one.name}, {one.side}", str(tuple(one.shape))]
        for place, (way, figures) in enumerate(one.figures.items()):
            first = spoken(one.first_call_us[way]) if way in one.first_call_us else ""
            faster = f"{one.faster[way]:.2f}x" if way in one.faster else ""
            drawn.add_row(calls[place] if place < len(calls) else "", way, str(Figures(**figures)), first, faster)
        drawn.add_section()
    return drawn


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, save; the exit status is 1 where a target is missed."""
    wanted = parsed(options(__doc__, rounds=4), arguments)
    shapes = QUICK if wanted.quick else SHAPES
    rows = []
    with Bar() as bar, torch.no_grad():
        bar.expect(len(shapes) * len(SIDES) * wanted.rounds)
        for name, shape in shapes.items():
            for side in SIDES:
                bar.at(f"{name}, {side}")
                rows.append(row(name, shape, side, wanted.rounds, bar))
    record = {"machine": machine(), "targets": TARGETS, "rows": [asdict(one) for one in rows]}
    finish("padding", record, [table(rows)], wanted)
    return int(not wanted.quick and any(rows[0].faster[way] < times for way, times in TARGETS.items()))


if __name__ == "__main__":
    sys.exit(main())
