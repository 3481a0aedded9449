"""Adding a backend is adding one file: it is listed, explained, contract-tested and selectable with no other edit.

And the contract is worth something: each way of being wrong below is caught.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import AttentionDispatcher, AttentionStrategy, AttentionStrategyFactory, Policy, Refusal, Refused
from heedful.strategies.reference import ReferenceAttentionStrategy
from heedful.testing import SAMPLES, Sample, contract, verify

FILE = '''
"""Einstein's attention: a plain softmax of products."""

import torch

from heedful import AttentionStrategy, Limits


class EinsteinAttentionStrategy(AttentionStrategy):
    """Einstein's attention: a plain softmax of products."""

    name = "einstein"
    aliases = ("emc2",)
    limits = Limits(devices=("cpu", "cuda"), dtypes=(torch.float32,), layouts=("BSHD",), masks=frozenset({"bias"}))

    def compute_attention(self, q_BTNH, k_BSNH, v_BSNH, *, attn_mask=0.0):
        scores_BNTS = torch.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH) / q_BTNH.shape[-1] ** 0.5 + attn_mask
        return torch.einsum("BNTS,BSNH->BTNH", scores_BNTS.softmax(-1), v_BSNH)
'''
SHAPE = (1, 2, 5, 8)


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AttentionStrategyFactory]:
    """A registry that also scans a package in which the file, and nothing else, was put."""
    package = tmp_path / "my_attention"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "einstein.py").write_text(FILE.strip() + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield AttentionStrategyFactory(packages=("heedful.strategies", "my_attention"), plugins=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_attention"]:
        del sys.modules[name]


def test_the_file_is_about_twenty_lines() -> None:
    assert len(FILE.strip().splitlines()) <= 20


def test_it_is_listed_explained_and_selectable(registry: AttentionStrategyFactory) -> None:
    dispatcher = AttentionDispatcher(registry, policy=Policy())
    query, key, value = torch.randn(3, *SHAPE)
    assert dispatcher.list_backends("cpu")["emc2"].description == "Einstein's attention: a plain softmax of products."
    plan = dispatcher.explain(query, key, value, is_causal=True, backend="einstein")
    assert (plan.backend, "layout" in str(plan), "materialise_mask" in str(plan)) == ("einstein", True, True)
    assert "einstein" in str(dispatcher.explain(query, key, value))
    out = dispatcher.attention(query, key, value, is_causal=True, backend="emc2")
    want = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(out, want)
    with pytest.raises(Refused, match=r"einstein refuses: dropout_p is 0\.5"):
        dispatcher.attention(query, key, value, dropout_p=0.5, backend="einstein")


def test_it_keeps_the_contract(registry: AttentionStrategyFactory) -> None:
    result = verify(type(registry.create_strategy("einstein")), devices=("cpu",))
    assert result.ok, str(result)
    assert sum(one.outcome == "right" for one in result.results) > 100


def test_a_strategy_in_the_short_form_keeps_the_contract() -> None:
    class Short(AttentionStrategy):
        """Plain attention in the short form."""

        def compute_attention(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
            assert not kwargs
            return torch.softmax(query @ key.mT / query.shape[-1] ** 0.5, dim=-1) @ value

    result = verify(Short, devices=("cpu",))
    assert result.ok, str(result)
    assert result.name == "Short"


class Wrong(ReferenceAttentionStrategy):
    """The reference, for one thing that the subclasses get wrong."""

    name = "wrong"
    found_by = "plain"  # the samples, by a part of their names, that find what is wrong

    def compute_attention(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Any:
        return super().compute_attention(query, key, value, **self.forgetting(**kwargs))

    def forgetting(self, **kwargs: Any) -> dict[str, Any]:
        return kwargs


def _forgets(*names: str, by: str) -> type[Wrong]:
    class Forgets(Wrong):
        """Drops an argument without a word."""

        found_by = by

        def forgetting(self, **kwargs: Any) -> dict[str, Any]:
            return {name: value for name, value in kwargs.items() if name not in names}

    return Forgets


class NaNOnEmptyRows(Wrong):
    """Gives NaN where a query sees no key."""

    found_by = "empty-row"

    def compute_attention(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Any:
        out, lse = super().compute_attention(query, key, value, **{**kwargs, "return_lse": True})
        out = out.masked_fill((lse == -torch.inf)[..., None], torch.nan)
        return (out, lse) if kwargs.get("return_lse") else out


class LseOfBaseTwo(Wrong):
    """Gives the LSE to base 2."""

    def compute_attention(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Any:
        answer = super().compute_attention(query, key, value, **kwargs)
        return (answer[0], answer[1] * 1.4427) if kwargs.get("return_lse") else answer


class LseOfEmptyRowsPositive(Wrong):
    """Gives +inf as the LSE where a query sees no key, as flash-attn 2 does."""

    found_by = "empty-row"

    def compute_attention(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Any:
        answer = super().compute_attention(query, key, value, **kwargs)
        return (answer[0], answer[1].abs()) if kwargs.get("return_lse") else answer


class ChangesItsInput(Wrong):
    """Scales the query in place."""

    def compute_attention(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Any:
        out = super().compute_attention(query.clone(), key, value, **kwargs)
        with torch.no_grad():
            query.mul_(2.0)
        return out


class WindowByOne(Wrong):
    """Takes the left end of a window as excluded."""

    found_by = "window"

    def forgetting(self, **kwargs: Any) -> dict[str, Any]:
        left, right = kwargs.get("window", (None, None))
        return {**kwargs, "window": (left - 1, right)} if left else kwargs


class OtherAlignment(Wrong):
    """Aligns every causal mask at the bottom right, as flash-attn does."""

    found_by = "causal"

    def forgetting(self, **kwargs: Any) -> dict[str, Any]:
        return {**kwargs, "causal_alignment": "bottom_right"} if kwargs.get("is_causal") else kwargs


class NoGradientOfKey(Wrong):
    """Lets no gradient reach the key."""

    def compute_attention(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Any:
        return super().compute_attention(query, key.detach() + 0.0 * key, value, **kwargs)


class GarbageComesThrough(Wrong):
    """Lets the largest value, seen or not, change the output."""

    found_by = "padding"

    def compute_attention(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Any:
        answer = super().compute_attention(query, key, value, **kwargs)
        noise = value.detach().clamp(100, 1e4).sub(100).amax() * 1e-3
        return (answer[0] + noise, answer[1]) if kwargs.get("return_lse") else answer + noise


class DropsOutputs(Wrong):
    """Drops features of the output and not weights."""

    found_by = "dropout"

    def compute_attention(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Any:
        drop_p = kwargs.pop("dropout_p", 0.0)
        answer = super().compute_attention(query, key, value, **kwargs)
        out = torch.dropout(answer[0] if kwargs.get("return_lse") else answer, drop_p / 2, train=drop_p > 0)
        return (out, answer[1]) if kwargs.get("return_lse") else out


class OutputInFloat32(Wrong):
    """Does not cast the output back."""

    found_by = "dtype"

    def compute_attention(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Any:
        answer = super().compute_attention(query, key, value, **kwargs)
        return (answer[0].float(), answer[1]) if kwargs.get("return_lse") else answer.float()


class BreaksBeyondItsDeclaration(Wrong):
    """Raises for head dims that its limits allow."""

    found_by = "head-dim"

    def compute_attention(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Any:
        if query.shape[-1] > 64:
            raise RuntimeError("head dim too large")
        return super().compute_attention(query, key, value, **kwargs)


class DeclaresUnknownWords(Wrong):
    """Has a kind of mask that heedful does not know."""

    limits = replace(ReferenceAttentionStrategy.limits, masks=frozenset({"causal", "diagonal"}))


class RefusesEverything(Wrong):
    """Hides behind refusals."""

    def refusals(self, problem: Any) -> tuple[Refusal, ...]:
        return (Refusal("mood", "bad", "a better one"),)


class RefusesWithoutReason(Wrong):
    """Refuses head dims above 64 without a word."""

    found_by = "head-dim"

    def refusals(self, problem: Any) -> tuple[Refusal, ...]:
        return (Refusal("head dim", "", ""),) if problem.head_dim > 64 else super().refusals(problem)


WRONGS = {
    "ignores scale": _forgets("scale", by="scale"),
    "ignores dense masks and biases": _forgets("attn_mask", "attn_bias", by="bool-mask-BHQK"),
    "ignores padding": _forgets("key_padding", by="padding-right"),
    "ignores causality": _forgets("is_causal", by="causal-top"),
    "ignores windows": _forgets("window", "window_alignment", by="window"),
    "ignores the window's alignment": _forgets("window_alignment", by="window-bottom"),
    "ignores dropout": _forgets("dropout_p", by="dropout"),
    "ignores softcap": _forgets("softcap", by="softcap"),
    "ignores packing": _forgets("varlen", by="varlen"),
    "ignores block masks": _forgets("block_mask", by="block-mask"),
} | {kind.__doc__ or "": kind for kind in Wrong.__subclasses__() if kind.__name__ != "Forgets"}


@pytest.mark.parametrize("kind", WRONGS.values(), ids=WRONGS)
def test_a_wrong_strategy_is_caught(kind: type[Wrong]) -> None:
    """By a sample that is there for it; the reference itself passes all of them."""
    samples = [sample for sample in SAMPLES if kind.found_by in sample.name]
    assert not verify(kind, devices=("cpu",), samples=samples).ok


def test_without_a_fault_the_same_strategy_passes() -> None:
    few = [sample for sample in SAMPLES if "head-dim" not in sample.name][::7]
    assert verify(Wrong, devices=("cpu",), samples=few).ok


def test_the_class_for_pytest_holds_every_check_and_reports_refusals_as_skips() -> None:
    class Short(AttentionStrategy):
        """Plain attention."""

        def compute_attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return torch.softmax(query @ key.mT / query.shape[-1] ** 0.5, dim=-1) @ value

    samples = (Sample(name="fine", aspects=("forward", "lse")),)
    suite = contract(Short, devices=("cpu",), samples=samples)
    (mark,) = suite.test_contract.pytestmark  # type: ignore[attr-defined]
    given = {param.id: param.values[0] for param in mark.args[1]}
    assert set(given) >= {"Short-cpu-fine-forward", "Short-cpu-fine-lse", "Short-cpu-declaration"}
    suite().test_contract(given["Short-cpu-fine-forward"])
    with pytest.raises(pytest.skip.Exception, match="Short refuses on cpu: return_lse"):
        suite().test_contract(given["Short-cpu-fine-lse"])


def test_a_report_says_what_is_wrong() -> None:
    samples = (Sample(name="scaled", call={"scale": 0.1}, aspects=("forward",)),)
    report = verify(_forgets("scale", by="scale"), devices=("cpu",), samples=samples)
    assert not report.ok
    assert "1 wrong" in str(report)
    assert "the output is off by" in str(report)


def test_an_approximate_strategy_is_held_to_its_tolerance_and_never_chosen_by_auto() -> None:
    class Rounded(Wrong):
        """Rounds its inputs to a few bits."""

        exactness = "quantised"

        def compute_attention(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Any:
            coarse = [(t * 32).round() / 32 for t in (query, key)]
            return super().compute_attention(*coarse, value, **kwargs)

    samples = (Sample(name="plain", query_length=64, key_length=64, aspects=("forward",)),)
    assert verify(Rounded, devices=("cpu",), samples=samples).ok
    Rounded.exactness = "exact"
    assert not verify(Rounded, devices=("cpu",), samples=samples).ok
