"""Measuring one call of ``kernels.py``: each backend bound to its copies, judged, then timed in rounds with the others.

What is wrong gets no time, nor does what refuses, breaks, or takes too long: each with its reason.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from kernel_cases import Drawn, Work
from kernel_checks import Gradients, Judgement, judged
from roofline import Roof, copies_beyond
from torch import Tensor

from heedful import AttentionDispatcher
from heedful.bench.measure import broken
from heedful.measuring import Figures, Matmul, Times, interleaved, seconds_of, spoken, synchronise
from heedful.strategies.triton import TritonKernelStrategy
from heedful.strategy import AttentionStrategy

MATMUL = "a plain matmul"
FIRST_SECONDS = 120.0  # of all first calls of a backend that is not ours
Call = Callable[[], object]


class DeviceBroken(RuntimeError):
    """A kernel has broken the device for this process: nothing can be measured any more."""


def is_ours(strategy: AttentionStrategy) -> bool:
    """Whether it runs our own Triton kernels."""
    return isinstance(strategy, TritonKernelStrategy)


@dataclass(frozen=True)
class Row:
    """What became of one backend on one call; times only where ``status`` is "right".

    ``units``: how far the answer is from the formula, in units of what is allowed.
    """

    backend: str
    ours: bool
    exactness: str
    status: str = "right"
    reason: str = ""
    steps: tuple[str, ...] = ()
    units: float | None = None
    figures: Figures | None = None
    rounds: int = 0
    rate: float | None = None
    of_roof: float | None = None
    of_matmul: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON data, in microseconds and TFLOP/s."""
        return {
            "backend": self.backend,
            "ours": self.ours,
            "exactness": self.exactness,
            "status": self.status,
            "reason": self.reason or None,
            "lowerings": list(self.steps),
            "error_in_units_of_allowed": self.units if self.units is not None and math.isfinite(self.units) else None,
            "median_us": None if self.figures is None else self.figures.median * 1e6,
            "spread_us": None if self.figures is None else self.figures.spread * 1e6,
            "rounds": self.rounds,
            "tflops": None if self.rate is None else self.rate / 1e12,
            "share_of_roofline": self.of_roof,
            "share_of_matmul": self.of_matmul,
        }


@dataclass
class Ready:
    """A backend that gave the right answer: its calls, one for each copy, and how to judge an answer to the first."""

    strategy: AttentionStrategy
    calls: list[Call]
    judge: Callable[[Any], Judgement]

    def turning(self) -> Call:
        """One call, through the copies in turn."""
        turns = itertools.cycle(self.calls)
        return lambda: next(turns)()


@dataclass
class Bench:
    """One run on one device. ``backends``: names of the registry; ``least_seconds``: of a round, of each of them."""

    device: torch.device
    backends: tuple[str, ...]
    rounds: int
    dispatcher: AttentionDispatcher
    roof: Roof = field(default_factory=Roof)
    cached: int = 0
    room: int = 1 << 30
    most_seconds: float = 0.2
    least_seconds: float = 0.005
    at: Callable[[str], None] = lambda _: None
    _matmuls: dict[torch.dtype, Matmul] = field(default_factory=dict)
    _too_slow: dict[tuple[str, str], tuple[int, str]] = field(default_factory=dict)
    _first_seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def measured(self, work: Work) -> dict[str, Any]:
        """A call's part of the record. Raises DeviceBroken."""
        try:
            copies = self._copies(work)
            return self._of_copies(work, copies)
        except torch.OutOfMemoryError as error:
            rows = [replace(self._row(name), **broken(error)) for name in self.backends]
            return {**work.to_dict(), "flops": None, "copies": 0, "rows": [row.to_dict() for row in rows]}

    def _copies(self, work: Work) -> list[Drawn]:
        self.at(f"{work.name}: drawing")
        torch.compiler.reset()  # after eight shapes a compiled function is run uncompiled from there on (torch 2.13)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        first = Drawn.of(work, self.device, 0)
        number = copies_beyond(self.cached, first.input_bytes, self.room)
        return [first, *(Drawn.of(work, self.device, seed, first) for seed in range(1, number))]

    def _of_copies(self, work: Work, copies: list[Drawn]) -> dict[str, Any]:
        with torch.set_grad_enabled(work.direction == "backward"):
            judging = Judging.of(copies)
            tried = {name: self._tried(name, work, judging) for name in self.backends}
            ready = {name: found for name, (_, found) in tried.items() if found is not None}
            rows = {name: row for name, (row, _) in tried.items()}
            times, fault = self._timed(work, ready)
            for name, one in ready.items():  # an answer that was right once may not stay so
                rows[name] = self._again(name, rows[name], one, work)
        flops = copies[0].flops
        roof, matmul = self.roof.at(flops, copies[0].moved), self._matmul_rate(work, times)
        done = [_with_figures(row, times.get(name, []), flops, roof, matmul, fault) for name, row in rows.items()]
        return {
            **work.to_dict(),
            "flops": flops,
            "bytes": copies[0].moved,
            "copies": len(copies),
            "roofline_tflops": None if roof is None else roof / 1e12,
            "matmul_tflops": None if matmul is None else matmul / 1e12,
            "rows": [row.to_dict() for row in sorted(done, key=_order)],
        }

    def _row(self, name: str) -> Row:
        strategy = self.dispatcher.factory.create_strategy(name)
        return Row(name, is_ours(strategy), strategy.exactness)

    def _tried(self, name: str, work: Work, judging: Judging) -> tuple[Row, Ready | None]:
        """A row, and the calls of a backend that gave the right answer and is to be timed."""
        self.at(f"{work.name}: {name}")
        row, flops = self._row(name), judging.copies[0].flops
        if reason := self._hopeless(row, work, flops):
            return replace(row, status="skipped", reason=reason), None
        started = time.perf_counter()
        try:
            strategy = self.dispatcher.factory.create_strategy(name)
            runs, steps = self._runs(name, judging.copies)
            row = replace(row, steps=steps)
            ready, judgement = judging.ready(strategy, runs)
            row = replace(row, units=judgement.units)
            if judgement.fault:
                return replace(row, status="wrong", reason=judgement.fault), None
            seconds = seconds_of(ready.calls[-1], self.device)
        except Exception as error:  # whatever a kernel raises is its row's text, and the others go on
            self._check_device(name, work, error)
            return replace(row, **broken(error)), None
        finally:
            self._first_seconds[name] += time.perf_counter() - started
        if seconds > self.most_seconds:
            reason = f"one call takes {spoken(seconds)}, at most {spoken(self.most_seconds)} is waited for"
            self._too_slow[name, work.direction] = (flops, f"not tried: on {work.name}, {reason}")
            return replace(row, status="skipped", reason=reason), None
        return row, ready

    def _runs(self, name: str, copies: Iterable[Drawn]) -> tuple[list[Call], tuple[str, ...]]:
        """A backend's plan bound to each copy, and the rewrites in it. Raises Refused."""
        runs: list[Call] = []
        steps: tuple[str, ...] = ()
        for drawn in copies:
            plan, every = self.dispatcher.rivals(*drawn.tensors, backend=name, **drawn.arguments)
            assert plan.chosen is not None
            runs.append(every[plan.chosen.label])
            steps = tuple(step.name for step in plan.chosen.steps)
        return runs, steps

    def _hopeless(self, row: Row, work: Work, flops: int) -> str:
        """Why a backend is not even tried; "" where it is."""
        fewest, reason = self._too_slow.get((row.backend, work.direction), (flops + 1, ""))
        if flops >= fewest:
            return reason
        spent = self._first_seconds[row.backend]
        if not row.ours and spent > FIRST_SECONDS:
            return f"not tried: its first calls have taken {spoken(spent)}, most of them in compiling"
        return ""

    def _timed(self, work: Work, ready: dict[str, Ready]) -> tuple[Times, str]:
        """Seconds a call of each way and round, and what ended the rounds early."""
        self.at(f"{work.name}: timing")
        times: Times = {}
        if not ready:
            return times, ""
        if work.dtype not in self._matmuls:
            self._matmuls[work.dtype] = Matmul.of(work.dtype, self.device)
        calls = {MATMUL: self._matmuls[work.dtype].call, **{name: one.turning() for name, one in ready.items()}}
        try:
            interleaved(calls, self.device, self.rounds, self.least_seconds, times=times)
        except RuntimeError as error:  # a kernel that had given a right answer
            self._check_device("one of the backends", work, error)
            return times, f"the rounds ended early: {broken(error)['reason']}"
        return times, ""

    def _again(self, name: str, row: Row, one: Ready, work: Work) -> Row:
        try:
            judgement = one.judge(one.calls[0]())
        except Exception as error:
            self._check_device(name, work, error)
            return replace(row, **broken(error))
        return replace(row, status="wrong", reason=f"after the rounds: {judgement.fault}") if judgement.fault else row

    def _check_device(self, name: str, work: Work, error: Exception) -> None:
        try:
            synchronise(self.device)
        except RuntimeError as fault:
            raise DeviceBroken(f"{name} broke the device on {work.name}: {error}") from fault

    def _matmul_rate(self, work: Work, times: Times) -> float | None:
        rounds = times.get(MATMUL, [])
        return self._matmuls[work.dtype].flops / min(rounds) if rounds else None


@dataclass(frozen=True)
class Judging:
    """The copies of a call, and the right gradients of the first where the backward pass is measured."""

    copies: list[Drawn]
    upstream: Tensor | None
    gradients: Gradients | None

    @classmethod
    def of(cls, copies: list[Drawn]) -> Judging:
        first = copies[0]
        if first.work.direction == "forward":
            return cls(copies, None, None)
        shape = (*first.query.shape[:-1], first.work.case.value_dim)
        draw = torch.Generator(device=first.query.device).manual_seed(7)
        upstream = torch.randn(shape, generator=draw, device=first.query.device).to(first.query.dtype)
        return cls(copies, upstream, Gradients(first, upstream))

    def ready(self, strategy: AttentionStrategy, runs: list[Call]) -> tuple[Ready, Judgement]:
        """What is to be timed, with the judgement on the first copy's answer and gradients."""
        first = self.copies[0]
        if self.gradients is None:
            one = Ready(strategy, runs, lambda answer: judged(first, answer, strategy))
            return one, one.judge(runs[0]())
        gradients, answers = self.gradients, [run() for run in runs]
        judgement = judged(first, answers[0], strategy)
        calls = [self._backward(drawn, answer) for drawn, answer in zip(self.copies, answers, strict=True)]
        one = Ready(strategy, calls, lambda found: gradients.judged(found, strategy))
        return one, judgement if judgement.fault else one.judge(calls[0]())

    def _backward(self, drawn: Drawn, answer: Any) -> Call:
        return lambda: torch.autograd.grad(answer, drawn.tensors, self.upstream, retain_graph=True)


def _with_figures(
    row: Row, rounds: list[float], flops: int, roof: float | None, matmul: float | None, fault: str
) -> Row:
    if row.status != "right":
        return row
    if len(rounds) < 2:
        return replace(row, status="failed", reason=fault or "it was not timed")
    figures = Figures.of(rounds)
    rate = flops / figures.median
    shares = (rate / roof if roof else None), (rate / matmul if matmul else None)
    return replace(row, figures=figures, rounds=len(rounds), rate=rate, of_roof=shares[0], of_matmul=shares[1])


def _order(row: Row) -> tuple[bool, float]:
    return row.figures is None, row.figures.median if row.figures else 0.0
