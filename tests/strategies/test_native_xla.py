"""What the TPU's kernel is handed: its scale multiplies the bias as well, and only a bias hides its padded keys."""

from types import SimpleNamespace

import pytest
import torch
from signatures.records import all_records, bound_to_record

import heedful
from heedful.strategies.native_xla import NativeXLAAttentionStrategy

RECORD = all_records()["torch_xla"]["functions"]["torch_xla.experimental.custom_kernel.flash_attention"]


@pytest.fixture
def recording():
    strategy, calls = NativeXLAAttentionStrategy(), []

    def kernel(q, k, v, causal=False, sm_scale=1.0, ab=None):
        calls.append({"causal": causal, "sm_scale": sm_scale, "ab": ab})
        return q * 1

    strategy.__dict__["kernels"] = SimpleNamespace(flash_attention=bound_to_record(kernel, RECORD))
    return strategy, calls


def tensors(queries, keys):
    return [torch.randn(1, 2, length, 16) for length in (queries, keys, keys)]


def test_the_bias_is_divided_by_the_scale_and_stays_finite(recording):
    strategy, calls = recording
    bias = torch.tensor([0.0, 3.0, -torch.inf]).expand(1, 1, 1, 3)
    strategy.compute_attention(*tensors(4, 3), attn_mask=bias, scale=0.5)
    assert calls[0]["sm_scale"] == 0.5
    assert calls[0]["ab"].shape == (1, 2, 4, 3)
    assert calls[0]["ab"][0, 0, 0].tolist() == [0.0, 6.0, pytest.approx(-1e30)]


@pytest.mark.parametrize(
    ("queries", "keys", "causal", "needed"),
    [
        (4, 512, False, False),
        (4, 100, False, False),
        (4, 1024, False, False),
        (4, 513, False, True),
        (513, 513, True, False),
        (600, 513, True, True),
    ],
)
def test_a_bias_of_zeros_hides_padded_keys(recording, queries, keys, causal, needed):
    strategy, calls = recording
    strategy.compute_attention(*tensors(queries, keys), is_causal=causal)
    assert (calls[0]["ab"] is not None) == needed
    assert calls[0]["causal"] is causal


def test_one_causal_query_before_many_keys_is_refused():
    sizes = {"batch": 1, "heads": 2, "kv_heads": 2, "key_length": 600, "head_dim": 64, "value_dim": 64}
    mask = heedful.masks.MaskFacts(causal="top_left")
    one, two = (
        heedful.AttentionProblem(**sizes, query_length=length, dtype=torch.float32, device="xla", mask=mask)
        for length in (1, 2)
    )
    assert [refusal.field for refusal in NativeXLAAttentionStrategy().refusals(one)] == ["mask"]
    assert not NativeXLAAttentionStrategy().refusals(two)
