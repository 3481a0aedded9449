"""What the NPU's kernel is handed: an inverted mask in a shape that it takes, sparse modes with their triangle."""

import math
from types import SimpleNamespace

import pytest
import torch
from signatures.records import all_records, bound_to_record

from heedful.strategies.native_npu import NativeNPUAttentionStrategy, hidden_of, triangle

RECORD = all_records()["torch_npu"]["functions"]["torch_npu.npu_fusion_attention"]


@pytest.fixture
def recording():
    strategy, calls = NativeNPUAttentionStrategy(), []

    def kernel(query, key, value, head_num, input_layout, **arguments):
        calls.append({"head_num": head_num, "input_layout": input_layout, **arguments})
        statistics = torch.full((query.shape[0], head_num, query.shape[1], 8), 2.0)
        return query * 1, statistics, statistics, query.new_empty(0), 0, 0, 0

    strategy.__dict__["kernels"] = SimpleNamespace(npu_fusion_attention=bound_to_record(kernel, RECORD))
    return strategy, calls


def tensors():
    return [torch.randn(2, length, 4, 16, dtype=torch.float16) for length in (5, 7, 7)]


def test_plain_calls_state_the_scale(recording):
    strategy, calls = recording
    strategy.compute_attention(*tensors())
    assert calls == [
        {"head_num": 4, "input_layout": "BSND", "atten_mask": None, "scale": 0.25, "keep_prob": 1.0, "sparse_mode": 0}
    ]
    strategy.compute_attention(*tensors(), scale=0.5, dropout_p=0.25)
    assert (calls[1]["scale"], calls[1]["keep_prob"]) == (0.5, 0.75)


@pytest.mark.parametrize(("alignment", "mode"), [("top_left", 2), ("bottom_right", 3)])
def test_causality_is_a_mode_with_a_triangle_of_its_own_size(recording, alignment, mode):
    strategy, calls = recording
    strategy.compute_attention(*tensors(), is_causal=True, causal_alignment=alignment)
    mask = calls[0]["atten_mask"]
    assert calls[0]["sparse_mode"] == mode
    assert torch.equal(mask, torch.ones(2048, 2048).triu(1).bool())
    assert mask is triangle(mask.device)


def test_the_triangle_can_be_saved_for_a_gradient_wherever_it_was_made():
    triangle.cache_clear()
    with torch.inference_mode():
        assert not triangle(torch.device("cpu")).is_inference()


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ((2, 1, 1, 7), (2, 1, 5, 7)),
        ((1, 1, 5, 1), (1, 1, 5, 7)),
        ((1, 4, 5, 7), (2, 4, 5, 7)),
        ((2, 4, 1, 1), (2, 4, 5, 7)),
    ],
)
def test_masks_are_inverted_in_a_shape_that_it_takes(recording, shape, wanted):
    strategy, calls = recording
    mask = torch.rand(shape) > 0.5
    strategy.compute_attention(*tensors(), attn_mask=mask)
    given = calls[0]["atten_mask"]
    assert (given.shape, given.dtype, given.is_contiguous()) == (wanted, torch.bool, True)
    assert torch.equal(given, ~mask.expand(wanted))
    assert torch.equal(given, hidden_of(mask, (2, 4, 5, 7)))


def test_the_lse_is_made_of_maximum_and_sum(recording):
    strategy, _ = recording
    _, lse = strategy.compute_attention(*tensors(), return_lse=True)
    assert (lse.shape, lse.dtype) == ((2, 4, 5), torch.float32)
    assert torch.allclose(lse, torch.tensor(2 + math.log(2)))
