"""The function that calls of one kind go to: a plan bound, watched by the guard, taking turns while one learns.

A function that passes each call on to another one has ``pick``, which gives that one; every one that is watched has
``tally``. So who asks before the call knows what will run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from heedful.binding import Run, bind
from heedful.experience import Experience
from heedful.factory import AttentionStrategyFactory
from heedful.guard import Guard
from heedful.learning import LiveRun
from heedful.refusal import Refusal
from heedful.select import Plan, Verdict, variants
from heedful.strategy import Answer, AttentionStrategy, Tuning

Excluded = Mapping[str, tuple[Refusal, ...]]


class Planner(Protocol):
    """What the functions ask of a dispatcher."""

    def again(self, plan: Plan, excluded: Excluded, device: torch.device) -> Plan:
        """Plan a call anew, without some strategies."""

    def ready(self, name: str, device: torch.device) -> bool:
        """Whether a strategy's kernels are there and work."""

    def forget_plans(self) -> None:
        """Drop all functions that were made."""

    def drop(self, live: LiveRun) -> None:
        """Drop one of them: what it did is settled."""


class Runs:
    """Makes such functions for a dispatcher, its ``planner``.

    ``own_look``: those that want to see the call's mask as it came.
    """

    def __init__(self, factory: AttentionStrategyFactory, experience: Experience, planner: Planner) -> None:
        self.factory, self.experience, self.planner = factory, experience, planner
        self.guard = Guard(experience.policy, experience.quarantine)
        self.own_look: set[Run] = set()

    def of(self, plan: Plan, call: dict[str, Any], device: torch.device, excluded: Excluded | None = None) -> Run:
        """The function of a plan that is not refused. ``call``: its arguments that are no tensors."""
        if plan.chosen is None:
            return bind(plan, None, {})
        watched, bare = self._candidate(plan, call, device, excluded or {})
        if plan.problem.compiling:
            return bare
        if not self.experience.may_learn(plan):
            return watched
        rivals = {verdict.label: replace(plan, chosen=verdict) for verdict in self._contenders(plan, device)}
        if plan.chosen.label not in rivals:  # it checks every call itself, or is no contender
            return watched
        course = self.experience.course(plan, device, tuple(rivals))
        if course is None:
            return watched
        guarded = self.experience.policy.watches(plan.problem)
        return LiveRun(
            course,
            lambda label: self._candidate(rivals[label], call, device, excluded or {})[0],
            self.planner.drop,
            guarded=guarded,
        )

    def bare(
        self, plan: Plan, call: dict[str, Any], device: torch.device, tuning: Tuning | None = None
    ) -> tuple[Plan, dict[str, Run]]:
        """The plan with the contenders that work, of the chosen strategy at least; and their functions, by label.

        ``tuning``: another one than what was measured.
        """
        assert plan.chosen is not None
        words = {name: call[name] for name in ("is_causal", "causal_alignment", "window")}
        every = self._contenders(plan, device)
        if plan.wish != "auto":
            strategy = self.factory.create_strategy(plan.chosen.name)
            every = [each for each in variants(strategy, plan.problem) if each.accepts]
        plan = replace(plan, contenders=tuple(every) or (plan.chosen,))
        return plan, {
            verdict.label: self._bind(replace(plan, chosen=verdict), words, device, tuning)
            for verdict in plan.contenders
        }

    def _bind(self, plan: Plan, words: dict[str, Any], device: torch.device, tuning: Tuning | None = None) -> Run:
        assert plan.chosen is not None
        strategy = self.factory.create_strategy(plan.chosen.name)
        return bind(plan, strategy, words, tuning or self.experience.tuning(plan, strategy, device))

    def _contenders(self, plan: Plan, device: torch.device) -> list[Verdict]:
        """The candidates whose kernels are there and work, and whose strategies do not check every call themselves.

        The chosen one comes first.
        """
        strategies = {verdict.name: self.factory.create_strategy(verdict.name) for verdict in plan.contenders}
        sound = {
            name
            for name, strategy in strategies.items()
            if not strategy.has_own_validation() and self.planner.ready(name, device)
        }
        every = [verdict for verdict in plan.contenders if verdict.name in sound]
        return sorted(every, key=lambda verdict: plan.chosen is None or verdict.label != plan.chosen.label)

    def _candidate(self, plan: Plan, call: dict[str, Any], device: torch.device, excluded: Excluded) -> tuple[Run, Run]:
        """The functions of what a plan chose: as the guard watches it, and bare.

        That of a strategy with its own validation knows the way on where that refuses.
        """
        assert plan.chosen is not None
        strategy = self.factory.create_strategy(plan.chosen.name)
        words = {name: call[name] for name in ("is_causal", "causal_alignment", "window")}
        bare = watched = self._bind(plan, words, device)

        def another(refusal: Refusal) -> Run:
            more = {**excluded, strategy.name: (refusal,)}
            return self.of(self.planner.again(plan, more, device).checked(), call, device, more)

        def redo(refusal: Refusal, *operands: Any) -> Answer:
            self.planner.forget_plans()
            return another(refusal)(*operands)

        if not plan.problem.compiling:
            forced = isinstance(plan.wish, str) and plan.wish != "auto"
            tally = self.experience.tally(plan)
            watched = self.guard.watch(bare, tally, strategy, call, None if forced or plan.known.locked else redo)
        if not strategy.has_own_validation():
            return watched, bare
        asking = AskFirst(watched, lambda **operands: own_refusal(strategy, **operands, **call), another)
        self.own_look.add(asking)
        return asking, asking


class AskFirst:
    """The function of a strategy with its own validation: asked at every call, with the way on where it refuses."""

    def __init__(self, run: Run, ask: Callable[..., Refusal | None], another: Callable[[Refusal], Run]) -> None:
        self._run, self._ask, self._another = run, ask, another

    def pick(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any) -> Run:
        """The function for these operands."""
        refusal = self._ask(query=query, key=key, value=value, attn_mask=attn_mask)
        return self._run if refusal is None else self._another(refusal)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any) -> Answer:
        """One call."""
        return self.pick(query, key, value, attn_mask)(query, key, value, attn_mask)


def own_refusal(strategy: AttentionStrategy, *, attn_mask: Any, **call: Any) -> Refusal | None:
    """What a strategy's own validation says against a call; None where it has none, or nothing against it."""
    if not strategy.has_own_validation():
        return None
    given = {name: value for name, value in call.items() if value is not None}
    try:
        strategy.validate_constraints(attn_mask=attn_mask, **given)
    except (ValueError, TypeError, RuntimeError) as error:
        return Refusal("validate_constraints", str(error), "what it checks itself")
    return None
