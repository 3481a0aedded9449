"""The forward pass, tile by tile, and what is looked up before it.

Scores are kept in units of log2, with the scale folded in, unless a bias or soft cap comes between (NATURAL): a bias of
float32's lowest number would overflow in them.

Queries and keys may be codes of 8 bits (``jit/int8.py``): their products are summed in int32, and a tile of scores is
scaled by its rows' scales and by the one of its block of keys. ``shift`` is what the smoothing of the keys took from
each row of scores; without a soft cap it matters to the LSE alone. Values may be codes, too (``jit/fp8.py``, FP8):
weights are then made 2^8 times as large, exactly, which keeps small ones above the least code.

Shapes: B batch, H heads, N kv heads, M queries and N keys of a tile, D head dim, E value dim; each dim in two parts.
"""

import triton
import triton.language as tl

from heedful.kernels.jit.fp8 import as_e4m3
from heedful.kernels.jit.loading import as_scores, load_mask, load_rows, store_rows
from heedful.kernels.jit.masking import LN2, LOG2E, band_of, key_bounds, key_tiles, seen_tile, sequence_of, soft_capped

RAISED = tl.constexpr(8.0)  # the power of two that weights in 8 bits are multiplied by
# They differ from call to call, and no compilation is worth them.
NUMBERS = ["query_length", "key_length", "sequences", "heads", "group", "left", "left_end", "right", "right_end",
           "longest_query"]  # fmt: skip


@triton.jit
def attend(
    acc0, acc1, total, top, query0, query1, key, value, dense, bias, keep, start, end, low, high, left, right,
    key_scales, shift,
    queries, rows, scale, softcap, stride_key_n, stride_key_d, stride_value_n, stride_value_e, stride_dense_m,
    stride_dense_n, stride_bias_m, stride_bias_n, stride_keep_n, BOUNDED: tl.constexpr, NATURAL: tl.constexpr,
    SOFTCAP: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, DENSE_PER_QUERY: tl.constexpr,
    BIAS_PER_QUERY: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, WIDE: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Add what the keys from ``start`` to ``end`` contribute; BOUNDED where some may be hidden by their places."""
    within = tl.arange(0, BLOCK_N)
    columns = within
    if WIDE:
        columns = columns.to(tl.int64)
    one = tl.full((), 1, tl.int64)  # what is multiplied by it has 64 bits
    # Pointers to the tile's first key go on by a tile: counted from the start each time they cost registers.
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
            scores = tl.dot(query1, tl.trans(key1), scores, input_precision="ieee", out_dtype=scores.dtype)
        row_factor, factor = scale, scale
        if key_scales is not None:
            row_factor = scale * tl.load(key_scales + first // BLOCK_N)
            row_factor = tl.where(row_factor == 0.0, 1e-37, row_factor)  # an underflow; -inf times 0 is NaN
            factor = row_factor[:, None]
            scores = scores.to(tl.float32)
        if NATURAL:
            scores = scores * factor
            if SOFTCAP:
                if shift is not None:
                    scores = scores + shift[:, None]
                scores = soft_capped(scores, softcap)
            if bias is not None:
                added = load_mask(bias, rows, columns, stride_bias_m, stride_bias_n, inside,
                                  BIAS_PER_QUERY, BOUNDED)  # fmt: skip
                scores = scores + as_scores(added)
        if dense is not None:
            shown = load_mask(dense, rows, columns, stride_dense_m, stride_dense_n, inside,
                              DENSE_PER_QUERY, BOUNDED)  # fmt: skip
            scores = tl.where(shown != 0, scores, float("-inf"))
        if BOUNDED:
            if keep is not None:  # not for the loads: they would wait for it, in registers
                inside = inside & (tl.load(keep + columns * stride_keep_n, mask=inside, other=0) != 0)
            seen = seen_tile(queries, keys, inside, left, right, HAS_LEFT, HAS_RIGHT)
            scores = tl.where(seen, scores, float("-inf"))
        if NATURAL:
            new_top = tl.maximum(top, tl.max(scores, 1))
        else:
            new_top = tl.maximum(top, tl.max(scores, 1) * row_factor)
        base = new_top
        if BOUNDED or dense is not None or bias is not None:
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
        lowered = base
        if FP8:
            lowered = base - (RAISED * LN2 if NATURAL else RAISED)
        if NATURAL:
            weights = tl.exp2((scores - lowered[:, None]) * LOG2E)
            shrink = tl.exp2((top - base) * LOG2E)
        else:
            weights = tl.exp2(scores * factor - lowered[:, None])
            shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        top = new_top
        acc0 = acc0 * shrink[:, None]
        if FP8:
            # A tile's sums are added in float32: tensor cores have fewer bits. Without a number here, which stands for
            # how many terms may be summed so, Triton (3.7.1) folds both sums into one, but for sm_90.
            weights = as_e4m3(weights)
            value0 = load_rows(value, within, 1, BLOCK_N, inside, 0, E0, E0 + E1, False, False)
            acc0 += tl.dot(weights, value0, max_num_imprecise_acc=BLOCK_N)
            if E1 > 0:
                value1 = load_rows(value, within, 1, BLOCK_N, inside, E0, E1, E0 + E1, False, False)
                acc1 = acc1 * shrink[:, None] + tl.dot(weights, value1, max_num_imprecise_acc=BLOCK_N)
        else:
            value0 = load_rows(value, columns, stride_value_n, stride_value_e, inside, 0, E0, E, BOUNDED, WIDE)
            weights = weights.to(value0.dtype)
            acc0 = tl.dot(weights, value0, acc0, input_precision="ieee")
            if E1 > 0:
                value1 = load_rows(value, columns, stride_value_n, stride_value_e, inside, E0, E1, E, BOUNDED, WIDE)
                acc1 = tl.dot(weights, value1, acc1 * shrink[:, None], input_precision="ieee")
        key += BLOCK_N * one * stride_key_n
        value += BLOCK_N * one * stride_value_n
        if dense is not None:
            dense += BLOCK_N * one * stride_dense_n
        if bias is not None:
            bias += BLOCK_N * one * stride_bias_n
        if keep is not None:
            keep += BLOCK_N * one * stride_keep_n
    return acc0, acc1, total, top


@triton.jit
def restored(part, seen, scales, means, START: tl.constexpr, SIZE: tl.constexpr):
    """Means of codes as means of values; zeros in rows that see nothing."""
    dims = START + tl.arange(0, SIZE)
    whole = part * tl.load(scales + dims)[None, :] + tl.load(means + dims)[None, :]
    return tl.where(seen[:, None], whole, 0.0)


@triton.jit(do_not_specialize=NUMBERS)
def forward_kernel(
    query, key, value, out, lse, rest, dense, bias, keep, rows, spans, ends_q, ends_k, scale, softcap, stride_query_b,
    query_scales, key_scales, value_scales, value_means, shift, stride_row_b, stride_row_h, stride_key_scales_s,
    stride_key_scales_h, stride_query_h, stride_query_m, stride_query_d, stride_key_b, stride_key_h, stride_key_n,
    stride_key_d,
    stride_value_b, stride_value_h, stride_value_n, stride_value_e, stride_out_b, stride_out_h, stride_out_m,
    stride_out_e, stride_lse_b, stride_lse_h, stride_dense_b, stride_dense_h, stride_dense_m, stride_dense_n,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n, stride_keep_b, stride_keep_n, stride_rows_b,
    stride_rows_m, sequences, query_length, key_length, heads, group, left, left_end, right, right_end, longest_query,
    SIGN: tl.constexpr, SOFTCAP: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    DENSE_PER_QUERY: tl.constexpr, BIAS_PER_QUERY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    WIDE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head of one sequence. The grid is flat: blocks, heads, sequences, batch."""
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
    step_query, step_key, step_value, step_out = stride_query_m, stride_key_n, stride_value_n, stride_out_m
    if WIDE:
        step_query, step_key, step_value, step_out = one * step_query, one * step_key, one * step_value, one * step_out
    step_query, step_key, step_value, step_out = step_query * UNIT, step_key * UNIT, step_value * UNIT, step_out * UNIT

    at = query + (batch * stride_query_b + head * stride_query_h + token * stride_query_m) * UNIT
    query0 = load_rows(at, row, step_query, stride_query_d, there, 0, D0, D, False, WIDE)
    query1 = query0
    if D1 > 0:
        query1 = load_rows(at, row, step_query, stride_query_d, there, D0, D1, D, False, WIDE)
    if SIGN != 1:
        query0 = (query0 * SIGN).to(query.dtype.element_ty)
        query1 = (query1 * SIGN).to(query.dtype.element_ty)

    key += (batch * stride_key_b + key_head * stride_key_h + key_token * stride_key_n) * UNIT
    FP8: tl.constexpr = value_scales is not None
    if FP8:  # whole blocks, and constants for strides: aligned wherever the sequence starts
        step_value = E0 + E1
        value += one * (first_key_token // BLOCK_N + sequence) * ((E0 + E1) * BLOCK_N)
        value += (batch * stride_value_b + key_head * stride_value_h) * UNIT
    else:
        value += (batch * stride_value_b + key_head * stride_value_h + key_token * stride_value_n) * UNIT
    if dense is not None:
        dense += batch * stride_dense_b + head * stride_dense_h
        dense += token * stride_dense_m + key_token * stride_dense_n
    if bias is not None:
        bias += batch * stride_bias_b + head * stride_bias_h
        bias += token * stride_bias_m + key_token * stride_bias_n
    if keep is not None:
        keep += batch * stride_keep_b + key_token * stride_keep_n
    if rows is not None:
        at = rows + batch * stride_rows_b + token * stride_rows_m
        used = tl.load(at + row * stride_rows_m) != 0
        end = tl.where(tl.max(used.to(tl.int32), 0) > 0, end, start)
        whole_start, whole_end = tl.minimum(whole_start, end), tl.minimum(whole_end, end)

    acc0 = tl.zeros((BLOCK_M, E0), tl.float32)
    acc1 = tl.zeros((BLOCK_M, E1 if E1 > 0 else 16), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    NATURAL: tl.constexpr = SOFTCAP or bias is not None
    factor = scale
    if not NATURAL:
        factor = scale * LOG2E
    if query_scales is not None:
        factor = factor * tl.load(query_scales + batch * stride_row_b + head * stride_row_h + token + row)
        key_scales += one * (place // blocks // heads) * stride_key_scales_s + key_head * stride_key_scales_h
    if shift is not None:
        shift = tl.load(shift + batch * stride_row_b + head * stride_row_h + token + row)
    # Tiles that bands or padding cut at their left ends, whole tiles, and those cut at their right ends.
    for part in tl.static_range(3):
        if part > 0 or HAS_LEFT or keep is not None:
            begin = start if part == 0 else whole_start if part == 1 else whole_end
            finish = tl.minimum(whole_start, end) if part == 0 else whole_end if part == 1 else end
            acc0, acc1, total, top = attend(
                acc0, acc1, total, top, query0, query1, key, value, dense, bias, keep, begin, finish, low, high, left,
                right, key_scales, shift,
                queries, row, factor, softcap, step_key, stride_key_d, step_value, stride_value_e,
                stride_dense_m, stride_dense_n, stride_bias_m, stride_bias_n, stride_keep_n, part != 1, NATURAL,
                SOFTCAP, HAS_LEFT, HAS_RIGHT, DENSE_PER_QUERY, BIAS_PER_QUERY, BLOCK_N, D, D0, D1, E, E0, E1, WIDE, FP8,
            )  # fmt: skip

    seen = total != 0.0  # of NaN, too
    if rows is not None:
        seen = seen & used
    inverse = tl.where(seen, 1.0 / tl.where(seen, total, 1.0), 0.0)
    if FP8:
        total = total * 0.00390625  # 2^-RAISED
        at = (one * (place // blocks // heads) * (heads // group) + key_head) * (E0 + E1)
        acc0 = restored(acc0 * inverse[:, None], seen, value_scales + at, value_means + at, 0, E0)
        if E1 > 0:
            acc1 = restored(acc1 * inverse[:, None], seen, value_scales + at, value_means + at, E0, E1)
        inverse = tl.full((BLOCK_M,), 1.0, tl.float32)
    at = out + (batch * stride_out_b + head * stride_out_h + token * stride_out_m) * UNIT
    store_rows(at, acc0 * inverse[:, None], row, step_out, stride_out_e, there, 0, E0, E, WIDE)
    if E1 > 0:
        store_rows(at, acc1 * inverse[:, None], row, step_out, stride_out_e, there, E0, E1, E, WIDE)
    if lse is not None:
        if NATURAL:
            more = tl.log2(tl.where(seen, total, 1.0)) * LN2
            logarithm = top + more
            if rest is not None:  # what the sum rounds away, for the backward pass: all of ``more`` beside a huge bias
                lost = tl.where(seen, more - (logarithm - top), 0.0)
                tl.store(rest + batch * stride_lse_b + head * stride_lse_h + token + within, lost, mask=there)
        else:
            logarithm = (top + tl.log2(tl.where(seen, total, 1.0))) * LN2
        if shift is not None and not SOFTCAP:
            logarithm = logarithm + shift
        at = lse + batch * stride_lse_b + head * stride_lse_h + token
        tl.store(at + within, tl.where(seen, logarithm, float("-inf")), mask=there)


@triton.jit(do_not_specialize=["key_length"])
def spans_kernel(keep, spans, stride_keep_b, stride_keep_n, key_length, BLOCK: tl.constexpr):
    """Of a batch row: its first kept key, the one behind its last, and whether all between are kept."""
    batch = tl.program_id(0)
    one = tl.full((), 1, tl.int64)
    keep += one * batch * stride_keep_b
    first = tl.full((BLOCK,), 0, tl.int32) + key_length
    last = tl.zeros((BLOCK,), tl.int32)
    count = tl.zeros((BLOCK,), tl.int32)
    for start in tl.range(0, key_length, BLOCK):
        keys = start + tl.arange(0, BLOCK)
        kept = tl.load(keep + keys * (one * stride_keep_n), mask=keys < key_length, other=0) != 0
        first = tl.where(kept, tl.minimum(first, keys), first)
        last = tl.where(kept, keys + 1, last)
        count += kept.to(tl.int32)
    low, high = tl.min(first, 0), tl.max(last, 0)
    low = tl.minimum(low, high)
    at = spans + batch * 3
    tl.store(at, low)
    tl.store(at + 1, high)
    tl.store(at + 2, (tl.sum(count, 0) == high - low).to(tl.int32))
