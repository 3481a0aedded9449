"""One verification: the jobs, each in workers of its own, some at a time, and what is collected of them.

A worker that crashes or hangs costs the check it was at: another one goes on behind it. Ctrl-C ends the run with what
was found until then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from heedful.dispatch import AttentionDispatcher
from heedful.problem import problem_for_shapes
from heedful.refusal import Refusal
from heedful.testing.subject import MACHINE
from heedful.verify.child import Child
from heedful.verify.features import NAMES, WHOLE
from heedful.verify.job import Job
from heedful.verify.record import OUTCOMES, START, Column

MOST_ENDS = 5  # crashed or hung workers of a backend, after which the rest of its checks is left
STARTED = {"check": START, "sample": None, "aspect": START, "features": [WHOLE]}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FORMAT = 1
_PATIENCE = 0.2  # seconds between looks at Ctrl-C, where waiting alone would not see it


def _unheard(doing: str, steps: int) -> None:
    """Nobody listens."""


def _unplanned(steps: int) -> None:
    """Nor here."""


def lacking(dispatcher: AttentionDispatcher, name: str, device: torch.device) -> tuple[Refusal, ...]:
    """What a machine lacks for a backend, whatever the call; empty where it may run. Nothing is imported or tried."""
    found: list[tuple[Refusal, ...]] = []
    for dtype in _DTYPES:
        shape = (1, 2, 16, 64)
        place = dispatcher.facts.device(device)
        problem = problem_for_shapes(shape, shape, shape, dtype=dtype, device=place)
        (verdict,) = dispatcher.plan(problem, name).verdicts
        found.append(tuple(one for one in verdict.refusals if one.field in MACHINE))
    return () if any(not one for one in found) else found[0]


@dataclass
class Run:
    """``jobs`` in their order, ``together`` of them at a time; ``seconds``: the most that one check may take.

    ``on_step``: told what is being done, and how many steps are done with it; ``on_plan``: how many steps more there
    are than was known.
    """

    jobs: tuple[Job, ...]
    seconds: float
    together: int = 1
    on_step: Callable[[str, int], None] = _unheard
    on_plan: Callable[[int], None] = _unplanned
    columns: list[Column] = field(default_factory=list)
    interrupted: bool = False
    _children: set[Child] = field(default_factory=set)
    _over: bool = False

    def go(self) -> None:
        """Do all jobs, as far as Ctrl-C lets."""
        columns = [Column(job, job.name) for job in self.jobs]
        self.columns += columns
        with futures.ThreadPoolExecutor(self.together, "heedful-verify") as pool:
            running = [pool.submit(self._verify, *one) for one in zip(self.jobs, columns, strict=True)]
            try:
                while futures.wait(running, _PATIENCE, futures.FIRST_EXCEPTION).not_done:
                    if any(one.done() and one.exception() for one in running):
                        break
            except KeyboardInterrupt:
                self.interrupted = True
            finally:
                self._end(running)
        for one in running:
            if not one.cancelled():
                one.result()

    def _end(self, running: Iterable[futures.Future[None]]) -> None:
        """Let nothing begin any more, and end what runs; where all is done there is nothing to end."""
        self._over = True
        for one in running:
            one.cancel()
        for child in list(self._children):
            child.end()

    def leave_out(self, job: Job, reasons: Iterable[Refusal]) -> None:
        """A backend that this machine lacks something for."""
        self.columns.append(Column(job, job.name, absent="; ".join(map(str, reasons))))

    def _verify(self, job: Job, column: Column) -> None:
        ends = 0
        while True:
            before = column.made
            fate = self._one_worker(replace(job, done=before), column)
            ends += fate != "done"
            if fate in {"done", "invalid", "ended"} or (column.planned is not None and column.made >= column.planned):
                return
            if column.planned is None or ends >= MOST_ENDS:
                left = "all" if column.planned is None else column.planned - column.made
                column.unmade = f"{left} checks were not made, after {ends} workers that crashed or hung"
                return

    def _one_worker(self, job: Job, column: Column) -> str:
        """What the last of a worker's events is."""
        check: Mapping[str, Any] | None = STARTED
        with self._child(job) as child:
            for event in child.events():
                if child.ended:
                    return "ended"
                kind = str(event["event"])
                if kind == "ready":
                    self._know(event, column)
                    check = None
                elif kind == "begin":
                    check = event
                    self.on_step(f"{column.name}: {event['check']}", 0)
                elif kind == "end":
                    assert check is not None
                    column.add(check, event["outcome"], event)
                    check = None
                    self.on_step(column.name, 1)
                elif kind == "invalid":
                    column.invalid = event["text"]
                elif kind in {"crashed", "hung"} and check is not None:
                    self._tell_end(event, check, column)
        return kind

    @contextmanager
    def _child(self, job: Job) -> Iterator[Child]:
        with Child(job, self.seconds) as child:
            self._children.add(child)
            try:
                if self._over:
                    child.end()
                yield child
            finally:
                self._children.discard(child)

    def _know(self, event: Mapping[str, Any], column: Column) -> None:
        if column.planned is None:
            self.on_plan(event["checks"])
        column.know(event)
        if column.job.plugin:
            taken = {one.name for one in self.columns if one is not column}
            column.name = event["name"] if event["name"] not in taken else f"{event['name']} ({column.job.plugin})"

    def _tell_end(self, event: Mapping[str, Any], check: Mapping[str, Any], column: Column) -> None:
        """A worker's end is the outcome of the check that it was at."""
        if event["event"] == "hung":
            told = f"no answer after {event['seconds']:g} s, and the process was ended"
        else:
            last = event["stderr"].splitlines()
            told = "\n".join([f"the process ended: {event['how']}", *last[-12:]])
        column.add(check, str(event["event"]), {"detail": told})
        self.on_step(column.name, 0 if check is STARTED else 1)

    def record(self, machine: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
        """The whole run as JSON data."""
        columns = [column.to_dict() for column in self.columns]
        counts = {word: sum(column["counts"][word] for column in columns) for word in OUTCOMES}
        return {
            "format": FORMAT,
            "kind": "verification",
            "machine": dict(machine),
            "settings": dict(settings),
            "interrupted": self.interrupted,
            "counts": counts,
            "samples": max((column["samples"] for column in columns), default=0),
            "features": [name for name in NAMES if any(name in column["cells"] for column in columns)],
            "backends": columns,
            "bench": None,
        }


def is_wrong(record: Mapping[str, Any]) -> bool:
    """Whether an answer in a record is not as it has to be."""
    return any(column["status"] == "wrong" for column in record["backends"])
