"""What a dispatcher costs over the kernel itself, on a tensor so small that the kernel hardly counts.

Four ways to the same answer, in interleaved rounds (one machine's noise hits all of them alike): torch's SDPA on
tensors that lie right already, SDPA with the transposes that a (B, S, H, D) model needs, diffusers'
``dispatch_attention_fn``, and ``heedful.attention(..., layout="BSHD")``. Each must give SDPA's numbers before it is
timed. The ratio is what heedful adds over the transposes, by what diffusers adds; at most 0.65 is wanted.

    python benchmarks/overhead.py [--rounds 25] [--quick] [--json] [--out FOLDER | --no-save]

Shapes: B batch, S length, H heads, D head dim; query, key and value are alike.
"""

from __future__ import annotations

import statistics
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from measuring import Bar, Call, Figures, Times, check_alike, finish, machine, measure, options, parsed
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import heedful

SHAPE_BSHD = (1, 8, 2, 16)
TARGET = 0.65
_NO_RATIO = 1e9  # diffusers' dispatcher came out faster than bare transposes in every round: noise
WAYS = ("sdpa", "transposes", "diffusers", "heedful")  # "transposes": SDPA with them


@dataclass(frozen=True)
class Row:
    """One setting: the median of each way in microseconds a call, and half the distance between its quartiles."""

    setting: str
    median_us: dict[str, float]
    spread_us: dict[str, float]
    ratio: float

    @classmethod
    def of(cls, setting: str, times: Times) -> Row:
        """The row of each way's rounds. The ratio is a median too: of the rounds, each by itself."""
        rounds = zip(*(times[way] for way in WAYS[1:]), strict=True)
        ratios = [(ours - bare) / (theirs - bare) for bare, theirs, ours in rounds if theirs > bare]
        figures = {way: Figures.of(times[way]) for way in WAYS}
        return cls(
            setting,
            {way: one.median_us for way, one in figures.items()},
            {way: one.spread_us for way, one in figures.items()},
            statistics.median(ratios) if ratios else _NO_RATIO,
        )


def settings() -> dict[str, tuple[bool, dict[str, Call]]]:
    """By name: whether gradients are recorded, and the four ways."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(SHAPE_BSHD) for _ in range(3))
    wanted = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    batch, length, heads, _ = SHAPE_BSHD
    full = torch.rand(batch, heads, length, length) < 0.7
    full[..., 0] = True
    keep = torch.arange(length)[None] < length - 2
    padding = heedful.KeyPadding(keep)
    return {
        "no_grad": (False, ways(query, key, value)),
        "grad mode": (True, ways(query, key, value)),
        "grad wanted": (True, ways(*wanted)),
        "bool mask": (False, ways(query, key, value, full, full, full)),
        "key padding tensor": (False, ways(query, key, value, keep[:, None, None, :], keep, keep[:, None, None, :])),
        "KeyPadding": (False, ways(query, key, value, keep[:, None, None, :], keep, padding)),
    }


def ways(query: Tensor, key: Tensor, value: Tensor, plain: Any = None, theirs: Any = None, ours: Any = None) -> dict:
    """The four ways to one answer (B, S, H, D); each takes the mask in its own form."""
    lying = [tensor.detach().transpose(1, 2).contiguous() for tensor in (query, key, value)]
    for tensor in lying:
        tensor.requires_grad_(query.requires_grad)

    def bare() -> Tensor:
        return sdpa(lying[0], lying[1], lying[2], plain)

    def transposed() -> Tensor:
        return sdpa(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), plain).transpose(1, 2)

    def diffusers() -> Tensor:
        return dispatch_attention_fn(query, key, value, attn_mask=theirs)

    def ours_() -> Tensor:
        return heedful.attention(query, key, value, attn_mask=ours, layout="BSHD")

    calls = {"sdpa": bare, "transposes": transposed, "diffusers": diffusers, "heedful": ours_}
    wanted = transposed()
    check_alike("sdpa", bare().transpose(1, 2), wanted)
    for way in ("diffusers", "heedful"):
        check_alike(way, calls[way](), wanted)
    return calls


def table(rows: list[Row]) -> Table:
    """The rows, as one reads them."""
    drawn = Table(
        title=f"microseconds a call, (B, S, H, D) = {SHAPE_BSHD}, float32: median ± half the quartile gap",
        caption="transposes: SDPA with them; ratio: what heedful adds to them by what diffusers adds",
    )
    drawn.add_column("setting")
    for way in WAYS:
        drawn.add_column(way, justify="right")
    drawn.add_column("ratio", justify="right")
    for row in rows:
        figures = [f"{row.median_us[way]:.2f} ± {row.spread_us[way]:.2f}" for way in WAYS]
        drawn.add_row(row.setting, *figures, f"{row.ratio:.2f}")
    return drawn


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, save; the exit status is 1 where the plain no_grad call misses the target."""
    parser = options(__doc__, rounds=25)
    parser.add_argument("--number", type=int, help="calls a round (default 2000, with --quick 50)")
    wanted = parsed(parser, arguments)

    rows, number = [], wanted.number or (50 if wanted.quick else 2000)
    with Bar() as bar:
        every = settings()
        bar.expect(len(every) * wanted.rounds)
        for setting, (grad, calls) in every.items():
            bar.at(setting)
            with nullcontext() if grad else torch.no_grad():
                rows.append(Row.of(setting, measure(calls, wanted.rounds, number, bar)))
    record = {
        "machine": machine("diffusers"),
        "shape_bshd": SHAPE_BSHD,
        "target": TARGET,
        "rows": [asdict(row) for row in rows],
    }
    finish("overhead", record, [table(rows)], wanted)
    return int(rows[0].ratio > TARGET and not wanted.quick)


if __name__ == "__main__":
    sys.exit(main())
