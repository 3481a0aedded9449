"""The face: one call for every backend, and the explanation of what it would do.

A call is looked up by a plain tuple of all that validation and selection read, so validation is memoised, not skipped.
The first call of a kind validates, selects a plan and binds it to one function.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heedful import facts as machine
from heedful import policy as wishes
from heedful import tracing
from heedful.analysis import MaskCache
from heedful.binding import Run
from heedful.call import plain_scale, problem_of_call
from heedful.errors import InvalidArgument
from heedful.experience import Experience
from heedful.factory import AttentionStrategyFactory
from heedful.facts import Facts
from heedful.learning import LiveRun
from heedful.listing import BackendRow, BackendTable
from heedful.locks import Lock, LockedPlan
from heedful.masks import key_of
from heedful.policy import Policy, Wish, as_wish, mirror
from heedful.probing import ready
from heedful.problem import AttentionProblem, problem_for_shapes
from heedful.refusal import Refusal
from heedful.running import Runs, own_refusal
from heedful.select import Plan, candidates, judge, select
from heedful.strategy import Answer, Tuning

_log = logging.getLogger("heedful")

# Looked up once: the hot path is short enough for attribute look-ups to count.
_compiling = torch.compiler.is_compiling
_grad_enabled = torch.is_grad_enabled
_deterministic = torch.are_deterministic_algorithms_enabled
_any_autocast = torch._C._is_any_autocast_enabled  # 0.07 us; asking for one device costs 0.4
_current_wish = wishes.current_wish

# A call's arguments that are no tensors, and a mask's.
_DEFAULTS: Mapping[str, Any] = {
    "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False, "layout": "BHSD",
    "causal_alignment": "top_left", "window": None, "softcap": None, "sinks": None, "max_error": None, "options": None,
    "return_lse": False,
}  # fmt: skip
_MOST_KINDS = 4096  # of calls that are remembered; beyond it all are forgotten and planned anew


class AttentionDispatcher:
    """Dispatches attention calls.

    The arguments replace the process's registry, machine and policy, for tests and embedding.
    ``factory`` may be an AttentionStrategyFactory, or the class itself for the default registry.
    """

    def __init__(
        self,
        factory: AttentionStrategyFactory | type[AttentionStrategyFactory] | None = None,
        facts: Facts | None = None,
        policy: Policy | None = None,
    ) -> None:
        self.factory = factory if isinstance(factory, AttentionStrategyFactory) else AttentionStrategyFactory.default()
        self._facts = facts
        self._policy = policy
        self._runs: dict[Any, Run] = {}
        self._own_look: set[Run] = set()
        self._look: Callable[..., Any] = self._first_look
        self.masks = MaskCache()
        self._told: set[str] = set()
        self._experience: Experience | None = None
        self._made: Runs | None = None
        self.traced = tracing.Traced(self)
        self.factory.watch(self._registry_changed)

    def _registry_changed(self) -> None:
        self.forget_plans()
        if self._experience is not None:
            self._experience.registry_changed(self.factory.strategies())

    def forget_plans(self) -> None:
        """Have every call planned anew, as another registry, lock or experience wants it.

        A call under way stores into the old dictionary.
        """
        self._runs, self._own_look = {}, set()
        if self._made is not None:
            self._made.own_look = self._own_look
        self.traced.forget()

    @property
    def experience(self) -> Experience:
        """What was measured, stored and found wrong; empty before the first call."""
        if self._experience is None:
            self._experience = Experience(self.policy, self.facts, self.factory.strategies())
        return self._experience

    @property
    def runs(self) -> Runs:
        """What makes a plan into the function that calls go to."""
        if self._made is None:
            self._made = Runs(self.factory, self.experience, self)
            self._made.own_look = self._own_look
        return self._made

    @property
    def facts(self) -> Facts:
        """The machine; probed at first use unless given."""
        if self._facts is None:
            self._facts = machine.probe()
        return self._facts

    @property
    def policy(self) -> Policy:
        """The policy; the environment is read at first use, once."""
        if self._policy is None:
            self._policy = Policy.from_environment()
        return self._policy

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        *,
        layout: str = "BHSD",
        causal_alignment: str = "top_left",
        window: tuple[int | None, int | None] | int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        max_error: float | None = None,
        options: Mapping[str, Any] | None = None,
        backend: str | list[str] | tuple[str, ...] | None = None,
        return_lse: bool = False,
    ) -> Any:
        """Attention, by the backend that is wished for, or by any exact one.

        The first eight arguments have the names, order and meaning of torch's ``scaled_dot_product_attention``.

        Args:
            query: (B, H, Q, D), or (B, Q, H, D) with layout "BSHD", or packed (T, H, D) with "THD" and a Varlen mask.
                With "BHSD" any rank from 2 on, and leading sizes that broadcast, as SDPA takes them.
            key: (B, N, K, D) in the same layout.
            value: (B, N, K, E) in the same layout.
            attn_mask: bool (True may attend) or float (added to the scaled scores), broadcastable to (B, H, Q, K) in
                every layout; or a mask value (``KeyPadding``, ``Varlen``, …); or a FlexAttention BlockMask. Beside
                ``is_causal`` or ``window`` both apply.
            dropout_p: probability of dropping an attention weight.
            is_causal: query i sees the keys up to its own place, see ``causal_alignment``.
            scale: factor of the scores; 1/sqrt(D) by default. In eager code a 0-dim tensor will do, as for SDPA.
            enable_gqa: N may divide H: each key and value head serves H/N query heads.
            layout: "BHSD", "BSHD" or "THD", of query, key, value and output.
            causal_alignment: "top_left" (torch) or "bottom_right" (flash-attn) where Q and K differ; of ``window`` too.
            window: (left, right): keys from left before to right after the query's place, both included; None is open.
            softcap: scores become softcap * tanh(score / softcap), before mask and bias (arXiv 2408.00118).
            sinks: one more logit a head in the softmax's sum; no backend of this version computes it, so it is refused.
            max_error: relative error that is allowed; None for exact backends only.
            options: the backend's own options by name; an unknown one is refused.
            backend: a name (obeyed, or Refused), a list of names (the fallback order), "auto", or None: the scope, then
                HEEDFUL_BACKEND, then auto.
            return_lse: also return the log-sum-exp of the scores.

        Returns:
            out, in query's layout with value's head dim; or (out, lse) with lse float32 (B, H, Q), natural log, without
            gradient. A query that sees no key gets zeros, -inf and no gradient.

        Raises:
            InvalidArgument: an argument is malformed. UnknownBackend: no backend has that name.
            Refused: no wanted backend computes this problem; the text holds each one's reasons.
        """
        if _compiling():
            return tracing.attend(
                self.traced, self.factory.epoch, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
                layout, causal_alignment, window, softcap, sinks, max_error, options, backend, return_lse,
            )  # fmt: skip
        wish = _current_wish() if backend is None else tuple(backend) if type(backend) is list else backend
        runs, seen = self._runs, attn_mask
        try:
            dtype, device = query.dtype, query.device
            query_shape, key_shape, value_shape = query.shape, key.shape, value.shape
            mask_key = None
            if attn_mask is not None:
                look = (query_shape, key_shape, value_shape, layout, not is_causal and window is None)
                seen, mask_key = self._look(attn_mask, *look)
            kind: Any = (
                wish, query_shape, key_shape, value_shape,
                dtype if dtype is key.dtype is value.dtype else (dtype, key.dtype, value.dtype),
                device if device == key.device == value.device else (device, key.device, value.device),
                type(query), type(key), type(value), mask_key, layout,
                None if scale is window is softcap is sinks is max_error is options is None  # type: ignore[comparison-overlap]
                and not (dropout_p or is_causal or enable_gqa or return_lse) and causal_alignment == "top_left"
                else (dropout_p, is_causal, scale, enable_gqa, causal_alignment, window, softcap, sinks is None,
                      max_error, None if options is None else tuple(options.items()), return_lse),
                _grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad),
                _deterministic(),
                _any_autocast() and torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type),
            )  # fmt: skip
            run = runs.get(kind)
        except (TypeError, AttributeError, RuntimeError):  # an unhashable option, no tensor, a nested tensor
            kind = run = None
        if run is None:
            call: dict[str, Any] = {
                "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa,
                "layout": layout, "causal_alignment": causal_alignment, "window": window, "softcap": softcap,
                "sinks": sinks, "max_error": max_error, "options": options, "return_lse": return_lse,
            }  # fmt: skip
            number = plain_scale(scale)
            if number is not scale:
                return self.attention(query, key, value, attn_mask, backend=backend, **{**call, "scale": number})
            plan = self._planned(query, key, value, attn_mask, seen, backend, call, getattr(query, "device", None))
            run = self._bound(plan, call, query.device)
            if kind is not None:
                if len(runs) >= _MOST_KINDS:
                    runs.clear()
                runs[kind] = run
        if seen is not attn_mask and run in self._own_look:
            seen = attn_mask
        route = mirror.route
        if route is None:
            return run(query, key, value, seen)
        return route.aside(run, query, key, value, seen)

    def _simplest(self, attn_mask: Any, query: Tensor, key: Tensor, value: Tensor, layout: str, alone: bool) -> Any:
        """The simplest mask that means the same as ``attn_mask`` in such a call; itself where none is known.

        ``alone``: nothing else hides keys in the call.
        """
        if attn_mask is None or not self.policy.analyse:
            return attn_mask
        batch = _batch_of(query.shape, key.shape, value.shape, layout)
        return attn_mask if batch is None else self.masks.simplest(attn_mask, batch, alone)

    def _keyed(
        self, attn_mask: Any, query: torch.Size, key: torch.Size, value: torch.Size, layout: str, alone: bool
    ) -> tuple[Any, tuple[Any, ...]]:
        """The same by shapes, with all that validation and selection read of the mask."""
        batch = _batch_of(query, key, value, layout)
        return (attn_mask, key_of(attn_mask)) if batch is None else self.masks.keyed(attn_mask, batch, alone)

    def _first_look(self, *call: Any) -> Any:
        """``_keyed``, or the mask as it is where the policy says so: decided once."""
        self._look = self._keyed if self.policy.analyse else _no_look
        return self._look(*call)

    def _planned(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any,
        seen: Any,
        backend: Any,
        call: dict[str, Any],
        device: torch.device | None,
    ) -> Plan:
        """The plan for a call whose mask was simplified to ``seen``; a strategy that checks calls sees the original."""
        problem = problem_of_call(query, key, value, attn_mask, **call, facts=self.facts)
        if seen is attn_mask:
            return self.plan(problem, backend, device=device)
        simpler = problem_of_call(query, key, value, seen, **call, facts=self.facts)
        plan = self.plan(simpler, backend, device=device)
        if plan.chosen is not None and self.factory.create_strategy(plan.chosen.name).has_own_validation():
            return self.plan(problem, backend, device=device)
        return replace(plan, given=problem.mask)

    def dispatch(self, backend: str | list[str] | tuple[str, ...] | None = None, /, **call: Any) -> Any:
        """``attention`` with the backend first: ``dispatch("native", query=q, key=k, value=v)``."""
        return self.attention(**call, backend=backend)

    def explain(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        *,
        backend: str | list[str] | tuple[str, ...] | None = None,
        **call: Any,
    ) -> Plan:
        """What ``attention`` with these arguments would run, why, and why nothing else; the call is not computed.

        A backend with a package of its own is loaded and tried before it is chosen, once a process.

        The plan prints as text; a refused one is returned, not raised. Raises InvalidArgument and UnknownBackend.
        """
        problem = problem_of_call(query, key, value, attn_mask, **call, facts=self.facts)
        alone = not call.get("is_causal") and call.get("window") is None
        seen = self._simplest(attn_mask, query, key, value, call.get("layout", "BHSD"), alone)
        device = None if self.facts.packages is None else query.device  # of a machine one lacks nothing can be loaded
        plan = self._planned(query, key, value, attn_mask, seen, backend, call, device)
        problem = plan.problem
        excluded: dict[str, tuple[Refusal, ...]] = {}
        while plan.chosen is not None:
            strategy = self.factory.create_strategy(plan.chosen.name)
            refusal = own_refusal(strategy, query=query, key=key, value=value, attn_mask=attn_mask, **call)
            if refusal is None:
                break
            excluded[strategy.name] = (refusal,)
            plan = self.plan(problem, backend, excluded=excluded, device=device)
        return plan

    def plan(
        self,
        problem: AttentionProblem,
        backend: str | list[str] | tuple[str, ...] | None = None,
        *,
        excluded: Mapping[str, tuple[Refusal, ...]] | None = None,
        device: torch.device | None = None,
    ) -> Plan:
        """The plan for a problem under a backend's name, or under the scope's, the environment's or auto's wish.

        ``excluded``: refusals found elsewhere. ``device``: where kernels are loaded and tried before one is chosen;
        with None they are only looked for.
        """
        wish, origin = self._wish(backend)
        plan = self._selected(problem, self._resolved(wish, origin), origin, excluded or {}, device)
        strategy = None if plan.chosen is None else self.factory.create_strategy(plan.chosen.name)
        return plan if strategy is None else replace(plan, tuned=self.experience.tuned(plan, strategy, device))

    def _selected(
        self,
        problem: AttentionProblem,
        wish: Wish,
        origin: str,
        excluded: Mapping[str, tuple[Refusal, ...]],
        device: torch.device | None,
    ) -> Plan:
        """The plan; a chosen strategy whose kernels cannot be loaded, or fail when tried, is passed over."""
        strategies, named = self.factory.strategies(), {wish} if isinstance(wish, str) else set(wish)
        allowed = named if self.policy.downloads else set()  # never for what auto tries
        lacks = {
            name: strategies[name].lacks(self.facts, name in allowed)
            for name in candidates(wish, problem, strategies, self.policy)
        }
        excluded = {name: (*lacks.get(name, ()), *excluded.get(name, ())) for name in {*lacks, *excluded}}
        words = (wish,) if isinstance(wish, str) else wish
        known = self.experience.known(problem, device, decides=wish == "auto")
        if isinstance(wish, tuple) and "auto" in words:
            first = select(problem, wish, strategies, self.policy, excluded=excluded, known=known)
            if first.chosen is None or first.chosen.name not in words:
                known = self.experience.known(problem, device)
        while True:
            plan = select(problem, wish, strategies, self.policy, origin=origin, excluded=excluded, known=known)
            if plan.chosen is None or device is None:
                return plan
            name = plan.chosen.name
            found = ready(strategies[name], self.facts, device, downloads=name in allowed)
            if not found:
                return plan
            excluded[plan.chosen.name] = (*excluded.get(plan.chosen.name, ()), *found)

    def rivals(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *, backend: str = "auto",
        tuning: Tuning | None = None, **call: Any,
    ) -> tuple[Plan, dict[str, Callable[[], Answer]]]:  # fmt: skip
        """The plan for a call, its ``contenders`` being candidates that work, and these as functions of nothing.

        They are neither watched nor counted: for measuring and judging them. Of a backend by name the candidates are
        its chains of rewrites. ``tuning``: choices of theirs to try, instead of what was measured. Raises Refused.
        """
        words = {**_DEFAULTS, **call}
        alone = not words["is_causal"] and words["window"] is None
        seen = self._simplest(attn_mask, query, key, value, words["layout"], alone)
        plan = self._planned(query, key, value, attn_mask, seen, backend, words, query.device).checked()
        plan, bare = self.runs.bare(plan, words, query.device, tuning)
        return plan, {label: functools.partial(run, query, key, value, seen) for label, run in bare.items()}

    def freeze(self) -> None:
        """Try nothing on live calls any more: from now on each call is computed by what is known to be fastest."""
        self.experience.frozen = True
        self.forget_plans()

    def thaw(self) -> None:
        """Learn from live calls again, where the policy says so."""
        self.experience.frozen = False
        self.forget_plans()

    def lock(self, path: str | os.PathLike[str]) -> Lock:
        """Write down the plans that auto used so far in this process, to be replayed by ``use_lock``.

        Of several plans for one problem, which learning tried in turns, the one that would be used now. Compiled calls
        are not in it. Raises OSError where the file cannot be written.
        """
        made = self._lock_of({tally.plan.problem for tally in self.experience.tallies.values() if tally.by_auto})
        made.save(Path(path))
        return made

    def use_lock(self, path: str | os.PathLike[str] | None) -> LockInUse:
        """Have auto do what a lock says, for every call of this process, until ``use_lock(None)``.

        As a context manager, until the block ends. Under it nothing is learnt, a call that it has no plan for raises
        LockBroken, and so does a wrong answer (``WrongAnswer``). Compiled calls are planned as without it.

        Raises LockBroken where machine, versions or plans are not those that were locked, with every difference, and
        InvalidArgument for a file that is no lock.
        """
        before, wanted = self.experience.lock, None
        if path is not None:
            wanted = Lock.load(Path(path))
            self.experience.lock = wanted
            try:
                now = self._lock_of(wanted.plans)
                wanted.check(now.machine, now.plans)
            except BaseException:
                self.experience.lock = before
                raise
        self.experience.lock = wanted
        self.forget_plans()
        return LockInUse(self, before)

    def list_backends(self, device: str | None = None) -> BackendTable:
        """Every strategy, and whether it takes a plain call, float16 on a GPU and float32 on a CPU, on this machine.

        ``device`` is torch's type ("cpu", "cuda"); by default the GPU where there is one.
        """
        types = [name.partition(":")[0] for name in self.facts.devices]
        device = device or next((name for name in types if name != "cpu"), "cpu")
        dtype = torch.float32 if device == "cpu" else torch.float16
        known = self.facts.devices.get(device)
        try:
            known = known or self.facts.device(torch.device(device))
        except RuntimeError:
            raise InvalidArgument("device", repr(device), "give a device type of torch, such as cpu or cuda") from None
        shape = (1, 8, 1024, 64)
        problem = problem_for_shapes(shape, shape, shape, dtype=dtype, device=known)
        rows = []
        for name, strategy in self.factory.strategies().items():
            reasons = (*judge(strategy, problem).refusals, *strategy.lacks(self.facts))
            if not reasons and self.facts.packages is not None:
                reasons = ready(strategy, self.facts, torch.device(device))
            rows.append(BackendRow(name, tuple(strategy.pins()), strategy.exactness, strategy.describe(), reasons))
        return BackendTable(problem, tuple(rows))

    def attention_backend(self, backend: str | list[str] | tuple[str, ...]) -> wishes.scope:
        """Wish for a backend within a ``with`` block, or a decorated function (an ``async`` one too, no generator):

        for this thread or asyncio task alone, nested, always restored. The object may be used again.

        ``backend`` is a name (obeyed or Refused), a list of names (the fallback order), or "auto". Compiled code sees
        the scopes that its own thread entered, outside of asyncio tasks; inside one it must name its backend.
        Raises InvalidArgument and UnknownBackend at once.
        """
        return wishes.scope(self._resolved(as_wish(backend), "backend"))

    def bound_for_tracing(
        self, problem: AttentionProblem, wish: Any, inherited: bool, call: dict[str, Any], device: torch.device
    ) -> Run:
        """The bound function that ``torch.compile`` traces; ``wish`` None means that no scope has one."""
        origin = "scope" if inherited else "call"
        if wish is None:
            wish, origin = self.policy.default, self.policy.default_origin
        wish = self._resolved(as_wish(wish), origin)
        return self._bound(self._selected(problem, wish, origin, {}, device), call, device)

    def _wish(self, backend: object) -> tuple[Wish, str]:
        if backend is not None:
            return as_wish(backend), "call"
        inherited = wishes.current_wish()
        return (self.policy.default, self.policy.default_origin) if inherited is None else (inherited, "scope")

    def _resolved(self, wish: Wish, origin: str) -> Wish:
        names = (wish,) if isinstance(wish, str) else wish
        resolved = tuple(
            name if name == "auto" else self.factory.resolve(name, "backend" if origin == "call" else origin)
            for name in names
        )
        return resolved[0] if isinstance(wish, str) else resolved

    def _bound(self, plan: Plan, call: dict[str, Any], device: torch.device) -> Run:
        """The function of a plan. Raises Refused."""
        plan.checked()
        self._tell(plan)
        return self.runs.of(plan, call, device)

    def again(self, plan: Plan, excluded: Mapping[str, tuple[Refusal, ...]], device: torch.device) -> Plan:
        """The plan without some strategies, loaded and tried like any; what is passed over is told."""
        other = self._selected(plan.problem, plan.wish, plan.origin, excluded, device)
        self._tell(other)
        return other

    def _lock_of(self, problems: Iterable[AttentionProblem]) -> Lock:
        """What auto would do with these problems now: under a lock in use what that says, where it can be done."""
        plans = [self._selected(problem, "auto", "auto", {}, None) for problem in problems]
        strategies = self.factory.strategies()
        chosen = [
            LockedPlan.of(plan, strategy, strategy.version(self.facts), self.experience.tuned(plan, strategy, None))
            for plan in plans
            if plan.chosen is not None
            for strategy in (strategies[plan.chosen.name],)
        ]
        machines = {place: self.experience.store(torch.device(place)).fingerprint for place in _places(chosen)}
        return Lock.of({place: str(one) for place, one in machines.items()}, chosen)

    def ready(self, name: str, device: torch.device) -> bool:
        """Whether a strategy's kernels can be loaded here, without a download, and pass their trial."""
        return not ready(self.factory.create_strategy(name), self.facts, device)

    def drop(self, live: LiveRun) -> None:
        """Have the kinds of calls that took part in a course planned anew: it is over."""
        for kind, run in list(self._runs.items()):
            if run is live:
                self._runs.pop(kind, None)

    def _tell(self, plan: Plan) -> None:
        """Log once why a backend that was wished for first was passed over."""
        for verdict in plan.passed_over if plan.wish != "auto" else ():
            message = f"{verdict.name} {verdict}; using {plan.backend}"
            if message not in self._told:
                self._told.add(message)
                _log.warning("heedful: %s", message)


class LockInUse(AbstractContextManager["LockInUse"]):
    """A lock that a dispatcher follows; leaving the block puts back what held before."""

    def __init__(self, dispatcher: AttentionDispatcher, before: Lock | None) -> None:
        self._dispatcher, self._before = dispatcher, before

    def __exit__(self, *_error: object) -> None:
        self._dispatcher.experience.lock = self._before
        self._dispatcher.forget_plans()


def _places(plans: Iterable[LockedPlan]) -> set[str]:
    return {"cuda:0" if plan.problem.device == "cuda" else plan.problem.device for plan in plans}


def _no_look(attn_mask: Any, *_call: Any) -> tuple[Any, tuple[Any, ...]]:
    return attn_mask, key_of(attn_mask)


def _batch_of(query: torch.Size, key: torch.Size, value: torch.Size, layout: str) -> int | None:
    """The batch of a call; None where a mask's batch is not that of the problem."""
    rank = len(query)
    if rank > 4 or not rank == len(key) == len(value):
        return None
    return 1 if rank < 4 or layout == "THD" else max(query[0], key[0], value[0])


default_dispatcher = AttentionDispatcher()
attention = default_dispatcher.attention
explain = default_dispatcher.explain
list_backends = default_dispatcher.list_backends
attention_backend = default_dispatcher.attention_backend
freeze = default_dispatcher.freeze
thaw = default_dispatcher.thaw
lock = default_dispatcher.lock
use_lock = default_dispatcher.use_lock
