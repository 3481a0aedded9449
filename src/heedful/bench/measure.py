"""Measuring: each backend explained, called once and judged; those that are right are timed in rounds, side by side.

What is wrong gets no time. Neither does what refuses, what takes too long, and what breaks, each with its reason.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch.nn.functional import scaled_dot_product_attention

from heedful.bench.work import CHECKED_ROWS, Drawn, Judge, Work
from heedful.dispatch import AttentionDispatcher
from heedful.errors import Refused
from heedful.measuring import Figures, Matmul, Times, interleaved, peak_bytes, seconds_of, spoken, synchronise

BASE_LINE = "torch"
NEEDED_ROUNDS = 2  # for quartiles
Status = Literal["right", "wrong", "refused", "skipped", "failed"]
_LONGEST_FIRST_CALL = 60.0  # seconds; a first call may compile, so a second one tells how long it takes
_MARGIN = 4.0  # what would take so many times too long at the best rate seen is not tried
_COMPARABLE = 100  # a rate says something about works of up to so many times the flops
_MATMUL = "a plain matmul"


@dataclass(frozen=True)
class Row:
    """What became of one backend on one work; the figures are None unless ``status`` is "right".

    ``ran``: the strategy that ran, after the rewrites ``steps``. ``faster``: how many times as fast as torch's SDPA.
    ``rate``: useful flops a second; ``share``: its share of a matmul's. ``error``: the largest difference from the
    formula, also told of a wrong answer. ``reason``: why there are no figures.
    """

    backend: str
    status: Status
    reason: str = ""
    ran: str = ""
    steps: tuple[str, ...] = ()
    exactness: str = "exact"
    figures: Figures | None = None
    rounds: int = 0
    faster: float | None = None
    rate: float | None = None
    share: float | None = None
    peak_bytes: int | None = None
    error: float | None = None
    allowed: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON data, in milliseconds and TFLOP/s."""
        figures = self.figures
        return {
            "backend": self.backend,
            "status": self.status,
            "reason": self.reason or None,
            "ran": self.ran or None,
            "lowerings": list(self.steps),
            "exactness": self.exactness,
            "median_ms": None if figures is None else figures.median * 1e3,
            "spread_ms": None if figures is None else figures.spread * 1e3,
            "rounds": self.rounds,
            "times_as_fast_as_torch": self.faster,
            "tflops": None if self.rate is None else self.rate / 1e12,
            "share_of_matmul": self.share,
            "peak_bytes": self.peak_bytes,
            "max_abs_error": self.error,
            "allowed_error": self.allowed,
        }


@dataclass(frozen=True)
class Group:
    """A work and its rows: those that are right first, the fastest first of all.

    ``matmul``: flops a second of a plain matmul in the fastest of the same rounds; None where there were none.
    """

    work: Work
    useful_flops: int
    rows: tuple[Row, ...]
    matmul: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        case = self.work.case
        sizes = ("batch", "heads", "kv_heads", "query_length", "key_length", "head_dim", "value_dim")
        return {
            "case": case.name,
            "model": case.model,
            "mask": self.work.mask,
            "kept_keys": case.kept_keys,
            "dtype": str(self.work.dtype).removeprefix("torch."),
            "shape": {name: size for name, size in asdict(case).items() if name in sizes},
            "useful_flops": self.useful_flops,
            "matmul_tflops": None if self.matmul is None else self.matmul / 1e12,
            "rows": [row.to_dict() for row in self.rows],
        }


def _unheard(doing: str, steps: int) -> None:
    """Nobody listens."""


@dataclass
class Run:
    """One run: on a device, by backends (``torch`` is plain SDPA), in so many rounds.

    ``most_seconds``: a backend whose call takes longer is skipped, and its rounds on one work end about there, too.
    ``on_step``: told what is being done, and how many of the ``steps_of_a_work`` are done with it. ``interrupted``:
    whether the run ended early.
    """

    device: torch.device
    backends: tuple[str, ...]
    rounds: int
    most_seconds: float
    dispatcher: AttentionDispatcher
    on_step: Callable[[str, int], None] = _unheard
    interrupted: bool = False
    _matmuls: dict[torch.dtype, Matmul] = field(default_factory=dict)
    _seen: list[tuple[torch.dtype, int, float]] = field(default_factory=list)  # dtype, flops and rate of a call
    _too_slow: dict[tuple[str, torch.dtype], tuple[int, str]] = field(default_factory=dict)

    @property
    def steps_of_a_work(self) -> int:
        """One for each backend that is checked, and one for each round."""
        return len(self.backends) + self.rounds

    def groups(self, works: Iterable[Work]) -> Iterator[Group]:
        """The groups, as they are done; Ctrl-C ends them with what was measured of the group at hand."""
        try:
            for work in works:
                self.on_step(f"{work}: drawing", 0)
                if work.dtype not in self._matmuls:
                    self._matmuls[work.dtype] = Matmul.of(work.dtype, self.device)
                yield self._group(work)
                if self.interrupted:
                    return
        except KeyboardInterrupt:
            self.interrupted = True

    def _group(self, work: Work) -> Group:
        reason = ""
        if work.case.gpu_only and self.device.type == "cpu":
            reason = "it is for GPUs: over 2e12 flops, or over 2 GB in float32"
        else:
            try:
                with torch.no_grad():
                    drawn = work.drawn(self.device)
                    return self._measured(drawn, Judge(drawn))
            except torch.OutOfMemoryError as error:
                reason = _out_of_memory(error)
        self.on_step(f"{work}: skipped", self.steps_of_a_work)
        return Group(work, work.expected_flops, tuple(Row(name, "skipped", reason) for name in self.backends))

    def _hopeless(self, name: str, work: Work) -> str:
        """Why a backend is not even tried, because of what this run has seen; "" where it is."""
        flops, dtype = work.expected_flops, work.dtype
        fewest, reason = self._too_slow.get((name, dtype), (math.inf, ""))
        if flops >= fewest:
            return reason
        best = max((rate for of, base, rate in self._seen if of == dtype and base * _COMPARABLE >= flops), default=0.0)
        if not best or flops / best <= _MARGIN * self.most_seconds:
            return ""
        return (
            f"not tried: at the best rate seen, {best / 1e12:.3g} TFLOP/s, a call would take {spoken(flops / best)}, "
            f"and --max-seconds is {self.most_seconds:g}"
        )

    def _measured(self, drawn: Drawn, judge: Judge) -> Group:
        title, flops = str(drawn.work), drawn.useful_flops()
        calls = {name: self._call(name, drawn) for name in self.backends}
        rows = {name: Row(name, "skipped", "interrupted before its turn") for name in self.backends}
        times, early = Times(), "interrupted before its rounds"
        try:
            for name, call in calls.items():
                self.on_step(f"{title}: checking {name}", 0)
                rows[name] = self._tried(name, call, drawn, judge)
                self.on_step(title, 1)
            right = {name: call for name, call in calls.items() if rows[name].status == "right"}
            self._time({**right, _MATMUL: self._matmuls[drawn.work.dtype].call} if right else {}, times, title)
            for name, call in right.items():
                self.on_step(f"{title}: memory of {name}", 0)
                rows[name] = self._with_memory(rows[name], call, judge)
        except KeyboardInterrupt:
            self.interrupted = True
        except RuntimeError as error:  # a kernel that broke after it had given a right answer
            early = f"the rounds ended early: {_told(error)}"
        matmul = self._matmul_rate(drawn.work, times)
        done = [self._with_figures(row, times, drawn.work, flops, matmul, early) for row in rows.values()]
        return Group(drawn.work, flops, tuple(sorted(done, key=_order)), matmul)

    def _call(self, name: str, drawn: Drawn) -> Callable[[], object]:
        """One call of a backend, with all that a user's call costs."""
        arguments = drawn.arguments
        if name == BASE_LINE:
            return lambda: scaled_dot_product_attention(**arguments)
        attend = self.dispatcher.attention
        return lambda: attend(**arguments, backend=name)

    def _tried(self, name: str, call: Callable[[], object], drawn: Drawn, judge: Judge) -> Row:
        """A row without figures: "right" where they may be measured."""
        work = drawn.work
        row = self._explained(name, drawn)
        if row.status != "right":
            return row
        if reason := self._hopeless(name, work):
            return replace(row, status="skipped", reason=reason)
        try:
            started = time.perf_counter()
            answer = call()
            synchronise(self.device)
            seconds = time.perf_counter() - started
            judged = judge(answer, exact=row.exactness == "exact")
            del answer
            row = replace(row, error=judged.error, allowed=judged.allowed)
            if judged.fault:
                return replace(row, status="wrong", reason=judged.fault)
            if self.most_seconds < seconds <= _LONGEST_FIRST_CALL:
                seconds = seconds_of(call, self.device)
        except Exception as error:  # whatever a kernel raises is its row's text, and the others go on
            return replace(row, **broken(error))
        self._seen.append((work.dtype, work.expected_flops, work.expected_flops / seconds))
        if seconds > self.most_seconds:
            reason = f"one call takes {spoken(seconds)}, and --max-seconds is {self.most_seconds:g}"
            told = f"not tried: on {work.case.name}, which has no more flops, {reason}"
            self._too_slow[name, work.dtype] = (work.expected_flops, told)
            return replace(row, status="skipped", reason=reason)
        return row

    def _explained(self, name: str, drawn: Drawn) -> Row:
        """What would run, or why nothing does."""
        if name == BASE_LINE:
            return Row(name, "right", ran="SDPA")
        plan = self.dispatcher.explain(**drawn.arguments, backend=name)
        if plan.chosen is None:
            reasons = dict.fromkeys(str(reason) for verdict in plan.verdicts for reason in verdict.refusals)
            return Row(name, "refused", "; ".join(reasons))
        exactness = self.dispatcher.factory.create_strategy(plan.chosen.name).exactness
        steps = tuple(step.name for step in plan.chosen.steps)
        return Row(name, "right", ran=plan.backend, steps=steps, exactness=exactness)

    def _time(self, calls: dict[str, Callable[[], object]], times: Times, title: str) -> None:
        def told() -> None:
            self.on_step(title, 1)

        self.on_step(f"{title}: timing", 0)
        if calls:
            interleaved(calls, self.device, self.rounds, on_round=told, most_seconds=self.most_seconds, times=times)
        else:
            self.on_step(title, self.rounds)

    def _with_memory(self, row: Row, call: Callable[[], object], judge: Judge) -> Row:
        """One untimed call more: what it holds, and whether the answer is still right after all those rounds."""
        answers = []
        held = peak_bytes(lambda: answers.append(call()), self.device)
        judged = judge(answers.pop(), exact=row.exactness == "exact")
        if judged.fault:
            return replace(row, status="wrong", reason=f"after the rounds: {judged.fault}", error=judged.error)
        return replace(row, peak_bytes=held)

    def _matmul_rate(self, work: Work, times: Times) -> float | None:
        rounds = times.get(_MATMUL, [])
        return self._matmuls[work.dtype].flops / min(rounds) if rounds else None

    def _with_figures(self, row: Row, times: Times, work: Work, flops: int, matmul: float | None, early: str) -> Row:
        rounds = times.get(row.backend, [])
        if row.status != "right":
            return row
        if len(rounds) < NEEDED_ROUNDS:
            return replace(row, status="skipped" if self.interrupted else "failed", reason=early)
        figures, base = Figures.of(rounds), times.get(BASE_LINE, [])
        rate = flops / figures.median
        self._seen.append((work.dtype, work.expected_flops, work.expected_flops / figures.median))
        return replace(
            row,
            figures=figures,
            rounds=len(rounds),
            faster=Figures.of(base).median / figures.median if len(base) >= NEEDED_ROUNDS else None,
            rate=rate,
            share=rate / matmul if matmul else None,
        )

    def record(self, groups: Iterable[Group], machine: dict[str, Any]) -> dict[str, Any]:
        """The whole run as JSON data."""
        groups = list(groups)
        rows = [row for group in groups for row in group.rows]
        return {
            "machine": machine,
            "settings": {
                "device": str(self.device),
                "backends": list(self.backends),
                "rounds": self.rounds,
                "max_seconds": self.most_seconds,
                "checked_rows": CHECKED_ROWS,
            },
            "interrupted": self.interrupted,
            "wrong": sum(row.status == "wrong" for row in rows),
            "failed": sum(row.status == "failed" for row in rows),
            "groups": [group.to_dict() for group in groups],
        }


def _order(row: Row) -> tuple[int, float]:
    place = ("right", "wrong", "failed", "refused", "skipped").index(row.status)
    return place, row.figures.median if row.figures else 0.0


def broken(error: Exception) -> dict[str, Any]:
    """The status and reason of a row whose call raised: refused, out of memory and so skipped, or failed."""
    if isinstance(error, Refused):
        reasons = dict.fromkeys(str(reason) for one in error.refusals.values() for reason in one)
        return {"status": "refused", "reason": "; ".join(reasons)}
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error):
        return {"status": "skipped", "reason": _out_of_memory(error)}
    return {"status": "failed", "reason": _told(error)}


def _out_of_memory(error: Exception) -> str:
    return f"out of memory: {_told(error)}"


def _told(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no text'}"
