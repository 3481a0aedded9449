"""A lock: the plans that a run used under auto, written down, and replayed exactly or not at all.

A lock fixes what "auto" does and nothing else: names and lists are obeyed as ever. It holds for the machine and the
versions that it was made with; another one breaks it, with the differences as text. Under a lock nothing is learnt, so
that kernels which are deterministic give the same bits from run to run.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from heedful.errors import LockBroken
from heedful.files import read_json, write_json
from heedful.problem import AttentionProblem
from heedful.select import Plan
from heedful.strategy import AttentionStrategy

FORMAT, KIND = 1, "lock"


@dataclass(frozen=True)
class LockedPlan:
    """What computes one problem: the candidate's label, its strategy's version, all its rewrites, and how exactly it

    repeats: ``bits`` where the same inputs give the same bits, ``random`` with dropout, ``forward`` where only the
    gradient may differ. ``tuned``: the strategy's own choices, such as tiles, by role; its defaults for all others.
    """

    problem: AttentionProblem
    label: str
    version: str
    steps: tuple[str, ...]
    repeats: str
    tuned: Mapping[str, str] = field(default_factory=dict, hash=False)

    @classmethod
    def of(
        cls, plan: Plan, strategy: AttentionStrategy, version: str, tuned: Mapping[str, str] = MappingProxyType({})
    ) -> LockedPlan:
        """Of a plan that chose a strategy."""
        assert plan.chosen is not None
        steps = tuple(step.name for step in plan.chosen.steps)
        return cls(plan.problem, plan.chosen.label, version, steps, _repeats(plan.problem, strategy), dict(tuned))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "problem": self.problem.to_dict(),
            "candidate": self.label,
            "version": self.version,
            "lowerings": list(self.steps),
            "repeats": self.repeats,
            **({"tuned": dict(self.tuned)} if self.tuned else {}),
        }


@dataclass(frozen=True)
class Lock:
    """Plans by their problems, and the machine that they hold for."""

    machine: Mapping[str, Any]
    plans: Mapping[AttentionProblem, LockedPlan]
    path: str = ""

    @classmethod
    def of(cls, machine: Mapping[str, Any], plans: Iterable[LockedPlan]) -> Lock:
        """A lock of these plans; of several for one problem the last."""
        return cls(machine, {plan.problem: plan for plan in plans})

    def save(self, path: Path) -> None:
        """Write it whole, or leave what was there. Raises OSError."""
        plans = [one.to_dict() for one in self.plans.values()]
        write_json(path, {"format": FORMAT, "kind": KIND, "machine": dict(self.machine), "plans": plans})

    @classmethod
    def load(cls, path: Path) -> Lock:
        """A lock from its file. Raises InvalidArgument for one that is none, or is damaged."""

        def made(data: dict[str, Any]) -> Lock:
            machine = {str(name): str(value) for name, value in data["machine"].items()}
            plans = [_plan_from(each) for each in data["plans"]]
            return cls(machine, {plan.problem: plan for plan in plans}, str(path))

        return read_json(path, KIND, FORMAT, made)

    def plan_for(self, problem: AttentionProblem) -> LockedPlan:
        """What computes a problem. Raises LockBroken where the lock has nothing, with the nearest it has."""
        plan = self.plans.get(problem)
        if plan is not None:
            return plan
        known = [str(one) for one in self.plans]
        near = difflib.get_close_matches(str(problem), known, n=1, cutoff=0.0)
        lines = [f"  locked: {near[0]}" if near else "  locked: nothing", f"  called: {problem}"]
        raise LockBroken(f"the lock {self.path} has no plan for this call; record it anew, or name a backend", lines)

    def check(self, machine: Mapping[str, Any], now: Mapping[AttentionProblem, LockedPlan]) -> None:
        """Raise LockBroken, with every difference, unless machine and plans are what they were.

        ``now``: what the locked candidates would be today, where they can run.
        """
        lines = []
        for name in sorted({*self.machine, *machine}):
            was, found = self.machine.get(name, "nothing"), str(machine.get(name, "nothing"))
            if was != found:
                lines += [f"  {name}: locked {was}, now {found}"]
        for problem, plan in self.plans.items():
            today = now.get(problem)
            if today is None:
                lines.append(f"  {problem}: locked {_spelled(plan)}, now it cannot run")
            elif any(getattr(plan, name) != getattr(today, name) for name in ("label", "version", "steps", "tuned")):
                lines.append(f"  {problem}: locked {_spelled(plan)}, now {_spelled(today)}")
        if lines:
            raise LockBroken(f"the lock {self.path} was made elsewhere, or with other versions; record it anew", lines)


def _spelled(plan: LockedPlan) -> str:
    steps = f" after {', '.join(plan.steps)}" if plan.steps else ""
    tuned = "".join(f", {role} by {label}" for role, label in sorted(plan.tuned.items()))
    return f"{plan.label} {plan.version}{steps}{tuned}"


def _repeats(problem: AttentionProblem, strategy: AttentionStrategy) -> str:
    if problem.dropout_p:
        return "random"
    limits = strategy.limits_for(problem.device)
    return "forward" if problem.needs_grad and not limits.deterministic_backward else "bits"


def _plan_from(data: Mapping[str, Any]) -> LockedPlan:
    problem = AttentionProblem.from_dict(data["problem"])
    hash(problem)
    tuned = dict(data.get("tuned", {}))
    words = (data["candidate"], data["version"], *data["lowerings"], data["repeats"], *tuned, *tuned.values())
    if not all(isinstance(word, str) for word in words):
        raise ValueError(f"a plan holds {words!r} where names belong")
    return LockedPlan(problem, data["candidate"], data["version"], tuple(data["lowerings"]), data["repeats"], tuned)
