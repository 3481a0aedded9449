"""What AITER is handed, argument by argument, from its package and from the Hub."""

from types import SimpleNamespace

import pytest
import torch
from signatures.records import all_records, bound_to_record

import heedful
from heedful.facts import DeviceFacts
from heedful.strategies.aiter import AiterAttentionStrategy
from heedful.strategy import Pin

RECORD = all_records()["aiter"]["functions"]
BOTTOM = {"is_causal": True, "causal_alignment": "bottom_right"}


def recording(source="package"):
    strategy, calls = AiterAttentionStrategy(), []
    strategy.pin = Pin(source=source)

    def kernel(name):
        def run(q, *args, **arguments):
            calls.append((name, arguments))
            lse = torch.zeros(q.shape[-2], q.shape[0]) if q.dim() == 3 else torch.zeros(q.shape[0], *q.shape[2:0:-1])
            return (q * 1, lse) if arguments["return_lse"] else q * 1

        return bound_to_record(run, RECORD[f"aiter.ops.mha.{name}"])

    names = ("flash_attn_func", "flash_attn_varlen_func")
    strategy.__dict__["kernels"] = SimpleNamespace(**{name: kernel(name) for name in names})
    return strategy, calls


def tensors(*shape):
    return [torch.randn(shape, dtype=torch.bfloat16) for _ in range(3)]


@pytest.mark.parametrize(
    ("arguments", "causal", "window"),
    [
        ({}, False, (-1, -1)),
        (BOTTOM, True, (-1, -1)),
        ({"window": (3, None)}, False, (3, -1)),
        ({"window": (3, 2)}, False, (3, 2)),
        ({"window": (3, 2), **BOTTOM}, False, (3, 0)),
    ],
)
def test_bands(arguments, causal, window):
    strategy, calls = recording()
    strategy.compute_attention(*tensors(1, 5, 2, 64), **arguments)
    assert (calls[0][1]["causal"], calls[0][1]["window_size"]) == (causal, window)


def test_a_gradient_needs_the_lse_and_does_not_return_it():
    strategy, calls = recording()
    query, key, value = tensors(1, 5, 2, 64)
    out = strategy.compute_attention(query.requires_grad_(), key, value)
    assert calls[0][1]["return_lse"] is True
    assert out.shape == query.shape
    with torch.no_grad():
        strategy.compute_attention(query, key, value)
    assert calls[1][1]["return_lse"] is False


def test_deterministic_is_torchs_switch_and_unknown_to_the_hub():
    strategy, calls = recording()
    strategy.compute_attention(*tensors(1, 5, 2, 64))
    assert calls[0][1]["deterministic"] is False
    strategy, calls = recording("hub")
    strategy.compute_attention(*tensors(1, 5, 2, 64))
    assert "deterministic" not in calls[0][1]


def test_packs():
    strategy, calls = recording()
    pack = heedful.Varlen(torch.tensor([0, 2, 5]), None, 3, 3)
    out, lse = strategy.compute_attention(*tensors(5, 2, 64), varlen=pack, window=(1, 9), return_lse=True)
    name, arguments = calls[0]
    assert name == "flash_attn_varlen_func"
    assert arguments["cu_seqlens_q"].dtype == torch.int32
    assert (arguments["max_seqlen_q"], arguments["max_seqlen_k"]) == (3, 10)
    assert (out.shape, lse.shape) == ((5, 2, 64), (2, 5))
    alone, _ = strategy.compute_attention(*tensors(5, 2, 64), return_lse=True)
    assert calls[1][0] == "flash_attn_func"
    assert alone.shape == (5, 2, 64)


def refused(source="package", **changes):
    strategy, _ = recording(source)
    made = DeviceFacts.parse("gfx942")
    sizes = {"batch": 1, "heads": 4, "kv_heads": 4, "query_length": 9, "key_length": 9, "head_dim": 64, "value_dim": 64}
    base = heedful.AttentionProblem(**sizes, dtype=torch.bfloat16, device="cuda", architecture=made.architecture)
    return {refusal.field for refusal in strategy.refusals(base.replace(layout="BSHD", **changes))}


def test_the_hub_is_built_for_less():
    assert refused(dtype=torch.float16) == set()
    assert refused("hub", dtype=torch.float16) == {"dtype"}
    assert refused(needs_grad=True) == set()
    assert refused("hub", needs_grad=True) == {"gradient"}
    assert refused("hub", head_dim=96, value_dim=96) == {"head dim padding"}
    assert refused("hub", head_dim=192, value_dim=192) == {"head dim"}
    assert refused(head_dim=192, value_dim=192) == set()


def test_one_source_does_not_stand_in_for_the_other():
    every = heedful.AttentionStrategyFactory.strategies()
    assert [source.kind for source in AiterAttentionStrategy.sources] == ["package", "hub"]
    assert every["aiter_fa2_hub"].pin == Pin(source="hub")
    facts = heedful.Facts("2.13", "3.11", "Linux", packages={"kernels": "0.17"})
    assert [lack.observed for lack in AiterAttentionStrategy().lacks(facts, True)] == ["amd-aiter not installed"]


def test_windows_that_its_kernels_take_for_other_ones():
    def window(left, right, **changes):
        return refused(mask=heedful.masks.MaskFacts(window=(left, right, "bottom_right"), rows_seen=True), **changes)

    assert window(3, 2) == set()
    assert window(0, 0) == {"window"}
    assert window(None, 0) == {"window"}
    assert window(3, None) == set()
    assert window(3, None, query_length=20) == {"window"}
    assert refused(dropout_p=1.0) == {"dropout"}
