"""What the guard costs: the same calls with it and without it, over enough calls that its checks fall into each round.

Lengths as they are in models, and a tiny one where only counting is left. The guard looks at a call when 1 % of the
time since the last look covers it, so about 1 % is what it may cost.

    python benchmarks/guard.py [--rounds 9] [--quick] [--json] [--out FOLDER | --no-save]

Shapes: B batch, H heads, S length, D head dim.
"""

from __future__ import annotations

import statistics
import sys
import timeit
from dataclasses import asdict, dataclass

import torch
from measuring import Bar, Figures, finish, machine, options, parsed
from rich.table import Table

import heedful
from heedful.tally import Tally

SHAPES = ((1, 8, 2, 16), (2, 16, 256, 72), (2, 20, 1024, 64), (1, 8, 2048, 64))
QUICK = ((1, 2, 8, 16),)
SECONDS = 0.6  # a round, of each way


@dataclass(frozen=True)
class Row:
    """One shape. ``period``: calls from one check to the next. ``ratio``: with the guard over without it."""

    shape: tuple[int, ...]
    figures: dict[str, dict[str, float]]
    period: int
    check_share: float
    ratio: float


def row(shape: tuple[int, ...], rounds: int, seconds: float, bar: Bar) -> Row:
    """Both ways in turn; a round holds several checks where the length is that of a model."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(shape) for _ in range(3))
    ways = {guard: heedful.AttentionDispatcher(policy=heedful.Policy(guard=guard)) for guard in ("off", "replace")}
    timers = {
        guard: timeit.Timer(lambda dispatcher=dispatcher: dispatcher.attention(query, key, value))
        for guard, dispatcher in ways.items()
    }
    for timer in timers.values():
        timer.timeit(20)
    number = max(1, int(seconds / (min(timers["off"].repeat(5, 3)) / 3)))
    times: dict[str, list[float]] = {guard: [] for guard in ways}
    for turn in range(rounds):
        for guard in sorted(ways, reverse=bool(turn % 2)):
            times[guard].append(timers[guard].timeit(number) / number * 1e6)
        bar.step()
    tally: Tally = next(iter(ways["replace"].experience.tallies.values()))
    figures = {guard: Figures.of(rounds_)._asdict() for guard, rounds_ in times.items()}
    ratio = statistics.median(on / off for on, off in zip(times["replace"], times["off"], strict=True))
    share = tally.trust.cost / tally.trust.seconds if tally.trust.seconds else 0.0
    return Row(shape, figures, tally.span, share, ratio)


def table(rows: list[Row]) -> Table:
    """The rows, as one reads them."""
    drawn = Table(title="the guard on and off, float32: median ± half the quartile gap")
    for column in ("(B, H, S, D)", "off", "on", "a check costs", "one in so many calls", "ratio"):
        drawn.add_column(column, justify="right")
    for one in rows:
        ways = [str(Figures(**one.figures[guard])) for guard in ("off", "replace")]
        drawn.add_row(str(one.shape), *ways, f"{one.check_share:.0%} of a call", str(one.period), f"{one.ratio:.3f}")
    return drawn


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, save."""
    wanted = parsed(options(__doc__, rounds=9), arguments)
    shapes, seconds = (QUICK, 0.01) if wanted.quick else (SHAPES, SECONDS)
    with Bar() as bar, torch.no_grad():
        bar.expect(len(shapes) * wanted.rounds)
        rows = [row(shape, wanted.rounds, seconds, bar) for shape in shapes]
    record = {"machine": machine(), "rows": [asdict(one) for one in rows]}
    finish("guard", record, [table(rows)], wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
