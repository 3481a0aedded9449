"""The contract: every strategy does what it declares, and refuses, with a reason, what it does not.

    TestMine = heedful.testing.contract(MyStrategy)     # under pytest: a class with one test for each check
    print(heedful.testing.verify(MyStrategy))           # without pytest

A refused call counts as kept contract, and is reported with the limit's name (pytest: a skip). So that a strategy
cannot pass by refusing, ``coverage`` demands that all which its limits declare was asked for and computed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from heedful.errors import HeedfulError
from heedful.factory import AttentionStrategyFactory
from heedful.facts import Facts
from heedful.refusal import Refusal
from heedful.select import judge
from heedful.strategy import AttentionStrategy, Pin
from heedful.testing.checks import examine
from heedful.testing.samples import Sample
from heedful.testing.subject import MACHINE, Outcome, Subject, asked_for, check_declaration, declared, devices_here
from heedful.testing.table import EXHAUSTIVE, PLAIN, SAMPLES
from heedful.testing.tolerance import ContractBroken, Deviation, Tolerance

_PRETENDED = {"cpu": (None,), "cuda": ((7, 5), (8, 0), (9, 0), (10, 0))}


@dataclass(frozen=True, eq=False)
class Check:
    """One check of one strategy on one device; ``sample`` None for those of the strategy as a whole."""

    subject: Subject
    aspect: str
    sample: Sample | None = None
    slow: bool = False

    @property
    def name(self) -> str:
        """The check's name, whatever the strategy and the device, such as ``window-(2,0)-lse``."""
        return self.aspect if self.sample is None else f"{self.sample.name}-{self.aspect}"

    @property
    def id(self) -> str:
        """The name in full, such as ``native-cpu-window-(2,0)-lse``."""
        return f"{self.subject.name}-{self.subject.device}-{self.name}"

    def run(self) -> Outcome:
        """Right, or refused; raises ContractBroken, or what the strategy raised."""
        if self.sample is not None:
            return examine(self.subject, self.sample, self.aspect)
        return _WHOLE[self.aspect](self.subject)


def checks(
    strategy: type[AttentionStrategy] | str,
    *,
    devices: Iterable[str] | None = None,
    samples: Iterable[Sample] | None = None,
    tolerance: Tolerance | None = None,
    machine: Facts | None = None,
    seed: int = 0,
) -> tuple[Check, ...]:
    """All checks of a strategy, given as a class or by its registered name.

    ``devices``: torch's types, by default all here. ``samples``: instead of the table's. ``tolerance``: what a strategy
    that is not exact is held to, by default what goes with the ``relative_error`` that it declares. ``machine``: facts
    to judge by, such as those of a GPU that a stand-in of the strategy's package plays on the CPU. ``seed``: of the
    tensors that are drawn. On a device that the limits do not name, one check says so.
    """
    every: list[Check] = []
    for device in devices_here() if devices is None else devices:
        subject = Subject.of(strategy, device, tolerance or _declared(strategy), machine, seed)
        every.append(Check(subject, "declaration"))
        every.append(Check(subject, "device"))
        if _plain_refusals(subject) & MACHINE:
            continue
        every += [
            Check(subject, aspect) for aspect in (("plain",) if subject.strategy.pin != Pin() else ("plain", "auto"))
        ]
        if samples is None:
            every.append(Check(subject, "coverage"))
            every += [Check(subject, aspect, one, slow=True) for one in EXHAUSTIVE for aspect in one.aspects]
        for one in _asked(subject) if samples is None else samples:
            every += [Check(subject, aspect, one) for aspect in _aspects(one)]
    return tuple(every)


def _declared(strategy: type[AttentionStrategy] | str) -> Tolerance:
    kind = AttentionStrategyFactory.create_strategy(strategy) if isinstance(strategy, str) else strategy
    return Tolerance.of(kind.relative_error)


def _asked(subject: Subject) -> tuple[Sample, ...]:
    """The table's samples; those in float32 in the first dtype that the strategy takes, where it takes no float32."""
    dtypes = subject.limits.dtypes
    if torch.float32 in dtypes or subject.kind_of_device == "cpu":
        return SAMPLES
    return tuple(replace(one, dtype=dtypes[0]) if one.dtype == torch.float32 else one for one in SAMPLES)


def _aspects(sample: Sample) -> tuple[str, ...]:
    return ("dropout",) if "dropout" in sample.aspects else sample.aspects


def _plain_refusals(subject: Subject) -> set[str]:
    """Why a plain call is refused here in every dtype; empty where one is taken."""
    found = [_plain_plan(subject, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)]
    return set() if any(not one for one in found) else set.intersection(*map(set, found))


def _plain_plan(subject: Subject, dtype: torch.dtype) -> set[str]:
    built = replace(PLAIN, dtype=dtype, head_dim=64).build(subject.device)
    (verdict,) = subject.dispatcher.explain(*built.tensors, backend=subject.name).verdicts
    return {refusal.field for refusal in verdict.refusals}


def check_declared(subject: Subject) -> Outcome:
    """The limits hold known words, and on every machine, had or not, refusals are whole and honest."""
    check_declaration(subject.strategy)
    if not subject.strategy.describe():
        raise ContractBroken(f"{subject.name} has no docstring to describe it in tables")
    for sample in SAMPLES:
        built = sample.build("cpu")
        problem = subject.dispatcher.explain(*built.tensors, **built.arguments).problem
        for device, capabilities in _PRETENDED.items():
            for capability in capabilities:
                verdict = judge(subject.strategy, problem.replace(device=device, capability=capability))
                for refusal in verdict.refusals:
                    subject.check_honest(refusal, verdict.lowered)
    return Outcome()


def check_device(subject: Subject) -> Outcome:
    """Whether the limits name this device, or the machine lacks what they demand."""
    if not _plain_refusals(subject) & MACHINE:
        return Outcome()
    built = PLAIN.build(subject.device)
    call = dict(zip(("query", "key", "value"), built.tensors, strict=True))
    return subject.refused(subject.dispatcher.explain(**call, backend=subject.name), call)


def check_plain(subject: Subject) -> Outcome:
    """A plain call is taken in some dtype: a strategy that refuses everything keeps no contract."""
    fields = _plain_refusals(subject)
    if fields:
        raise ContractBroken(f"{subject.name} takes no plain call on {subject.device}: refused for {sorted(fields)}")
    return Outcome()


def check_auto(subject: Subject) -> Outcome:
    """ "auto" may choose the strategy if, and only if, it is exact."""
    dtype = next(dtype for dtype in subject.limits.dtypes)
    built = replace(PLAIN, dtype=dtype, head_dim=64).build(subject.device)
    plan = subject.dispatcher.explain(*built.tensors, backend="auto")
    if (plan.backend == subject.name) != subject.is_exact:
        raise ContractBroken(f"{subject.name} is {subject.strategy.exactness}, and auto decides:\n{plan}")
    return Outcome()


def check_coverage(subject: Subject) -> Outcome:
    """All that the limits declare for this device was computed, through at least one sample."""
    reached: set[str] = set()
    for sample in _asked(subject):
        for aspect in sample.aspects:
            built = sample.build(subject.device, needs_grad=aspect in {"gradient", "both"})
            with built.surroundings():
                call = {**built.arguments, "return_lse": aspect in {"lse", "both"}}
                plan = subject.dispatcher.explain(*built.tensors, **call, backend=subject.name)
            reached |= asked_for(plan.chosen.lowered) | {f"dtypes: {plan.problem.dtype}"} if plan.chosen else set()
    missing = declared(subject.limits) - reached
    if missing:
        raise ContractBroken(f"{subject.name} declares what no sample could make it compute: {sorted(missing)}")
    return Outcome()


_WHOLE = {
    "declaration": check_declared,
    "device": check_device,
    "plain": check_plain,
    "auto": check_auto,
    "coverage": check_coverage,
}


@dataclass(frozen=True)
class Result:
    """What became of a check: ``right``, ``refused`` (``detail`` names the limits) or ``wrong`` (what is wrong).

    ``deviation``: the one that came nearest to what is allowed, or the one that is beyond it.
    """

    check: str
    outcome: str
    detail: str = ""
    refusals: tuple[Refusal, ...] = ()
    deviation: Deviation | None = None


@dataclass(frozen=True)
class Report:
    """All results of one strategy. Prints as a summary with everything that is wrong."""

    name: str
    results: tuple[Result, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.wrong

    @property
    def wrong(self) -> tuple[Result, ...]:
        """The broken checks."""
        return tuple(result for result in self.results if result.outcome == "wrong")

    def __str__(self) -> str:
        count = {word: sum(one.outcome == word for one in self.results) for word in ("right", "refused", "wrong")}
        lines = [f"{self.name}: " + ", ".join(f"{number} {word}" for word, number in count.items())]
        return "\n".join(lines + [f"  {one.check}: {one.detail}" for one in self.wrong])


def verify(
    strategy: type[AttentionStrategy] | str, *, slow: bool = False, only: Iterable[str] = (), **choice: Any
) -> Report:
    """Run the contract without pytest. ``choice``: see ``checks``.

    ``slow``: with all samples in every dtype. ``only``: the checks of these names, such as ``window-(2,0)-lse``, and no
    others; a name that no check has is a ValueError.
    """
    names, every = set(only), checks(strategy, **choice)
    if unknown := names - {check.name for check in every}:
        raise ValueError(f"only: no check is called {', '.join(sorted(unknown))}")
    wanted = [one for one in every if one.name in names or (not names and (slow or not one.slow))]
    results = [examined(check) for check in wanted]
    name = strategy if isinstance(strategy, str) else strategy.name or strategy.__name__
    return Report(name, tuple(results))


def examined(check: Check) -> Result:
    """What becomes of a check; whatever a strategy raises is no answer and no refusal."""
    try:
        outcome = check.run()
    except (ContractBroken, HeedfulError) as error:
        return Result(check.id, "wrong", str(error), deviation=getattr(error, "deviation", None))
    except Exception as error:
        return Result(check.id, "wrong", f"{type(error).__name__}: {error}")
    word = "refused" if outcome.refused else "right"
    return Result(check.id, word, str(outcome), outcome.refused, outcome.worst)


def parameters(strategy: type[AttentionStrategy] | str, **choice: Any) -> list[Any]:
    """The checks as ``pytest.param``, with the markers ``slow`` and ``gpu``; ``choice``: see ``checks``."""
    import pytest

    marked = []
    for check in checks(strategy, **choice):
        marks = [pytest.mark.slow] if check.slow else []
        marks += [pytest.mark.gpu] if check.subject.device == "cuda" else []
        marked.append(pytest.param(check, id=check.id, marks=marks))
    return marked


def report(check: Check) -> None:
    """Run a check inside a pytest test; a refusal becomes a skip that names the limit."""
    import pytest

    outcome = check.run()
    if outcome.refused:
        pytest.skip(f"{check.subject.name} refuses on {check.subject.device}: {outcome}")


def contract(strategy: type[AttentionStrategy] | str, **choice: Any) -> type:
    """A test class for pytest: ``TestMine = contract(MyStrategy)``. ``choice``: see ``checks``."""
    import pytest

    class Contract:
        """The contract of one strategy."""

        @pytest.mark.parametrize("check", parameters(strategy, **choice))
        def test_contract(self, check: Check) -> None:
            report(check)

    return Contract
