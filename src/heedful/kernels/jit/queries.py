"""The gradient of the queries, tile by tile: a program has a block of queries and goes through the keys that it sees.

Shapes: B batch, H heads, N kv heads, M queries and N keys of a tile, D head dim, E value dim; each dim in two parts.
"""

import triton
import triton.language as tl

from heedful.kernels.jit.backward import NUMBERS, numbers_of, weights_of
from heedful.kernels.jit.loading import load_rows, store_rows
from heedful.kernels.jit.masking import LOG2E, band_of, key_bounds, key_tiles, seen_tile, sequence_of


@triton.jit
def to_queries(
    acc0, acc1, query0, query1, dout0, dout1, number, lost, sums, key, value, dense, bias, keep, start, end, low, high,
    left, right, queries, rows, scale, softcap, stride_key_n, stride_key_d, stride_value_n, stride_value_e,
    stride_dense_m, stride_dense_n, stride_bias_m, stride_bias_n, stride_keep_n, BOUNDED: tl.constexpr,
    NATURAL: tl.constexpr, SOFTCAP: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    DENSE_PER_QUERY: tl.constexpr, BIAS_PER_QUERY: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Add to the queries' gradient what the keys from ``start`` to ``end`` contribute, without the scale."""
    columns = tl.arange(0, BLOCK_N)
    if WIDE:
        columns = columns.to(tl.int64)
    one = tl.full((), 1, tl.int64)
    # Pointers go on by a tile: counted from the start each time they cost registers.
    key += start * one * stride_key_n
    value += start * one * stride_value_n
    if dense is not None:
        dense += start * one * stride_dense_n
    if bias is not None:
        bias += start * one * stride_bias_n
    if keep is not None:
        keep += start * one * stride_keep_n
    for first in tl.range(start, end, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        inside = (keys >= low) & (keys < high)
        key0 = load_rows(key, columns, stride_key_n, stride_key_d, inside, 0, D0, D, BOUNDED, WIDE)
        scores = tl.dot(query0, tl.trans(key0), input_precision="ieee")
        if D1 > 0:
            key1 = load_rows(key, columns, stride_key_n, stride_key_d, inside, D0, D1, D, BOUNDED, WIDE)
            scores = tl.dot(query1, tl.trans(key1), scores, input_precision="ieee")
        weights, slope = weights_of(
            scores, number[:, None], lost[:, None], dense, bias, rows, columns, inside, scale, softcap,
            stride_dense_m, stride_dense_n, stride_bias_m, stride_bias_n, NATURAL, SOFTCAP, DENSE_PER_QUERY,
            BIAS_PER_QUERY, BOUNDED,
        )  # fmt: skip
        if BOUNDED:
            if keep is not None:  # not for the loads: they would wait for it, in registers
                inside = inside & (tl.load(keep + columns * stride_keep_n, mask=inside, other=0) != 0)
            seen = seen_tile(queries, keys, inside, left, right, HAS_LEFT, HAS_RIGHT)
            weights = tl.where(seen, weights, 0.0)
        value0 = load_rows(value, columns, stride_value_n, stride_value_e, inside, 0, E0, E, BOUNDED, WIDE)
        change = tl.dot(dout0, tl.trans(value0), input_precision="ieee")
        if E1 > 0:
            value1 = load_rows(value, columns, stride_value_n, stride_value_e, inside, E0, E1, E, BOUNDED, WIDE)
            change = tl.dot(dout1, tl.trans(value1), change, input_precision="ieee")
        change = weights * (change - sums[:, None])
        if SOFTCAP:
            change = change * slope
        change = change.to(key0.dtype)
        acc0 = tl.dot(change, key0, acc0, input_precision="ieee")
        if D1 > 0:
            acc1 = tl.dot(change, key1, acc1, input_precision="ieee")
        key += BLOCK_N * one * stride_key_n
        value += BLOCK_N * one * stride_value_n
        if dense is not None:
            dense += BLOCK_N * one * stride_dense_n
        if bias is not None:
            bias += BLOCK_N * one * stride_bias_n
        if keep is not None:
            keep += BLOCK_N * one * stride_keep_n
    return acc0, acc1


@triton.jit(do_not_specialize=NUMBERS)
def queries_kernel(
    query, key, value, dout, dquery, lse, rest, delta, dense, bias, keep, spans, ends_q, ends_k, scale, softcap,
    stride_query_b, stride_query_h, stride_query_m, stride_query_d, stride_key_b, stride_key_h, stride_key_n,
    stride_key_d, stride_value_b, stride_value_h, stride_value_n, stride_value_e, stride_dout_b, stride_dout_h,
    stride_dout_m, stride_dout_e, stride_dquery_b, stride_dquery_h, stride_dquery_m, stride_dquery_d, stride_lse_b,
    stride_lse_h, stride_dense_b, stride_dense_h, stride_dense_m, stride_dense_n, stride_bias_b, stride_bias_h,
    stride_bias_m, stride_bias_n, stride_keep_b, stride_keep_n, sequences, query_length, key_length, heads, group, left,
    left_end, right, right_end, longest_query, SIGN: tl.constexpr, SOFTCAP: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, GUARDED: tl.constexpr, DENSE_PER_QUERY: tl.constexpr, BIAS_PER_QUERY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E: tl.constexpr,
    E0: tl.constexpr, E1: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of queries of one head of one sequence. The grid is the forward kernel's."""
    stride_key_n *= UNIT
    stride_value_n *= UNIT
    blocks = tl.cdiv(longest_query, BLOCK_M)
    place = tl.program_id(0)
    block = place % blocks
    if HAS_RIGHT:
        block = blocks - 1 - block  # those with most keys first
    head = (place // blocks) % heads
    sequence = (place // blocks // heads) % sequences
    batch = place // blocks // heads // sequences

    first_token, query_length = sequence_of(ends_q, sequence, query_length)
    first_key_token, key_length = sequence_of(ends_k, sequence, key_length)
    first = block * BLOCK_M
    if first >= query_length:
        return
    left, right = band_of(query_length, key_length, left, left_end, right, right_end)
    low, high, whole = key_bounds(spans, batch, key_length)
    if keep is not None:
        if spans is None:
            whole = 0
    last = tl.minimum(first + BLOCK_M, query_length) - 1
    start, whole_start, whole_end, end = key_tiles(
        first, last, left, right, low, high, whole, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )

    # Rows behind the last are computed as copies of it, and not stored.
    within = tl.arange(0, BLOCK_M)
    queries = first + within
    there = queries < query_length
    row = tl.minimum(within, last - first)
    if WIDE:
        row = row.to(tl.int64)
    one = tl.full((), 1, tl.int64)
    token, key_token = one * (first_token + first), one * first_key_token
    key_head = one * (head // group)
    batch, head = one * batch, one * head
    NATURAL: tl.constexpr = SOFTCAP or bias is not None

    at = batch * stride_lse_b + head * stride_lse_h + token + within
    number, lost, sums, alive = numbers_of(lse, rest, delta, at, there, NATURAL, True, GUARDED)
    query += (batch * stride_query_b + head * stride_query_h + token * stride_query_m) * UNIT
    dout += (batch * stride_dout_b + head * stride_dout_h + token * stride_dout_m) * UNIT
    row_query, row_dout = stride_query_m * UNIT, stride_dout_m * UNIT
    query0 = load_rows(query, row, row_query, stride_query_d, alive, 0, D0, D, GUARDED, WIDE)
    query1 = query0
    if D1 > 0:
        query1 = load_rows(query, row, row_query, stride_query_d, alive, D0, D1, D, GUARDED, WIDE)
    if SIGN != 1:
        query0 = (query0 * SIGN).to(query.dtype.element_ty)
        query1 = (query1 * SIGN).to(query.dtype.element_ty)
    dout0 = load_rows(dout, row, row_dout, stride_dout_e, alive, 0, E0, E, GUARDED, WIDE)
    dout1 = dout0
    if E1 > 0:
        dout1 = load_rows(dout, row, row_dout, stride_dout_e, alive, E0, E1, E, GUARDED, WIDE)

    key += (batch * stride_key_b + key_head * stride_key_h) * UNIT + key_token * stride_key_n
    value += (batch * stride_value_b + key_head * stride_value_h) * UNIT + key_token * stride_value_n
    if dense is not None:
        dense += batch * stride_dense_b + head * stride_dense_h
        dense += token * stride_dense_m + key_token * stride_dense_n
    if bias is not None:
        bias += batch * stride_bias_b + head * stride_bias_h
        bias += token * stride_bias_m + key_token * stride_bias_n
    if keep is not None:
        keep += batch * stride_keep_b + key_token * stride_keep_n
    if GUARDED:
        end = tl.where(tl.max(alive.to(tl.int32), 0) > 0, end, start)
        whole_start, whole_end = tl.minimum(whole_start, end), tl.minimum(whole_end, end)

    acc0 = tl.zeros((BLOCK_M, D0), tl.float32)
    acc1 = tl.zeros((BLOCK_M, D1 if D1 > 0 else 16), tl.float32)
    factor = scale
    if not NATURAL:
        factor = scale * LOG2E
    if HAS_LEFT or keep is not None:
        acc0, acc1 = to_queries(
            acc0, acc1, query0, query1, dout0, dout1, number, lost, sums, key, value, dense, bias, keep, start,
            tl.minimum(whole_start, end), low, high, left, right, queries, row, factor, softcap, stride_key_n,
            stride_key_d, stride_value_n, stride_value_e, stride_dense_m, stride_dense_n, stride_bias_m, stride_bias_n,
            stride_keep_n, True, NATURAL, SOFTCAP, HAS_LEFT, HAS_RIGHT, DENSE_PER_QUERY, BIAS_PER_QUERY, BLOCK_N, D, D0,
            D1, E, E0, E1, WIDE,
        )  # fmt: skip
    acc0, acc1 = to_queries(
        acc0, acc1, query0, query1, dout0, dout1, number, lost, sums, key, value, dense, bias, keep, whole_start,
        whole_end, low, high, left, right, queries, row, factor, softcap, stride_key_n, stride_key_d, stride_value_n,
        stride_value_e, stride_dense_m, stride_dense_n, stride_bias_m, stride_bias_n, stride_keep_n, False, NATURAL,
        SOFTCAP, HAS_LEFT, HAS_RIGHT, DENSE_PER_QUERY, BIAS_PER_QUERY, BLOCK_N, D, D0, D1, E, E0, E1, WIDE,
    )  # fmt: skip
    acc0, acc1 = to_queries(
        acc0, acc1, query0, query1, dout0, dout1, number, lost, sums, key, value, dense, bias, keep, whole_end,
        end, low, high, left, right, queries, row, factor, softcap, stride_key_n, stride_key_d, stride_value_n,
        stride_value_e, stride_dense_m, stride_dense_n, stride_bias_m, stride_bias_n, stride_keep_n, True, NATURAL,
        SOFTCAP, HAS_LEFT, HAS_RIGHT, DENSE_PER_QUERY, BIAS_PER_QUERY, BLOCK_N, D, D0, D1, E, E0, E1, WIDE,
    )  # fmt: skip

    factor = scale * SIGN
    dquery += (batch * stride_dquery_b + head * stride_dquery_h + token * stride_dquery_m) * UNIT
    row_dquery = stride_dquery_m * UNIT
    acc0 = tl.where(alive[:, None], acc0 * factor, 0.0)
    store_rows(dquery, acc0, row, row_dquery, stride_dquery_d, there, 0, D0, D, WIDE)
    if D1 > 0:
        acc1 = tl.where(alive[:, None], acc1 * factor, 0.0)
        store_rows(dquery, acc1, row, row_dquery, stride_dquery_d, there, D0, D1, D, WIDE)
