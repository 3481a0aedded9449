"""The contract on a GPU, by the packages that are installed here: every strategy, and every alias that pins something.

Without ``--record`` only the aliases are checked: the strategies themselves are in tests/contract, on every device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from heedful import AttentionStrategyFactory, Policy
from heedful.facts import probe
from heedful.strategy import Pin
from heedful.testing import Check, parameters, report


def names() -> Iterator[tuple[str, bool]]:
    """Each strategy, and after it its pinned aliases; whether the name is such an alias."""
    for name, strategy in AttentionStrategyFactory.strategies().items():
        yield name, False
        yield from ((alias, True) for alias, pin in strategy.pins().items() if pin != Pin())


def cases(name: str) -> list[Any]:
    """The checks of one name on the GPU, or why there are none."""
    if not torch.cuda.is_available():
        return []
    strategy = AttentionStrategyFactory.create_strategy(name)
    lacks = strategy.lacks(probe(), Policy().downloads)  # the policy that checks are made with
    if lacks and strategy.limits_for("cuda").covers("cuda"):
        reason = f"{name} is absent: {'; '.join(map(str, lacks))}"
        return [pytest.param(reason, id=f"{name}-cuda-package", marks=pytest.mark.gpu)]
    return parameters(name, devices=("cuda",))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    everything = metafunc.config.getoption("--record", default=None) is not None
    found = [case for name, is_alias in names() if is_alias or everything for case in cases(name)]
    none = pytest.param("no GPU: torch sees none here", id="none", marks=pytest.mark.gpu)
    metafunc.parametrize("check", found or [none])


def test_contract(check: Check | str) -> None:
    if isinstance(check, str):
        pytest.skip(check)
    report(check)
