"""What is under test: one strategy, alone in a registry, on one device; and what became of one check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from heedful.dispatch import AttentionDispatcher
from heedful.errors import Refused
from heedful.factory import AttentionStrategyFactory
from heedful.facts import Facts
from heedful.masks import ALIGNMENTS
from heedful.policy import Policy
from heedful.problem import LAYOUTS, AttentionProblem
from heedful.refusal import Refusal
from heedful.select import Plan
from heedful.strategy import ALL_MASKS, AttentionStrategy, Limits, Pin
from heedful.testing.tolerance import ContractBroken, Deviation, Tolerance

# What lowerings rewrite away, whatever the kernel: it is never a reason in the end.
_ALWAYS_MENDED = frozenset(
    {"layout", "leading sizes", "autocast", "kv heads", "bias dtype", "head dim padding", "value dim", "scale"}
)
# What a machine lacks. A strategy that is refused for these is not tested here, and says so.
MACHINE = frozenset(
    {"device", "architecture", "compute capability", "package", "download", "folder", "import", "probe"}
)


@dataclass(frozen=True)
class Outcome:
    """``right``, or ``refused`` with the limits that the call breaks. A wrong answer raises ContractBroken.

    ``deviations``: how far each right answer was from the formula.
    """

    refused: tuple[Refusal, ...] = ()
    deviations: tuple[Deviation, ...] = ()

    @property
    def worst(self) -> Deviation | None:
        """The deviation that comes nearest to what is allowed."""
        return max(self.deviations, key=lambda one: one.units, default=None)

    def __str__(self) -> str:
        return "; ".join(f"{one.field} (takes {one.required})" for one in self.refused) or "right"


@dataclass(frozen=True, eq=False)
class Subject:
    """A strategy on a device. ``dispatcher`` knows no other strategy. ``seed``: of the first tensors that are drawn."""

    name: str
    strategy: AttentionStrategy
    device: str
    dispatcher: AttentionDispatcher
    tolerance: Tolerance
    machine: Facts | None = None
    seed: int = 0

    @classmethod
    def of(
        cls,
        strategy: type[AttentionStrategy] | str,
        device: str,
        tolerance: Tolerance,
        machine: Facts | None = None,
        seed: int = 0,
    ) -> Subject:
        """The strategy, given as a class or by a name or alias in the default registry, under its own name.

        ``machine``: the facts to judge by, instead of this machine's.
        """
        made = AttentionStrategyFactory.create_strategy(strategy) if isinstance(strategy, str) else None
        kind = type(made) if made is not None else strategy
        assert isinstance(kind, type)
        name = (strategy if isinstance(strategy, str) else kind.name) or kind.__name__
        factory = AttentionStrategyFactory(packages=(), plugins=False)
        factory.register_strategy(kind.name if made is not None and made.pin != Pin() else name, kind)
        # The contract judges by itself, and wants to see wrong answers.
        policy = Policy(downloads=Policy.from_environment().downloads, guard="off")
        dispatcher = AttentionDispatcher(factory, facts=machine, policy=policy)
        return cls(name, factory.create_strategy(name), device, dispatcher, tolerance, machine, seed)

    @property
    def kind_of_device(self) -> str:
        """The type of its device by the facts, which may see more in it than torch."""
        return self.dispatcher.facts.device(torch.device(self.device)).type

    @property
    def limits(self) -> Limits:
        """Its limits on this device."""
        return self.strategy.limits_for(self.kind_of_device)

    @property
    def is_exact(self) -> bool:
        """Whether flash-attn's rule holds for it."""
        return self.strategy.exactness == "exact"

    def refused(self, plan: Plan, call: dict[str, Any]) -> Outcome:
        """The outcome of a refused plan, once its reasons are honest and the call itself is refused as well."""
        (verdict,) = plan.verdicts
        for refusal in verdict.refusals:
            self.check_honest(refusal, verdict.lowered)
        try:
            self.dispatcher.attention(**call, backend=self.name)
        except Refused:
            return Outcome(verdict.refusals)
        raise ContractBroken(f"explain says that {self.name} refuses the call, and the call gives an answer:\n{plan}")

    def check_honest(self, refusal: Refusal, lowered: AttentionProblem) -> None:
        """Raise ContractBroken unless the reason is whole, and true of the problem that is left after all lowerings."""
        if not (refusal.field and refusal.observed and refusal.required):
            raise ContractBroken(f"a refusal must give field, observed and required: {refusal!r}")
        if type(self.strategy).refusals is not AttentionStrategy.refusals:
            return  # it has rules of its own
        packed_only = refusal.field == "layout" and self.strategy.limits_for(lowered.device).layouts == ("THD",)
        if refusal.field in _ALWAYS_MENDED and not packed_only:
            raise ContractBroken(f"{self.name} refuses for {refusal}, which a lowering can mend: {lowered}")
        broken = _broken(lowered, self.strategy.limits_for(lowered.device)).get(refusal.field)
        if broken is False:
            raise ContractBroken(f"{self.name} refuses for {refusal}, which is within its limits: {lowered}")


def check_declaration(strategy: AttentionStrategy) -> None:
    """Raise ContractBroken unless the limits hold words that heedful knows."""
    every = strategy.limits if isinstance(strategy.limits, tuple) else (strategy.limits,)
    for limits in every:
        known: dict[str, tuple[Any, Any]] = {
            "masks": (limits.masks, ALL_MASKS),
            "layouts": (limits.layouts, LAYOUTS),
            "causal_alignments": (limits.causal_alignments, ALIGNMENTS),
            "empty_rows": (limits.empty_rows, ("output", "lse")),
        }
        for word, (have, words) in known.items():
            if not set(have) <= set(words):
                raise ContractBroken(f"limits.{word} is {have}; known are {', '.join(sorted(words))}")
        if not (
            limits.devices and limits.layouts and limits.dtypes and all(t.is_floating_point for t in limits.dtypes)
        ):
            raise ContractBroken(f"limits need devices, layouts and floating dtypes: {limits}")
    if strategy.exactness not in ("exact", "quantised", "sparse"):
        raise ContractBroken(f"exactness is {strategy.exactness!r}; give exact, quantised or sparse")


def asked_for(problem: AttentionProblem) -> set[str]:
    """The features that a problem asks a kernel for, by the names of ``declared``."""
    mask = problem.mask
    flags = {
        "gqa": problem.heads != problem.kv_heads,
        "scale": problem.scale is not None,
        "softcap": problem.softcap is not None,
        "dropout": problem.dropout_p > 0,
        "lse": problem.needs_lse,
        "backward": problem.needs_grad,
        "bias_backward": mask.bias_needs_grad and problem.needs_grad,
        "deterministic_backward": problem.needs_grad and problem.deterministic,
        "value_dim_may_differ": problem.head_dim != problem.value_dim,
        "mixed_masks": len(mask.kinds) > 1,
    }
    words = {name for name, there in flags.items() if there} | {f"masks: {kind}" for kind in mask.kinds}
    return words | {f"dtypes: {problem.dtype}", f"layouts: {problem.layout}"} | _alignments(problem)


def declared(limits: Limits) -> set[str]:
    """What the limits allow that a sample can ask for."""
    names = ("gqa", "scale", "softcap", "dropout", "lse", "backward", "bias_backward", "value_dim_may_differ")
    words = {name for name in (*names, "deterministic_backward", "mixed_masks") if getattr(limits, name)}
    words |= {f"masks: {kind}" for kind in limits.masks}
    words |= {f"dtypes: {dtype}" for dtype in limits.dtypes}
    words |= {f"layouts: {layout}" for layout in limits.layouts}
    banded = bool(limits.masks & {"causal", "window"})
    return words | {f"causal_alignments: {one}" for one in limits.causal_alignments if banded}


def _alignments(problem: AttentionProblem) -> set[str]:
    mask = problem.mask
    every = {mask.causal, mask.window[2] if mask.window else None} - {None}
    return {f"causal_alignments: {one}" for one in every}


def _broken(problem: AttentionProblem, limits: Limits) -> dict[str, bool]:
    """For each field of a refusal, whether the problem really breaks that limit, derived anew."""
    mask, dims = problem.mask, (problem.head_dim, problem.value_dim)
    joins = "bias" in limits.masks or ("dense" in limits.masks and mask.bias is None)
    missing = not limits.empty_rows >= {"output"} or (problem.needs_lse and "lse" not in limits.empty_rows)
    return {
        "device": not (problem.device in limits.devices or "*" in limits.devices),
        "dtype": problem.dtype not in limits.dtypes or _before_bfloat16(problem, limits),
        "head dim": max(dims) > (limits.max_head_dim or max(dims)),
        "mask": not set(mask.kinds) <= limits.masks and not joins,
        "packing": mask.packing != "tidy" and not limits.loose_packs,
        "batch": problem.batch > (limits.max_batch or problem.batch),
        "mask mix": len(mask.kinds) > 1 and not joins,
        "causal alignment": bool(_alignments(problem)) and not joins,
        "bias gradient": mask.bias_needs_grad and not limits.bias_backward,
        "empty rows": problem.may_hide_rows and missing,
        "softcap": problem.softcap is not None and not limits.softcap,
        "sinks": problem.sinks,
        "dropout_p": problem.dropout_p > 0 and not limits.dropout,
        "return_lse": problem.needs_lse and not limits.lse,
        "gradient": problem.needs_grad and not limits.backward,
        "deterministic gradient": problem.deterministic and not limits.deterministic_backward,
        "torch.compile": problem.compiling and not limits.compile,
        "options": not {name for name, _ in problem.options} <= limits.options,
    }


def _before_bfloat16(problem: AttentionProblem, limits: Limits) -> bool:
    since, have = limits.bfloat16_from, problem.capability
    return problem.dtype == torch.bfloat16 and since is not None and have is not None and have < since


def devices_here() -> tuple[str, ...]:
    """The types of device that torch can use here."""
    every = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "xpu": hasattr(torch, "xpu") and torch.xpu.is_available(),
    }
    return tuple(name for name, there in every.items() if there)
