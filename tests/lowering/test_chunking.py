"""Chunks of queries: when they are taken, which keys and masks each of them is given, and what is never made."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from heedful import Bias, Causal, Dense, KeyPadding, Limits, Mask, SlidingWindow, Varlen
from heedful.call import problem_of_call
from heedful.lowering import ChunkQueries, Operands, chunking, lower

GOOD = {"scale": True, "gqa": True, "value_dim_may_differ": True, "lse": True, "backward": True}
TAKES_DENSE = Limits(**GOOD, masks=frozenset({"causal", "dense", "bias"}), empty_rows=frozenset({"output", "lse"}))
HOLDS_SCORES = replace(TAKES_DENSE, scores_in_memory=True)
LARGE = (1, 2, 4096, 8)


@pytest.fixture
def small(monkeypatch):
    """Chunks of four queries, and a bound that every mask here is above."""
    monkeypatch.setattr(chunking, "CHUNK", 4)
    monkeypatch.setattr(chunking, "MOST_BYTES", 64)


def tensors(*shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def names(problem, limits):
    return [step.name for step in lower(problem, limits)[0]]


def large(mask=None, length=4096, **words):
    """The problem of a call that is large, on tensors that take no memory."""
    query = torch.empty(1, device="cpu").expand(1, 2, length, 8)
    return problem_of_call(query, query, query, attn_mask=mask, **words)


# When


@pytest.mark.parametrize("length", [256, 4096])
def test_a_mask_that_nobody_gave_is_joined_in_chunks_where_it_is_large(length):
    for mask in (SlidingWindow(3, 3), Causal("bottom_right") & KeyPadding(torch.ones(1, length, dtype=torch.bool))):
        taken = names(large(mask, length), TAKES_DENSE)
        assert ("chunk_queries" in taken) == (length == 4096)


def test_all_scores_are_held_in_chunks_where_they_are_many():
    assert names(large(), HOLDS_SCORES) == ["chunk_queries"]
    assert names(large(), TAKES_DENSE) == []
    assert names(large(length=1024), HOLDS_SCORES) == []


def test_what_the_user_gave_whole_is_left_whole():
    dense = torch.ones(1, dtype=torch.bool).expand(4096, 4096)
    for mask in (Dense(dense), Dense(dense) & Causal(), Bias(torch.zeros(1).expand(4096, 4096))):
        assert "chunk_queries" not in names(large(mask), TAKES_DENSE)
    padded = Dense(dense) & KeyPadding(torch.ones(2, 4096, dtype=torch.bool))
    query = torch.empty(1).expand(2, 2, 4096, 8)
    assert "chunk_queries" in names(problem_of_call(query, query, query, attn_mask=padded), TAKES_DENSE)


def test_gradients_dropout_and_compilers_stay_whole():
    problem = large(SlidingWindow(3, 3))
    assert ChunkQueries().improves(problem, TAKES_DENSE)
    assert not ChunkQueries().improves(problem.replace(needs_grad=True), TAKES_DENSE)
    for changed in ({"dropout_p": 0.1}, {"compiling": True}, {"layout": "THD"}):
        assert ChunkQueries().rewrite(problem.replace(**changed), TAKES_DENSE) is None


def test_bands_need_a_kernel_that_takes_the_parts_of_one():
    assert "chunk_queries" in names(large(Causal()), HOLDS_SCORES)
    limits = replace(HOLDS_SCORES, masks=frozenset({"causal"}))
    assert names(large(Causal()), limits) == []
    assert names(large(), limits) == ["chunk_queries"]


def test_a_step_says_which_of_its_two_reasons_it_has():
    fast = replace(HOLDS_SCORES, faster_with=frozenset({"chunk_queries"}))
    said = {
        "chunk_queries (holds less at once)": (large(), fast),
        "chunk_queries (faster)": (large(Causal(), 512), fast),
    }
    for text, (problem, limits) in said.items():
        assert text in map(str, lower(problem, limits)[0])


@pytest.mark.parametrize("length", [511, 512])
def test_speed_alone_wants_a_band_and_two_chunks_and_its_name(length):
    fast = replace(TAKES_DENSE, faster_with=frozenset({"chunk_queries"}))
    for mask, banded in ((None, False), (Causal(), True), (Causal() & SlidingWindow(5, None), True)):
        assert ("chunk_queries" in names(large(mask, length), fast)) == (banded and length == 512)
        assert "chunk_queries" not in names(large(mask, length), TAKES_DENSE)


# What


def met(call, limits, tools):
    """The operands of every chunk, and the answer."""
    seen, problem = [], call.problem()
    new = ChunkQueries().rewrite(problem, limits)
    out = ChunkQueries().around(problem, new, tools.strict_kernel(new, None, seen))(Operands(*call_tensors(call)))
    return seen, out


def call_tensors(call):
    return call.query, call.key, call.value, call.simplest


@pytest.mark.parametrize(
    ("mask", "keys"),
    [
        (Causal(), [4, 8, 9]),
        (Causal("bottom_right"), [7, 11, 12]),
        (SlidingWindow(2, 1), [5, 7, 4]),
        (SlidingWindow(1, 0, "bottom_right"), [5, 5, 2]),
        (Causal() & SlidingWindow(None, 3, "bottom_right"), [4, 8, 9]),
    ],
    ids=str,
)
def test_a_chunk_is_given_the_keys_that_its_band_reaches(mask, keys, tools, monkeypatch):
    monkeypatch.setattr(chunking, "CHUNK", 4)
    call = tools.Call(*tensors((2, 2, 9, 4), (2, 2, 12, 4), (2, 2, 12, 4)), mask)
    chunks, _ = met(call, HOLDS_SCORES, tools)
    assert [x.query.shape[-2] for x in chunks] == [4, 4, 1]
    assert [x.key.shape[-2] for x in chunks] == keys
    assert all(x.key.untyped_storage().data_ptr() == call.key.untyped_storage().data_ptr() for x in chunks)


def test_queries_that_reach_no_key_reach_no_kernel(small, tools):
    call = tools.Call(*tensors((1, 2, 12, 4), (1, 2, 3, 4), (1, 2, 3, 5)), Causal("bottom_right"))
    chunks, (out, lse) = met(call, HOLDS_SCORES, tools)
    assert all(0 not in x.key.shape for x in chunks)
    assert out.shape == (1, 2, 12, 5)
    assert (out[:, :, :9] == 0).all()
    assert (lse[:, :, :9] == -math.inf).all()


def test_without_a_mask_none_is_made(small, tools):
    chunks, _ = met(tools.Call(*tensors(*((1, 2, 9, 4),) * 3)), HOLDS_SCORES, tools)
    assert len(chunks) > 1
    assert all(x.mask is None for x in chunks)


def test_every_part_of_a_mask_is_cut(small, tools):
    keep, used = torch.arange(9)[None] < torch.tensor([[7], [9]]), torch.arange(9)[None] < torch.tensor([[9], [6]])
    bias = tensors((2, 1, 9, 9))[0]
    mask = KeyPadding(keep, used) & Causal() & Bias(bias) & Dense(torch.ones(9, dtype=torch.bool))
    call = tools.Call(*tensors(*((2, 2, 9, 4),) * 3), mask, analysed=False)
    for x in met(call, HOLDS_SCORES, tools)[0]:
        rows, keys = x.query.shape[-2], x.key.shape[-2]
        assert x.mask.bias.shape == (2, 1, rows, keys)
        assert x.mask.bias.untyped_storage().data_ptr() == bias.untyped_storage().data_ptr()
        assert x.mask.padding.shape == (2, keys)
        assert x.mask.rows.shape == (2, rows)
        assert x.mask.dense.shape[-2:] == (rows, keys)
        assert x.mask.causal is None


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operator gives."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max(self.elements, out.numel() if isinstance(out, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("kind", ["causal", "window", "padding", "varlen", "block"])
def test_nothing_of_all_queries_times_all_keys_is_made(kind):
    length = 1024
    mask = {
        "causal": Causal("bottom_right"),
        "window": SlidingWindow(9, 9),
        "padding": Causal() & KeyPadding(torch.ones(1, length, dtype=torch.bool)),
        "varlen": Varlen(torch.tensor([0, 300, length])) & Causal(),
        "block": Mask(block=create_block_mask(lambda b, h, q, k: q >= k, 1, 1, length, length, device="cpu")),
    }[kind]
    query = tensors((1, 1, length, 4))[0]
    problem = problem_of_call(query, query, query, attn_mask=mask)
    new = ChunkQueries().rewrite(problem, HOLDS_SCORES)
    run = ChunkQueries().around(problem.replace(), new.replace(query_length=32), lambda x: (x.query, None))
    with Largest() as largest:
        run(Operands(query, query, query, mask))
    assert largest.elements <= 32 * length


@pytest.mark.parametrize("name", ["native", "native_flash", "native_math", "flex"])
@pytest.mark.parametrize(
    "words",
    [
        {"window": (5, 2)},
        {"is_causal": True, "causal_alignment": "bottom_right"},
        {"is_causal": True, "attn_mask": KeyPadding(torch.arange(40)[None] % 3 > 0)},
        {"attn_mask": Mask(block=create_block_mask(lambda b, h, q, k: q >= k, None, None, 30, 40, device="cpu"))},
    ],
    ids=["window", "bottom right", "padding", "block"],
)
@pytest.mark.parametrize("lse", [False, True])
def test_real_kernels_in_chunks_give_the_formula(name, words, lse, small, dispatcher, naive_attention):
    query, key, value = tensors((2, 4, 30, 8), (2, 2, 40, 8), (2, 2, 40, 5), dtype=torch.float32)
    call = {"enable_gqa": True, "return_lse": lse, "backend": name, **words}
    plan = dispatcher.explain(query, key, value, **call)
    if plan.refused:
        assert lse
        return
    assert "chunk_queries" in [step.name for step in plan.chosen.steps]
    answer = dispatcher.attention(query, key, value, **call)
    mask = words.get("attn_mask") or Mask()
    if "window" in words:
        mask = SlidingWindow(*words["window"])
    elif words.get("is_causal"):
        mask = mask & Causal(words.get("causal_alignment", "top_left"))
    wanted, wanted_lse = naive_attention(query, key, value, seen=mask.visible(30, 40, query.device))
    torch.testing.assert_close((answer[0] if lse else answer).double(), wanted, atol=1e-5, rtol=1e-5)
    if lse:
        torch.testing.assert_close(answer[1].double(), wanted_lse, atol=1e-5, rtol=1e-5)
