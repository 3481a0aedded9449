"""The forward pass in int8: exact where the inputs are codes already, near the formula elsewhere, and smoothed.

Tiles are small (16 queries, 16 keys) wherever lengths matter, so that a few dozen keys have several scales.

Shapes: B batch, H heads, N kv heads, Q query length, K key length, D head dim, E value dim, T packed tokens.
"""

from __future__ import annotations

import math

import pytest
import torch

from heedful.kernels import int8
from heedful.kernels.arguments import as_given, call_of_arguments
from heedful.kernels.operands import split_of
from heedful.kernels.tiles import Tile
from heedful.masks import Mask, Varlen
from heedful.strategies import TritonInt8AttentionStrategy
from heedful.testing import checks, report
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


def attend(tensors, asked=None, *, tile=SMALL, **words):
    return int8.forward(call_of_arguments(*tensors, **(asked or {})), with_lse=True, tile=tile, **words)


def error(got, want):
    """sum|out - exact| / sum|exact|, as ``relative_error`` is declared."""
    return ((got.double() - want).abs().sum() / want.abs().sum()).item()


def band(queries, keys, left, right, alignment, device):
    """Bool (Q, K)."""
    place = torch.arange(queries, device=device)[:, None] + (keys - queries if alignment == "bottom_right" else 0)
    key = torch.arange(keys, device=device)[None, :]
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device)
    seen = seen if left is None else seen & (key >= place - left)
    return seen if right is None else seen & (key <= place + right)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def draw(device, generator):
    """``draw(2, 3, dtype=…)``: N(0, 1), the same on every device."""
    return lambda *shape, dtype=FLOAT: torch.randn(*shape, generator=generator).to(dtype).to(device)


@pytest.fixture
def flags(device, generator):
    """``flags(0.5, 2, 3)``: bool, True with that probability."""
    return lambda share, *shape: (torch.rand(*shape, generator=generator) < share).to(device)


@pytest.fixture
def codes(device, generator):
    """``codes(2, 3)``: numbers that are their own codes, times 1/32: each row has a 127."""

    def drawn(*shape, dtype=FLOAT):
        whole = torch.randint(-30, 31, shape, generator=generator)
        whole[..., 0] = 127 * torch.where(torch.rand(shape[:-1], generator=generator) < 0.5, -1, 1)
        return (whole / 32).to(dtype).to(device)

    return drawn


# Masks, packs, heads: with inputs that are codes already, and the mean left in them, the answers are exact ones


def hold(tensors, asked=None, *, tile=SMALL, **meaning):
    out, lse = attend(tensors, asked, tile=tile, smooth=False)
    want, want_lse = formula(*tensors, **meaning)
    naive, naive_lse = formula(*tensors, **meaning, dtype=tensors[0].dtype)
    factor = 3.0 if meaning.get("softcap") else 2.0
    assert (out.dtype, lse.dtype) == (tensors[0].dtype, FLOAT)
    check_close("the output", out, want, naive, out.dtype, factor)
    check_close("the LSE", lse, want_lse, naive_lse, out.dtype, factor)
    assert not out[want_lse == NOTHING].any()


@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
@pytest.mark.parametrize(("queries", "keys"), [(20, 47), (47, 20)])
def test_causal(codes, draw, device, queries, keys, alignment):
    tensors = (codes(1, 1, queries, 32), codes(1, 1, keys, 32), draw(1, 1, keys, 32))
    asked = {"is_causal": True, "causal_alignment": alignment}
    hold(tensors, asked, seen=band(queries, keys, None, 0, alignment, device))


def powers(*places):
    """Powers of two, which keep codes what they are: 1, 1/2 or 1/4 by the sum of the places."""
    return 2.0 ** -(sum(places) % 3)


def test_each_row_of_queries_and_each_block_of_keys_of_a_head_has_a_scale_of_its_own(codes, draw, device):
    batch, head = torch.arange(2, device=device)[:, None, None, None], torch.arange(2, device=device)[:, None, None]
    place = torch.arange(70, device=device)[:, None]
    query = codes(2, 4, 20, 72) * powers(place[:20])
    tensors = (query, codes(2, 2, 70, 72) * powers(batch, head, place // 16), draw(2, 2, 70, 72))
    hold(tensors, {"enable_gqa": True})
    hold(tensors, {"window": (9, 30)}, seen=band(20, 70, 9, 30, "top_left", device))


def test_a_window_that_leaves_queries_and_keys_alone(codes, draw, device):
    tensors = (codes(1, 1, 50, 32), codes(1, 1, 20, 32), draw(1, 1, 20, 32))
    hold(tensors, {"window": (3, 1)}, seen=band(50, 20, 3, 1, "top_left", device))


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
def test_everything_at_once(codes, draw, flags, device, dtype):
    tensors = (codes(2, 4, 20, 40, dtype=dtype), codes(2, 2, 40, 40, dtype=dtype), draw(2, 2, 40, 24, dtype=dtype))
    mask, bias, keep, rows = flags(0.8, 2, 1, 20, 40), draw(1, 4, 20, 40), flags(0.9, 2, 40), flags(0.8, 2, 20)
    mask[1, :, 3] = False
    asked = {"attn_mask": mask, "attn_bias": bias, "key_padding": keep, "query_padding": rows, "is_causal": True,
             "causal_alignment": "bottom_right", "window": (25, 9), "scale": -0.1, "softcap": 1.5}  # fmt: skip
    seen = mask & keep[:, None, None, :] & rows[:, None, :, None] & band(20, 40, 25, 9, "top_left", device)
    seen = seen & band(20, 40, None, 0, "bottom_right", device)
    hold(tensors, asked, seen=seen, bias=bias, scale=-0.1, softcap=1.5)


@pytest.mark.parametrize(("dim", "value_dim"), [(1, 3), (32, 72), (72, 32), (80, 8), (160, 160), (256, 16)])
def test_head_dims_in_parts(codes, draw, dim, value_dim):
    hold((codes(1, 1, 17, dim), codes(1, 1, 19, dim), draw(1, 1, 19, value_dim)))


def test_any_strides(codes, draw):
    want = (codes(2, 2, 20, 40), codes(2, 2, 20, 40), draw(2, 2, 20, 40))
    plain = attend(want)
    for turned in ((0, 2, 1, 3), (0, 1, 3, 2), (3, 2, 0, 1)):
        back = [turned.index(axis) for axis in range(4)]
        given = tuple(t.permute(turned).contiguous().permute(back) for t in want)
        torch.testing.assert_close(attend(given), plain, rtol=1e-5, atol=1e-5)  # on a GPU it is other machine code


@pytest.mark.parametrize("tile", [Tile(16, 64, 4, 1), Tile(64, 16, 4, 2)])
def test_other_tiles(codes, draw, device, tile):
    tensors = (codes(1, 1, 70, 32), codes(1, 1, 90, 32), draw(1, 1, 90, 32))
    hold(tensors, {"window": (30, 10)}, tile=tile, seen=band(70, 90, 30, 10, "top_left", device))


def pack(device, queries, keys):
    def ends(lengths):
        return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=device)

    return Varlen(ends(queries), ends(keys))


PACKS = {"cross": ((20, 1, 33), (5, 40, 17)), "without queries or keys": ((20, 0, 7, 16), (9, 12, 0, 16)),
         "tokens behind": ((20, 5), (9, 12)), "none": ((), ())}  # fmt: skip


@pytest.mark.parametrize("name", PACKS)
@pytest.mark.parametrize("alignment", [None, "bottom_right"])
def test_packs(codes, draw, device, name, alignment):
    queries, keys = PACKS[name]
    beyond = 11 if name in ("tokens behind", "none") else 0
    tensors = (codes(sum(queries) + beyond, 2, 32), codes(sum(keys) + beyond, 1, 32), draw(sum(keys) + beyond, 1, 32))
    for sequence, one in enumerate(tensors[1][: sum(keys)].split(keys)):  # each block has a scale of its own
        one.mul_(powers(sequence, torch.arange(len(one), device=device)[:, None, None] // 16))
    varlen = pack(device, queries, keys)
    asked = {"varlen": varlen} if alignment is None else {
        "varlen": varlen, "is_causal": True, "causal_alignment": alignment}  # fmt: skip
    out, lse = as_given(tensors[0], *attend(tensors, asked, smooth=False))
    seen = Mask(varlen=varlen, causal=alignment).visible(len(tensors[0]), len(tensors[1]), device)
    heads_first = [t.transpose(0, 1)[None] for t in tensors]
    want, want_lse = formula(*heads_first, seen=seen)
    naive, naive_lse = formula(*heads_first, seen=seen, dtype=FLOAT)
    check_close("the output", out.transpose(0, 1)[None], want, naive, FLOAT)
    check_close("the LSE", lse[None], want_lse, naive_lse, FLOAT)


# Smoothing


def outlying(draw, keys=80, dim=64, mean=30.0):
    """Query, key and value (1, 2, …) whose keys have channels of a large mean, as real models' have."""
    means = torch.zeros(dim).to(draw(1).device)
    means[::16] = mean
    means[8::32] = -mean
    return draw(1, 2, 20, dim), draw(1, 2, keys, dim) + means, draw(1, 2, keys, dim)


@pytest.mark.parametrize("asked", [{}, {"scale": -0.2}, {"softcap": 20.0}, {"is_causal": True}])
def test_smoothing_keeps_channels_of_a_large_mean_from_spoiling_the_answer(draw, device, asked):
    tensors = outlying(draw)
    meaning = dict(asked)
    if meaning.pop("is_causal", False):
        meaning["seen"] = band(20, 80, None, 0, "top_left", device)
    want, want_lse = formula(*tensors, **meaning)
    out, lse = attend(tensors, asked)
    rough, _ = attend(tensors, asked, smooth=False)
    assert error(out, want) < 0.025
    assert error(out, want) < 0.3 * error(rough, want)
    assert (lse - want_lse).abs().max() < 0.05


def test_the_lse_is_that_of_the_true_scores(draw):
    """Without its correction, by the product of the query and the keys' mean, it would be off by far."""
    query, key, value = outlying(draw)
    _, want = formula(query, key, value)
    shift = (query @ key.mean(2, keepdim=True).mT).squeeze(-1) / 8
    _, lse = attend((query, key, value))
    assert (lse - want).abs().max() < 0.05
    assert (lse - shift - want).abs().mean() > 2.0
    assert (lse - shift.roll(1, -1) + shift - want).abs().max() > 2.0


def test_means_are_those_of_each_sequence_and_kv_head_over_keys_that_are_seen(draw, device):
    keep = torch.arange(40, device=device)[None] < torch.tensor([[33], [0]], device=device)
    query, key = draw(2, 4, 20, 40), draw(2, 2, 40, 40) + 5
    call = call_of_arguments(query, key.masked_fill(~keep[:, None, :, None], math.nan), key, key_padding=keep)
    means = int8.means_of(call, int8.seen_of(call, SMALL))
    assert means.shape == (2, 2, 64)
    torch.testing.assert_close(means[0, :, :40], key[0, :, :33].mean(1))
    assert not means[1].any()
    assert not means[..., 40:].any()
    packed = (draw(30, 2, 40), draw(57, 1, 40) + 5, draw(57, 1, 40))
    call = call_of_arguments(*packed, varlen=pack(device, (10, 9, 11), (17, 0, 40)))
    means = int8.means_of(call, int8.seen_of(call, SMALL))
    torch.testing.assert_close(means[:, 0, :40], torch.stack([packed[1][:17, 0].mean(0), torch.zeros(40).to(device),
                                                              packed[1][17:, 0].mean(0)]))  # fmt: skip


def test_means_of_more_keys_than_one_program_sums(draw):
    key = draw(1, 1, 1100, 32) + 3
    call = call_of_arguments(draw(1, 1, 1, 32), key, key)
    torch.testing.assert_close(int8.means_of(call, None)[0], key[0].mean(1))


def test_codes_are_within_half_a_step_of_what_they_stand_for(draw):
    query, key = draw(1, 2, 20, 72) * 3, draw(1, 1, 40, 72) * torch.logspace(-3, 3, 40, device=draw(1).device)[:, None]
    codes = int8.codes_of(call_of_arguments(query, key, key, scale=-1.0), SMALL, smooth=False)
    assert (codes.query.dtype, codes.query.shape, codes.key.shape) == (torch.int8, (1, 2, 20, 96), (1, 1, 40, 96))
    assert (codes.query_scales.shape, codes.key_scales.shape) == ((1, 2, 20), (1, 1, 3))
    torch.testing.assert_close(codes.query_scales, query.abs().amax(-1) / 127)
    peaks = torch.stack([part.abs().max() for part in key[0, 0].split(16)])
    torch.testing.assert_close(codes.key_scales[0, 0], peaks / 127)
    steps = codes.key_scales.repeat_interleave(16, 2)[..., :40, None]
    for got, scale, want in ((codes.query, codes.query_scales[..., None], -query), (codes.key, steps, key)):
        off = got[..., :72].float() - want / scale
        assert off.abs().max() <= 0.5 + 1e-4
        assert got.amax() == 127 or got.amin() == -127
        assert not got[..., 72:].any()


def test_parts_for_eight_bits_are_no_shorter_than_what_is_multiplied_at_a_time():
    assert [split_of(dim, 32) for dim in (1, 32, 33, 72, 80, 96, 128, 129, 160, 256)] == [
        (32, 0), (32, 0), (64, 0), (64, 32), (64, 32), (64, 32), (128, 0), (128, 32), (128, 32), (256, 0)]  # fmt: skip


# What nothing sees, what is nothing, and what is no number


def without_key_5(mask, hidden=False, first_query=0):
    """The mask (…, Q, K), in which no query from the first on sees key 5."""
    mask[..., first_query:, 5] = hidden
    return mask


HIDDEN = {
    "dense": lambda flags: {"attn_mask": without_key_5(flags(0.7, 1, 2, 20, 40))},
    "bias": lambda flags: {"attn_mask": without_key_5(flags(0.5, 1, 1, 20, 40).float(), NOTHING)},
    "causal and dense": lambda flags: {"attn_mask": without_key_5(flags(1.0, 1, 1, 20, 40), first_query=5),
                                       "is_causal": True},
    "window": lambda flags: {"window": (2, -3), "window_alignment": "bottom_right"},
    "padding": lambda flags: {"key_padding": without_key_5(flags(1.0, 1, 1, 40))[0]},
    "queries": lambda flags: {"window": (0, 0), "query_padding": without_key_5(flags(1.0, 1, 1, 20))[0]},
}  # fmt: skip


@pytest.mark.parametrize("kind", HIDDEN)
def test_garbage_in_keys_that_no_query_sees_takes_no_digits_from_the_others(draw, flags, device, kind):
    asked = HIDDEN[kind](flags)
    query, key, value = draw(1, 2, 20, 32), draw(1, 1, 40, 32), draw(1, 1, 40, 32)
    clean = attend((query, key, value), asked)
    for garbage in (1e4, -3e38, math.nan if kind == "padding" else 0.0):
        spoilt = key.index_fill(2, torch.tensor([5], device=device), garbage)
        assert all(map(torch.equal, attend((query, spoilt, value), asked), clean))
    assert clean[0].isfinite().all()


def test_queries_that_are_padding_and_rows_that_see_nothing(draw, flags):
    tensors = tuple(draw(1, 2, 40, 32) for _ in range(3))
    mask, rows = flags(0.5, 1, 2, 40, 40), flags(0.5, 1, 40)
    mask[:, :, [0, 5, 39]] = False
    mask[:, :, 7, :32] = False  # its first tiles hide everything
    rows[0, 16:32] = False  # a whole block
    seen = mask & rows[:, None, :, None]
    spoilt = (tensors[0].masked_fill(~rows[:, None, :, None], math.nan), *tensors[1:])
    out, lse = attend(spoilt, {"attn_mask": mask, "query_padding": rows})
    want, want_lse = formula(*tensors, seen=seen)
    empty = want_lse == NOTHING
    assert empty.any()
    assert torch.equal(lse == NOTHING, empty)
    assert not out[empty].any()
    assert error(out, want) < 0.03


def test_all_rows_masked(draw, device):
    tensors = tuple(draw(1, 1, 20, 32) for _ in range(3))
    for asked in ({"attn_mask": torch.zeros(1, 1, 1, 20, dtype=torch.bool, device=device)},
                  {"key_padding": torch.zeros(1, 20, dtype=torch.bool, device=device)}):  # fmt: skip
        out, lse = attend(tensors, asked)
        assert not out.any()
        assert lse.eq(NOTHING).all()


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-7, 1e30])
def test_blocks_of_zeros_and_of_tiny_and_huge_numbers(draw, device, size):
    query, key, value = draw(1, 1, 20, 32) / max(size, 1.0), draw(1, 1, 40, 32), draw(1, 1, 40, 32)
    key[:, :, 16:32] *= size
    seen = band(20, 40, None, 0, "bottom_right", device)
    out, lse = attend((query, key, value), {"is_causal": True, "causal_alignment": "bottom_right", "scale": 0.1})
    want, want_lse = formula(query, key, value, scale=0.1, seen=seen)
    assert error(out, want) < 0.03
    assert (lse - want_lse).abs().max() < 0.03


@pytest.mark.parametrize("size", [0.0, 1e-30])
def test_scores_that_underflow_are_zeros_and_hide_what_is_hidden(draw, device, size):
    query, key, value = draw(1, 1, 20, 32) * size, draw(1, 1, 20, 32) * size, draw(1, 1, 20, 32)
    seen = band(20, 20, None, 0, "top_left", device)
    want, want_lse = formula(query, key, value, seen=seen)
    out, lse = attend((query, key, value), {"is_causal": True})
    torch.testing.assert_close(out, want.float())
    torch.testing.assert_close(lse, want_lse.float())


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_no_number_in_the_answer(draw, number):
    query, key, value = draw(1, 1, 20, 32), draw(1, 1, 40, 32), draw(1, 1, 40, 32)
    broken = query.clone()
    broken[0, 0, 3, 7] = number
    out, lse = attend((broken, key, value))
    assert out[0, 0, 3].isnan().all()
    assert lse[0, 0, 3].isnan()
    assert out[0, 0, [2, 4]].isfinite().all()
    broken = key.clone()
    broken[0, 0, 3, 7] = number
    assert attend((query, broken, value))[0].isnan().all()


@pytest.mark.parametrize("shape", [(0, 2, 5, 7), (1, 1, 0, 7), (1, 1, 5, 0)])
def test_nothing_to_compute(draw, shape):
    batch, heads, queries, keys = shape
    tensors = (draw(batch, heads, queries, 16), draw(batch, heads, keys, 16), draw(batch, heads, keys, 8))
    out, lse = attend(tensors)
    assert out.shape == (batch, heads, queries, 8)
    assert not out.any()
    assert lse.eq(NOTHING).all()


# Errors


def spread(draw, keys, factor, mean):
    query, key, value = outlying(draw, keys, mean=mean)
    return tuple(t.to(HALF) for t in (query * factor, key, value))


@pytest.mark.parametrize(("factor", "mean", "most"), [(1.0, 0.0, 0.014), (1.0, 10.0, 0.014), (6.0, 0.0, 0.04),
                                                      (6.0, 10.0, 0.04)])  # fmt: skip
@pytest.mark.parametrize("keys", [64, 512])
def test_errors_are_those_of_the_docs_and_far_below_what_is_declared(draw, keys, factor, mean, most):
    """``factor``: the standard deviation of the scores."""
    tensors = spread(draw, keys, factor, mean)
    out, lse = attend(tensors, tile=Tile(32, 64, 4, 1))
    want, want_lse = formula(*tensors)
    assert error(out, want) < most < 0.5 * TritonInt8AttentionStrategy.relative_error
    assert (lse - want_lse).abs().max() < 0.05 * factor


# The contract: `heedful.testing.verify("triton_int8")` runs all of it; some of every kind run here, where tests run

PLACE = "cuda" if torch.cuda.is_available() else "cpu"

KINDS = ("declaration", "device", "plain", "auto", "coverage")
SOME = {"plain", "dtype-float16", "head-dim-72", "value-dim-24-of-16", "lengths-17x33", "gqa-6-3", "gqa-padding",
        "bshd", "bool-mask-and-causal", "bias-and-causal-bottom-right", "window-bottom_right-14x9", "causal-float16",
        "padding-interior-queries-right", "padding-and-bias-float32-query-float16", "varlen-cross",
        "varlen-empty-sequences", "varlen-tokens-behind", "varlen-and-bias", "empty-rows-all", "empty-row-gqa",
        "scale--0.5-causal", "scale-0.0", "softcap-bias-scale", "inference-call-bshd-bias-causal", "zero-keys",
        "zero-tokens"}  # fmt: skip


def some(check):
    if check.sample is None:
        return check.aspect in KINDS
    return check.sample.name in SOME and check.aspect in ("lse", "garbage", "compile")


CHECKS = [pytest.param(check, id=check.id, marks=[] if some(check) else [pytest.mark.slow])
          for check in checks("triton_int8", devices=(PLACE,)) if not check.slow]  # fmt: skip


def test_the_samples_are_those_of_the_contract():
    assert {param.values[0].sample.name for param in CHECKS if param.values[0].sample is not None} >= SOME


@pytest.mark.parametrize("check", CHECKS)
def test_contract(check):
    report(check)
