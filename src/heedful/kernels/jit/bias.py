"""The gradient of a bias: of each of its elements, the sum over the heads and batch rows that share it.

A bias that is the same for all queries, or all keys, gets one sum for each block of them; these are added up
afterwards.

Shapes: B batch, H heads, M queries and N keys of a tile, D head dim, E value dim; each dim in two parts.
"""

import triton
import triton.language as tl

from heedful.kernels.jit.backward import NUMBERS, numbers_of, weights_of
from heedful.kernels.jit.loading import load_rows
from heedful.kernels.jit.masking import band_of, key_bounds, seen_tile, sequence_of


@triton.jit(do_not_specialize=NUMBERS)
def bias_kernel(
    query, key, value, dout, dbias, lse, rest, delta, dense, bias, keep, spans, ends_q, ends_k, scale, softcap,
    stride_query_b, stride_query_h, stride_query_m, stride_query_d, stride_key_b, stride_key_h, stride_key_n,
    stride_key_d, stride_value_b, stride_value_h, stride_value_n, stride_value_e, stride_dout_b, stride_dout_h,
    stride_dout_m, stride_dout_e, stride_dbias_b, stride_dbias_h, stride_dbias_m, stride_dbias_n, stride_lse_b,
    stride_lse_h, stride_dense_b, stride_dense_h, stride_dense_m, stride_dense_n, stride_bias_b, stride_bias_h,
    stride_bias_m, stride_bias_n, stride_keep_b, stride_keep_n, sequences, query_length, key_length, heads, group, left,
    left_end, right, right_end, longest_query, longest_key, summed_batch, summed_heads, SIGN: tl.constexpr,
    SOFTCAP: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SUM_M: tl.constexpr, SUM_N: tl.constexpr,
    DENSE_PER_QUERY: tl.constexpr, BIAS_PER_QUERY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    WIDE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One tile of one sequence, summed over ``summed_batch`` rows of the batch and ``summed_heads`` heads.

    The grid is flat: blocks of keys, blocks of queries, the bias's heads, sequences, the bias's batch.
    """
    blocks_n = tl.cdiv(longest_key, BLOCK_N)
    blocks_m = tl.cdiv(longest_query, BLOCK_M)
    own_heads = heads // summed_heads
    place = tl.program_id(0)
    block_n = place % blocks_n
    block_m = (place // blocks_n) % blocks_m
    own_head = (place // blocks_n // blocks_m) % own_heads
    sequence = (place // blocks_n // blocks_m // own_heads) % sequences
    own_batch = place // blocks_n // blocks_m // own_heads // sequences

    first_token, query_length = sequence_of(ends_q, sequence, query_length)
    first_key_token, key_length = sequence_of(ends_k, sequence, key_length)
    first, first_key = block_m * BLOCK_M, block_n * BLOCK_N
    if first >= query_length:
        return
    if first_key >= key_length:
        return
    left, right = band_of(query_length, key_length, left, left_end, right, right_end)
    last, last_key = tl.minimum(first + BLOCK_M, query_length) - 1, tl.minimum(first_key + BLOCK_N, key_length) - 1
    if HAS_RIGHT:
        if first_key > last + right:
            return
    if HAS_LEFT:
        if last_key < first - left:
            return

    queries, keys = first + tl.arange(0, BLOCK_M), first_key + tl.arange(0, BLOCK_N)
    there = queries < query_length
    row, column = tl.minimum(tl.arange(0, BLOCK_M), last - first), tl.arange(0, BLOCK_N)
    if WIDE:
        row, column = row.to(tl.int64), column.to(tl.int64)
    one = tl.full((), 1, tl.int64)
    token, key_token = one * (first_token + first), one * (first_key_token + first_key)
    row_query, row_dout, row_key, row_value = (
        stride_query_m * UNIT, stride_dout_m * UNIT, stride_key_n * UNIT, stride_value_n * UNIT,
    )  # fmt: skip
    NATURAL: tl.constexpr = True
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for number in tl.range(0, summed_batch * summed_heads):
        batch = one * (own_batch * summed_batch + number // summed_heads)
        head = one * (own_head * summed_heads + number % summed_heads)
        key_head = head // group
        low, high, _ = key_bounds(spans, batch, key_length)
        inside = (keys >= low) & (keys < high)
        if keep is not None:
            at = keep + batch * stride_keep_b + key_token * stride_keep_n
            inside = inside & (tl.load(at + column * stride_keep_n, mask=inside, other=0) != 0)
        at = batch * stride_lse_b + head * stride_lse_h + token + tl.arange(0, BLOCK_M)
        natural, lost, sums, alive = numbers_of(lse, rest, delta, at, there, NATURAL, True, True)

        at = query + (batch * stride_query_b + head * stride_query_h + token * stride_query_m) * UNIT
        at_key = key + (batch * stride_key_b + key_head * stride_key_h + key_token * stride_key_n) * UNIT
        query0 = load_rows(at, row, row_query, stride_query_d, alive, 0, D0, D, True, WIDE)
        key0 = load_rows(at_key, column, row_key, stride_key_d, inside, 0, D0, D, True, WIDE)
        scores = tl.dot(query0, tl.trans(key0), input_precision="ieee")
        if D1 > 0:
            query1 = load_rows(at, row, row_query, stride_query_d, alive, D0, D1, D, True, WIDE)
            key1 = load_rows(at_key, column, row_key, stride_key_d, inside, D0, D1, D, True, WIDE)
            scores = tl.dot(query1, tl.trans(key1), scores, input_precision="ieee")
        at_dense = dense
        if dense is not None:
            at_dense = dense + batch * stride_dense_b + head * stride_dense_h
            at_dense += token * stride_dense_m + key_token * stride_dense_n
        at_bias = bias + batch * stride_bias_b + head * stride_bias_h
        at_bias += token * stride_bias_m + key_token * stride_bias_n
        weights, _ = weights_of(
            scores, natural[:, None], lost[:, None], at_dense, at_bias, row, column, inside, scale * SIGN, softcap,
            stride_dense_m, stride_dense_n, stride_bias_m, stride_bias_n, NATURAL, SOFTCAP, DENSE_PER_QUERY,
            BIAS_PER_QUERY, True,
        )  # fmt: skip
        seen = seen_tile(queries, keys, inside, left, right, HAS_LEFT, HAS_RIGHT)
        weights = tl.where(seen, weights, 0.0)

        at = dout + (batch * stride_dout_b + head * stride_dout_h + token * stride_dout_m) * UNIT
        at_value = value + (batch * stride_value_b + key_head * stride_value_h + key_token * stride_value_n) * UNIT
        dout0 = load_rows(at, row, row_dout, stride_dout_e, alive, 0, E0, E, True, WIDE)
        value0 = load_rows(at_value, column, row_value, stride_value_e, inside, 0, E0, E, True, WIDE)
        change = tl.dot(dout0, tl.trans(value0), input_precision="ieee")
        if E1 > 0:
            dout1 = load_rows(at, row, row_dout, stride_dout_e, alive, E0, E1, E, True, WIDE)
            value1 = load_rows(at_value, column, row_value, stride_value_e, inside, E0, E1, E, True, WIDE)
            change = tl.dot(dout1, tl.trans(value1), change, input_precision="ieee")
        total += weights * (change - sums[:, None])

    dbias += one * own_batch * stride_dbias_b + one * own_head * stride_dbias_h
    shape_m: tl.constexpr = 1 if SUM_M else BLOCK_M
    shape_n: tl.constexpr = 1 if SUM_N else BLOCK_N
    if SUM_M:  # the blocks of a pack's sequences, one behind the other
        total = tl.sum(total, 0, keep_dims=True)
        dbias += one * (first_token // BLOCK_M + sequence + block_m) * stride_dbias_m
    else:
        dbias += token * stride_dbias_m
    if SUM_N:
        total = tl.sum(total, 1, keep_dims=True)
        dbias += one * (first_key_token // BLOCK_N + sequence + block_n) * stride_dbias_n
    else:
        dbias += key_token * stride_dbias_n
    rows, columns = one * tl.arange(0, shape_m), one * tl.arange(0, shape_n)
    within = (first + rows < query_length)[:, None] & (first_key + columns < key_length)[None, :]
    pointers = dbias + rows[:, None] * stride_dbias_m + columns[None, :] * stride_dbias_n
    tl.store(pointers, total.to(dbias.dtype.element_ty), mask=within)
