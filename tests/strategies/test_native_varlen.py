"""What torch's varlen_attn is handed: int32 starts, longest lengths, windows that it does not clamp."""

from types import SimpleNamespace

import pytest
import torch
from signatures.records import all_records, bound_to_record

import heedful
from heedful.strategies.native_varlen import NativeVarlenAttentionStrategy

RECORD = all_records()["torch_varlen"]["functions"]["torch.nn.attention.varlen.varlen_attn"]


@pytest.fixture
def recording():
    strategy, calls = NativeVarlenAttentionStrategy(), []

    def kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **arguments):
        calls.append({"starts": (cu_seq_q, cu_seq_k), "longest": (max_q, max_k), **arguments})
        lse = torch.zeros(query.shape[1], query.shape[0], requires_grad=True)
        return (query * 1, lse) if arguments["return_aux"].lse else query * 1

    aux = SimpleNamespace
    strategy.__dict__["kernels"] = SimpleNamespace(varlen_attn=bound_to_record(kernel, RECORD), AuxRequest=aux)
    return strategy, calls


def tensors():
    return [torch.randn(length, 2, 16, dtype=torch.float16) for length in (5, 7, 7)]


def test_packs(recording):
    strategy, calls = recording
    pack = heedful.Varlen(torch.tensor([0, 2, 5]), torch.tensor([0, 4, 7]), 3, 4)
    out, lse = strategy.compute_attention(*tensors(), varlen=pack, scale=0.5, enable_gqa=True, return_lse=True)
    (call,) = calls
    assert [cu.dtype for cu in call["starts"]] == [torch.int32] * 2
    assert [cu.tolist() for cu in call["starts"]] == [[0, 2, 5], [0, 4, 7]]
    assert call["longest"] == (3, 4)
    assert (call["scale"], call["enable_gqa"], call["window_size"]) == (0.5, True, (-1, -1))
    assert (out.shape, lse.shape, lse.requires_grad) == ((5, 2, 16), (2, 5), False)


@pytest.mark.parametrize(
    ("arguments", "left", "rights"),
    [
        ({"is_causal": True}, -1, {0}),
        ({"window": (2, 1)}, 2, {1}),
        ({"window": (2, 9)}, 2, range(3, 10)),  # no query sees more than 3 keys ahead
        ({"window": (2, None)}, 2, range(3, 10)),
        ({"window": (2, None), "is_causal": True}, 2, {0}),
    ],
)
def test_windows_are_not_clamped(recording, arguments, left, rights):
    """The kernel takes a right end of max_k or more for open, and an open one beside a left end for max_k."""
    strategy, calls = recording
    pack = heedful.Varlen(torch.tensor([0, 2, 5]), torch.tensor([0, 4, 7]), 3, 4)
    strategy.compute_attention(*tensors(), varlen=pack, **arguments)
    assert calls[0]["window_size"][0] == left
    assert calls[0]["window_size"][1] in rights
    assert calls[0]["window_size"][1] < calls[0]["longest"][1]
