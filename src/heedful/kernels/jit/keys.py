"""The gradients of keys and values, tile by tile: a program has a block of keys, and goes through what sees it.

Shapes: B batch, H heads, N kv heads, M queries and N keys of a tile, D head dim, E value dim; each dim in two parts.
"""

import triton
import triton.language as tl

from heedful.kernels.jit.backward import NUMBERS, numbers_of, weights_of
from heedful.kernels.jit.loading import load_rows, store_rows
from heedful.kernels.jit.masking import LOG2E, band_of, key_bounds, key_tiles, seen_tile, sequence_of


@triton.jit
def to_keys(
    dkey0, dkey1, dvalue0, dvalue1, key0, key1, value0, value1, query, dout, lse, rest, delta, dense, bias, start, end,
    gap, gap_size, group, query_length, left, right, keys, rows, scale, softcap, stride_query_h, stride_query_m,
    stride_query_d, stride_dout_h, stride_dout_m, stride_dout_e, stride_lse_h, stride_dense_h, stride_dense_m,
    stride_dense_n, stride_bias_h, stride_bias_m, stride_bias_n, BOUNDED: tl.constexpr, GUARDED: tl.constexpr,
    GROUPED: tl.constexpr, NATURAL: tl.constexpr, SOFTCAP: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, BLOCK_M: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Add to the gradients of keys and values what the queries from ``start`` on contribute, ``gap_size`` left out.

    BOUNDED where there may be fewer queries, or bands that hide keys from some; the gap, which begins at ``gap``, is
    there alone. Tiles are keys by queries. GROUPED: all heads of a group, one behind the other; a loop around this one
    costs a hundred registers.
    """
    within = tl.arange(0, BLOCK_M)
    columns = within
    if WIDE:
        columns = columns.to(tl.int64)
    one = tl.full((), 1, tl.int64)
    MASKED: tl.constexpr = BOUNDED or GUARDED
    tiles = tl.cdiv(end - gap_size - start, BLOCK_M)
    for place in tl.range(0, tiles * group):
        head = 0
        tile = place
        if GROUPED:
            head = place // tiles
            tile = place - head * tiles
        first = start + tile * BLOCK_M
        if BOUNDED:
            first += tl.where(first < gap, 0, gap_size)
        queries = first + within
        there = queries < query_length
        at = head * one * stride_lse_h + first
        number, lost, sums, alive = numbers_of(lse, rest, delta, at + within, there, NATURAL, BOUNDED, GUARDED)
        at = query + head * one * stride_query_h + first * one * stride_query_m
        query0 = load_rows(at, columns, stride_query_m, stride_query_d, alive, 0, D0, D, MASKED, WIDE)
        scores = tl.dot(key0, tl.trans(query0), input_precision="ieee")
        if D1 > 0:
            query1 = load_rows(at, columns, stride_query_m, stride_query_d, alive, D0, D1, D, MASKED, WIDE)
            scores = tl.dot(key1, tl.trans(query1), scores, input_precision="ieee")
        at_dense, at_bias = dense, bias
        if dense is not None:
            at_dense = dense + head * one * stride_dense_h + first * one * stride_dense_m
        if bias is not None:
            at_bias = bias + head * one * stride_bias_h + first * one * stride_bias_m
        weights, slope = weights_of(
            scores, number[None, :], lost[None, :], at_dense, at_bias, rows, columns, there, scale, softcap,
            stride_dense_n, stride_dense_m, stride_bias_n, stride_bias_m, NATURAL, SOFTCAP, True, True, BOUNDED,
        )  # fmt: skip
        if BOUNDED and (HAS_LEFT or HAS_RIGHT):
            seen = seen_tile(keys, queries, there, right, left, HAS_RIGHT, HAS_LEFT)
            weights = tl.where(seen, weights, 0.0)
        at = dout + head * one * stride_dout_h + first * one * stride_dout_m
        dout0 = load_rows(at, columns, stride_dout_m, stride_dout_e, alive, 0, E0, E, MASKED, WIDE)
        rounded = weights.to(dout0.dtype)
        dvalue0 = tl.dot(rounded, dout0, dvalue0, input_precision="ieee")
        change = tl.dot(value0, tl.trans(dout0), input_precision="ieee")
        if E1 > 0:
            dout1 = load_rows(at, columns, stride_dout_m, stride_dout_e, alive, E0, E1, E, MASKED, WIDE)
            dvalue1 = tl.dot(rounded, dout1, dvalue1, input_precision="ieee")
            change = tl.dot(value1, tl.trans(dout1), change, input_precision="ieee")
        change = weights * (change - sums[None, :])
        if SOFTCAP:
            change = change * slope
        change = change.to(query0.dtype)
        dkey0 = tl.dot(change, query0, dkey0, input_precision="ieee")
        if D1 > 0:
            dkey1 = tl.dot(change, query1, dkey1, input_precision="ieee")
    return dkey0, dkey1, dvalue0, dvalue1


@triton.jit(do_not_specialize=NUMBERS)
def keys_kernel(
    query, key, value, dout, dkey, dvalue, lse, rest, delta, dense, bias, keep, spans, ends_q, ends_k, scale, softcap,
    stride_query_b, stride_query_h, stride_query_m, stride_query_d, stride_key_b, stride_key_h, stride_key_n,
    stride_key_d, stride_value_b, stride_value_h, stride_value_n, stride_value_e, stride_dout_b, stride_dout_h,
    stride_dout_m, stride_dout_e, stride_dkey_b, stride_dkey_h, stride_dkey_n, stride_dkey_d, stride_dvalue_b,
    stride_dvalue_h, stride_dvalue_n, stride_dvalue_e, stride_lse_b, stride_lse_h, stride_dense_b, stride_dense_h,
    stride_dense_m, stride_dense_n, stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n, stride_keep_b,
    stride_keep_n, sequences, query_length, key_length, heads, group, left, left_end, right, right_end, longest_key,
    SIGN: tl.constexpr, SOFTCAP: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, GUARDED: tl.constexpr,
    GROUPED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The gradients of one block of keys and values of one kv head of one sequence, summed over its group's heads.

    The grid is flat: blocks, kv heads, sequences, batch.
    """
    stride_query_h *= UNIT
    stride_query_m *= UNIT
    stride_dout_h *= UNIT
    stride_dout_m *= UNIT
    blocks = tl.cdiv(longest_key, BLOCK_N)
    kv_heads = heads // group
    place = tl.program_id(0)
    block = place % blocks
    key_head = (place // blocks) % kv_heads
    sequence = (place // blocks // kv_heads) % sequences
    batch = place // blocks // kv_heads // sequences

    first_token, query_length = sequence_of(ends_q, sequence, query_length)
    first_key_token, key_length = sequence_of(ends_k, sequence, key_length)
    first = block * BLOCK_N
    if first >= key_length:
        return
    left, right = band_of(query_length, key_length, left, left_end, right, right_end)
    low, high, _ = key_bounds(spans, batch, key_length)
    last = tl.minimum(first + BLOCK_N, key_length) - 1
    # A band seen from the keys: which queries see them.
    start, whole_start, whole_end, end = key_tiles(
        first, last, right, left, 0, query_length, 1, HAS_RIGHT, HAS_LEFT, BLOCK_M
    )

    # Keys behind the last are computed as copies of it, and not stored.
    within = tl.arange(0, BLOCK_N)
    keys = first + within
    there = keys < key_length
    row = tl.minimum(within, last - first)
    if WIDE:
        row = row.to(tl.int64)
    one = tl.full((), 1, tl.int64)
    token, key_token = one * first_token, one * (first_key_token + first)
    first_head = one * key_head * group
    batch, key_head = one * batch, one * key_head
    inside = there & (keys >= low) & (keys < high)
    if keep is not None:
        at = keep + batch * stride_keep_b + key_token * stride_keep_n
        inside = inside & (tl.load(at + row * stride_keep_n) != 0)
        end = tl.where(tl.max(inside.to(tl.int32), 0) > 0, end, start)
        whole_start, whole_end = tl.minimum(whole_start, end), tl.minimum(whole_end, end)

    key += (batch * stride_key_b + key_head * stride_key_h + key_token * stride_key_n) * UNIT
    value += (batch * stride_value_b + key_head * stride_value_h + key_token * stride_value_n) * UNIT
    row_key, row_value = stride_key_n * UNIT, stride_value_n * UNIT
    key0 = load_rows(key, row, row_key, stride_key_d, inside, 0, D0, D, True, WIDE)
    key1 = key0
    if D1 > 0:
        key1 = load_rows(key, row, row_key, stride_key_d, inside, D0, D1, D, True, WIDE)
    if SIGN != 1:
        key0 = (key0 * SIGN).to(key.dtype.element_ty)
        key1 = (key1 * SIGN).to(key.dtype.element_ty)
    value0 = load_rows(value, row, row_value, stride_value_e, inside, 0, E0, E, True, WIDE)
    value1 = value0
    if E1 > 0:
        value1 = load_rows(value, row, row_value, stride_value_e, inside, E0, E1, E, True, WIDE)

    dkey0 = tl.zeros((BLOCK_N, D0), tl.float32)
    dkey1 = tl.zeros((BLOCK_N, D1 if D1 > 0 else 16), tl.float32)
    dvalue0 = tl.zeros((BLOCK_N, E0), tl.float32)
    dvalue1 = tl.zeros((BLOCK_N, E1 if E1 > 0 else 16), tl.float32)
    NATURAL: tl.constexpr = SOFTCAP or bias is not None
    factor = scale
    if not NATURAL:
        factor = scale * LOG2E
    head = one * first_head
    query += batch * stride_query_b * UNIT + head * stride_query_h + token * stride_query_m
    dout += batch * stride_dout_b * UNIT + head * stride_dout_h + token * stride_dout_m
    at = batch * stride_lse_b + head * stride_lse_h + token
    lse += at
    delta += at
    if rest is not None:
        rest += at
    if dense is not None:
        dense += batch * stride_dense_b + head * stride_dense_h
        dense += token * stride_dense_m + key_token * stride_dense_n
    if bias is not None:
        bias += batch * stride_bias_b + head * stride_bias_h
        bias += token * stride_bias_m + key_token * stride_bias_n
    dkey0, dkey1, dvalue0, dvalue1 = to_keys(
        dkey0, dkey1, dvalue0, dvalue1, key0, key1, value0, value1, query, dout, lse, rest, delta, dense, bias, start,
        end, whole_start, whole_end - whole_start, group, query_length, left, right, keys, row, factor, softcap,
        stride_query_h, stride_query_m, stride_query_d, stride_dout_h, stride_dout_m, stride_dout_e, stride_lse_h,
        stride_dense_h, stride_dense_m, stride_dense_n, stride_bias_h, stride_bias_m, stride_bias_n, True, GUARDED,
        GROUPED, NATURAL, SOFTCAP, HAS_LEFT, HAS_RIGHT, BLOCK_M, D, D0, D1, E, E0, E1, WIDE,
    )  # fmt: skip
    dkey0, dkey1, dvalue0, dvalue1 = to_keys(
        dkey0, dkey1, dvalue0, dvalue1, key0, key1, value0, value1, query, dout, lse, rest, delta, dense, bias,
        whole_start, whole_end, 0, 0, group, query_length, left, right, keys, row, factor, softcap,
        stride_query_h, stride_query_m, stride_query_d, stride_dout_h, stride_dout_m, stride_dout_e, stride_lse_h,
        stride_dense_h, stride_dense_m, stride_dense_n, stride_bias_h, stride_bias_m, stride_bias_n, False, GUARDED,
        GROUPED, NATURAL, SOFTCAP, HAS_LEFT, HAS_RIGHT, BLOCK_M, D, D0, D1, E, E0, E1, WIDE,
    )  # fmt: skip

    factor = scale * SIGN
    dkey += (batch * stride_dkey_b + key_head * stride_dkey_h + key_token * stride_dkey_n) * UNIT
    dvalue += (batch * stride_dvalue_b + key_head * stride_dvalue_h + key_token * stride_dvalue_n) * UNIT
    row_key, row_value = stride_dkey_n * UNIT, stride_dvalue_n * UNIT
    dkey0, dkey1 = dkey0 * factor, dkey1 * factor
    if keep is not None:
        hidden = ~inside[:, None]
        dkey0, dkey1 = tl.where(hidden, 0.0, dkey0), tl.where(hidden, 0.0, dkey1)
        dvalue0, dvalue1 = tl.where(hidden, 0.0, dvalue0), tl.where(hidden, 0.0, dvalue1)
    store_rows(dkey, dkey0, row, row_key, stride_dkey_d, there, 0, D0, D, WIDE)
    store_rows(dvalue, dvalue0, row, row_value, stride_dvalue_e, there, 0, E0, E, WIDE)
    if D1 > 0:
        store_rows(dkey, dkey1, row, row_key, stride_dkey_d, there, D0, D1, D, WIDE)
    if E1 > 0:
        store_rows(dvalue, dvalue1, row, row_value, stride_dvalue_e, there, E0, E1, E, WIDE)
