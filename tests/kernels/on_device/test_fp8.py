"""Values in fp8: PyTorch's codes, exact answers where weights and values are codes, near the formula elsewhere.

A query of zeros gives the keys that it sees one weight, which is a code, so that its answer is the mean of their
values: what masks, packs, heads and head dims do to values is held to that, exactly. Scores are ``test_int8.py``'s.

Shapes: B batch, H heads, N kv heads, Q query length, K key length, D head dim, E value dim, T packed tokens.
"""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl

from heedful.kernels import fp8, int8
from heedful.kernels.arguments import as_given, call_of_arguments
from heedful.kernels.jit.fp8 import as_e4m3
from heedful.kernels.tiles import Tile
from heedful.masks import Mask, Varlen
from heedful.strategies import TritonInt8Fp8AttentionStrategy
from heedful.testing import checks, report

SMALL = Tile(16, 32, 4, 1)  # tensor cores multiply no fewer keys
HALF, FLOAT, FP8 = torch.float16, torch.float32, torch.float8_e4m3fn
NOTHING = -math.inf


def formula(query, key, value, *, seen=None, bias=None):
    """Out and LSE of (B, H, length, dim) in float64, heads grouped."""
    query, key, value = (t.double() for t in (query, key, value))
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    scores = query @ key.mT * query.shape[-1] ** -0.5 + (0.0 if bias is None else bias.double())
    if seen is not None:
        scores = scores.masked_fill(~seen, NOTHING)
    empty = (scores == NOTHING).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    return weights @ value, torch.logsumexp(scores, -1)


def attend(tensors, asked=None, *, tile=SMALL, **words):
    return fp8.forward(call_of_arguments(*tensors, **(asked or {})), with_lse=True, tile=tile, **words)


def error(got, want):
    """sum|out - exact| / sum|exact|, as ``relative_error`` is declared."""
    return ((got.double() - want).abs().sum() / want.abs().sum()).item()


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
    """``codes(2, 1, 40, 8)``: codes of e4m3, of each channel times a power of two; first and last key have 448."""

    def drawn(*shape, dtype=FLOAT):
        whole = (torch.randn(shape, generator=generator) * 100).clamp(-448, 448).to(FP8).float()
        whole[..., :1, :] = whole[..., -1:, :] = 448.0
        return (whole * 2.0 ** -(torch.arange(shape[-1]) % 5) / 64).to(dtype).to(device)

    return drawn


# Codes


@triton.jit
def round_kernel(given, found, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(found + at, as_e4m3(tl.load(given + at)))


def test_codes_are_those_that_pytorch_makes(device, draw):
    """Each number of float16 that has a code, and what lies between them in float32."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(HALF).float().to(device)
    every = torch.where(every.abs() <= 448, every, 0.0)
    between = draw(1 << 14) * torch.exp2(torch.arange(1 << 14, device=device) % 20 - 12.0)
    given = torch.cat([every, between.clamp(-448, 448)])
    found = torch.empty_like(given, dtype=FP8)
    round_kernel[(len(given) // 4096,)](given, found, BLOCK=4096)
    assert torch.equal(found.float(), given.to(FP8).float())


def pack(device, queries, keys):
    def ends(lengths):
        return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=device)

    return Varlen(ends(queries), ends(keys))


def test_a_sequence_has_blocks_scales_and_means_of_its_own(draw, device):
    """Keys lie side by side, and what is no key is 0."""
    lengths = (33, 1, 0, 70)
    value = draw(sum(lengths), 2, 20) + 3.0
    varlen = pack(device, (4, 4, 4, 4), lengths)
    call = call_of_arguments(draw(16, 2, 16), draw(sum(lengths), 2, 16), value, varlen=varlen)
    found = fp8.values_of(call, SMALL, None)
    assert (found.codes.shape, found.codes.dtype) == ((1, 2, 104 // 32 + 4, 32, 32), FP8)
    assert found.scales.shape == found.means.shape == (4, 2, 32)
    start = 0
    for sequence, length in enumerate(lengths):
        part = value[start : start + length].transpose(0, 1)  # N, K, E
        first = start // 32 + sequence
        blocks = found.codes[0, :, first : first + -(-length // 32)].float()
        got = blocks.transpose(-1, -2).flatten(1, 2)  # N, K, P
        start += length
        assert not got[:, length:].any()
        assert not got[..., 20:].any()
        if length:
            mean, scale = found.means[sequence, :, None, :20], found.scales[sequence, :, None, :20]
            torch.testing.assert_close(mean, part.mean(1, keepdim=True))
            torch.testing.assert_close(scale, ((part - mean).abs().amax(1, keepdim=True) / 448).clamp(min=1e-35 / 448))
            off = (got[:, :length, :20] * scale + mean - part).abs()
            assert (off <= (part - mean).abs() / 16 + scale * 2.0**-10 + 1e-5).all()


def test_more_values_than_one_program_looks_at(draw):
    value = draw(1, 1, 1100, 16) + 3.0
    found = fp8.values_of(call_of_arguments(draw(1, 1, 1, 16), value, value), SMALL, None)
    torch.testing.assert_close(found.means[0, 0], value[0, 0].mean(0))
    torch.testing.assert_close(found.scales[0, 0], (value - value.mean(2)).abs().amax(2)[0, 0] / 448)


# Means of the values that a query sees: exact


def hold(query, value, asked=None, *, tile=SMALL, **meaning):
    """A query (B, H, Q, D), of which the shape alone counts."""
    query = torch.zeros_like(query)
    key = query.new_zeros(*value.shape[:3], query.shape[-1])
    out, lse = attend((query, key, value), asked, tile=tile, smooth=False)
    want, want_lse = formula(query, key, value, **meaning)
    assert (out.dtype, out.shape, lse.dtype) == (value.dtype, want.shape, FLOAT)
    torch.testing.assert_close(out, want.to(out.dtype), rtol=2e-3 if out.dtype == HALF else 2e-5, atol=1e-5)
    torch.testing.assert_close(lse, want_lse.float(), rtol=1e-5, atol=1e-5)
    assert not out[want_lse == NOTHING].any()


@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
@pytest.mark.parametrize(("queries", "keys"), [(20, 70), (70, 20)])
def test_causal(codes, draw, device, queries, keys, alignment):
    seen = Mask(causal=alignment).visible(queries, keys, device)
    hold(draw(1, 1, queries, 32), codes(1, 1, keys, 32), {"is_causal": True, "causal_alignment": alignment}, seen=seen)


def test_a_window_and_other_tiles(codes, draw, device):
    place, key = torch.arange(70, device=device)[:, None], torch.arange(90, device=device)[None]
    seen = (key >= place - 30) & (key <= place + 10)
    for tile in (Tile(16, 64, 4, 1), Tile(64, 32, 4, 2)):
        hold(draw(1, 1, 70, 32), codes(1, 1, 90, 32), {"window": (30, 10)}, tile=tile, seen=seen)


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
def test_everything_at_once(codes, draw, flags, device, dtype):
    mask, keep, rows = flags(0.8, 2, 1, 20, 70), flags(0.9, 2, 70), flags(0.8, 2, 20)
    bias = -math.log(2.0) * (flags(0.5, 1, 2, 20, 70).float() + flags(0.5, 1, 1, 1, 70).float())  # weights are codes
    mask[1, :, 3] = False
    keep[:, [0, 69]] = mask[:, :, 0, [0, 69]] = True  # where the largest of each channel stand
    asked = {"attn_mask": mask, "attn_bias": bias, "key_padding": keep, "query_padding": rows, "is_causal": True,
             "causal_alignment": "bottom_right"}  # fmt: skip
    seen = mask & keep[:, None, None, :] & rows[:, None, :, None]
    seen = seen & Mask(causal="bottom_right").visible(20, 70, device)
    hold(draw(2, 2, 20, 40, dtype=dtype), codes(2, 1, 70, 24, dtype=dtype), asked, seen=seen, bias=bias)


@pytest.mark.parametrize(("dim", "value_dim"), [(1, 3), (16, 40), (32, 72), (8, 80), (16, 96), (160, 160), (16, 256)])
def test_value_dims_in_parts(codes, draw, dim, value_dim):
    hold(draw(1, 2, 17, dim), codes(1, 1, 35, value_dim))


def test_any_strides(codes, draw):
    want = (draw(2, 1, 16, 40), draw(2, 1, 20, 40), codes(2, 1, 20, 40))
    plain = attend(want)
    for turned in ((0, 2, 1, 3), (3, 2, 0, 1)):
        back = [turned.index(axis) for axis in range(4)]
        given = tuple(t.permute(turned).contiguous().permute(back) for t in want)
        torch.testing.assert_close(attend(given), plain, rtol=1e-5, atol=1e-5)  # on a GPU it is other machine code


PACKS = {"cross": ((20, 1, 33), (5, 40, 17)), "without queries or keys": ((20, 0, 7, 16), (9, 12, 0, 64)),
         "tokens behind": ((20, 5), (9, 40)), "none": ((), ())}  # fmt: skip


@pytest.mark.parametrize("name", PACKS)
@pytest.mark.parametrize("alignment", [None, "bottom_right"])
def test_packs(codes, draw, device, name, alignment):
    queries, keys = PACKS[name]
    beyond = 11 if name in ("tokens behind", "none") else 0
    query = torch.zeros(sum(queries) + beyond, 2, 32, device=device)
    key = torch.zeros(sum(keys) + beyond, 1, 32, device=device)
    value = codes(1, 1, sum(keys) + beyond, 32)[0, 0].unsqueeze(1)
    for sequence, one in enumerate(value[: sum(keys)].split(keys)):  # each has scales of its own
        one[:1], one[-1:] = 7.0, 7.0 * 2.0**-sequence
        one.mul_(2.0**-sequence)
    asked = {"varlen": pack(device, queries, keys)}
    if alignment is not None:
        asked |= {"is_causal": True, "causal_alignment": alignment}
    out, lse = as_given(query, *attend((query, key, value), asked, smooth=False))
    seen = Mask(varlen=asked["varlen"], causal=alignment).visible(len(query), len(key), device)
    want, want_lse = formula(*(t.transpose(0, 1)[None] for t in (query, key, value)), seen=seen)
    torch.testing.assert_close(out.transpose(0, 1)[None], want.float(), rtol=2e-5, atol=1e-5)
    torch.testing.assert_close(lse[None], want_lse.float(), rtol=1e-5, atol=1e-5)


# Smoothing


def test_what_all_values_of_a_channel_have_in_common_comes_back_whole(draw):
    query, key, value = draw(1, 2, 20, 32), draw(1, 1, 70, 32), draw(1, 1, 70, 24)
    plain, _ = attend((query, key, value))
    value[..., 3] = 1234.5
    out, _ = attend((query, key, value))
    torch.testing.assert_close(out[..., 3], torch.full_like(out[..., 3], 1234.5), rtol=1e-6, atol=0)
    others = [dim for dim in range(24) if dim != 3]
    assert torch.equal(out[..., others], plain[..., others])


def test_smoothing_keeps_the_means_of_values_out_of_the_rounding(draw):
    query, key, value = draw(1, 2, 20, 64), draw(1, 2, 160, 64), draw(1, 2, 160, 64)
    tensors = (query, key, value + 10.0)
    want, want_lse = formula(*tensors)
    out, lse = attend(tensors)
    rough, _ = attend(tensors, smooth=False)
    assert error(out, want) < 0.003
    assert error(out, want) < 0.5 * error(rough, want)
    assert (lse - want_lse).abs().max() < 0.02


def test_small_weights_count_beside_a_large_one(draw, device):
    """Of 1024 keys one has half of all weight: the others, 2^-10 of its, would be half the least code."""
    query, key = torch.zeros(1, 1, 16, 16, device=device), torch.zeros(1, 1, 1024, 16, device=device)
    bias = torch.zeros(1, 1, 1, 1024, device=device)
    bias[..., 0] = math.log(1023.0)
    value = draw(1, 1, 1024, 16) + torch.where(bias[0, 0, 0] > 0, -5.0, 5.0)[:, None]
    out, _ = attend((query, key, value), {"attn_mask": bias}, tile=Tile(16, 128, 4, 1), smooth=False)
    want, _ = formula(query, key, value, bias=bias)
    torch.testing.assert_close(out, want.float(), rtol=0, atol=0.25)


# What nothing sees, what is nothing, and what is no number

HIDDEN = {
    "dense": {"attn_mask": (torch.arange(70) != 5).expand(1, 1, 20, 70)},
    "bias": {"attn_mask": torch.where(torch.arange(70) != 5, 0.0, NOTHING)[None, None, None]},
    "window": {"window": (2, -3), "window_alignment": "bottom_right"},
    "padding": {"key_padding": (torch.arange(70) != 5)[None]},
}  # fmt: skip


@pytest.mark.parametrize("kind", HIDDEN)
def test_garbage_in_values_that_no_query_sees_takes_no_digits_from_the_others(draw, device, kind):
    asked = {name: one.to(device) if torch.is_tensor(one) else one for name, one in HIDDEN[kind].items()}
    query, key, value = draw(1, 1, 20, 16), draw(1, 1, 70, 16), draw(1, 1, 70, 24)
    clean = attend((query, key, value), asked)
    for garbage in (-3e38, math.nan):
        spoilt = value.index_fill(2, torch.tensor([5], device=device), garbage)
        assert all(map(torch.equal, attend((query, key, spoilt), asked), clean))
    assert clean[0].isfinite().all()


def test_rows_that_see_nothing_are_zeros_beside_means_and_nan(draw, flags):
    tensors = (draw(1, 2, 40, 32), draw(1, 2, 40, 32), draw(1, 2, 40, 32) + 5.0)
    mask, rows = flags(0.5, 1, 2, 40, 40), flags(0.5, 1, 40)
    mask[:, :, [0, 39]] = False
    mask[:, :, 7, :32] = False  # its first tile hides everything
    rows[0, 16:32] = False  # a whole block
    seen = mask & rows[:, None, :, None]
    want, want_lse = formula(*tensors, seen=seen)
    empty = want_lse == NOTHING
    out, lse = attend(tensors, {"attn_mask": mask, "query_padding": rows})
    assert torch.equal(lse == NOTHING, empty)
    assert not out[empty].any()
    assert error(out, want) < 0.02
    tensors[2][:, :, 20, 3] = math.nan
    assert not attend(tensors, {"attn_mask": mask, "query_padding": rows})[0][empty].any()


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_channel_that_holds_no_number_is_none_and_others_are_as_they_were(draw, number):
    """Of that head alone."""
    query, key, value = draw(1, 2, 20, 32), draw(1, 2, 40, 32), draw(1, 2, 40, 32)
    clean, clean_lse = attend((query, key, value))
    value[0, 1, 3, 7] = number
    out, lse = attend((query, key, value))
    assert out[0, 1, :, 7].isnan().all()
    assert torch.equal(lse, clean_lse)
    out[0, 1, :, 7] = clean[0, 1, :, 7]
    assert torch.equal(out, clean)


@pytest.mark.parametrize("size", [0.0, 1e-37, 1e-30, 1e37])
def test_channels_of_zeros_and_of_tiny_and_huge_numbers(draw, size):
    query, key, value = draw(1, 1, 20, 32), draw(1, 1, 400, 32), draw(1, 1, 400, 24)
    value[..., 3] *= size
    out, _ = attend((query, key, value), tile=Tile(32, 128, 4, 1))
    want, _ = formula(query, key, value)
    assert out.isfinite().all()
    assert error(out, want) < 0.07
    assert error(out[..., 3], want[..., 3]) < 0.07 or size in (0.0, 1e-37)  # less than there are numbers for
    assert (out[..., 3].double() - want[..., 3]).abs().max() <= 0.1 * size + 1e-36


@pytest.mark.parametrize("shape", [(0, 2, 5, 7), (1, 1, 0, 7), (1, 1, 5, 0)])
def test_nothing_to_compute(draw, shape):
    batch, heads, queries, keys = shape
    out, lse = attend((draw(batch, heads, queries, 16), draw(batch, heads, keys, 16), draw(batch, heads, keys, 8)))
    assert out.shape == (batch, heads, queries, 8)
    assert not out.any()
    assert lse.eq(NOTHING).all()


# Errors


ERRORS = [(72, 1.0, 0.0, 0.043), (128, 1.0, 0.0, 0.043), (128, 1.0, 10.0, 0.004), (128, 6.0, 0.0, 0.05)]


@pytest.mark.parametrize(("dim", "factor", "mean", "most"), ERRORS)
def test_errors_are_those_of_the_docs_and_far_below_what_is_declared(draw, dim, factor, mean, most):
    """``factor``: the standard deviation of the scores; ``mean``: of the values, in an eighth of the channels."""
    query, key, value = (draw(1, 1, length, dim, dtype=HALF) for length in (64, 512, 512))
    value[..., ::8] += mean
    tensors, tile = (query * factor, key, value), Tile(64, 64, 4, 2)
    out, lse = attend(tensors, tile=tile)
    want, want_lse = formula(*tensors)
    ours, scores_alone = error(out, want), error(int8.forward(call_of_arguments(*tensors), tile=tile)[0], want)
    assert scores_alone < ours < most < 0.5 * TritonInt8Fp8AttentionStrategy.relative_error
    assert (lse - want_lse).abs().max() < 0.05 * factor


# The contract: `heedful.testing.verify("triton_int8_pv_fp8")` runs all of it; some of every kind run here

KINDS = ("declaration", "device", "plain", "auto", "coverage")
SOME = {"plain", "dtype-float16", "value-dim-24-of-16", "gqa-padding", "bshd", "padding-and-bias-float32-query-float16",
        "varlen-empty-sequences", "varlen-and-bias", "empty-row-gqa", "softcap-bias-scale", "zero-keys"}  # fmt: skip


def some(check):
    if check.sample is None:
        return check.aspect in KINDS
    return check.sample.name in SOME and check.aspect in ("lse", "garbage", "compile")


PLACE = "cuda" if torch.cuda.is_available() else "cpu"
CHECKS = [pytest.param(check, id=check.id, marks=[] if some(check) else [pytest.mark.slow])
          for check in checks("triton_int8_pv_fp8", devices=(PLACE,)) if not check.slow]  # fmt: skip


def test_the_samples_are_those_of_the_contract():
    assert {param.values[0].sample.name for param in CHECKS if param.values[0].sample is not None} >= SOME


@pytest.mark.parametrize("check", CHECKS)
def test_contract(check):
    report(check)
