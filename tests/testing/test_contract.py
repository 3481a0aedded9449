"""What a check tells beside right or wrong: how far it was, under which seed, and how to have it alone."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from heedful.strategies.reference import ReferenceAttentionStrategy
from heedful.testing import Sample, checks, examined, verify

SCALED = (Sample(name="scaled", call={"scale": 0.1}, aspects=("forward", "lse", "gradient")),)


class Deaf(ReferenceAttentionStrategy):
    """Ignores scale."""

    name = "deaf"

    def compute_attention(self, query: Tensor, key: Tensor, value: Tensor, *, scale: Any = None, **kwargs: Any) -> Any:
        return super().compute_attention(query, key, value, **kwargs)


def result(kind: Any, name: str, **choice: Any) -> Any:
    [one] = verify(kind, devices=("cpu",), samples=SCALED, only=(name,), **choice).results
    return one


def test_a_right_check_tells_its_largest_deviation() -> None:
    found = result("reference", "scaled-gradient").deviation
    assert 0 < found.units <= 1
    assert 0 < found.error < 1e-5
    assert "output" in found.what or "gradient" in found.what


def test_a_wrong_check_tells_how_far_it_is() -> None:
    found = result(Deaf, "scaled-forward")
    assert (found.outcome, found.deviation.what) == ("wrong", "the output")
    assert found.deviation.units > 1
    assert f"off by {found.deviation.error:.3g}" in found.detail


def test_a_refused_check_holds_its_refusals() -> None:
    sample = Sample(name="capped", call={"softcap": 2.0}, aspects=("forward",))
    [one] = verify("native", devices=("cpu",), samples=(sample,), only=("capped-forward",)).results
    assert (one.outcome, [refusal.field for refusal in one.refusals], one.deviation) == ("refused", ["softcap"], None)


def test_dropout_and_compiled_calls_tell_theirs() -> None:
    every = {check.name: check for check in checks("native", devices=("cpu",))}
    for name in ("dropout-0.25-dropout", "compiled-compile"):
        assert examined(every[name]).deviation.units <= 1


def test_another_seed_is_another_call() -> None:
    first, again, other = (result("reference", "scaled-forward", seed=seed).deviation for seed in (0, 0, 9))
    assert first == again
    assert first != other


def test_a_check_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match="only: no check is called sclaed-forward"):
        result("reference", "sclaed-forward")


def test_an_approximate_strategy_is_held_to_the_error_that_it_declares() -> None:
    class Coarse(ReferenceAttentionStrategy):
        """A tenth too large, and says so."""

        name = "coarse"
        exactness = "quantised"
        relative_error = 0.12

        def compute_attention(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Any:
            return super().compute_attention(query, key, value * 1.1, **kwargs)

    found = result(Coarse, "scaled-forward")
    assert (found.outcome, round(found.deviation.units, 2)) == ("right", 0.83)
    Coarse.relative_error = 0.08
    assert result(Coarse, "scaled-forward").outcome == "wrong"
