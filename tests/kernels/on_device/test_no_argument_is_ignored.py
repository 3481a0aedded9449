"""No argument of ours is ignored: the hunt of ``tests/contract/test_no_argument_is_ignored.py``, in the interpreter."""

from __future__ import annotations

import pytest
from contract.test_no_argument_is_ignored import at_home, hold_to_account, hunt_through

FEW, MANY = 12, 90


def test_a_few_draws():
    _, subject = at_home("triton")
    assert hunt_through(subject, FEW, shrinking=False).moved["scale"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["triton", "triton_int8"])
def test_every_argument_counts(name):
    _, subject = at_home(name)
    hold_to_account(hunt_through(subject, MANY), MANY)
