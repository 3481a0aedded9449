"""What masks cost, and what looking at them costs: heedful reads a mask tensor at its first sight, once.

Four tables. An all-True mask over no mask at all, after its first sight: at most 5 % more is wanted, but for calls so
short that the arguments alone cost that (under 100 us). The first sight by kind and size. A causal tensor, recognised,
beside causality that was given. And a fresh tensor at every call, as models make that rebuild their masks: then each
call is a first sight; ``derive`` says of a fresh tensor what it came from, and a policy may leave masks unread.

    python benchmarks/masks.py [--rounds 5] [--quick] [--json] [--out FOLDER | --no-save]

Shapes: B batch, H heads, Q query length, K key length, D head dim.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from measuring import (
    Bar,
    Call,
    Figures,
    Times,
    WrongAnswer,
    check_ways,
    finish,
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
from heedful.analysis import MaskCache

TARGET = 1.05
SHORTEST_US = 100.0  # a call below it has no target
READ = heedful.AttentionDispatcher(policy=heedful.Policy(guard="off"))
UNREAD = heedful.AttentionDispatcher(policy=heedful.Policy(analyse=False, guard="off"))


class Shape(NamedTuple):
    """One call's sizes."""

    batch: int
    heads: int
    query_length: int
    key_length: int
    head_dim: int = 64

    def drawn(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value."""
        torch.manual_seed(0)
        lengths = (self.query_length, self.key_length, self.key_length)
        query, key, value = (torch.randn(self.batch, self.heads, length, self.head_dim) for length in lengths)
        return query, key, value


SHAPES = (
    Shape(1, 2, 8, 8, 16),
    Shape(1, 8, 128, 128),
    Shape(2, 20, 1024, 77),
    Shape(2, 20, 1024, 1024),
    Shape(1, 4, 4096, 4096),
)
QUICK = (Shape(1, 2, 8, 8, 16), Shape(2, 2, 32, 20))
CAUSAL = (Shape(1, 8, 128, 128), Shape(1, 8, 1024, 1024), Shape(1, 4, 4096, 4096))
CAUSAL_QUICK = (Shape(1, 2, 32, 32),)
FRESH = (Shape(1, 8, 128, 128), Shape(2, 20, 1024, 77), Shape(2, 20, 1024, 1024))
SIZES, SIZES_QUICK = (1024, 4096), (32,)


@dataclass(frozen=True)
class Row:
    """One setting: each way's figures, and what is compared."""

    setting: str
    shape: tuple[int, ...]
    figures: dict[str, dict[str, float]]
    ratios: dict[str, float]

    @classmethod
    def of(cls, setting: str, shape: tuple[int, ...], times: Times, ratios: dict[str, tuple[str, str]]) -> Row:
        """The row of each way's rounds; ``ratios`` are medians of the rounds' own."""
        figures = {way: Figures.of(rounds)._asdict() for way, rounds in times.items()}
        return cls(setting, tuple(shape), figures, {name: ratio(times, *pair) for name, pair in ratios.items()})


def noops(shape: Shape, rounds: int, bar: Bar) -> list[Row]:
    """All-True masks over none; the first sight is part of the check."""
    query, key, value = shape.drawn()
    masks = {
        "all True (B, 1, 1, K)": torch.ones(shape.batch, 1, 1, shape.key_length, dtype=torch.bool),
        "all True (Q, K)": torch.ones(shape.query_length, shape.key_length, dtype=torch.bool),
    }
    rows = []
    for setting, mask in masks.items():
        bar.at(f"{setting} at {tuple(shape)}")
        calls: dict[str, Call] = {
            "SDPA, no mask": lambda: sdpa(query, key, value),
            "SDPA, mask": lambda mask=mask: sdpa(query, key, value, mask),
            "heedful, no mask": lambda: READ.attention(query, key, value, backend="native"),
            "heedful, mask": lambda mask=mask: READ.attention(query, key, value, mask, backend="native"),
        }
        check_ways(calls, query, key, value, of=setting)
        times = measure(calls, rounds, bar=bar)
        pairs = {
            "heedful's mask": ("heedful, mask", "heedful, no mask"),
            "SDPA's mask": ("SDPA, mask", "SDPA, no mask"),
        }
        rows.append(Row.of(setting, shape, times, pairs))
    return rows


def masks_to_read(size: int) -> dict[str, Tensor]:
    """One of each kind that is read differently."""
    places = torch.arange(size)
    right = places < size // 2
    draw = torch.Generator().manual_seed(0)
    ones = torch.ones(size, size, dtype=torch.bool)
    return {
        "all True": ones,
        "causal": ones.tril(),
        "padding, right": right.expand(size, size).contiguous(),
        "padding, right (B, 1, 1, K)": right.expand(2, 1, 1, size).contiguous(),
        "padding, interior (B, 1, 1, K)": (places % 2 == 0).expand(2, 1, 1, size).contiguous(),
        "two blocks": right[:, None] == right,
        "arbitrary": (torch.rand(size, size, generator=draw) < 0.7) | torch.eye(size, dtype=torch.bool),
        "causal, float": torch.zeros(size, size).masked_fill(~ones.tril(), float("-inf")),
        "zeros, float": torch.zeros(size, size),
    }


def first_sights(size: int, rounds: int, bar: Bar) -> list[Row]:
    """What a cache that never saw a mask takes to read it, and what it takes to find it again."""
    rows = []
    for setting, mask in masks_to_read(size).items():
        bar.at(f"first sight of {setting}, {size}")
        known = MaskCache()
        known.simplest(mask, 2)
        calls: dict[str, Call] = {
            "first sight": lambda mask=mask: MaskCache().simplest(mask, 2),
            "found again": lambda known=known, mask=mask: known.simplest(mask, 2),
            "one pass (all)": lambda mask=mask: bool(mask.all()),
        }
        times = measure(calls, rounds, bar=bar)
        rows.append(Row.of(setting, tuple(mask.shape), times, {"passes": ("first sight", "one pass (all)")}))
    return rows


def causal(shape: Shape, rounds: int, bar: Bar) -> Row:
    """Causality as a tensor, and as an argument."""
    bar.at(f"causal at {tuple(shape)}")
    query, key, value = shape.drawn()
    seen = torch.ones(shape.query_length, shape.key_length, dtype=torch.bool).tril()
    if READ.explain(query, key, value, seen, backend="native").problem.mask.kinds != ("causal",):
        raise WrongAnswer(f"a causal tensor {tuple(seen.shape)} is not recognised")
    calls: dict[str, Call] = {
        "SDPA, tensor": lambda: sdpa(query, key, value, seen),
        "SDPA, is_causal": lambda: sdpa(query, key, value, is_causal=True),
        "heedful, tensor": lambda: READ.attention(query, key, value, seen, backend="native"),
        "heedful, is_causal": lambda: READ.attention(query, key, value, is_causal=True, backend="native"),
    }
    check_ways(calls, query, key, value, seen, of="causal")
    pairs = {
        "SDPA's tensor": ("SDPA, tensor", "heedful, tensor"),
        "recognised": ("heedful, tensor", "heedful, is_causal"),
    }
    return Row.of("causal", shape, measure(calls, rounds, bar=bar), pairs)


def fresh(setting: str, shape: Shape, mask: Tensor, rounds: int, bar: Bar) -> Row:
    """A copy of the mask at each call, but for the way that keeps one."""
    bar.at(f"fresh {setting} at {tuple(shape)}")
    query, key, value = shape.drawn()

    def derived() -> Tensor:
        made = mask.clone()
        READ.masks.derive(made, mask)
        return READ.attention(query, key, value, made, backend="native")

    calls: dict[str, Call] = {
        "SDPA, fresh": lambda: sdpa(query, key, value, mask.clone()),
        "heedful, kept": lambda: READ.attention(query, key, value, mask, backend="native"),
        "heedful, fresh": lambda: READ.attention(query, key, value, mask.clone(), backend="native"),
        "heedful, derived": derived,
        "heedful, unread": lambda: UNREAD.attention(query, key, value, mask.clone(), backend="native"),
    }
    check_ways(calls, query, key, value, mask, of=f"fresh {setting}")
    pairs = {"fresh over SDPA": ("heedful, fresh", "SDPA, fresh"), "kept over SDPA": ("heedful, kept", "SDPA, fresh")}
    return Row.of(setting, shape, measure(calls, rounds, bar=bar), pairs)


def fresh_masks(shape: Shape) -> dict[str, Tensor]:
    """Masks as models rebuild them."""
    draw = torch.Generator().manual_seed(0)
    arbitrary = torch.rand(shape.query_length, shape.key_length, generator=draw) < 0.7
    arbitrary[:, 0] = True
    return {
        "padding, right (B, 1, 1, K)": (torch.arange(shape.key_length) < shape.key_length // 2)
        .expand(shape.batch, 1, 1, -1)
        .contiguous(),
        "arbitrary (Q, K)": arbitrary,
    }


def table(title: str, rows: list[Row]) -> Table:
    """Rows of the same ways, as one reads them."""
    drawn = Table("mask", "sizes", *rows[0].figures, *rows[0].ratios, title=f"{title}: median ± half the quartile gap")
    for one in rows:
        figures = [f"{spoken(each['median_us'])} ± {spoken(each['spread_us'])}" for each in one.figures.values()]
        sizes = "x".join(map(str, one.shape))
        drawn.add_row(one.setting, sizes, *figures, *(f"{number:.2f}x" for number in one.ratios.values()))
    return drawn


def missed(rows: list[Row]) -> bool:
    """Whether an all-True mask costs too much at a shape that has a target."""
    long = [one for one in rows if one.figures["heedful, no mask"]["median_us"] >= SHORTEST_US]
    return any(one.ratios["heedful's mask"] > TARGET for one in long)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, save; the exit status is 1 where the target is missed."""
    wanted = parsed(options(__doc__, rounds=5), arguments)
    shapes, causals = (QUICK, CAUSAL_QUICK) if wanted.quick else (SHAPES, CAUSAL)
    anew, sizes = (QUICK[1:], SIZES_QUICK) if wanted.quick else (FRESH, SIZES)
    work: dict[str, list[Callable[[], list[Row]]]] = {}
    with Bar() as bar, torch.no_grad():
        rounds = wanted.rounds
        work["an all-True mask"] = [lambda shape=shape: noops(shape, rounds, bar) for shape in shapes]
        work["first sight"] = [lambda size=size: first_sights(size, rounds, bar) for size in sizes]
        work["causality as a tensor"] = [lambda shape=shape: [causal(shape, rounds, bar)] for shape in causals]
        work["a fresh mask each call"] = [
            lambda one=(name, shape, mask): [fresh(*one, rounds, bar)]
            for shape in anew
            for name, mask in fresh_masks(shape).items()
        ]
        bar.expect(rounds * (2 * len(shapes) + len(masks_to_read(2)) * len(sizes) + len(causals) + 2 * len(anew)))
        found = {title: [row for part in parts for row in part()] for title, parts in work.items()}
    record = {
        "machine": machine(),
        "target": TARGET,
        "target_from_us": SHORTEST_US,
        **{title: [asdict(row) for row in rows] for title, rows in found.items()},
    }
    finish("masks", record, [table(title, rows) for title, rows in found.items()], wanted)
    return int(not wanted.quick and missed(found["an all-True mask"]))


if __name__ == "__main__":
    sys.exit(main())
