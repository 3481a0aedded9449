"""Which candidate is fastest, measured ahead of time: every one checked first, then timed in turn, in two windows.

The windows of one class lie apart in time, as those of live calls do: all classes have their first before any has its
second.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch

from heedful.call import mask_of_call
from heedful.dispatch import AttentionDispatcher
from heedful.errors import HeedfulError, InvalidArgument
from heedful.knowledge import strategy_of
from heedful.learning import BEHIND
from heedful.measuring import interleaved, ratio, seconds_of
from heedful.problem import AttentionProblem
from heedful.problem_class import class_of
from heedful.records import APART, Window
from heedful.rows import check_rows
from heedful.select import Plan, worth_timing
from heedful.strategy import Answer
from heedful.timings import this_run
from heedful.tune.inputs import Inputs, inputs_for

Call = Callable[[], Answer]
ALONE = "has no rival"
_WINDOWS, _MOST_WINDOWS = 2, 4
_SHORT = 5e-3  # seconds: shorter calls are hit harder by what else the machine does, and more of them cost little


class Measured(Protocol):
    """What is known of something that is measured in windows; see ``Tuned``."""

    refused: str
    failed: bool
    settled: bool
    measured_at: float


M = TypeVar("M", bound=Measured)
T = TypeVar("T")


@dataclass
class Tuned:
    """What was found for one class. ``usual`` is what auto takes without timing; ``winner`` what it takes from now on.

    ``refused`` says why a class was not measured, ``failed`` that this is a fault; ``wrong`` why a candidate is
    quarantined.
    """

    key: str
    problem: AttentionProblem
    usual: str = ""
    winner: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    refused: str = ""
    measured_at: float = 0.0
    settled: bool = False
    failed: bool = False

    @property
    def gain(self) -> float:
        """How many times as fast the winner is as the usual candidate."""
        known = {self.usual, self.winner} <= self.seconds.keys()  # not so where the usual one is wrong
        return self.seconds[self.usual] / self.seconds[self.winner] if known else 1.0


def tune(
    dispatcher: AttentionDispatcher,
    problems: Iterable[AttentionProblem],
    device: torch.device,
    *,
    rounds: int = 7,
    on_step: Callable[[str], None] = lambda _text: None,
    wait: Callable[[float], None] = time.sleep,
) -> list[Tuned]:
    """Measure one problem of each class, and keep what was found where the dispatcher keeps its times.

    Each class has two windows; those whose windows disagree have more, up to four. ``on_step`` is told what comes next,
    before each window of each class; ``wait`` sleeps so many seconds.
    """
    classes = {class_of(problem): problem for problem in problems}
    tuned = [Tuned(key, problem) for key, problem in classes.items()]
    return in_windows(
        tuned, lambda one: _measure(dispatcher, one, device, rounds), lambda one: on_step(str(one.problem)), wait
    )


def in_windows(
    every: list[M], measure: Callable[[M], None], on_step: Callable[[M], None], wait: Callable[[float], None]
) -> list[M]:
    """Measure each in two windows that lie apart, those that are not settled then in up to four.

    What cannot be measured is refused, with the reason, and keeps no other from it.
    """
    for window in range(_MOST_WINDOWS):
        for one in every:
            if window >= _WINDOWS and (one.settled or one.refused):
                continue
            on_step(one)
            early = one.measured_at + APART - time.time()
            if one.refused:
                continue
            if early > 0:
                wait(early)
            try:
                measure(one)
            except (HeedfulError, RuntimeError) as error:  # a kernel's own, or no memory: the other classes go on
                one.refused = str(error).partition("\n")[0] or type(error).__name__
                one.failed = not isinstance(error, InvalidArgument)  # which says that it cannot be drawn
    return every


@torch.no_grad()
def _measure(dispatcher: AttentionDispatcher, one: Tuned, device: torch.device, rounds: int) -> None:
    given = inputs_for(one.problem, device)
    plan, calls = dispatcher.rivals(*given[:4], **given.words)
    one.key = class_of(plan.problem)
    if len(calls) < 2:
        one.refused = f"{next(iter(calls))} {ALONE}" if worth_timing(one.problem) else "too small to matter"
        return
    one.usual = one.usual or plan.contenders[0].label
    sound = _sound(dispatcher, one, plan, given, near(calls, one.seconds))
    if not sound:
        one.refused, one.failed = "every candidate is wrong", True
        return
    times = times_of(sound, device, rounds)
    window = Window(ended=time.time(), run=this_run(), seconds=times, turns=rounds)
    one.measured_at = window.ended
    record = dispatcher.experience.add_window(plan.problem, device, window)
    one.seconds = dict(record.seconds())
    one.settled = record.winner() is not None
    one.winner = record.winner() or min(one.seconds, key=one.seconds.__getitem__)


def _sound(
    dispatcher: AttentionDispatcher, one: Tuned, plan: Plan, given: Inputs, calls: Mapping[str, Call]
) -> dict[str, Call]:
    """The candidates whose answers are right; the strategies of the others are quarantined."""
    words = {name: given.words[name] for name in ("is_causal", "causal_alignment", "window")}
    mask = mask_of_call(attn_mask=given.attn_mask, **words)
    for label, call in calls.items():
        exact = dispatcher.factory.create_strategy(strategy_of(label)).exactness == "exact"
        bound = None if exact else plan.problem.max_error
        verdict = check_rows(plan.problem, *given[:3], mask, call(), max_error=bound)
        if not verdict.right:
            one.wrong[label] = verdict.fault
            dispatcher.experience.quarantine(plan.problem, strategy_of(label), verdict.fault)
    out = {strategy_of(label) for label in one.wrong}
    return {label: call for label, call in calls.items() if strategy_of(label) not in out}


def near(calls: Mapping[str, T], seconds: Mapping[str, float]) -> dict[str, T]:
    """Those that are not clearly behind by these times; all, where there are none."""
    least = min(seconds.values(), default=math.inf)
    return {label: call for label, call in calls.items() if seconds.get(label, 0.0) <= BEHIND * least}


def times_of(calls: Mapping[str, Call], device: torch.device, rounds: int) -> dict[str, float]:
    """The medians of those that are near the fastest; of the others what one call says. All were called before.

    Those that are near are compared within each round: a machine that changes its pace changes it for all of a round.
    """
    rough = {label: seconds_of(call, device) for label, call in calls.items()}
    close = near(calls, rough)
    first = min(rough, key=rough.__getitem__)
    times = interleaved(close, device, 3 * rounds if rough[first] < _SHORT else rounds, rough=rough)
    pace = statistics.median(times[first])
    return {**rough, **{label: pace * ratio(times, label, first) for label in close}}
