"""The forward kernel held to the formula in float64 by the tolerance rule: where tiles, bands, masks and packs end.

Tiles are small (16 queries, 16 keys) wherever lengths matter, so that a few dozen keys have whole tiles and cut ones.

Shapes: B batch, H heads, N kv heads, Q query length, K key length, D head dim, E value dim, T packed tokens.
"""

from __future__ import annotations

import math

import pytest
import torch

from heedful.kernels.arguments import as_given, call_of_arguments
from heedful.kernels.forward import forward
from heedful.kernels.tiles import Tile
from heedful.masks import Mask, Varlen
from heedful.testing.tolerance import check_close

SMALL = Tile(16, 16, 4, 1)
HALF, FLOAT = torch.float16, torch.float32
NOTHING = -math.inf


def formula(query, key, value, *, seen=None, bias=None, scale=None, softcap=None, dtype=torch.float64):
    """Out and LSE of (B, H, length, dim), heads grouped."""
    query, key, value = (t.to(dtype) for t in (query, key, value))
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(dtype)
    if seen is not None:
        scores = scores.masked_fill(~seen, NOTHING)
    empty = (scores == NOTHING).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    return weights @ value, torch.logsumexp(scores, -1)


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


def hold(tensors, arguments=None, *, tile=SMALL, clean=None, **meaning):
    """Compute and hold to the formula; ``clean`` are the tensors to judge by. Gives out and LSE."""
    out, lse = forward(call_of_arguments(*tensors, **(arguments or {})), with_lse=True, tile=tile)
    want, want_lse = formula(*(clean or tensors), **meaning)
    naive, naive_lse = formula(*(clean or tensors), **meaning, dtype=tensors[0].dtype)
    factor = 3.0 if meaning.get("softcap") else 2.0
    assert (out.dtype, lse.dtype) == (tensors[0].dtype, FLOAT)
    check_close("the output", out, want, naive, out.dtype, factor)
    check_close("the LSE", lse, want_lse, naive_lse, out.dtype, factor)
    assert not out[want_lse == NOTHING].any()
    return out, lse


def band(queries, keys, left, right, alignment, device):
    """Bool (Q, K)."""
    place = torch.arange(queries, device=device)[:, None] + (keys - queries if alignment == "bottom_right" else 0)
    key = torch.arange(keys, device=device)[None, :]
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device)
    seen = seen if left is None else seen & (key >= place - left)
    return seen if right is None else seen & (key <= place + right)


# Lengths and bands


@pytest.mark.parametrize("keys", [1, 15, 16, 17, 33])
@pytest.mark.parametrize("queries", [1, 16, 17])
def test_lengths_around_the_tiles(draw, queries, keys):
    hold((draw(1, 1, queries, 16), draw(1, 1, keys, 16), draw(1, 1, keys, 16)))


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@pytest.mark.parametrize("length", [63, 64, 65])
def test_lengths_around_the_tables_tiles(draw, dtype, length):
    shape = (1, 1, length, 64)
    hold(tuple(draw(*shape, dtype=dtype) for _ in range(3)), {"is_causal": True}, tile=Tile(64, 64, 4, 2),
         seen=band(length, length, None, 0, "top_left", draw(1).device))  # fmt: skip


@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
@pytest.mark.parametrize(("queries", "keys"), [(33, 33), (20, 47), (47, 20), (1, 40), (40, 1)])
def test_causal(draw, device, queries, keys, alignment):
    tensors = (draw(1, 2, queries, 16), draw(1, 2, keys, 16), draw(1, 2, keys, 16))
    asked = {"is_causal": True, "causal_alignment": alignment}
    hold(tensors, asked, seen=band(queries, keys, None, 0, alignment, device))


@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
@pytest.mark.parametrize(("queries", "keys"), [(50, 50), (50, 10), (10, 50)])
@pytest.mark.parametrize(("left", "right"), [(0, 0), (3, 1), (20, 2), (None, 5), (17, None), (1000, 1000), (2, 40)])
def test_windows(draw, device, queries, keys, left, right, alignment):
    tensors = (draw(1, 1, queries, 16), draw(1, 1, keys, 16), draw(1, 1, keys, 16))
    asked = {"window": (left, right), "window_alignment": alignment}
    hold(tensors, asked, seen=band(queries, keys, left, right, alignment, device))


def test_a_window_that_leaves_whole_blocks_of_queries_without_keys(draw, device):
    tensors = (draw(1, 1, 70, 16), draw(1, 1, 9, 16), draw(1, 1, 9, 16))
    _, lse = hold(tensors, {"window": (1, 0)}, seen=band(70, 9, 1, 0, "top_left", device))
    assert lse[0, 0, 16:].eq(NOTHING).all()


@pytest.mark.parametrize("keys", [20, 50])
def test_causality_and_a_window_that_count_from_different_ends(draw, device, keys):
    tensors = (draw(1, 1, 35, 16), draw(1, 1, keys, 16), draw(1, 1, keys, 16))
    asked = {"is_causal": True, "window": (9, 4), "window_alignment": "bottom_right"}
    seen = band(35, keys, None, 0, "top_left", device) & band(35, keys, 9, 4, "bottom_right", device)
    hold(tensors, asked, seen=seen)


@pytest.mark.parametrize("tile", [Tile(16, 64, 4, 1), Tile(64, 16, 4, 2), Tile(32, 32, 4, 1)])
def test_other_tiles(draw, device, tile):
    tensors = (draw(1, 1, 70, 16), draw(1, 1, 90, 16), draw(1, 1, 90, 16))
    asked = {"window": (30, 10), "is_causal": True, "causal_alignment": "bottom_right"}
    seen = band(70, 90, 30, 10, "top_left", device) & band(70, 90, None, 0, "bottom_right", device)
    hold(tensors, asked, tile=tile, seen=seen)


# Masks and biases


@pytest.mark.parametrize("axes", [(2, 2, 20, 40), (1, 2, 1, 40), (2, 1, 20, 1), (1, 1, 20, 40), (1, 1, 1, 1)])
def test_masks_and_biases_broadcast_by_strides(draw, flags, axes):
    tensors = (draw(2, 2, 20, 16), draw(2, 2, 40, 16), draw(2, 2, 40, 16))
    mask, bias = flags(0.6, *axes), draw(*axes)
    hold(tensors, {"attn_mask": mask}, seen=mask)
    hold(tensors, {"attn_mask": mask, "attn_bias": bias}, seen=mask, bias=bias)


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
def test_rows_that_see_nothing_in_tiles_where_others_do(draw, flags, dtype):
    tensors = tuple(draw(1, 2, 40, 16, dtype=dtype) for _ in range(3))
    mask = flags(0.5, 1, 2, 40, 40)
    mask[:, :, [0, 5, 39]] = False
    mask[:, :, 7, :32] = False  # its first tiles hide everything
    _, lse = hold(tensors, {"attn_mask": mask}, seen=mask)
    assert lse[:, :, [0, 5, 39]].eq(NOTHING).all()
    bias = draw(1, 2, 40, 40, dtype=dtype).masked_fill(~mask, NOTHING)
    hold(tensors, {"attn_mask": bias}, bias=bias)


@pytest.mark.parametrize("bias_dtype", [FLOAT, HALF, torch.float64])
@pytest.mark.parametrize("dtype", [FLOAT, HALF])
def test_a_bias_of_the_lowest_number_hides_nothing_where_all_have_it(draw, flags, dtype, bias_dtype):
    tensors = tuple(draw(1, 1, 20, 16, dtype=dtype) for _ in range(3))
    lowest = torch.finfo(bias_dtype).min
    bias = draw(1, 1, 20, 20, dtype=bias_dtype).masked_fill(flags(0.4, 20, 20), lowest)
    bias[..., 3, :] = lowest
    out, _ = forward(call_of_arguments(*tensors, attn_mask=bias), tile=SMALL)
    want, _ = formula(*tensors, bias=bias)
    naive, _ = formula(*tensors, bias=bias, dtype=FLOAT)
    alike = [row for row in range(20) if row != 3]
    check_close("the output", out[..., alike, :], want[..., alike, :], naive[..., alike, :], dtype)
    if bias_dtype != HALF:  # float16's lowest leaves the scores some digits
        check_close("the mean", out[..., 3, :], tensors[2].double().mean(2), tensors[2].mean(2), dtype)


def test_a_bias_of_plus_infinity_is_nan_as_in_the_formula(draw):
    tensors = tuple(draw(1, 1, 5, 16) for _ in range(3))
    bias = draw(1, 1, 5, 5)
    bias[..., 2, 1] = math.inf
    out, _ = forward(call_of_arguments(*tensors, attn_mask=bias), tile=SMALL)
    assert out[..., 2, :].isnan().all()
    assert out[..., [0, 1, 3, 4], :].isfinite().all()


def test_finite_garbage_under_a_mask_changes_nothing(draw, flags):
    clean = tuple(draw(1, 2, 40, 16) for _ in range(3))
    mask = flags(0.6, 1, 2, 40, 40)
    mask[..., 30:36] = False
    spoilt = tuple(clean[at].index_fill(2, torch.arange(30, 36, device=mask.device), 1e4) for at in (1, 2))
    hold((clean[0], *spoilt), {"attn_mask": mask}, clean=clean, seen=mask)


KEPT = {
    "right": lambda keys: torch.arange(keys) < 19,
    "left": lambda keys: torch.arange(keys) >= 21,
    "middle": lambda keys: (torch.arange(keys) >= 18) & (torch.arange(keys) < 30),
    "interior": lambda keys: torch.arange(keys) % 3 > 0,
    "hole": lambda keys: (torch.arange(keys) < 16) | (torch.arange(keys) >= 33),
    "one": lambda keys: torch.arange(keys) == 17,
    "all": lambda keys: torch.arange(keys) >= 0,
    "none": lambda keys: torch.arange(keys) < 0,
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KEPT)
def test_padding_of_any_pattern(draw, device, kind, causal):
    """Before its first kept key and behind its last a row may hold NaN; between them finite garbage."""
    keys = 50
    keep = torch.stack([KEPT[kind](keys), torch.arange(keys) < 33]).to(device)
    clean = (draw(2, 2, 40, 16), draw(2, 2, keys, 16), draw(2, 2, keys, 16))
    nan = math.nan if kind not in ("interior", "hole") else 1e4
    spoilt = tuple(t.masked_fill(~keep[:, None, :, None], nan) for t in clean[1:])
    zeroed = tuple(t.masked_fill(~keep[:, None, :, None], 0.0) for t in clean[1:])
    seen = keep[:, None, None, :].expand(2, 1, 40, keys)
    seen = seen & band(40, keys, None, 0, "bottom_right", device) if causal else seen
    asked = {"key_padding": keep} | ({"is_causal": True, "causal_alignment": "bottom_right"} if causal else {})
    hold((clean[0], *spoilt), asked, clean=(clean[0], *zeroed), seen=seen)


def test_padding_of_more_keys_than_are_scanned_at_a_time(draw, device):
    keep = torch.zeros(3, 2100, dtype=torch.bool, device=device)
    keep[0, 1030:2090] = keep[1, 5:1300] = True
    keep[2, ::7] = True
    tensors = (draw(3, 1, 5, 16), draw(3, 1, 2100, 16), draw(3, 1, 2100, 16))
    hold(tensors, {"key_padding": keep}, tile=Tile(16, 128, 4, 1), seen=keep[:, None, None, :])


def test_one_padding_for_all_of_a_batch_and_queries_that_are_padding(draw, flags):
    tensors = (draw(2, 2, 40, 16), draw(2, 2, 30, 16), draw(2, 2, 30, 16))
    keep, rows = flags(0.7, 1, 30), flags(0.5, 2, 40)
    rows[0, 16:32] = False  # a whole block
    seen = keep[:, None, None, :] & rows[:, None, :, None]
    _, lse = hold(tensors, {"key_padding": keep, "query_padding": rows}, seen=seen)
    assert lse[0, :, 16:32].eq(NOTHING).all()


def test_everything_at_once(draw, flags, device):
    tensors = (draw(2, 4, 40, 40), draw(2, 2, 50, 40), draw(2, 2, 50, 24))
    mask, bias, keep, rows = flags(0.8, 2, 1, 40, 50), draw(1, 4, 40, 50), flags(0.9, 2, 50), flags(0.9, 2, 40)
    asked = {"attn_mask": mask, "attn_bias": bias, "key_padding": keep, "query_padding": rows, "is_causal": True,
             "causal_alignment": "bottom_right", "window": (25, 9), "scale": 0.3, "softcap": 1.5}  # fmt: skip
    seen = mask & keep[:, None, None, :] & rows[:, None, :, None] & band(40, 50, 25, 9, "top_left", device)
    seen = seen & band(40, 50, None, 0, "bottom_right", device)
    hold(tensors, asked, seen=seen, bias=bias, scale=0.3, softcap=1.5)


# Heads, dims, strides

DIMS = ((1, 1), (5, 3), (8, 8), (40, 40), (72, 72), (80, 72), (96, 16), (16, 96), (160, 40), (256, 256), (200, 8))


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 1), (8, 2), (3, 3)])
def test_grouped_heads(draw, device, heads, kv_heads):
    tensors = (draw(2, heads, 20, 16), draw(2, kv_heads, 20, 16), draw(2, kv_heads, 20, 16))
    hold(tensors, {"is_causal": True, "enable_gqa": True}, seen=band(20, 20, None, 0, "top_left", device))


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@pytest.mark.parametrize(("dim", "value_dim"), DIMS)
def test_head_dims_in_parts(draw, dtype, dim, value_dim):
    tensors = (draw(1, 1, 17, dim), draw(1, 1, 19, dim), draw(1, 1, 19, value_dim))
    hold(tuple(t.to(dtype) for t in tensors))


def test_any_strides(draw, device):
    want = tuple(draw(2, 2, 20, 16) for _ in range(3))
    transposed = tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in want)
    features = tuple(t.mT.contiguous().mT for t in want)
    sliced = tuple(torch.nn.functional.pad(t, (3, 5, 1, 2))[:, :, 1:21, 3:19] for t in want)
    strange = tuple(t.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0) for t in want)
    plain = forward(call_of_arguments(*want))[0]
    for tensors in (transposed, features, sliced, strange, (transposed[0], features[1], sliced[2])):
        assert torch.equal(forward(call_of_arguments(*tensors))[0], plain)


def test_expanded_tensors_are_read_as_they_are(draw, device):
    query, key, value = draw(1, 1, 20, 16), draw(1, 1, 1, 16), draw(1, 2, 30, 16)
    tensors = (query.expand(2, 2, 20, 16), key.expand(2, 2, 30, 16), value.expand(2, 2, 30, 16))
    hold(tensors)


def test_the_outputs_axes_lie_in_memory_as_the_querys(draw):
    query = draw(2, 20, 3, 16).transpose(1, 2)
    out, _ = forward(call_of_arguments(query, query, query[..., :8]))
    assert out.transpose(1, 2).is_contiguous()
    assert forward(call_of_arguments(*[query.contiguous()] * 3))[0].is_contiguous()


def sparse(device, count):
    """A buffer of that many float16; memory is taken only where it is touched."""
    return torch.empty(count, dtype=HALF, device=device)


def test_offsets_beyond_32_bits_between_rows_heads_and_features(draw, device):
    plain = [draw(1, 2, 5, 16, dtype=HALF) for _ in range(3)]
    buffer = sparse(device, (1 << 31) + (1 << 24))
    far = (
        (0, (1 << 31), 1 << 9, 1),  # the second head begins past 2^31
        (0, 1 << 9, (1 << 29), 1),  # the fifth row does
        (0, 1, 1 << 5, 1 << 27),  # the last feature nearly: 15 * 2^27, plus the rows
    )
    placed = []
    for at, (given, strides) in enumerate(zip(plain, far, strict=True)):
        view = buffer.as_strided(given.shape, strides, (1 << 20) * at)
        view.copy_(given)
        placed.append(view)
    assert max(sum(s * (n - 1) for s, n in zip(t.stride(), t.shape, strict=True)) for t in placed) >= 1 << 31
    hold(tuple(placed), clean=tuple(plain))


def test_a_mask_beyond_32_bits(draw, flags, device):
    tensors = tuple(draw(1, 1, 20, 16) for _ in range(3))
    mask = flags(0.5, 1, 1, 20, 20)
    far = torch.empty(20 << 27, dtype=torch.bool, device=device).as_strided(mask.shape, (0, 0, 1 << 27, 1))
    far.copy_(mask)
    hold(tensors, {"attn_mask": far}, seen=mask)


# Numbers


@pytest.mark.parametrize("scale", [0.0, -0.5, 3.0, 1e-4])
def test_any_scale(draw, flags, scale):
    tensors = tuple(draw(1, 1, 20, 16) for _ in range(3))
    mask = flags(0.6, 1, 1, 20, 20)
    hold(tensors, {"attn_mask": mask, "scale": scale}, seen=mask, scale=scale)
    hold(tensors, {"attn_mask": mask, "scale": scale, "softcap": 1.0}, seen=mask, scale=scale, softcap=1.0)


@pytest.mark.parametrize("softcap", [0.1, 2.0, 50.0, 1000.0])
def test_soft_caps_are_as_exact_as_tanh(draw, softcap):
    hold(tuple(draw(1, 1, 20, 16) for _ in range(3)), {"softcap": softcap}, softcap=softcap)


def test_large_scores_stay_finite(draw):
    hold((draw(1, 1, 20, 16) * 100, draw(1, 1, 40, 16) * 100, draw(1, 1, 40, 16)), tile=SMALL)


def test_the_lse_may_be_left_out(draw):
    tensors = tuple(draw(1, 1, 20, 16) for _ in range(3))
    out, lse = forward(call_of_arguments(*tensors))
    assert lse is None
    assert torch.equal(out, forward(call_of_arguments(*tensors), with_lse=True)[0])


@pytest.mark.parametrize("shape", [(0, 2, 5, 7), (2, 0, 5, 7), (1, 1, 0, 7), (1, 1, 5, 0), (1, 1, 0, 0)])
def test_nothing_to_compute(draw, shape):
    batch, heads, queries, keys = shape
    tensors = (draw(batch, heads, queries, 16), draw(batch, heads, keys, 16), draw(batch, heads, keys, 8))
    out, lse = forward(call_of_arguments(*tensors), with_lse=True)
    assert out.shape == (batch, heads, queries, 8)
    assert not out.any()
    assert lse.eq(NOTHING).all()


# Packed sequences


def pack(device, queries, keys=None, dtype=torch.int32):
    """A Varlen of those lengths."""

    def ends(lengths):
        return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=dtype, device=device)

    return Varlen(ends(queries), None if keys is None else ends(keys))


def hold_packed(tensors, varlen, asked=None, *, causal=None, window=None, seen=None, **meaning):
    """Packed tensors (T, H, D), held to the formula with the mask that the packing means."""
    mask = Mask(varlen=varlen, causal=causal, window=window)
    visible = mask.visible(len(tensors[0]), len(tensors[1]), tensors[0].device)
    visible = visible if seen is None else visible & seen
    call = call_of_arguments(*tensors, varlen=varlen, **(asked or {}))
    out, lse = as_given(tensors[0], *forward(call, with_lse=True, tile=SMALL))
    heads_first = [t.transpose(0, 1)[None] for t in tensors]
    want, want_lse = formula(*heads_first, seen=visible, **meaning)
    naive, naive_lse = formula(*heads_first, seen=visible, **meaning, dtype=tensors[0].dtype)
    check_close("the output", out.transpose(0, 1)[None], want, naive, out.dtype)
    check_close("the LSE", lse[None], want_lse, naive_lse, out.dtype)


PACKS = {
    "alike": ((20, 1, 33), None),
    "cross": ((20, 1, 33), (5, 40, 17)),
    "without queries or keys": ((20, 0, 7, 16), (9, 12, 0, 16)),
    "tokens behind": ((20, 5), (9, 12)),
    "none": ((), ()),
}


@pytest.mark.parametrize("name", PACKS)
@pytest.mark.parametrize("alignment", [None, "top_left", "bottom_right"])
def test_packs(draw, device, name, alignment):
    queries, keys = PACKS[name]
    beyond = 11 if name in ("tokens behind", "none") else 0
    sizes = (sum(queries) + beyond, sum(keys if keys is not None else queries) + beyond)
    tensors = (draw(sizes[0], 2, 16), draw(sizes[1], 2, 16), draw(sizes[1], 2, 16))
    asked = {} if alignment is None else {"is_causal": True, "causal_alignment": alignment}
    hold_packed(tensors, pack(device, queries, keys), asked, causal=alignment)


@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
def test_packs_with_windows_and_causality_from_the_other_end(draw, device, alignment):
    other = {"top_left": "bottom_right", "bottom_right": "top_left"}[alignment]
    tensors = (draw(54, 2, 16), draw(62, 1, 16), draw(62, 1, 16))
    asked = {"is_causal": True, "causal_alignment": other, "window": (9, 6), "window_alignment": alignment}
    varlen = pack(device, (20, 1, 33), (5, 40, 17), dtype=torch.int64)
    hold_packed(tensors, varlen, asked, causal=other, window=(9, 6, alignment))


def test_packs_with_masks_by_their_tokens(draw, flags, device):
    tensors = (draw(54, 2, 16), draw(62, 2, 16), draw(62, 2, 16))
    mask, bias, keep = flags(0.7, 1, 1, 54, 62), draw(1, 2, 54, 62), flags(0.8, 1, 62)
    varlen = pack(device, (20, 1, 33), (5, 40, 17))
    asked = {"attn_mask": mask, "attn_bias": bias, "key_padding": keep}
    hold_packed(tensors, varlen, asked, seen=mask & keep[:, None, None, :], bias=bias)


def test_a_batch_whose_rows_are_packed_alike(draw, device):
    tensors = tuple(draw(2, 2, 54, 16) for _ in range(3))
    varlen = pack(device, (20, 1, 33))
    hold(tensors, {"varlen": varlen}, seen=Mask(varlen=varlen).visible(54, 54, device))
