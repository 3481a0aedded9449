"""The contract over every registered strategy. A skip names the limit for which a call is refused."""

from __future__ import annotations

import pytest

from heedful import AttentionStrategyFactory
from heedful.testing import SAMPLES, Check, Tolerance, checks, parameters, report
from heedful.testing.subject import Subject

NAMES = sorted(AttentionStrategyFactory.strategies())


@pytest.mark.parametrize("check", [one for name in NAMES for one in parameters(name)])
def test_contract(check: Check) -> None:
    report(check)


def test_the_reference_takes_every_sample() -> None:
    """It refuses what no backend of this version computes, and nothing else."""
    subject = Subject.of("reference", "cpu", Tolerance())
    for sample in SAMPLES:
        built = sample.build("cpu", needs_grad=True)
        with built.surroundings():
            more = {"return_lse": True, **built.arguments}
            plan = subject.dispatcher.explain(*built.tensors, **more, backend="reference")
        assert plan.refused == bool(sample.must_refuse), f"{sample.name}: {plan}"


def test_every_check_has_a_name_of_its_own() -> None:
    names = [check.id for name in NAMES for check in checks(name)]
    assert len(set(names)) == len(names)
    assert len(SAMPLES) > 300
