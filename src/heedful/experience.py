"""What a dispatcher has learnt: stored and shipped times, courses under way, faults, the lock in use, as one answer.

``known`` is asked when a plan is made, never at a call. Times and faults belong to classes of problems, and to one
machine: a store for each device's fingerprint.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Iterable, Mapping

import torch

from heedful.errors import LockBroken
from heedful.facts import Facts
from heedful.fingerprint import fingerprint
from heedful.knowledge import LOCKED, MEASURED, NOTHING, SHIPPED, Knowledge
from heedful.learning import Course, Writer, announce, worth_learning
from heedful.locks import Lock
from heedful.policy import Policy, folder_of
from heedful.problem import AttentionProblem
from heedful.problem_class import class_of
from heedful.records import Record, Window, as_line
from heedful.select import Plan, worth_timing
from heedful.strategy import AttentionStrategy, Tuning
from heedful.tally import Tally, Trust
from heedful.timings import TimingStore, shipped_for

_MOST_TALLIES = 4096  # a plan of 20 KB hangs on each
_log = logging.getLogger("heedful")


class Experience:
    """All of it, for one dispatcher. ``strategies`` are those whose packages' versions the times depend on."""

    def __init__(self, policy: Policy, facts: Facts, strategies: Mapping[str, AttentionStrategy]) -> None:
        self.policy, self._facts, self._strategies = policy, facts, strategies
        self.lock: Lock | None = None
        self.frozen = False
        self.tallies: dict[tuple[AttentionProblem, object, str], Tally] = {}
        self._trusts: dict[tuple[str, str], Trust] = {}
        self._courses: dict[tuple[str, str], Course] = {}  # by the place, and the class
        self._faults: dict[str, dict[str, str]] = {}
        self._dropped: set[tuple[str, str, str]] = set()  # choices of strategies: by place, class and label
        self._stores: dict[str, TimingStore] = {}
        self._writer = Writer()
        self._guarding = threading.Lock()

    def known(self, problem: AttentionProblem, device: torch.device | None, *, decides: bool = True) -> Knowledge:
        """What is known of a problem. Where it ``decides``, for "auto", a lock that lacks the problem is LockBroken."""
        if self._facts.packages is None or problem.compiling:  # no machine at hand; sizes that stand for many
            return NOTHING
        key = class_of(problem)
        record = self._record(key, problem, device)
        faults = {**(record.faults if record else {}), **self._faults.get(key, {})}
        if self.lock is not None and decides:
            locked = self.lock.plan_for(problem)
            return Knowledge(locked.label, LOCKED, faults=faults, tuned=locked.tuned)
        if self.policy.tune == "off" or not decides:
            return Knowledge(faults=faults)
        seconds = dict(record.seconds()) if record else {}
        course = self._courses.get((_place(problem, device), key))
        if course is not None:
            seconds |= course.seconds
        winner, source = (record.winner() if record else None) or "", MEASURED
        if course is not None and course.windows:
            winner = winner if course.over and winner else course.best
        if not winner:
            shipped = self._store(problem, device).shipped(key)
            winner, source = (shipped.winner() if shipped else None) or "", SHIPPED
            seconds = {**(shipped.seconds() if shipped else {}), **seconds}
        errors = {label: trust.error for (of, label), trust in list(self._trusts.items()) if of == key and trust.checks}
        return Knowledge(winner, source if winner else "", seconds, faults, errors)

    def may_learn(self, plan: Plan) -> bool:
        """Whether the calls of a plan may take part in a course."""
        if self.policy.tune != "live" or self.frozen or self.lock is not None or len(plan.contenders) < 2:
            return False
        return worth_timing(plan.problem) and worth_learning(plan.problem)

    def course(self, plan: Plan, device: torch.device, labels: tuple[str, ...]) -> Course | None:
        """The course that the calls of a plan take part in; None where nothing is left to be learnt.

        ``labels``: the candidates, what auto takes without timing first.
        """
        problem, key = plan.problem, class_of(plan.problem)
        of = _place(problem, device), key
        with self._guarding:
            course = self._courses.get(of)
            if course is None:
                record = self._record(key, problem, device)
                if len(labels) < 2 or (record is not None and record.winner() is not None):
                    return None
                store = self._store(problem, device)
                course = self._courses[of] = Course(
                    labels,
                    lambda window: self._writer.submit(lambda: store.add_window(key, window)),
                    () if record is None else record.windows,
                )
                announce()
        if course.over or not set(course.labels) <= set(labels):  # lengths of one class may differ in a rewrite
            return None
        return course

    @property
    def trusts(self) -> list[Trust]:
        """What the guard knows, of every candidate in every class."""
        return list(self._trusts.values())

    def tally(self, plan: Plan) -> Tally:
        """The tally of a plan's calls."""
        assert plan.chosen is not None
        trust = self._trusts.setdefault((class_of(plan.problem), plan.chosen.label), Trust())
        key = (plan.problem, plan.wish, plan.chosen.label)
        try:
            tally = self.tallies.get(key)
        except TypeError:  # an option that cannot be hashed: its calls are in no report
            return Tally(plan, trust)
        if tally is None:
            if len(self.tallies) >= _MOST_TALLIES:
                self._fold()
            tally = self.tallies.setdefault(key, Tally(plan, trust))
        tally.plan = plan
        return tally

    def _fold(self) -> None:
        """Keep one tally of each class, wish and candidate, which stands for the calls of all."""
        homes: dict[tuple[str, object, str], Tally] = {}
        for key, tally in list(self.tallies.items()):
            problem, wish, label = key
            home = homes.setdefault((class_of(problem), wish, label), tally)
            if home is not tally:
                home.fold(self.tallies.pop(key))

    def quarantine(self, problem: AttentionProblem, name: str, reason: str, device: torch.device | None = None) -> None:
        """A strategy gave a wrong answer: it is no candidate for problems of this class any more, here and later."""
        key = class_of(problem)
        self._faults.setdefault(key, {})[name] = reason
        for (_, of), course in list(self._courses.items()):
            if of == key:
                course.drop(name)
        store = self._store(problem, device)
        self._writer.submit(lambda: store.add_fault(key, name, reason))

    def add_window(self, problem: AttentionProblem, device: torch.device, window: Window) -> Record:
        """Keep what was measured ahead of time."""
        return self._store(problem, device).add_window(class_of(problem), window)

    def tuned(self, plan: Plan, strategy: AttentionStrategy, device: torch.device | None) -> dict[str, str]:
        """What was measured of the chosen strategy's own choices, such as tiles: by role, those that are settled.

        Under a lock what it says. Compiled calls go by the strategy's defaults.
        """
        if plan.chosen is None or plan.problem.compiling or self._facts.packages is None:
            return {}
        classes = strategy.tunable(plan.chosen.lowered)
        if plan.known.locked:
            return {role: label for role, label in plan.known.tuned.items() if role in classes}
        if self.policy.tune == "off" or not classes:
            return {}
        place, store = _place(plan.problem, device), self._store(plan.problem, device)
        found = {role: _winner(store, key) for role, key in classes.items()}
        return {
            role: label for role, label in found.items() if label and (place, classes[role], label) not in self._dropped
        }

    def tuning(self, plan: Plan, strategy: AttentionStrategy, device: torch.device | None) -> Tuning | None:
        """The same for a strategy to go by; None where it goes by its defaults."""
        labels = self.tuned(plan, strategy, device)
        return Tuning(labels, functools.partial(self._cannot_run, plan, strategy, device)) if labels else None

    def _cannot_run(
        self, plan: Plan, strategy: AttentionStrategy, device: torch.device | None, role: str, label: str, reason: str
    ) -> None:
        """A strategy's choice failed when it ran: not chosen any more. Raises LockBroken under a lock."""
        assert plan.chosen is not None
        if plan.known.locked:
            line = f"  {plan.problem}: locked {role} by {label}, now {reason}"
            raise LockBroken("the lock names what cannot run here; record it anew", [line])
        self.drop_choice(strategy.tunable(plan.chosen.lowered)[role], label, reason, _device(plan.problem, device))

    def drop_choice(self, key: str, label: str, reason: str, device: torch.device) -> None:
        """Quarantine one of a strategy's choices for its class, here and in the store, and say so once."""
        choice = (_spelled(device), key, label)
        if choice in self._dropped:
            return
        self._dropped.add(choice)
        _log.warning("heedful: %s by %s cannot run (%s); the default is taken", key, label, as_line(reason))
        store = self.store(device)
        self._writer.submit(lambda: store.add_fault(key, label, reason))

    def forget_choices(self, keys: Iterable[str], device: torch.device) -> None:
        """Forget what was measured and found wrong of these classes of choices, here and in the store."""
        self.finish()
        for key in keys:
            self._dropped = {one for one in self._dropped if one[:2] != (_spelled(device), key)}
            self.store(device).forget(key)

    def registry_changed(self, strategies: Mapping[str, AttentionStrategy]) -> None:
        """A name may stand for another strategy now: what was learnt in this process is learnt anew."""
        self._strategies = strategies
        for known in (self._trusts, self._courses, self._faults, self._dropped, self._stores):
            known.clear()

    def finish(self) -> None:
        """Wait until all that was learnt is written."""
        self._writer.finish()

    def forget(self, problem: AttentionProblem, device: torch.device) -> None:
        """Forget what was measured and found wrong of the problem's class, here and in the store."""
        key = class_of(problem)
        self._courses.pop((_place(problem, device), key), None)
        self._faults.pop(key, None)
        for (of, _), trust in list(self._trusts.items()):
            if of == key:
                trust.fault, trust.checks = "", 0
        self._store(problem, device).forget(key)

    def forget_all(self, device: torch.device) -> None:
        """Forget all that was measured and found wrong on a device."""
        self.registry_changed(self._strategies)
        self.store(device).forget()

    def store(self, device: torch.device) -> TimingStore:
        """The store of one device's times."""
        key = _spelled(device)
        if key not in self._stores:
            made = fingerprint(self._facts, device, self._strategies)
            folder = folder_of(self.policy.cache)
            self._stores[key] = TimingStore(folder and folder / "timings", made, shipped_for(made))
        return self._stores[key]

    def _store(self, problem: AttentionProblem, device: torch.device | None) -> TimingStore:
        return self.store(_device(problem, device))

    def _record(self, key: str, problem: AttentionProblem, device: torch.device | None) -> Record | None:
        if self.policy.tune == "off" and self.policy.guard == "off":
            return None
        return self._store(problem, device).get(key)


def _winner(store: TimingStore, key: str) -> str:
    """What was settled of a class here, else in a table that is shipped; "" where nothing is."""
    known = (store.get(key), store.shipped(key))
    return next(filter(None, (record.winner() for record in known if record is not None)), "") or ""


def _device(problem: AttentionProblem, device: torch.device | None) -> torch.device:
    """The device of a problem: the one that is known, or the first of its type."""
    if device is not None:
        return device
    return torch.device(problem.device, 0) if problem.device == "cuda" else torch.device(problem.device)


def _place(problem: AttentionProblem, device: torch.device | None) -> str:
    return _spelled(_device(problem, device))


def _spelled(device: torch.device) -> str:
    """What changes about times while a process runs: the device, and torch's threads on a CPU."""
    return f"{device} {torch.get_num_threads() if device.type == 'cpu' else 0}"
