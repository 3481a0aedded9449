"""What xFormers is handed: bias classes, aligned biases, grouped heads, packs.

The package is the real one, with its kernels in torch. That the answers are right is the contract suite's part.
"""

import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import heedful
from heedful.facts import DeviceFacts, Facts
from heedful.strategies.xformers import XFormersAttentionStrategy, aligned, aligned_bias, unpadded

pytest.importorskip("xformers")
SITE = Path(__file__).parent.parent / "stand_ins" / "xformers_op" / "xformers_op.py"
SPEC = importlib.util.spec_from_file_location("xformers_op", SITE)
xformers_op = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(xformers_op)
BOTTOM = {"is_causal": True, "causal_alignment": "bottom_right"}
NAMES = ("memory_efficient_attention", "memory_efficient_attention_forward_requires_grad")


@pytest.fixture
def recording():
    """A strategy, and the list of calls that it made."""
    from xformers.ops.fmha import attn_bias

    calls = []

    def attend(query, key, value, bias=None, p=0.0, scale=None):
        calls.append(SimpleNamespace(query=query, key=key, value=value, bias=bias, p=p, scale=scale))
        return torch.zeros(*query.shape[:-1], value.shape[-1])

    def attend_with_lse(*args):
        out = attend(*args)
        return out, torch.zeros(out.shape[0], *out.shape[2:-1], 32)

    strategy = XFormersAttentionStrategy()
    strategy.__dict__["kernels"] = SimpleNamespace(
        attn_bias=attn_bias, **dict(zip(NAMES, (attend, attend_with_lse), strict=True))
    )
    return strategy, calls


def dispatcher(capability=(8, 0)):
    device = DeviceFacts("cuda", "gpu", capability, f"sm_{capability[0]}{capability[1]}")
    facts = Facts(torch.__version__, "3.11", "Linux", {"cpu": device})
    return heedful.AttentionDispatcher(policy=heedful.Policy(), facts=facts)


def tensors(*sizes, dtype=torch.float16):
    return [torch.randn(size, dtype=dtype) for size in sizes]


@pytest.mark.parametrize(
    ("arguments", "name", "state"),
    [
        ({}, "NoneType", {}),
        (BOTTOM, "LowerTriangularFromBottomRightMask", {}),
        ({"window": (3, 2)}, "LocalAttentionFromBottomRightMask", {"window_left": 3, "window_right": 2}),
        ({"window": (None, 2)}, "LocalAttentionFromBottomRightMask", {"window_left": 12, "window_right": 2}),
        ({"window": (3, 2), **BOTTOM}, "LocalAttentionFromBottomRightMask", {"window_left": 3, "window_right": 0}),
        ({"window": (None, 2), **BOTTOM}, "LowerTriangularFromBottomRightMask", {}),
    ],
)
def test_bands_are_bias_classes(recording, arguments, name, state):
    strategy, calls = recording
    strategy.compute_attention(*tensors((1, 5, 2, 8), (1, 7, 2, 8), (1, 7, 2, 8)), **arguments)
    assert (type(calls[0].bias).__name__, getattr(calls[0].bias, "__dict__", {})) == (name, state)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({}, "BlockDiagonalMask"),
        (BOTTOM, "BlockDiagonalCausalFromBottomRightMask"),
        ({"window": (2, None), **BOTTOM}, "BlockDiagonalCausalLocalAttentionFromBottomRightMask"),
    ],
)
def test_packs_are_block_diagonal_without_a_copy_to_the_host(recording, arguments, name):
    strategy, calls = recording
    starts, ends = torch.tensor([0, 2, 5]), torch.tensor([0, 3, 7])
    pack = heedful.Varlen(starts, ends, 3, 4)
    out = strategy.compute_attention(*tensors((5, 2, 8), (7, 2, 8), (7, 2, 8)), varlen=pack, **arguments)
    (call,) = calls
    assert out.shape == (5, 2, 8)
    assert call.query.shape == (1, 5, 2, 8)
    assert type(call.bias).__name__ == name
    assert getattr(call.bias, "_window_size", 3) == 3
    for given, info, most in ((starts, call.bias.q_seqinfo, 3), (ends, call.bias.k_seqinfo, 4)):
        assert info.seqstart.dtype == torch.int32
        assert torch.equal(info.seqstart.long(), given)
        assert (info.max_seqlen, info.seqstart_py) == (most, [])


def test_grouped_heads_are_five_dimensions_and_no_copies(recording):
    strategy, calls = recording
    query, key, value = tensors((2, 5, 6, 8), (2, 7, 2, 8), (2, 7, 2, 8))
    bias = torch.zeros(2, 6, 5, 7, dtype=torch.float16)
    out, lse = strategy.compute_attention(query, key, value, attn_mask=bias, enable_gqa=True, return_lse=True)
    (call,) = calls
    assert call.query.shape == (2, 5, 2, 3, 8)
    assert (call.key.shape, call.key.stride(3), call.key.data_ptr()) == ((2, 7, 2, 3, 8), 0, key.data_ptr())
    assert call.bias.shape == (2, 2, 3, 5, 7)
    assert (out.shape, lse.shape) == (query.shape, (2, 6, 5))


BIASES = {
    "broadcast": lambda: torch.randn(2, 1, 1, 7),
    "one key for all": lambda: torch.randn(2, 4, 5, 1),
    "odd rows": lambda: torch.randn(2, 4, 5, 7),
    "odd rows of even length": lambda: torch.randn(2, 4, 5, 35)[..., :8],
    "an offset": lambda: torch.randn(2, 4, 5, 16)[..., 3:11],
    "transposed": lambda: torch.randn(2, 4, 8, 5).mT,
    "channels last": lambda: torch.randn(2, 4, 5, 8).to(memory_format=torch.channels_last),
    "a scalar": lambda: torch.randn(1, 1, 1, 1),
}


@pytest.mark.parametrize("make", BIASES.values(), ids=BIASES)
def test_biases_are_aligned_and_keep_their_numbers(make):
    bias = make()
    sizes = (2, 4, 5, 8 if bias.shape[-1] == 8 else 7)
    made = aligned_bias(bias, sizes)
    assert torch.equal(made, bias.expand(sizes))
    assert made.stride(-1) == 1
    assert not any(step % 8 for step in (made.storage_offset(), *made.stride()[:-1]))


def test_aligned_biases_are_no_copies():
    bias = torch.randn(2, 1, 5, 8)
    assert aligned_bias(bias, (2, 4, 5, 8)).data_ptr() == bias.data_ptr()
    assert aligned(bias) is bias


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("keys", [7, 8, 13])
def test_the_real_package_takes_what_it_is_handed(dtype, keys):
    """A bool mask is refused by xFormers itself, and so is a bias that is not aligned."""
    query, key, value = tensors((2, 2, 5, 16), (2, 2, keys, 16), (2, 2, keys, 16), dtype=dtype)
    mask = torch.rand(2, 1, 5, keys) > 0.4
    mask[..., 0] = True
    with xformers_op.installed():
        out = dispatcher().attention(query, key, value, attn_mask=mask, backend="xformers")
    wanted = torch.nn.functional.scaled_dot_product_attention(*(t.double() for t in (query, key, value)), mask)
    assert (out - wanted).abs().max() < 2e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_lse_of_both_operators(dtype):
    """Flash gives it packed; CUTLASS pads it, a row for each sequence."""
    query, key, value = tensors((9, 2, 16), (11, 2, 16), (11, 2, 16), dtype=dtype)
    pack = heedful.Varlen(torch.tensor([0, 2, 9]), torch.tensor([0, 8, 11])).with_lengths((2, 7), (8, 3))
    with xformers_op.installed():
        out, lse = dispatcher().attention(
            query, key, value, attn_mask=pack, layout="THD", return_lse=True, backend="xformers"
        )
    scores = torch.einsum("qhd,khd->hqk", query.double(), key.double()) / 4
    scores = scores.masked_fill(~pack.visible(9, 11, torch.device("cpu"))[0], -math.inf)
    assert (lse.dtype, lse.shape) == (torch.float32, (2, 9))
    assert (lse - scores.logsumexp(-1)).abs().max() < 1e-4
    assert (out - torch.einsum("hqk,khd->qhd", scores.softmax(-1), value.double())).abs().max() < 2e-3


def test_padding_of_the_lse_is_cut():
    assert unpadded(torch.zeros(2, 4, 32), None, 5).shape == (2, 4, 5)


def refused(capability=(8, 0), dtype=torch.float16, dims=(16, 16), kv_heads=2, **arguments):
    query, key, value = tensors((1, 2, 5, dims[0]), (1, kv_heads, 5, dims[0]), (1, kv_heads, 5, dims[1]), dtype=dtype)
    grad = arguments.pop("grad", False)
    plan = dispatcher(capability).explain(query.requires_grad_(grad), key, value, backend="xformers", **arguments)
    (verdict,) = plan.verdicts
    return {refusal.field for refusal in verdict.refusals}, [step.name for step in verdict.steps]


def test_what_neither_operator_takes():
    assert refused((9, 0), torch.float32) == (set(), ["layout"])
    assert "operator" in refused((10, 0), torch.float32)[0]
    assert refused((10, 0)) == (set(), ["layout"])
    assert "operator" in refused((10, 0), attn_mask=torch.randn(5, 5, dtype=torch.float16))[0]
    assert refused((7, 5), torch.bfloat16)[0] == {"dtype"}
    assert refused(return_lse=True, dropout_p=0.1)[0] == {"LSE beside a gradient or dropout"}
    assert refused(return_lse=True, grad=True)[0] == {"LSE beside a gradient or dropout"}
    assert refused(dropout_p=1.0)[0] == {"dropout"}


def test_what_lowerings_mend_for_one_operator():
    assert "materialise_mask" in refused(dtype=torch.float32, window=(2, 1))[1]
    assert "materialise_mask" not in refused(window=(2, 1))[1]
    assert "expand_kv_heads" in refused(kv_heads=1, grad=True, enable_gqa=True)[1]
    assert "expand_kv_heads" not in refused(kv_heads=1, enable_gqa=True)[1]
    assert "materialise_mask" in refused(attn_mask=torch.randn(5, 5, dtype=torch.float16), is_causal=True)[1]
