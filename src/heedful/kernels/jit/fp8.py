"""Values as codes of 8 bits (e4m3), after SageAttention 2 (arXiv 2411.10958): a scale for each channel.

A channel of a sequence's values is codes times its scale, plus its mean: scale = max|v - mean| / 448, over the keys
that some query sees. Weights sum to 1, so what is taken from every value comes back whole, and is rounded neither in
codes nor by weights. A channel with a number that is not finite has the scale NaN.

Codes lie in the order that tensor cores want 8 bits in, the keys of a block side by side: (B, N, blocks, P, block). A
sequence's blocks start at its first token // block + its number, wherever it starts in a pack: the blocks of two never
meet, and all are aligned.

Shapes: B batch, S packed sequences, N kv heads, P value dim made of parts; N keys of a tile.
"""

import triton
import triton.language as tl

from heedful.kernels.jit.int8 import LEAST, NUMBERS, is_finite, place_of, seen_rows
from heedful.kernels.jit.loading import load_rows
from heedful.kernels.jit.masking import sequence_of

SHRUNK = tl.constexpr(2.0**-20)  # values are summed so much smaller, exactly: no sum of finite ones overflows
HIGHEST = tl.constexpr(448.0)
INTERPRETED = tl.constexpr(not isinstance(place_of, triton.runtime.JITFunction))


@triton.jit
def as_e4m3(x):
    """Float32 of at most 448 in e4m3, to the nearest code, ties to even."""
    if INTERPRETED:
        # The interpreter's cast (3.7.1) loses carries into the exponent: 0.498 becomes 0.25. It gets what is a code.
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
        x = tl.where(tl.abs(x) < 0.015625, (x + 24576.0) - 24576.0, bits.to(tl.float32, bitcast=True))
    return x.to(tl.float8e4nv)


@triton.jit
def store_extremes(to, value, used, P: tl.constexpr, START: tl.constexpr, SIZE: tl.constexpr):
    """Sum, lowest and highest of the values' rows that are used."""
    at = to + START + tl.arange(0, SIZE)
    tl.store(at, tl.sum(value * SHRUNK, 0))
    tl.store(at + P, tl.min(tl.where(used[:, None], value, float("inf")), 0))
    tl.store(at + 2 * P, tl.max(tl.where(used[:, None], value, float("-inf")), 0))


@triton.jit(do_not_specialize=NUMBERS)
def extremes_kernel(
    value, seen, extremes, counts, ends_k, stride_value_b, stride_value_h, stride_value_n, stride_value_e,
    stride_seen_b, stride_seen_h, sequences, key_length, heads, chunks, CHUNK: tl.constexpr, E: tl.constexpr,
    E0: tl.constexpr, E1: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Of a chunk of values that are seen, by channel: (B * S, N, chunks, 3, P); and their number (B * S, N, chunks)."""
    chunk, head, sequence, batch, order = place_of(chunks, heads, sequences)
    first_token, key_length = sequence_of(ends_k, sequence, key_length)
    first = chunk * CHUNK
    columns = tl.arange(0, CHUNK)
    rows = columns
    if WIDE:
        rows = columns.to(tl.int64)
    token = tl.full((), 1, tl.int64) * first_token + first
    used = seen_rows(seen, batch, head, token, columns, first + columns < key_length, stride_seen_b, stride_seen_h)
    base = value + batch * stride_value_b + head * stride_value_h + token * stride_value_n
    at = (order * heads + head) * chunks + chunk
    tl.store(counts + at, tl.sum(used.to(tl.float32), 0))
    to = extremes + at * (3 * (E0 + E1))
    part = load_rows(base, rows, stride_value_n, stride_value_e, used, 0, E0, E, True, WIDE).to(tl.float32)
    store_extremes(to, part, used, E0 + E1, 0, E0)
    if E1 > 0:
        part = load_rows(base, rows, stride_value_n, stride_value_e, used, E0, E1, E, True, WIDE).to(tl.float32)
        store_extremes(to, part, used, E0 + E1, E0, E1)


@triton.jit(do_not_specialize=NUMBERS)
def value_scales_kernel(extremes, counts, scales, means, chunks, SMOOTH: tl.constexpr, P: tl.constexpr,
                        BLOCK: tl.constexpr, CHUNKS: tl.constexpr):  # fmt: skip
    """The channels' scales and means of a sequence and kv head, from its chunks: (B * S, N, P)."""
    order = tl.full((), 1, tl.int64) * tl.program_id(0)
    dims = tl.arange(0, BLOCK)
    there = dims < P
    total = tl.zeros((BLOCK,), tl.float32)
    low = tl.full((BLOCK,), float("inf"), tl.float32)
    high = tl.full((BLOCK,), float("-inf"), tl.float32)
    count = tl.zeros((CHUNKS,), tl.float32)
    for first in tl.range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        within = chunk < chunks
        count += tl.load(counts + order * chunks + chunk, mask=within, other=0.0)
        at = extremes + ((order * chunks + chunk) * (3 * P))[:, None] + dims[None, :]
        shown = within[:, None] & there[None, :]
        total += tl.sum(tl.load(at, mask=shown, other=0.0), 0)
        low = tl.minimum(low, tl.min(tl.load(at + P, mask=shown, other=float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.load(at + 2 * P, mask=shown, other=float("-inf")), 0))
    fine = is_finite(total)
    mean = tl.zeros((BLOCK,), tl.float32)
    if SMOOTH:
        mean = tl.where(fine, total, 0.0) / tl.maximum(tl.sum(count, 0), 1.0) / SHRUNK
    peak = tl.maximum(tl.maximum(high - mean, mean - low), LEAST)
    tl.store(scales + order * P + dims, tl.where(fine, peak / HIGHEST, float("nan")), mask=there)
    tl.store(means + order * P + dims, mean, mask=there)


@triton.jit
def store_codes(to, value, used, columns, scales, means, START: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Some channels of a block of values as codes; 0 for those that nothing sees."""
    dims = START + tl.arange(0, SIZE)
    value = tl.where(used[:, None] & is_finite(value), value - tl.load(means + dims)[None, :], 0.0)
    quotient = value / tl.load(scales + dims)[None, :]
    codes = as_e4m3(tl.minimum(tl.maximum(quotient, -HIGHEST), HIGHEST))
    tl.store(to + columns[:, None] + dims[None, :] * BLOCK, codes)


@triton.jit(do_not_specialize=NUMBERS)
def quantise_values_kernel(
    value, codes, scales, means, seen, ends_k, stride_value_b, stride_value_h, stride_value_n, stride_value_e,
    stride_codes_b, stride_codes_h, stride_seen_b, stride_seen_h, sequences, key_length, heads, longest,
    BLOCK_N: tl.constexpr, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The codes of a block of values, keys side by side."""
    block, head, sequence, batch, order = place_of(tl.cdiv(longest, BLOCK_N), heads, sequences)
    first_token, key_length = sequence_of(ends_k, sequence, key_length)
    first = block * BLOCK_N
    if first >= key_length:
        return
    columns = tl.arange(0, BLOCK_N)
    rows = columns
    if WIDE:
        rows = columns.to(tl.int64)
    one = tl.full((), 1, tl.int64)
    token = one * first_token + first
    used = seen_rows(seen, batch, head, token, columns, first + columns < key_length, stride_seen_b, stride_seen_h)
    scales += (order * heads + head) * (E0 + E1)
    means += (order * heads + head) * (E0 + E1)
    place = one * (first_token // BLOCK_N + sequence + block) * ((E0 + E1) * BLOCK_N)
    to = codes + batch * stride_codes_b + head * stride_codes_h + place
    base = value + batch * stride_value_b + head * stride_value_h + token * stride_value_n
    part = load_rows(base, rows, stride_value_n, stride_value_e, used, 0, E0, E, True, WIDE).to(tl.float32)
    store_codes(to, part, used, columns, scales, means, 0, E0, BLOCK_N)
    if E1 > 0:
        part = load_rows(base, rows, stride_value_n, stride_value_e, used, E0, E1, E, True, WIDE).to(tl.float32)
        store_codes(to, part, used, columns, scales, means, E0, E1, BLOCK_N)
