"""Queries and keys as codes of 8 bits, after SageAttention (arXiv 2410.02367, section 4; arXiv 2411.10958).

A row of queries is codes times its scale, a block of keys codes times the block's: scale = max|x| / 127, code =
round(x / scale). Keys are smoothed first: softmax(q k) is softmax(q (k - mean)), because q mean is the same number for
all keys, and what is left of channels with a large mean has small codes to fill. Only keys that some query sees count
for means and scales: what stands in the others, padding above all, must not take digits from them.

A row or block with a number that is not finite has the scale NaN, and its answers are NaN: no code stands for it.

Shapes: B batch, S packed sequences, H heads, N kv heads, P head dim made of parts; M queries and N keys of a tile.
"""

import triton
import triton.language as tl

from heedful.kernels.jit.loading import load_mask, load_rows, store_rows
from heedful.kernels.jit.masking import band_of, seen_tile, sequence_of

LEAST = tl.constexpr(1e-35)  # of what a scale is made of: the scale is a normal number then, and not 0
NUMBERS = ["query_length", "key_length", "sequences", "heads", "group", "left", "left_end", "right", "right_end",
           "longest", "chunks"]  # fmt: skip


@triton.jit
def place_of(blocks, heads, sequences):
    """A program's block, head, sequence and batch row, and the number of the last two; the last three with 64 bits."""
    place = tl.program_id(0)
    order = place // blocks // heads
    one = tl.full((), 1, tl.int64)
    return place % blocks, (place // blocks) % heads, order % sequences, one * (order // sequences), one * order


@triton.jit
def is_finite(x):
    """Whether they are numbers, neither NaN nor infinite."""
    return tl.abs(x) < float("inf")


@triton.jit
def as_code(x, scale):
    """Rounded quotients; what is not finite has no code, and gets 0."""
    quotient = tl.where(is_finite(x), x, 0.0) / scale
    return (quotient + tl.where(quotient < 0, -0.5, 0.5)).to(tl.int8)


@triton.jit(do_not_specialize=NUMBERS)
def seen_kernel(
    seen, dense, bias, keep, rows, ends_q, ends_k, stride_seen_b, stride_seen_h, stride_dense_b, stride_dense_h,
    stride_dense_m, stride_dense_n, stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n, stride_keep_b,
    stride_keep_n, stride_rows_b, stride_rows_m, sequences, query_length, key_length, heads, group, left, left_end,
    right, right_end, longest, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, DENSE_PER_QUERY: tl.constexpr,
    BIAS_PER_QUERY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Which of a block of keys are seen by some query of the heads that share them."""
    block, key_head, sequence, batch, _ = place_of(tl.cdiv(longest, BLOCK_N), heads // group, sequences)
    first_token, query_length = sequence_of(ends_q, sequence, query_length)
    first_key_token, key_length = sequence_of(ends_k, sequence, key_length)
    left, right = band_of(query_length, key_length, left, left_end, right, right_end)
    first = block * BLOCK_N
    within, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    keys = first + columns
    there = keys < key_length
    one = tl.full((), 1, tl.int64)
    token, key_token = one * first_token, one * first_key_token + first
    if WIDE:
        within, columns = within.to(tl.int64), columns.to(tl.int64)
    inside = there
    if keep is not None:
        kept = keep + batch * stride_keep_b + key_token * stride_keep_n
        inside = inside & (tl.load(kept + columns * stride_keep_n, mask=there, other=0) != 0)
    start, end = tl.maximum(first - right, 0), tl.minimum(first + BLOCK_N + left, query_length)
    if dense is None and bias is None and rows is None:
        inside = inside & (keys >= -left) & (keys < query_length + right) & (end > start)
    else:
        found = tl.zeros((BLOCK_N,), tl.int32)
        for head in tl.range(key_head * group, key_head * group + group):
            for query in tl.range(start, end, BLOCK_M):
                row = tl.minimum(within, query_length - 1 - query)
                queries = query + row
                shown = seen_tile(queries, keys, inside, left, right, HAS_LEFT, HAS_RIGHT)
                if rows is not None:
                    used = tl.load(rows + batch * stride_rows_b + (token + queries) * stride_rows_m) != 0
                    shown = shown & used[:, None]
                if dense is not None:
                    at = dense + batch * stride_dense_b + (one * head) * stride_dense_h
                    at += (token + query) * stride_dense_m + key_token * stride_dense_n
                    marks = load_mask(at, row, columns, stride_dense_m, stride_dense_n, there, DENSE_PER_QUERY, True)
                    shown = shown & (marks != 0)
                if bias is not None:
                    to = bias + batch * stride_bias_b + (one * head) * stride_bias_h
                    to += (token + query) * stride_bias_m + key_token * stride_bias_n
                    added = load_mask(to, row, columns, stride_bias_m, stride_bias_n, there, BIAS_PER_QUERY, True)
                    shown = shown & (added != float("-inf"))
                found = tl.maximum(found, tl.max(shown.to(tl.int32), 0))
        inside = found != 0
    at = seen + batch * stride_seen_b + key_head * stride_seen_h + key_token
    tl.store(at + columns, inside.to(tl.uint8), mask=there)


@triton.jit
def seen_rows(seen, batch, head, token, columns, there, stride_seen_b, stride_seen_h):
    """Of keys that are there, those that are seen; all where nothing is hidden (``seen`` None)."""
    if seen is None:
        return there
    else:
        at = seen + batch * stride_seen_b + head * stride_seen_h + token
        return there & (tl.load(at + columns, mask=there, other=0) != 0)


@triton.jit(do_not_specialize=NUMBERS)
def sums_kernel(
    key, seen, sums, counts, ends_k, stride_key_b, stride_key_h, stride_key_n, stride_key_d, stride_seen_b,
    stride_seen_h, sequences, key_length, heads, chunks, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Sum and number of the keys of a chunk that are seen and finite: (B * S, N, chunks, P) and (B * S, N, chunks)."""
    chunk, head, sequence, batch, order = place_of(chunks, heads, sequences)
    first_token, key_length = sequence_of(ends_k, sequence, key_length)
    one = tl.full((), 1, tl.int64)
    columns = tl.arange(0, BLOCK_N)
    rows = columns
    if WIDE:
        rows = columns.to(tl.int64)
    sum0 = tl.zeros((D0,), tl.float32)
    sum1 = tl.zeros((D1 if D1 > 0 else 16,), tl.float32)
    count = tl.zeros((BLOCK_N,), tl.float32)
    for first in tl.range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, key_length), BLOCK_N):
        token = one * first_token + first
        there = first + columns < key_length
        used = seen_rows(seen, batch, head, token, columns, there, stride_seen_b, stride_seen_h)
        at = key + batch * stride_key_b + head * stride_key_h + token * stride_key_n
        key0 = load_rows(at, rows, stride_key_n, stride_key_d, used, 0, D0, D, True, WIDE).to(tl.float32)
        fine = tl.min(is_finite(key0).to(tl.int32), 1) != 0
        if D1 > 0:
            key1 = load_rows(at, rows, stride_key_n, stride_key_d, used, D0, D1, D, True, WIDE).to(tl.float32)
            fine = fine & (tl.min(is_finite(key1).to(tl.int32), 1) != 0)
            sum1 += tl.sum(tl.where(fine[:, None], key1, 0.0), 0)
        sum0 += tl.sum(tl.where(fine[:, None], key0, 0.0), 0)
        count += (used & fine).to(tl.float32)
    at = (order * heads + head) * chunks + chunk
    tl.store(counts + at, tl.sum(count, 0))
    tl.store(sums + at * (D0 + D1) + tl.arange(0, D0), sum0)
    if D1 > 0:
        tl.store(sums + at * (D0 + D1) + D0 + tl.arange(0, D1), sum1)


@triton.jit(do_not_specialize=NUMBERS)
def quantise_keys_kernel(
    key, codes, scales, means, seen, ends_k, stride_key_b, stride_key_h, stride_key_n, stride_key_d, stride_codes_b,
    stride_codes_h, stride_scales_s, stride_scales_h, stride_seen_b, stride_seen_h, sequences, key_length, heads,
    longest, BLOCK_N: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The codes of a block of keys less their mean, and their scale."""
    block, head, sequence, batch, order = place_of(tl.cdiv(longest, BLOCK_N), heads, sequences)
    first_token, key_length = sequence_of(ends_k, sequence, key_length)
    first = block * BLOCK_N
    if first >= key_length:
        return
    columns = tl.arange(0, BLOCK_N)
    there = first + columns < key_length
    token = tl.full((), 1, tl.int64) * first_token + first
    used = seen_rows(seen, batch, head, token, columns, there, stride_seen_b, stride_seen_h)
    rows = columns
    if WIDE:
        rows = columns.to(tl.int64)
    at = key + batch * stride_key_b + head * stride_key_h + token * stride_key_n
    key0 = load_rows(at, rows, stride_key_n, stride_key_d, used, 0, D0, D, True, WIDE).to(tl.float32)
    key1 = key0
    if D1 > 0:
        key1 = load_rows(at, rows, stride_key_n, stride_key_d, used, D0, D1, D, True, WIDE).to(tl.float32)
    if means is not None:
        means += (order * heads + head) * (D0 + D1)
        key0 = tl.where(used[:, None], key0 - tl.load(means + tl.arange(0, D0))[None, :], 0.0)
        if D1 > 0:
            key1 = tl.where(used[:, None], key1 - tl.load(means + D0 + tl.arange(0, D1))[None, :], 0.0)
    peak = tl.maximum(tl.max(tl.max(tl.where(is_finite(key0), tl.abs(key0), 0.0), 1), 0), LEAST)
    fine = tl.min(tl.min(is_finite(key0).to(tl.int32), 1), 0)
    if D1 > 0:
        peak = tl.maximum(peak, tl.max(tl.max(tl.where(is_finite(key1), tl.abs(key1), 0.0), 1), 0))
        fine = tl.minimum(fine, tl.min(tl.min(is_finite(key1).to(tl.int32), 1), 0))
    scale = peak / 127.0
    at = scales + order * stride_scales_s + head * stride_scales_h + block
    tl.store(at, tl.where(fine != 0, scale, float("nan")))
    at = codes + batch * stride_codes_b + head * stride_codes_h + token * (D0 + D1)
    store_rows(at, as_code(key0, scale), columns, D0 + D1, 1, there, 0, D0, D0 + D1, False)
    if D1 > 0:
        store_rows(at, as_code(key1, scale), columns, D0 + D1, 1, there, D0, D1, D0 + D1, False)


@triton.jit(do_not_specialize=NUMBERS)
def quantise_queries_kernel(
    query, codes, scales, shift, means, rows, ends_q, softmax_scale, stride_query_b, stride_query_h, stride_query_m,
    stride_query_d, stride_codes_b, stride_codes_h, stride_row_b, stride_row_h, stride_rows_b, stride_rows_m,
    sequences, query_length, heads, group, longest, SIGN: tl.constexpr, BLOCK_M: tl.constexpr, D: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The codes of a block of queries, each one's scale, and its product with the keys' mean."""
    block, head, sequence, batch, order = place_of(tl.cdiv(longest, BLOCK_M), heads, sequences)
    first_token, query_length = sequence_of(ends_q, sequence, query_length)
    first = block * BLOCK_M
    if first >= query_length:
        return
    within = tl.arange(0, BLOCK_M)
    there = first + within < query_length
    token = tl.full((), 1, tl.int64) * first_token + first
    used = there
    if rows is not None:
        at = rows + batch * stride_rows_b + token * stride_rows_m
        used = used & (tl.load(at + within * stride_rows_m, mask=there, other=0) != 0)
    row = within
    if WIDE:
        row = within.to(tl.int64)
    at = query + batch * stride_query_b + head * stride_query_h + token * stride_query_m
    query0 = load_rows(at, row, stride_query_m, stride_query_d, used, 0, D0, D, True, WIDE).to(tl.float32) * SIGN
    query1 = query0
    if D1 > 0:
        query1 = load_rows(at, row, stride_query_m, stride_query_d, used, D0, D1, D, True, WIDE).to(tl.float32) * SIGN
    peak = tl.maximum(tl.max(tl.where(is_finite(query0), tl.abs(query0), 0.0), 1), LEAST)
    fine = tl.min(is_finite(query0).to(tl.int32), 1)
    if D1 > 0:
        peak = tl.maximum(peak, tl.max(tl.where(is_finite(query1), tl.abs(query1), 0.0), 1))
        fine = tl.minimum(fine, tl.min(is_finite(query1).to(tl.int32), 1))
    scale = peak / 127.0
    at = batch * stride_row_b + head * stride_row_h + token + within
    tl.store(scales + at, tl.where(fine != 0, scale, float("nan")), mask=there)
    if shift is not None:
        means += (order * (heads // group) + head // group) * (D0 + D1)
        product = tl.sum(query0 * tl.load(means + tl.arange(0, D0))[None, :], 1)
        if D1 > 0:
            product += tl.sum(query1 * tl.load(means + D0 + tl.arange(0, D1))[None, :], 1)
        tl.store(shift + at, product * softmax_scale, mask=there)
    at = codes + batch * stride_codes_b + head * stride_codes_h + token * (D0 + D1)
    store_rows(at, as_code(query0, scale[:, None]), within, D0 + D1, 1, there, 0, D0, D0 + D1, False)
    if D1 > 0:
        store_rows(at, as_code(query1, scale[:, None]), within, D0 + D1, 1, there, D0, D1, D0 + D1, False)
