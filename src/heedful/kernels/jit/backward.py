"""What the passes backward share: sums of out * dout, and weights made again from the forward pass's LSE.

Weights are recomputed from the forward pass's LSE. Of a row that sees nothing, neither query nor gradient is read.
Where a bias may be so large that float32 has no digits left in the LSE, ``rest`` holds what it lost.

Shapes: B batch, H heads, N kv heads, M queries and N keys of a tile, D head dim, E value dim; each dim in two parts.
"""

import triton
import triton.language as tl

from heedful.kernels.jit.loading import as_scores, load_mask, load_rows
from heedful.kernels.jit.masking import LOG2E, soft_capped

# They differ from call to call, and no compilation is worth them.
NUMBERS = ["query_length", "key_length", "sequences", "heads", "group", "left", "left_end", "right", "right_end",
           "longest_query", "longest_key", "summed_batch", "summed_heads"]  # fmt: skip


@triton.jit(do_not_specialize=["query_length", "heads"])
def delta_kernel(
    out, dout, lse, delta, stride_out_b, stride_out_h, stride_out_m, stride_out_e, stride_dout_b, stride_dout_h,
    stride_dout_m, stride_dout_e, stride_lse_b, stride_lse_h, query_length, heads, BLOCK_M: tl.constexpr,
    E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The sum of out * dout of each query, float32; 0 for those that see nothing."""
    blocks = tl.cdiv(query_length, BLOCK_M)
    place = tl.program_id(0)
    first = (place % blocks) * BLOCK_M
    one = tl.full((), 1, tl.int64)
    head = one * ((place // blocks) % heads)
    batch = one * (place // blocks // heads)
    within = tl.arange(0, BLOCK_M)
    there = first + within < query_length
    row = within
    if WIDE:
        row = row.to(tl.int64)
    at = batch * stride_lse_b + head * stride_lse_h + first + within
    there = there & (tl.load(lse + at, mask=there, other=float("-inf")) != float("-inf"))
    out += (batch * stride_out_b + head * stride_out_h + one * first * stride_out_m) * UNIT
    dout += (batch * stride_dout_b + head * stride_dout_h + one * first * stride_dout_m) * UNIT
    row_out, row_dout = stride_out_m * UNIT, stride_dout_m * UNIT
    part = load_rows(out, row, row_out, stride_out_e, there, 0, E0, E, True, WIDE).to(tl.float32)
    change = load_rows(dout, row, row_dout, stride_dout_e, there, 0, E0, E, True, WIDE).to(tl.float32)
    total = tl.sum(part * change, 1)
    if E1 > 0:
        part = load_rows(out, row, row_out, stride_out_e, there, E0, E1, E, True, WIDE).to(tl.float32)
        change = load_rows(dout, row, row_dout, stride_dout_e, there, E0, E1, E, True, WIDE).to(tl.float32)
        total += tl.sum(part * change, 1)
    tl.store(delta + at, total, mask=first + within < query_length)


@triton.jit
def numbers_of(lse, rest, delta, at, there, NATURAL: tl.constexpr, BOUNDED: tl.constexpr, GUARDED: tl.constexpr):
    """Of some queries: LSE, what it lost, delta, and which of them see something. The LSE of others is inf.

    Only where BOUNDED may some not be there; only then, or where GUARDED, may some see nothing.
    """
    if BOUNDED:
        number = tl.load(lse + at, mask=there, other=float("-inf"))
        sums = tl.load(delta + at, mask=there, other=0.0)
    else:
        number = tl.load(lse + at)
        sums = tl.load(delta + at)
    alive = there
    if BOUNDED or GUARDED:
        alive = number != float("-inf")
        number = tl.where(alive, number, float("inf"))
    if not NATURAL:
        number = number * LOG2E
    lost = number
    if rest is not None:
        if BOUNDED:
            lost = tl.load(rest + at, mask=there, other=0.0)
        else:
            lost = tl.load(rest + at)
    return number, lost, sums, alive


@triton.jit
def weights_of(
    scores, lse, lost, dense, bias, rows, columns, inside, scale, softcap, stride_dense_r, stride_dense_c,
    stride_bias_r, stride_bias_c, NATURAL: tl.constexpr, SOFTCAP: tl.constexpr, DENSE_PER_ROW: tl.constexpr,
    BIAS_PER_ROW: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Softmax of a tile, from the products of queries and keys, and the soft cap's slope there.

    The tile is queries by keys, or keys by queries; ``lse`` and ``lost`` broadcast to it.
    """
    slope = scores
    if NATURAL:
        scores = scores * scale
        if SOFTCAP:
            scores = soft_capped(scores, softcap)
            slope = 1.0 - (scores / softcap) * (scores / softcap)
        if bias is not None:
            added = load_mask(bias, rows, columns, stride_bias_r, stride_bias_c, inside, BIAS_PER_ROW, BOUNDED)
            scores = scores + as_scores(added) - lse - lost
        else:
            scores = scores - lse
        weights = tl.exp2(scores * LOG2E)
    else:
        weights = tl.exp2(scores * scale - lse)
    if dense is not None:
        shown = load_mask(dense, rows, columns, stride_dense_r, stride_dense_c, inside, DENSE_PER_ROW, BOUNDED)
        weights = tl.where(shown != 0, weights, 0.0)
    return weights, slope
