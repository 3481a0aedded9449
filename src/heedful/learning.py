"""Learning from live calls which candidate is fastest: each takes its turn on real calls, nothing is computed twice.

A class of problems is learnt in windows. In a window every candidate has one turn that is not timed (kernels compile,
memory is allocated), then timed turns, in rotation; one that is clearly behind is dropped after its first timed turn.
The fastest holds from then on. A second window, some time later, repeats the measurement with those that were near: a
busy minute can invert a ranking. Where windows agree the winner is fixed and stored; after a bounded number it is fixed
all the same.

Not learnt are calls with gradient or dropout, deterministic or compiled ones, small ones (``select.worth_timing``),
and those above 100 ms, where every turn of a slow candidate would be felt: ``heedful tune`` measures them ahead.
"""

from __future__ import annotations

import itertools
import logging
import os
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from torch import Tensor

from heedful.binding import Run
from heedful.clock import DEVICES, Reading, timed
from heedful.errors import HeedfulError
from heedful.guard import can_be_checked
from heedful.knowledge import strategy_of
from heedful.problem import AttentionProblem
from heedful.records import APART, Window, settled
from heedful.strategy import Answer
from heedful.tally import Tally
from heedful.timings import this_run

_log = logging.getLogger("heedful")
TIMED_TURNS = 5  # of each candidate in a window
BEHIND = 1.5  # times as slow as the fastest: dropped
_SLOW = 0.1  # seconds a call, from which on nothing is tried on live calls
_MOST_WINDOWS = 4
_MOST_DELAYS = 3  # a call that was slow once may have met a busy machine
NEAR = 0.03  # the one chosen without timing stays unless another is faster by more


def worth_learning(problem: AttentionProblem) -> bool:
    """Whether live calls of such a problem may be learnt from, apart from its size."""
    held = problem.needs_grad or problem.dropout_p or problem.deterministic or problem.compiling
    return not held and problem.device in DEVICES


class Course:
    """What is being learnt about one class of problems. ``labels``: the candidates, the usual one first.

    ``earlier``: windows of other processes. ``best`` is the label to use meanwhile; ``over`` once nothing is tried any
    more. ``keep`` is handed each window as it ends.
    """

    def __init__(
        self,
        labels: tuple[str, ...],
        keep: Callable[[Window], None],
        earlier: tuple[Window, ...] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.labels, self.keep, self.clock = labels, keep, clock
        self.best, self.over = labels[0], False
        self.windows: list[Window] = []
        self._earlier = earlier
        self._resumes = 0.0
        self._delays = 0
        self._lock = threading.Lock()
        self._open(labels)

    def _open(self, labels: tuple[str, ...]) -> None:
        self._alive = list(labels)
        self._given = dict.fromkeys(labels, 0)
        self._times: dict[str, list[float]] = {label: [] for label in labels}
        self._waiting: list[tuple[str, Reading]] = []

    @property
    def seconds(self) -> Mapping[str, float]:
        """The least median of each candidate so far."""
        found: dict[str, float] = {}
        for window in (*self._earlier, *self.windows):
            for label, seconds in window.seconds.items():
                found[label] = min(seconds, found.get(label, seconds))
        return found

    def turn(self) -> tuple[str, bool] | None:
        """Whose turn it is, and whether it is to be timed; None where nothing is tried at this call."""
        if self.over or self.clock() < self._resumes or not self._lock.acquire(blocking=False):
            return None
        try:
            self._read()
            if self.over or self.clock() < self._resumes:
                return None
            usual = self.labels[0]
            label = usual if self._given.get(usual, 9) < 2 else min(self._alive, key=self._given.__getitem__)
            if self._given[label] > TIMED_TURNS:  # all have had theirs; the device is behind
                return None
            self._given[label] += 1
            return label, self._given[label] > 1
        finally:
            self._lock.release()

    def give_back(self, label: str) -> None:
        """A turn that was to be timed was not."""
        with self._lock:
            self._given[label] = self._given.get(label, 1) - 1

    def took(self, label: str, reading: Reading) -> None:
        """A timed turn is on its way."""
        with self._lock:
            self._waiting.append((label, reading))
            self._read()

    def drop(self, strategy: str) -> None:
        """A strategy gave a wrong answer: its candidates are out."""
        with self._lock:
            self._alive = [label for label in self._alive if strategy_of(label) != strategy]
            self.over = self.over or len(self._alive) < 2
            if strategy_of(self.best) == strategy:
                self.best = self._alive[0] if self._alive else self.labels[0]

    def _read(self) -> None:
        """Take what times have become known, drop who is behind, and close the window when all had their turns."""
        still = []
        for label, reading in self._waiting:
            seconds = reading()
            if seconds is None:
                still.append((label, reading))
            elif label in self._times:
                self._times[label].append(seconds)
        self._waiting = still
        medians = {label: statistics.median(times) for label, times in self._times.items() if times}
        if not medians:
            return
        if medians.get(self.labels[0], 0.0) > _SLOW:
            self._put_off()
            return
        least = min(medians.values())
        self._alive = [label for label in self._alive if medians.get(label, 0.0) <= BEHIND * least]
        if not still and all(len(self._times[label]) >= TIMED_TURNS for label in self._alive):
            self._close(medians)

    def _put_off(self) -> None:
        """The usual candidate is too slow to try others beside it: look again later, and in the end no more."""
        self._delays += 1
        self.over = self._delays >= _MOST_DELAYS
        self._resumes = self.clock() + APART
        self._open(self.labels)

    def _close(self, medians: dict[str, float]) -> None:
        window = Window(ended=time.time(), run=this_run(), seconds=medians, turns=TIMED_TURNS)
        self.windows.append(window)
        self.best = fastest(medians, self.labels[0])
        every = (*self._earlier, *self.windows)
        winner = settled(every)
        if winner is not None or len(self.windows) >= _MOST_WINDOWS or len(self.labels) == 1:
            self.best, self.over = winner or fastest(self.seconds, self.labels[0]), True
        self.keep(window)
        self._resumes = self.clock() + APART
        self._open(tuple(self._alive))


class LiveRun:
    """The function of a kind of call while its class is being learnt.

    ``bound`` gives a candidate's function as the guard watches it, with its ``tally`` and, ``bare``, what a timed turn
    calls. ``guarded``: no turn is timed before the guard has found the candidate right. ``done`` is called when nothing
    is left to learn.
    """

    def __init__(
        self, course: Course, bound: Callable[[str], Run], done: Callable[[LiveRun], None], *, guarded: bool = True
    ) -> None:
        self.course, self._bound, self._done, self._guarded = course, bound, done, guarded
        self._runs: dict[str, Run] = {}

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any) -> Answer:
        """One call, by whose turn it is."""
        return self.pick(query, key, value)(query, key, value, attn_mask)

    def pick(self, query: Tensor, key: Tensor, value: Tensor, *_mask: Any) -> Run:
        """The function for this call."""
        turn = self.course.turn() if can_be_checked(query, key, value) else None
        if turn is None:
            if self.course.over:
                self._done(self)
            return self._of(self.course.best)
        label, timed_one = turn
        warm = label in self._runs
        watched = self._of(label)
        tally: Tally = watched.tally  # type: ignore[attr-defined]
        unchecked = self._guarded and (not tally.trust.checks or bool(tally.trust.fault))
        if timed_one and (not warm or unchecked):  # another kind of call of this class had the turn that warms up
            self.course.give_back(label)
            timed_one = False
        run = self._timed(label, watched) if timed_one else watched
        return self._daring(label, run, tally) if label != self.course.labels[0] else run

    def _timed(self, label: str, watched: Run) -> Run:
        """A turn that is timed: counted, and not looked at by the guard."""
        tally: Tally = watched.tally  # type: ignore[attr-defined]
        bare: Run = watched.bare  # type: ignore[attr-defined]

        def timed_turn(*operands: Any) -> Answer:
            try:
                answer, reading = timed(partial(bare, *operands), operands[0].device)
            except BaseException:
                self.course.give_back(label)
                raise
            tally.count()
            self.course.took(label, reading)
            return answer

        timed_turn.tally = tally  # type: ignore[attr-defined]
        return timed_turn

    def _daring(self, label: str, run: Run, tally: Tally) -> Run:
        """A turn of a candidate that nobody asked for: if its kernel raises, it is out, and the usual one computes."""

        def turn(*operands: Any) -> Answer:
            try:
                return run(*operands)
            except HeedfulError:
                self.course.drop(strategy_of(label))
                raise
            except Exception as error:
                self.course.drop(strategy_of(label))
                usual = self.course.labels[0]
                _log.warning("heedful: %s raised %r and is not tried any more; %s computes", label, error, usual)
                return self._of(usual)(*operands)

        turn.tally = tally  # type: ignore[attr-defined]
        return turn

    def _of(self, label: str) -> Run:
        if label not in self._runs:
            self._runs[label] = self._bound(label)
        return self._runs[label]


def fastest(seconds: Mapping[str, float], usual: str) -> str:
    """The label with the least time; the usual one unless another is faster by more than noise."""
    least = min(seconds, key=seconds.__getitem__)
    return usual if seconds.get(usual, float("inf")) * (1 - NEAR) <= seconds[least] else least


class Writer:
    """Writes to the store behind the calls' backs, in order; the interpreter waits for it at its end."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._process = 0
        self._lock = threading.Lock()

    def finish(self) -> None:
        """Wait until all is written."""
        if self._thread is not None and self._process == os.getpid():
            self._thread.submit(int).result()

    def submit(self, write: Callable[[], object]) -> None:
        """Do it soon. At the interpreter's end, when no thread may start any more, do it now."""
        with self._lock:
            if self._thread is None or self._process != os.getpid():  # a fork has no threads
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="heedful-timings")
                self._process = os.getpid()
        try:
            self._thread.submit(write)
        except RuntimeError:
            write()


_told = itertools.count()


def announce() -> None:
    """Say once that learning goes on."""
    if next(_told) == 0:
        _log.info(
            "heedful: auto tries its candidates on live calls until the fastest is known, so the last bits may differ "
            "between calls; heedful.freeze(), a lock or HEEDFUL_TUNE=off stops that"
        )
