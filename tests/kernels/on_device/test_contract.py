"""The contract over our own strategies in Triton's interpreter. On a GPU ``tests/contract`` runs it whole.

The LSE's aspects look at the output, too, and so do those with gradient and LSE at each of them: what stands alone in
other aspects is slow.
"""

from __future__ import annotations

import pytest

from heedful.testing import Check, checks, report

OURS = ("triton",)
WITHIN = {"forward": "lse", "gradient": "both"}  # an aspect, and the one that looks at all of it
WHOLE = {"plain"}  # samples of which every aspect runs


def _parameters() -> list[object]:
    made = []
    for name in OURS:
        for check in checks(name, devices=("cpu",)):
            sample = check.sample
            if sample is None:
                made.append(pytest.param(check, id=check.id))
                continue
            again = WITHIN.get(check.aspect) in sample.aspects and sample.name not in WHOLE
            made.append(pytest.param(check, id=check.id, marks=[pytest.mark.slow] if check.slow or again else []))
    return made


@pytest.mark.parametrize("check", _parameters())
def test_contract(check: Check) -> None:
    report(check)
