"""Bound plans: what reaches the kernel, and what comes back."""

import math

import pytest
import torch

import heedful
from heedful import AttentionStrategy, KeyPadding, Limits, Policy, Varlen
from heedful.binding import bind
from heedful.call import problem_of_call
from heedful.select import select
from heedful.strategy import ALL_MASKS


class Recorder(AttentionStrategy):
    """Keeps what it is given, and answers with the formula."""

    name = "recorder"
    limits = Limits(
        masks=frozenset({"causal", "dense", "bias"}), scale=True, gqa=True, lse=True, value_dim_may_differ=True,
        empty_rows=frozenset({"output", "lse"}), backward=True,
    )  # fmt: skip

    def __init__(self, formula):
        self.formula = formula

    def compute_attention(self, query, key, value, **kwargs):
        self.given = (query, key, value, kwargs)
        self.autocast = torch.is_autocast_enabled("cpu")
        mask, causal = kwargs.get("attn_mask"), kwargs.get("is_causal")
        seen = mask if mask is not None and mask.dtype == torch.bool else None
        if causal:
            seen = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
        out, lse = self.formula(query, key, value, seen=seen, bias=None if seen is not None else mask)
        out, lse = out.to(query.dtype), lse.float()
        return (out, lse) if kwargs.get("return_lse") else out


@pytest.fixture
def recorder(naive_attention):
    return Recorder(naive_attention)


def bound(strategy, query, key, value, attn_mask=None, **call):
    problem = problem_of_call(query, key, value, attn_mask, **call)
    plan = select(problem, strategy.name, {strategy.name: strategy}, Policy()).checked()
    words = {name: call[name] for name in ("is_causal", "causal_alignment", "window") if name in call}
    return bind(plan, strategy, words)


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def test_a_plain_call_reaches_the_kernel_untouched(recorder):
    query, key = randn(2, 4, 3, 8), randn(2, 4, 5, 8)
    bound(recorder, query, key, key)(query, key, key, None)
    assert recorder.given[0] is query
    assert recorder.given[1] is key
    assert recorder.given[3] == {}


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("layout", ["BHSD", "BSHD"])
@pytest.mark.parametrize("kind", ["none", "causal", "dense", "bias", "padding", "padding and causal", "window"])
def test_every_way_of_binding_gives_the_formula(recorder, kind, layout, return_lse, naive_attention):
    """Short cuts and chains alike; the plan's function also serves other lengths than the plan's."""
    call = {"none": {}, "causal": {"is_causal": True}, "window": {"window": (1, 0)}}.get(kind, {})
    call |= {"is_causal": True} if kind == "padding and causal" else {}
    runs = None
    for length in (6, 9):
        query, key, value = randn(2, 4, length, 8), randn(2, 4, length, 8) + 1, randn(2, 4, length, 12)
        keep = torch.rand(2, length, generator=torch.Generator().manual_seed(1)) < 0.5
        band = torch.ones(length, length, dtype=torch.bool).tril()
        mask, seen, bias = {
            "none": (None, None, None),
            "causal": (None, band, None),
            "dense": (band, band, None),
            "bias": (randn(length, length), None, randn(length, length)),
            "padding": (KeyPadding(keep), keep[:, None, None], None),
            "padding and causal": (KeyPadding(keep), keep[:, None, None] & band, None),
            "window": (None, band & band.mT.triu(-1).tril().mT.triu(-1), None),
        }[kind]
        if kind == "window":
            places = torch.arange(length)
            seen = (places[None] <= places[:, None]) & (places[None] >= places[:, None] - 1)
        given = [tensor.transpose(1, 2) if layout == "BSHD" else tensor for tensor in (query, key, value)]
        runs = runs or bound(recorder, *given, mask, layout=layout, return_lse=return_lse, **call)
        answer = runs(*given, mask)
        out, lse = answer if return_lse else (answer, None)
        expected_out, expected_lse = naive_attention(query, key, value, seen=seen, bias=bias)
        out = out.transpose(1, 2) if layout == "BSHD" else out
        torch.testing.assert_close(out.double(), expected_out, atol=1e-6, rtol=1e-5)
        if return_lse:
            torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)


def test_the_kernels_own_arithmetic_is_not_cast_again(recorder):
    query = randn(1, 2, 3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = bound(recorder, query, query, query)(query, query, query, None)
        assert torch.is_autocast_enabled("cpu")
    assert recorder.autocast is False
    assert out.dtype == recorder.given[0].dtype == torch.bfloat16


# Empty problems

EMPTY = {
    "no query": ((2, 4, 0, 8), (2, 4, 5, 8), {}),
    "no key": ((2, 4, 3, 8), (2, 4, 0, 8), {}),
    "no batch": ((0, 4, 3, 8), (0, 4, 5, 8), {}),
    "no head": ((2, 0, 3, 8), (2, 0, 5, 8), {}),
    "no key, broadcast": ((1, 4, 3, 8), (2, 4, 0, 8), {}),
    "no key, grouped": ((2, 4, 3, 8), (2, 2, 0, 8), {"enable_gqa": True}),
    "no key, grouped and broadcast": ((2, 4, 3, 8), (1, 2, 0, 8), {"enable_gqa": True}),
    "no key, 2 dims": ((3, 8), (0, 8), {}),
    "no key, 5 dims": ((1, 2, 4, 3, 8), (6, 1, 4, 0, 8), {}),
}


@pytest.mark.parametrize(
    ("case", "layout"),
    [(case, layout) for case in EMPTY for layout in ("BHSD", "BSHD") if layout == "BHSD" or len(EMPTY[case][0]) == 4],
)
def test_an_empty_problem_gives_zeros_in_the_right_shape(case, layout, recorder, naive_attention):
    query_shape, key_shape, call = EMPTY[case]
    query, key = torch.ones(query_shape, requires_grad=True), torch.ones(key_shape)
    value = torch.ones((*key_shape[:-1], 5))
    given = [tensor.transpose(1, 2) if layout == "BSHD" else tensor for tensor in (query, key, value)]
    out, lse = bound(recorder, *given, layout=layout, return_lse=True, **call)(*given, None)
    lead = torch.broadcast_shapes(query_shape[:-3], key_shape[:-3])
    heads = query_shape[-3:-2]
    shape = (*lead, *heads, query_shape[-2])
    assert lse.shape == shape
    assert lse.dtype == torch.float32
    assert (lse == -math.inf).all()
    out = out.transpose(1, 2) if layout == "BSHD" else out
    assert out.shape == (*shape, 5)
    assert not out.any()
    out.sum().backward()
    assert query.grad is not None
    assert not query.grad.any()


def test_an_empty_packed_problem():
    query, key = torch.ones(3, 4, 8), torch.ones(0, 4, 8)
    mask = Varlen(torch.tensor([0, 3]), torch.tensor([0, 0]))
    problem = problem_of_call(query, key, key, mask, layout="THD", return_lse=True)
    out, lse = bind(select(problem, (), {}, Policy()), None, {})(query, key, key, mask)
    assert (out.shape, lse.shape) == (query.shape, (4, 3))


def test_the_lse_of_an_empty_problem_is_float32_whatever_the_default_dtype():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        tensors = torch.zeros(3, 1, 2, 0, 4, dtype=torch.float32).unbind()
        assert heedful.attention(*tensors, return_lse=True)[1].dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


def test_an_infinite_input_does_not_spoil_an_empty_answer():
    query, key = torch.full((1, 1, 3, 8), math.inf, requires_grad=True), torch.ones(1, 1, 0, 8)
    problem = problem_of_call(query, key, key)
    out = bind(select(problem, (), {}, Policy()), None, {})(query, key, key, None)
    assert not out.any()


def test_all_masks_reach_a_kernel_that_takes_them():
    class Everything(AttentionStrategy):
        name = "everything"
        limits = Limits(masks=ALL_MASKS, mixed_masks=True, empty_rows=frozenset({"output"}))

        def compute_attention(self, query, key, value, **kwargs):
            return sorted(kwargs)

    query, mask = randn(1, 1, 3, 8), KeyPadding(torch.ones(1, 3, dtype=torch.bool))
    arguments = bound(Everything(), query, query, query, mask, is_causal=True, window=(1, 1))
    assert arguments(query, query, query, mask) == ["is_causal", "key_padding", "window"]
