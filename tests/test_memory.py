"""Memory under auto does not grow with queries times keys: the peak of live bytes, at two lengths.

Torch's profiler tells of every allocation of a tensor, those inside of kernels too, without changing what is planned.
From one length to four times it, memory that is linear grows fourfold, and all scores sixteenfold. What has a bound
may grow up to it: ``FIXED`` is that of one chunk, of the scores, the weights and what lies between.
"""

from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import heedful
from heedful import Causal, KeyPadding, Limits, Policy, Varlen
from heedful.lowering import chunking
from heedful.strategies import reference
from heedful.strategies.native import NativeAttentionStrategy

SHORT, LONG = 1536, 6144
FIXED = 3 * chunking.MOST_BYTES
pytestmark = pytest.mark.filterwarnings("ignore:.*Memory block of unknown size")


def peak(run):
    """The most bytes that live at once while it runs, beyond those that lived before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    live = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


def is_linear(short, long):
    """Whether peaks at two lengths, one four times the other, are those of memory that grows with the length."""
    return long <= 5 * short + FIXED


def tensors(length, heads=1, kv_heads=None, keys=None, value_dim=32):
    generator = torch.Generator().manual_seed(0)
    keys, kv_heads = keys or length, kv_heads or heads
    shapes = (1, heads, length, 32), (1, kv_heads, keys, 32), (1, kv_heads, keys, value_dim)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def interior(length):
    keep = torch.rand(1, length, generator=torch.Generator().manual_seed(1)) < 0.5
    keep[:, 0] = True
    return keep


def packed(length, mask=None, **words):
    """Eight sequences end to end."""
    ends = Varlen(torch.arange(0, length + 1, length // 8))
    mask = ends if mask is None else ends & mask
    return tuple(t[0].transpose(0, 1) for t in tensors(length)), {"layout": "THD", "attn_mask": mask, **words}


KINDS = {
    "plain": lambda n: (tensors(n), {}),
    "grouped": lambda n: (tensors(n, 2, 1), {"enable_gqa": True}),
    "grouped, LSE, window": lambda n: (tensors(n, 2, 1), {"enable_gqa": True, "return_lse": True, "window": (64, 0)}),
    "value dim": lambda n: (tensors(n, value_dim=16), {}),
    "LSE": lambda n: (tensors(n), {"return_lse": True}),
    "window": lambda n: (tensors(n), {"window": (64, 64)}),
    "causal, bottom right": lambda n: (
        tensors(n, keys=n + n // 2),
        {"is_causal": True, "causal_alignment": "bottom_right"},
    ),
    "causal and padding": lambda n: (tensors(n), {"attn_mask": KeyPadding(interior(n)), "is_causal": True}),
    "padding of queries": lambda n: (tensors(n), {"attn_mask": KeyPadding(interior(n), interior(n))}),
    "varlen": lambda n: packed(n),
    "varlen, causal, LSE": lambda n: packed(n, Causal(), return_lse=True),
    "softcap": lambda n: (tensors(n), {"softcap": 20.0}),
    "softcap, causal": lambda n: (tensors(n), {"softcap": 20.0, "is_causal": True}),
    "softcap, varlen": lambda n: packed(n, softcap=20.0),
    "unfused, by name": lambda n: (tensors(n), {"backend": "native_math"}),
}
UNREAD = {name: KINDS[name] for name in ("padding of queries", "causal and padding", "varlen")}
UNREAD["padding"] = lambda n: (tensors(n), {"attn_mask": KeyPadding(interior(n))})
UNREAD["padding, LSE"] = lambda n: (tensors(n), {"attn_mask": KeyPadding(interior(n)), "return_lse": True})


def peaks(dispatcher, made, lengths=(SHORT, LONG)):
    found = []
    for length in lengths:
        inputs, words = made(length)
        with torch.no_grad():
            found.append(peak(lambda inputs=inputs, words=words: dispatcher.attention(*inputs, **words)))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_memory_does_not_grow_with_queries_times_keys(kind, dispatcher):
    assert is_linear(*peaks(dispatcher, KINDS[kind]))


@pytest.mark.parametrize("kind", UNREAD)
def test_nor_does_it_where_masks_are_left_unread(kind, factory):
    assert is_linear(*peaks(heedful.AttentionDispatcher(factory, policy=Policy(analyse=False)), UNREAD[kind]))


def test_the_reference_makes_its_mask_by_rows(dispatcher):
    """It is slow, so shorter; its scores are float64, and five of their kind live at once."""
    made = {"window": (64, 0), "backend": "reference"}
    assert peaks(dispatcher, lambda n: (tensors(n), made), (4096,))[0] < 5 * reference._BYTES


@pytest.mark.parametrize("kind", ["window", "causal, bottom right", "softcap", "unfused, by name"])
def test_without_chunks_it_would(kind, dispatcher, monkeypatch):
    monkeypatch.setattr(chunking, "MOST_BYTES", 1 << 40)
    assert not is_linear(*peaks(dispatcher, KINDS[kind]))


def test_without_equal_dims_it_would(dispatcher, factory):
    """Torch's own choice falls to its unfused kernel there."""
    limits = replace(NativeAttentionStrategy().limits_for("cpu"), value_dim_may_differ=True)
    factory.register_strategy("native", type("Native", (NativeAttentionStrategy,), {"limits": limits}), replace=True)
    assert not is_linear(*peaks(dispatcher, KINDS["value dim"]))


class AllScores(heedful.AttentionStrategy):
    """Holds all scores, and does not say so."""

    name = "all_scores"
    limits = Limits(devices=("cpu",), scale=True)

    def compute_attention(self, query, key, value, *, scale=None):
        return torch.softmax(query @ key.mT * query.shape[-1] ** -0.5, dim=-1) @ value


def test_a_kernel_that_holds_all_scores_is_caught(dispatcher, factory):
    factory.register_strategy("all_scores", AllScores)
    short, long = peaks(dispatcher, lambda n: (tensors(n), {"backend": "all_scores"}))
    assert not is_linear(short, long)
    assert long >= 4 * LONG * LONG
