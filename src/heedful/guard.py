"""The guard: answers of live calls held to the formula, on a few query rows, as often as one per cent of the time buys.

A strategy's first call of each class of problems is checked; after that, a check happens when 1 % of the time that the
calls took since the last one covers it. Which rows are looked at, and what passes, is said in ``rows``. What it cannot
see: compiled calls, calls with dropout, and those inside of ``torch.func`` transforms, dispatch modes and CUDA graphs.

A wrong answer is replaced by the next candidate's where somebody else may compute it (``auto`` or a list), and the
strategy is quarantined for that class; a forced name, or a lock, raises ``WrongAnswer``.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack as listeners
from torch.cuda import is_current_stream_capturing as _capturing
from torch.nn import Parameter

from heedful.binding import Run
from heedful.bundle import write_bundle
from heedful.call import mask_of_call
from heedful.clock import settle
from heedful.errors import HeedfulError, WrongAnswer
from heedful.policy import Policy
from heedful.problem import AttentionProblem
from heedful.problem_class import class_of
from heedful.refusal import Refusal
from heedful.rows import check_rows
from heedful.select import Plan
from heedful.strategy import Answer, AttentionStrategy
from heedful.tally import NEVER, Tally, Trust

_log = logging.getLogger("heedful")
_BUDGET = 0.01  # of the time that calls take
_LATER = 64  # calls, where a check is due and cannot be made
Redo = Callable[[Refusal, Tensor, Tensor, Tensor, Any], Answer]
Quarantine = Callable[[AttentionProblem, str, str, torch.device], None]


class Guard:
    """Watches bound functions. ``quarantine`` is told the problem, the strategy and the reason, once a fault."""

    def __init__(self, policy: Policy, quarantine: Quarantine) -> None:
        self.policy = policy
        self._quarantine = quarantine
        self._bundles: set[tuple[str, str]] = set()

    def watch(
        self, run: Run, tally: Tally, strategy: AttentionStrategy, call: Mapping[str, Any], redo: Redo | None
    ) -> Run:
        """The function, counted, and checked when it is due.

        ``call``: its arguments that are no tensors. ``redo`` computes the call by somebody else; None where nobody may.
        """
        counted = self._reporting(run, tally.plan, strategy, call)
        if self.policy.watches(tally.plan.problem) and strategy.name != "reference":
            carried = tally.trust.carry(tally)  # lengths that grow are a new kind at every call, and of one class
            tally.wait(1 if tally.trust.checks == 0 else _period(tally.trust) - carried)

        def look(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any) -> Answer:
            if not can_be_checked(query, key, value):
                tally.wait(_LATER)
                return counted(query, key, value, attn_mask)
            return self._look(counted, tally, strategy, call, redo, (query, key, value, attn_mask))

        def watched(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any) -> Answer:
            tally.left -= 1
            if tally.left > 0:
                return counted(query, key, value, attn_mask)
            try:
                return look(query, key, value, attn_mask)
            except BaseException:
                tally.wait(1)  # it was not looked at
                raise

        watched.tally, watched.bare = tally, counted  # type: ignore[attr-defined]
        return watched

    def _look(
        self,
        run: Run,
        tally: Tally,
        strategy: AttentionStrategy,
        call: Mapping[str, Any],
        redo: Redo | None,
        operands: tuple[Tensor, Tensor, Tensor, Any],
    ) -> Answer:
        trust, device = tally.trust, operands[0].device
        first = trust.checks == 0
        settle(device)
        start = time.perf_counter()
        answer = run(*operands)
        settle(device)
        called = time.perf_counter()
        if not first and trust.seconds is None:  # the first call compiled, loaded and allocated: the second one counts
            trust.seconds = called - start
            tally.wait(_period(trust))
            return answer
        query, key, value, attn_mask = operands
        words = {name: call[name] for name in ("is_causal", "causal_alignment", "window")}
        problem = tally.plan.problem
        try:
            verdict = check_rows(
                problem,
                query,
                key,
                value,
                mask_of_call(attn_mask=attn_mask, **words),
                answer,
                max_error=_allowed_error(strategy, problem),
            )
        except Exception as error:  # no memory left, say: the answer is there, and is not lost for it
            _log.warning("heedful: an answer of %s could not be checked, later ones will be: %r", strategy.name, error)
            tally.wait(_LATER)
            return answer
        trust.checks += 1
        trust.carried, trust.newest = 0, tally
        trust.cost = time.perf_counter() - called
        trust.error = max(trust.error, verdict.relative if math.isfinite(verdict.relative) else math.inf)
        trust.share = max(trust.share, verdict.error / verdict.allowed if verdict.allowed else 0.0)
        if not first:
            trust.seconds = called - start
        if verdict.right:
            tally.wait(1 if first else _period(trust))
            return answer
        trust.fault = verdict.fault
        return self._tripped(tally, strategy, call, redo, operands)

    def _tripped(
        self,
        tally: Tally,
        strategy: AttentionStrategy,
        call: Mapping[str, Any],
        redo: Redo | None,
        operands: tuple[Tensor, Tensor, Tensor, Any],
    ) -> Answer:
        """Replace a wrong answer, or raise WrongAnswer."""
        plan, fault = tally.plan, tally.trust.fault
        path = self._bundled(plan, strategy, call, operands, fault)
        where = f"; its tensors are in {path}, `heedful replay` reruns them" if path else ""
        tally.trust.checks = 0  # whoever names it has it checked anew
        tally.wait(1)
        if redo is None or self.policy.guard == "raise":
            raise WrongAnswer(plan.problem, strategy.name, fault + where)
        self._quarantine(plan.problem, strategy.name, fault, operands[0].device)
        _log.warning(
            "heedful: %s gave a wrong answer and is quarantined for such problems: %s (%s)%s; computed by the next one",
            strategy.name, fault, plan.problem, where,
        )  # fmt: skip
        return redo(Refusal("guard", fault, "right answers"), *operands)

    def _reporting(self, run: Run, plan: Plan, strategy: AttentionStrategy, call: Mapping[str, Any]) -> Run:
        """The function; where bundles are wanted, an error of the kernel writes one, and goes on."""
        if self.policy.bundles is None or plan.problem.compiling:
            return run

        def reporting(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any) -> Answer:
            try:
                return run(query, key, value, attn_mask)
            except HeedfulError:
                raise
            except Exception as error:
                fault = f"{type(error).__name__}: {error}"
                path = self._bundled(plan, strategy, call, (query, key, value, attn_mask), fault)
                _log.error("heedful: %s raised %s%s", strategy.name, fault, f"; see {path}" if path else "")
                raise

        return reporting

    def _bundled(
        self,
        plan: Plan,
        strategy: AttentionStrategy,
        call: Mapping[str, Any],
        operands: tuple[Tensor, Tensor, Tensor, Any],
        fault: str,
    ) -> str:
        """The file that the call was written to; "" where none is wanted or it cannot be written, which is logged."""
        once = (strategy.name, class_of(plan.problem))
        if self.policy.bundles is None or plan.chosen is None or once in self._bundles:
            return ""
        self._bundles.add(once)  # one a class: a loop that tries again would fill the disk
        query, key, value, mask = operands
        try:
            path = write_bundle(
                self.policy.bundles,
                problem=plan.problem,
                call={name: word for name, word in call.items() if word is not None},
                query=query,
                key=key,
                value=value,
                mask=mask,
                strategy=strategy.name,
                version=strategy.version(),
                steps=tuple(step.name for step in plan.chosen.steps),
                fault=fault,
                machine={"torch": torch.__version__, "device": str(query.device)},
            )
        except Exception as error:  # whatever keeps it from being written must not hide what it is about
            _log.warning("heedful: no bug report was written: %s", error)
            return ""
        return str(path)


def _period(trust: Trust) -> int:
    """After how many calls a check is paid for."""
    if trust.seconds is None or not trust.seconds:
        return 1
    return min(math.ceil(trust.cost / (_BUDGET * trust.seconds)), NEVER)


def _allowed_error(strategy: AttentionStrategy, problem: AttentionProblem) -> float | None:
    """The relative error that an approximate strategy may make: the call's, or what it declares itself."""
    if strategy.exactness == "exact":
        return None
    return strategy.relative_error if problem.max_error is None or problem.max_error == math.inf else problem.max_error


def can_be_checked(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether these are plain tensors with numbers, and nothing listens that would see, or record, the check."""
    if any(type(tensor) not in (Tensor, Parameter) for tensor in (query, key, value)) or query.device.type == "meta":
        return False
    if listeners() or torch._C._functorch.maybe_current_level() is not None:
        return False
    return not (query.device.type == "cuda" and _capturing())
