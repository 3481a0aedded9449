"""The backward kernels held to the formula's gradients in float64 by the tolerance rule; tiles are small.

Shapes: B batch, H heads, N kv heads, Q query length, K key length, D head dim, E value dim, T packed tokens.
"""

from __future__ import annotations

import math

import pytest
import torch

from heedful.kernels.arguments import bias_of, call_of_arguments
from heedful.kernels.backward import Known, Passes, backward
from heedful.kernels.forward import forward
from heedful.kernels.operands import of_rank_four, rest_for
from heedful.kernels.tiles import Tile
from heedful.masks import Mask, Varlen
from heedful.testing.oracle import Meaning, attend, band
from heedful.testing.tolerance import check_close

SMALL = Passes(Tile(16, 32, 4, 1), Tile(32, 16, 4, 1))
HALF, FLOAT = torch.float16, torch.float32
NOTHING = -math.inf
NAMES = ("query", "key", "value", "bias")


@pytest.fixture
def draw(device):
    """``draw(2, 3, dtype=…)``: N(0, 1), the same on every device."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape, dtype=FLOAT: torch.randn(*shape, generator=generator).to(dtype).to(device)


@pytest.fixture
def flags(device):
    """``flags(0.5, 2, 3)``: bool, True with that probability."""
    generator = torch.Generator().manual_seed(1)
    return lambda share, *shape: (torch.rand(*shape, generator=generator) < share).to(device)


def weights_like(out):
    """A gradient of the output, the same for every answer of its shape."""
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.device).to(out.dtype)


def gradients(tensors, asked=None, *, dout=None, tiles=SMALL):
    """Those of query, key, value and, if there is one, of the bias, by the kernels."""
    asked = asked or {}
    call, bias = call_of_arguments(*tensors, **asked), bias_of(asked.get("attn_mask"), asked.get("attn_bias"))
    rest = rest_for(call)
    out, lse = forward(call, with_lse=True, rest=rest, tile=Tile(16, 16, 4, 1))
    dout = weights_like(out) if dout is None else dout
    shape = None if bias is None else tuple(bias.shape)
    return backward(call, Known(out, lse, rest, dout), bias=shape, tiles=tiles)


def wanted(tensors, bias, dtype, dout=None, *, seen=None, scale=None, softcap=None):
    """The formula's gradients, computed in ``dtype``."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (*tensors, bias)]
    query, key, value, added = leaves
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    meaning = Meaning(scale, seen=seen, softcap=softcap, groups=query.shape[1] // key.shape[1])
    out, _ = attend(*(t.to(dtype) for t in (query, key, value)), None if added is None else added.double(), meaning)
    dout = weights_like(out.to(tensors[0].dtype)) if dout is None else dout
    leaves = [leaf for leaf in leaves if leaf is not None]
    return torch.autograd.grad(out, leaves, dout.to(dtype))


def judge(found, tensors, bias, dout=None, **meaning):
    """Raise unless the gradients are the formula's, by the rule."""
    dtype, factor = tensors[0].dtype, 3.0 if meaning.get("softcap") else 2.0
    right = wanted(tensors, bias, torch.float64, dout, **meaning)
    naive = wanted(tensors, bias, dtype, dout, **meaning)
    scores = math.prod((*tensors[0].shape[:3], tensors[1].shape[2])) * tensors[2].shape[-1]
    for name, got, want, rough in zip(NAMES, found, right, naive, strict=False):
        terms = max(1, scores // bias.numel()) if name == "bias" else tensors[2].shape[-1]
        check_close(f"the gradient of {name}", got, want.double(), rough, dtype, factor, terms)


def hold(tensors, asked=None, *, clean=None, dout=None, tiles=SMALL, **meaning):
    """Compute and judge; ``clean`` are the tensors to judge by."""
    asked = asked or {}
    found = gradients(tensors, asked, dout=dout, tiles=tiles)
    assert [one.dtype for one in found[:3]] == [tensors[0].dtype] * 3
    judge(found, clean or tensors, bias_of(asked.get("attn_mask"), asked.get("attn_bias")), dout, **meaning)
    return found


def qkv(draw, queries, keys, dim=16, value_dim=None, lead=(1, 1), kv_heads=None, dtype=FLOAT):
    shared = (lead[0], kv_heads or lead[1])
    value_dim = dim if value_dim is None else value_dim
    return (draw(*lead, queries, dim, dtype=dtype), draw(*shared, keys, dim, dtype=dtype),
            draw(*shared, keys, value_dim, dtype=dtype))  # fmt: skip


# Lengths and bands


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 40), (16, 32), (17, 33), (32, 16), (33, 31), (70, 1)])
def test_lengths_around_the_tiles(draw, queries, keys):
    hold(qkv(draw, queries, keys))


@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
@pytest.mark.parametrize(("queries", "keys"), [(40, 70), (70, 40)])
@pytest.mark.parametrize("window", [None, (9, 4), (20, None), (None, 3)])
def test_bands(draw, device, queries, keys, alignment, window):
    sides = (None, 0) if window is None else window
    asked = {"is_causal": True, "causal_alignment": alignment}
    if window is not None:
        asked = {"window": window, "window_alignment": alignment}
    hold(qkv(draw, queries, keys), asked, seen=band(queries, keys, *sides, alignment, device))


def test_causality_and_a_window_that_count_from_different_ends(draw, device):
    asked = {"is_causal": True, "window": (9, 4), "window_alignment": "bottom_right"}
    seen = band(35, 50, None, 0, "top_left", device) & band(35, 50, 9, 4, "bottom_right", device)
    hold(qkv(draw, 35, 50), asked, seen=seen)


@pytest.mark.parametrize("keys", [Tile(64, 16, 4, 1), Tile(16, 64, 4, 1)])
def test_other_tiles(draw, device, keys):
    asked = {"window": (30, 10), "is_causal": True, "causal_alignment": "bottom_right"}
    seen = band(70, 90, 30, 10, "top_left", device) & band(70, 90, None, 0, "bottom_right", device)
    hold(qkv(draw, 70, 90), asked, tiles=Passes(keys, keys), seen=seen)


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
def test_the_tables_tiles(draw, device, dtype):
    seen = band(65, 65, None, 0, "top_left", device)
    hold(qkv(draw, 65, 65, 64, dtype=dtype), {"is_causal": True}, tiles=None, seen=seen)


# Masks and biases


@pytest.mark.parametrize("axes", ["BHQK", "HQK", "K", "BQ", ""])
def test_masks_and_biases_of_any_axes(draw, flags, axes):
    shape = tuple(size if axis in axes else 1 for axis, size in zip("BHQK", (2, 2, 20, 40), strict=True))
    tensors, mask, bias = qkv(draw, 20, 40, lead=(2, 2)), flags(0.6, *shape), draw(*shape)
    found = hold(tensors, {"attn_mask": mask, "attn_bias": bias}, seen=mask)
    assert found.bias.shape == bias.shape


@pytest.mark.parametrize("bias_dtype", [FLOAT, HALF, torch.float64])
def test_a_bias_of_another_dtype(draw, bias_dtype):
    bias = draw(1, 2, 1, 40, dtype=bias_dtype)
    found = hold(qkv(draw, 20, 40, lead=(2, 2), dtype=HALF), {"attn_mask": bias})
    assert found.bias.dtype == bias_dtype


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
def test_rows_that_see_nothing_give_and_get_nothing_whatever_they_hold(draw, flags, dtype):
    clean = qkv(draw, 40, 40, lead=(1, 2), dtype=dtype)
    mask = flags(0.5, 1, 2, 40, 40)
    empty = [0, 5, 39]
    mask[:, :, empty] = False
    dout = draw(1, 2, 40, 16, dtype=dtype)
    spoilt = dout.index_fill(2, torch.tensor(empty, device=dout.device), math.nan)
    query = clean[0].index_fill(2, torch.tensor(empty, device=dout.device), math.nan)
    found = gradients((query, *clean[1:]), {"attn_mask": mask}, dout=spoilt)
    judge(found, clean, None, dout, seen=mask)
    assert not found.query[:, :, empty].any()


@pytest.mark.parametrize("lowest", [-1e9, torch.finfo(FLOAT).min])
def test_rows_that_a_huge_bias_hides_evenly_see_all_evenly(draw, flags, lowest):
    """Their LSE has no digits left in float32."""
    tensors = qkv(draw, 20, 40)
    tensors[0][:, :, 3] = 0.0  # its scores are lost beside such a number
    bias = draw(1, 1, 20, 40).masked_fill(flags(0.4, 20, 40), lowest)
    bias[..., 3, :] = lowest
    even = bias.clone()
    even[..., 3, :] = 0.0
    judge(gradients(tensors, {"attn_mask": bias}), tensors, even)


@pytest.mark.parametrize("kind", ["right", "left", "hole", "one", "none"])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_of_any_pattern(draw, device, kind, causal):
    place = torch.arange(50, device=device)
    kept = {"right": place < 19, "left": place >= 21, "hole": (place < 16) | (place >= 33), "one": place == 17,
            "none": place < 0}[kind]  # fmt: skip
    keep = torch.stack([kept, place < 33])
    seen = keep[:, None, None, :].expand(2, 1, 40, 50)
    seen = seen & band(40, 50, None, 0, "bottom_right", device) if causal else seen
    asked = {"key_padding": keep} | ({"is_causal": True, "causal_alignment": "bottom_right"} if causal else {})
    clean = qkv(draw, 40, 50, lead=(2, 1))
    spoilt = clean
    if kind != "hole":  # NaN between kept keys reaches the output, too
        spoilt = (clean[0], *(t.masked_fill(~keep[:, None, :, None], math.nan) for t in clean[1:]))
    found = hold(spoilt, asked, clean=clean, seen=seen)
    hidden = ~keep[:, None, :, None].expand_as(clean[1])
    assert not found.key[hidden].any()
    assert not found.value[hidden].any()


def test_everything_at_once(draw, flags, device):
    tensors = qkv(draw, 40, 50, 24, 40, lead=(2, 2), kv_heads=1)
    mask, bias, keep, rows = flags(0.8, 2, 1, 40, 50), draw(1, 2, 40, 50), flags(0.9, 2, 50), flags(0.9, 2, 40)
    rows[0, :33] = False  # a whole block
    asked = {"attn_mask": mask, "attn_bias": bias, "key_padding": keep, "query_padding": rows, "is_causal": True,
             "causal_alignment": "bottom_right", "window": (25, 9), "scale": 0.3, "softcap": 1.5}  # fmt: skip
    seen = mask & keep[:, None, None, :] & rows[:, None, :, None] & band(40, 50, 25, 9, "top_left", device)
    seen = seen & band(40, 50, None, 0, "bottom_right", device)
    hold(tensors, asked, seen=seen, scale=0.3, softcap=1.5)


# Heads, dims, strides, numbers


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 1), (4, 2)])
def test_grouped_heads(draw, device, heads, kv_heads):
    seen = band(20, 20, None, 0, "top_left", device)
    hold(qkv(draw, 20, 20, lead=(1, heads), kv_heads=kv_heads), {"is_causal": True, "enable_gqa": True}, seen=seen)


@pytest.mark.parametrize(
    ("dim", "value_dim", "dtype"),
    [(1, 1, FLOAT), (5, 40, FLOAT), (72, 72, HALF), (80, 8, FLOAT), (16, 96, HALF), (256, 200, FLOAT)],
)
def test_head_dims_in_parts(draw, dim, value_dim, dtype):
    hold(qkv(draw, 17, 19, dim, value_dim, dtype=dtype))


def test_any_strides(draw, device):
    want = qkv(draw, 20, 20, lead=(1, 2))
    transposed = tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in want)
    features = tuple(t.mT.contiguous().mT for t in want)
    sliced = tuple(torch.nn.functional.pad(t, (3, 5, 1, 2))[:, :, 1:21, 3:19] for t in want)
    plain = gradients(want)
    for tensors in ((transposed[0], features[1], sliced[2]), (sliced[0], transposed[1], features[2])):
        for got, right in zip(gradients(tensors)[:3], plain[:3], strict=True):
            torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)  # on a GPU it is other machine code
    even = torch.ones(1, 1, 1, 1, device=device).expand(1, 2, 20, 16)  # as that of a sum
    for got, right in zip(gradients(want, dout=even)[:3], gradients(want, dout=even.contiguous())[:3], strict=True):
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)


def test_offsets_beyond_32_bits(draw, device):
    plain = qkv(draw, 20, 20, dtype=HALF)
    far = torch.empty(20 << 27, dtype=HALF, device=device).as_strided((1, 1, 20, 16), (0, 0, 1 << 27, 1))
    key = far.copy_(plain[1])
    call = call_of_arguments(plain[0], key, plain[2])
    out, lse = forward(call, with_lse=True, tile=Tile(16, 16, 4, 1))
    dout = weights_like(out)
    found = backward(call, Known(out, lse, None, dout), key=False, value=False, tiles=SMALL)
    assert torch.equal(found.query, gradients(plain, dout=dout).query)
    assert found.key is None
    assert found.value is None


@pytest.mark.parametrize("asked", [{"scale": 0.0}, {"scale": -0.5}, {"scale": 3.0}, {"softcap": 2.0},
                                   {"scale": -0.5, "softcap": 0.5}, {"softcap": 50.0}])  # fmt: skip
def test_any_scale_and_soft_cap(draw, flags, asked):
    mask = flags(0.6, 1, 1, 20, 40)
    hold(qkv(draw, 20, 40), {"attn_mask": mask, **asked}, seen=mask, **asked)


@pytest.mark.parametrize("shape", [(0, 2, 5, 7), (2, 0, 5, 7), (1, 1, 0, 7), (1, 1, 5, 0)])
def test_nothing_to_compute(draw, shape):
    batch, heads, queries, keys = shape
    tensors = qkv(draw, queries, keys, lead=(batch, heads))
    found = gradients(tensors, {"attn_mask": draw(*shape)})
    for got, given in zip(found, (*tensors, draw(*shape)), strict=True):
        assert got.shape == given.shape
        assert not got.any()


def test_the_same_call_gives_the_same_bits(draw):
    tensors = qkv(draw, 40, 40, lead=(1, 2), kv_heads=1, dtype=HALF)
    bias = draw(1, 1, 1, 40)
    first, second = (gradients(tensors, {"attn_mask": bias, "is_causal": True}) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


# Packed sequences


def pack(device, queries, keys=None):
    """A Varlen of those lengths."""

    def ends(lengths):
        return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=device)

    return Varlen(ends(queries), None if keys is None else ends(keys))


PACKS = {
    "cross": ((20, 1, 33), (5, 40, 17)),
    "without queries or keys": ((20, 0, 7, 16), (9, 12, 0, 16)),
    "tokens behind": ((20, 5), (9, 12)),
}


@pytest.mark.parametrize("name", PACKS)
@pytest.mark.parametrize("alignment", [None, "bottom_right"])
def test_packs(draw, device, name, alignment):
    queries, keys = PACKS[name]
    beyond = 11 if name == "tokens behind" else 0
    tensors = (draw(sum(queries) + beyond, 2, 16), *(draw(sum(keys) + beyond, 1, 16) for _ in range(2)))
    varlen = pack(device, queries, keys)
    seen = Mask(varlen=varlen, causal=alignment).visible(len(tensors[0]), len(tensors[1]), device)
    asked = {} if alignment is None else {"is_causal": True, "causal_alignment": alignment}
    hold(of_rank_four(*tensors), {"varlen": varlen, **asked}, seen=seen)


@pytest.mark.parametrize("axes", ["HQK", "Q", ""])
def test_packs_with_a_bias(draw, flags, device, axes):
    shape = tuple(size if axis in axes else 1 for axis, size in zip("BHQK", (1, 1, 37, 62), strict=True))
    tensors, keep = of_rank_four(draw(37, 1, 16), draw(62, 1, 16), draw(62, 1, 16)), flags(0.8, 1, 62)
    varlen = pack(device, (3, 1, 33), (5, 40, 17))
    seen = Mask(varlen=varlen).visible(37, 62, device) & keep[:, None, None, :]
    hold(tensors, {"varlen": varlen, "attn_mask": draw(*shape), "key_padding": keep}, seen=seen)
