"""Who sees whom, within kernels: where a program's keys begin and end, which tiles are whole, and a tile's mask.

Places count from the start of the sequence: key n is seen by query m where m - left <= n <= m + right, low <= n < high.
Forward and backward share these. A ``whole`` tile is one whose keys are all seen by all of its queries, as far as
bounds, bands and padding tell; only the others pay for a mask.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def sequence_of(ends, sequence, length):
    """Where a sequence starts among the tokens, and its length; the whole without packing (``ends`` None)."""
    if ends is None:
        return 0, length
    else:
        start = tl.load(ends + sequence)
        return start, tl.load(ends + sequence + 1) - start


@triton.jit
def band_of(query_length, key_length, left, left_end, right, right_end):
    """The band of a sequence, both of its sides counted from the start."""
    shift = key_length - query_length
    return tl.minimum(left, left_end - shift), tl.minimum(right, right_end + shift)


@triton.jit
def key_bounds(spans, batch, key_length):
    """The first key and the one behind the last that padding leaves, and whether it leaves all between."""
    if spans is None:
        return 0, key_length, 1
    else:
        at = spans + batch * 3
        return tl.load(at), tl.load(at + 1), tl.load(at + 2)


@triton.jit
def key_tiles(
    first_query,
    last_query,
    left,
    right,
    low,
    high,
    whole,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The keys that queries first..last (included) have to look at: start, whole_start, whole_end, end.

    All but the end are multiples of BLOCK_N; tiles from ``whole_start`` to ``whole_end`` are whole.
    """
    start, end = low, high
    whole_start, whole_end = low, high
    if HAS_LEFT:
        start = tl.maximum(start, first_query - left)
        whole_start = tl.maximum(whole_start, last_query - left)
    if HAS_RIGHT:
        end = tl.minimum(end, last_query + right + 1)
        whole_end = tl.minimum(whole_end, first_query + right + 1)
    start = (start // BLOCK_N) * BLOCK_N
    end = tl.maximum(start, end)
    whole_start = tl.minimum(tl.cdiv(tl.maximum(whole_start, 0), BLOCK_N) * BLOCK_N, tl.cdiv(end, BLOCK_N) * BLOCK_N)
    whole_end = tl.maximum(whole_start, (tl.maximum(whole_end, 0) // BLOCK_N) * BLOCK_N)
    whole_end = tl.where(whole != 0, whole_end, whole_start)
    return start, whole_start, whole_end, end


@triton.jit
def seen_tile(queries, keys, seen_keys, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Bool, (M, N) or (1, N): which keys the queries see by bounds, padding and bands."""
    seen = seen_keys[None, :]
    if HAS_LEFT:
        seen = seen & (keys[None, :] >= queries[:, None] - left)
    if HAS_RIGHT:
        seen = seen & (keys[None, :] <= queries[:, None] + right)
    return seen


@triton.jit
def soft_capped(scores, softcap):
    """softcap * tanh(scores / softcap), to float32's precision also where the quotient is small."""
    x = scores / softcap
    small = x * x
    series = x * (1.0 + small * (-0.33333333 + small * (0.13333333 + small * (-0.05396825 + small * 0.02186949))))
    shrunk = tl.exp2(tl.abs(x) * -2.8853900817779268)  # e^(-2|x|)
    far = (1.0 - shrunk) / (1.0 + shrunk)
    return softcap * tl.where(small < 0.0625, series, tl.where(x < 0, -far, far))
