"""The forward pass over tensor descriptors, by which a GPU's copy engine (TMA, from Hopper on) fetches the tiles.

One loop, whose tiles are all masked where anything is to mask.

Shapes: B batch, H heads, N kv heads, M queries and N keys of a tile, D head dim, E value dim.
"""

import triton
import triton.language as tl

from heedful.kernels.jit.forward import NUMBERS
from heedful.kernels.jit.loading import store_rows
from heedful.kernels.jit.masking import LN2, LOG2E, band_of, key_tiles, seen_tile, sequence_of, soft_capped


@triton.jit(do_not_specialize=NUMBERS)
def streamed_kernel(
    query, key, value, out, lse, ends_q, ends_k, scale, softcap, stride_query_b, stride_query_h, stride_query_m,
    stride_key_b, stride_key_h, stride_key_n, stride_value_b, stride_value_h, stride_value_n, stride_out_b,
    stride_out_h, stride_out_m, stride_out_e, stride_lse_b, stride_lse_h, sequences, query_length, key_length, heads,
    group, left, left_end, right, right_end, longest_query, SOFTCAP: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
    D0: tl.constexpr, E: tl.constexpr, E0: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head of one sequence, in ``forward_kernel``'s grid. WHOLE: no tile has to be masked.

    Descriptors end where a sequence ends: what lies behind it is 0, not its neighbour's.
    """
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
    last = tl.minimum(first + BLOCK_M, query_length) - 1
    start, _, _, end = key_tiles(first, last, left, right, 0, key_length, 1, HAS_LEFT, HAS_RIGHT, BLOCK_N)

    one = tl.full((), 1, tl.int64)
    token, key_token = one * first_token, one * first_key_token
    key_head = one * (head // group)
    batch, head = one * batch, one * head
    step_query, step_key, step_value = stride_query_m * UNIT, stride_key_n * UNIT, stride_value_n * UNIT
    query += (batch * stride_query_b + head * stride_query_h) * UNIT + token * step_query
    key += (batch * stride_key_b + key_head * stride_key_h) * UNIT + key_token * step_key
    value += (batch * stride_value_b + key_head * stride_value_h) * UNIT + key_token * step_value
    queries_of = tl.make_tensor_descriptor(query, [query_length, D], [step_query, 1], [BLOCK_M, D0])
    longest = tl.maximum(key_length, 1)  # of no rows there is no descriptor; nothing is loaded by it then
    keys_of = tl.make_tensor_descriptor(key, [longest, D], [step_key, 1], [BLOCK_N, D0])
    values_of = tl.make_tensor_descriptor(value, [longest, E], [step_value, 1], [BLOCK_N, E0])

    within = tl.arange(0, BLOCK_M)
    queries = first + within
    block_of_queries = queries_of.load([first, 0])
    acc = tl.zeros((BLOCK_M, E0), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    factor = scale * LOG2E  # scores in units of log2; soft-capped ones in their own until they are weighed
    for at in tl.range(start, end, BLOCK_N):
        scores = tl.dot(block_of_queries, tl.trans(keys_of.load([at, 0])))
        if SOFTCAP:
            scores = soft_capped(scores * scale, softcap)
        if not WHOLE:
            keys = at + tl.arange(0, BLOCK_N)
            seen = seen_tile(queries, keys, keys < key_length, left, right, HAS_LEFT, HAS_RIGHT)
            scores = tl.where(seen, scores, float("-inf"))
        weight = LOG2E if SOFTCAP else factor
        new_top = tl.maximum(top, tl.max(scores, 1) * weight)
        base = new_top
        if not WHOLE:
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores * weight - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        top = new_top
        block_of_values = values_of.load([at, 0])
        acc = tl.dot(weights.to(block_of_values.dtype), block_of_values, acc * shrink[:, None])

    there = queries < query_length
    row = within
    if WIDE:
        row = row.to(tl.int64)
        stride_out_m *= one
    seen_any = total != 0.0  # of NaN, too
    inverse = tl.where(seen_any, 1.0 / tl.where(seen_any, total, 1.0), 0.0)
    to = out + (batch * stride_out_b + head * stride_out_h + (token + first) * stride_out_m) * UNIT
    store_rows(to, acc * inverse[:, None], row, stride_out_m * UNIT, stride_out_e, there, 0, E0, E, WIDE)
    if lse is not None:
        logarithm = (top + tl.log2(tl.where(seen_any, total, 1.0))) * LN2
        to = lse + batch * stride_lse_b + head * stride_lse_h + token + first
        tl.store(to + within, tl.where(seen_any, logarithm, float("-inf")), mask=there)
