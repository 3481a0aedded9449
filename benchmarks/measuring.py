"""What the benchmarks share: their options, the check before any time, interleaved rounds, the record of a run.

No time is printed before every way gave the right answer: tables come last, and a wrong answer ends the run.

Shapes: B batch, H heads, Q query length, K key length, D head dim, E value dim; tensors are (B, H, length, dim).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import timeit
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from torch import Tensor

from heedful.measuring import folder_name, machine_record
from heedful.measuring import ratio as ratio  # for the benchmarks
from heedful.measuring import spoken as of_seconds

Call = Callable[[], Any]
Times = dict[str, list[float]]

RESULTS = Path(__file__).parent / "results"
CHECKED_ROWS = 64  # queries of each head that are held to the formula; all others to the first way
SHORTEST_ROUND_US = 5e3
SHORT_US = 5e4  # a round of all ways
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class WrongAnswer(Exception):
    """A way to be timed gives another answer: its time would mean nothing."""


class Figures(NamedTuple):
    """Microseconds a call: the median of the rounds, and half the distance between their quartiles."""

    median_us: float
    spread_us: float

    @classmethod
    def of(cls, rounds: list[float]) -> Figures:
        """Of one figure a round."""
        low, _, high = statistics.quantiles(rounds, n=4)
        return cls(statistics.median(rounds), (high - low) / 2)

    def __str__(self) -> str:
        return f"{spoken(self.median_us)} ± {spoken(self.spread_us)}"


def spoken(microseconds: float) -> str:
    """A time with its unit, in three digits."""
    return of_seconds(microseconds / 1e6)


def options(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options that all benchmarks have; ``doc`` opens with the line that describes this one."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, help=f"rounds of each measurement (default {rounds})")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, few rounds, nothing saved without --out")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", type=Path, help="folder of the record")
    parser.add_argument("--no-save", action="store_true")
    parser.set_defaults(usual_rounds=rounds)
    return parser


def parsed(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """The options as given, with the number of rounds settled: quartiles need two."""
    wanted = parser.parse_args(arguments)
    wanted.rounds = max(2, wanted.rounds or (3 if wanted.quick else wanted.usual_rounds))
    return wanted


class Bar(AbstractContextManager["Bar"]):
    """A progress bar on stderr; it is gone when the work is done, and absent where nobody watches."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task("", total=0)

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._progress.stop()

    def expect(self, steps: int) -> None:
        """There are that many steps more."""
        self._progress.update(self._task, total=(self._progress.tasks[0].total or 0) + steps)

    def at(self, description: str) -> None:
        """What is being done now."""
        self._progress.update(self._task, description=description)

    def step(self) -> None:
        """One step is done."""
        self._progress.advance(self._task)


def measure(calls: dict[str, Call], rounds: int, number: int | None = None, bar: Bar | None = None) -> Times:
    """Microseconds a call, one figure a round and way. Every round times all ways, each time in another order.

    ``number``: calls a round; None takes as many of each way as fill 5 ms, and four times the rounds where they are
    short, which are hit harder by what else the machine does. That noise falls on all ways alike.
    """
    timers = {way: timeit.Timer(call) for way, call in calls.items()}
    numbers: dict[str, int] = {}
    length_us = 0.0
    for way, timer in timers.items():
        timer.timeit(number or 1)  # warm
        one = min(timer.repeat(3, 1)) * 1e6 if number is None else 0.0
        numbers[way] = number or max(1, int(SHORTEST_ROUND_US / max(one, 1.0)))
        length_us += numbers[way] * one
    more = 3 * rounds if 0.0 < length_us < SHORT_US else 0
    times: Times = {way: [] for way in calls}
    order = list(calls)
    for round_ in range(rounds + more):
        order.append(order.pop(0))
        for way in order if round_ % 4 < 2 else reversed(order):
            times[way].append(timers[way].timeit(numbers[way]) / numbers[way] * 1e6)
        if bar is not None and round_ < rounds:
            bar.step()
    return times


def first_us(call: Call) -> float:
    """The time of one call that was never made before."""
    return timeit.Timer(call).timeit(1) * 1e6


def formula(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None = None) -> Tensor:
    """Attention in float64 straight from its definition; shares no code with what is timed."""
    query, key, value = (tensor.double() for tensor in (query, key, value))
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    return torch.softmax(scores, dim=-1) @ value


def check_by_formula(name: str, got: Tensor, query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None) -> None:
    """Raise WrongAnswer unless some rows of every head, evenly spread, are those of the formula in float64.

    ``seen``: bool that broadcasts to (B, H, Q, K), every row with a key.
    """
    length = query.shape[-2]
    rows = torch.linspace(0, length - 1, min(CHECKED_ROWS, length)).long()
    if seen is not None and seen.dim() > 1 and seen.shape[-2] > 1:
        seen = seen[..., rows, :]
    check_alike(name, got[..., rows, :], formula(query[..., rows, :], key, value, seen))


def check_alike(name: str, got: Tensor, wanted: Tensor) -> None:
    """Raise WrongAnswer unless the numbers are those wanted, as closely as the dtype of ``got`` can say."""
    if got.shape != wanted.shape:
        raise WrongAnswer(f"{name}: shape {tuple(got.shape)}, not {tuple(wanted.shape)}")
    away = (got.double() - wanted.double()).abs().max().item()
    allowed = TOLERANCE[got.dtype] * max(1.0, wanted.abs().max().item())
    if not away <= allowed:  # NaN is not
        raise WrongAnswer(f"{name}: an answer is {away:.2g} away from the right one, {allowed:.2g} is allowed")


def check_ways(
    calls: dict[str, Call], query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None = None, of: str = ""
) -> None:
    """Raise WrongAnswer unless all ways give one answer, and it is the formula's."""
    first: Tensor | None = None
    for way, call in calls.items():
        name, out = f"{of}: {way}", call()
        check_by_formula(name, out, query, key, value, seen)
        if first is None:
            first = out
        else:
            check_alike(name, out, first)


def machine(*packages: str) -> dict[str, Any]:
    """What the figures depend on; ``packages`` beside torch and heedful."""
    return machine_record(packages=packages)


def finish(name: str, record: dict[str, Any], tables: Iterable[Table], wanted: argparse.Namespace) -> None:
    """Print the tables, or the record as JSON, and save it in the folder wanted, or that of this machine's size."""
    show(record, tables, wanted)
    path = path_of(name, record["machine"], wanted)
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")
    print(f"written to {path}", file=sys.stderr)


def show(record: dict[str, Any], tables: Iterable[Table], wanted: argparse.Namespace) -> None:
    """Print the tables, or the record as JSON."""
    if wanted.json:
        print(json.dumps(record, indent=2, allow_nan=False))
        return
    console = Console()
    for table in tables:
        console.print(table)


def path_of(name: str, machine: dict[str, Any], wanted: argparse.Namespace) -> Path | None:
    """Where a record is saved: in the folder wanted, or that of the GPU, or of the CPU's size; None where nowhere."""
    if wanted.no_save or (wanted.quick and wanted.out is None):
        return None
    device = folder_name(machine["gpu"]) if "gpu" in machine else f"cpu-{machine['cores']}core"
    return (wanted.out or RESULTS / device) / f"{name}.json"
