"""Tiles of tensors and masks, loaded and stored within kernels by strides.

A base is a pointer to a tile's first element, which took 64 bits to find; offsets within the tile are small.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(
    base,
    rows,
    stride_row,
    stride_dim,
    seen,
    START: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    BOUNDED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """(rows, SIZE): features START and on of some rows; zeros past DIM, and in rows not ``seen`` if BOUNDED."""
    dims = START + tl.arange(0, SIZE)
    if WIDE:
        dims = dims.to(tl.int64)
    pointers = base + rows[:, None] * stride_row + dims[None, :] * stride_dim
    if BOUNDED:
        if START + SIZE > DIM:
            return tl.load(pointers, mask=seen[:, None] & (dims < DIM)[None, :], other=0.0)
        else:
            return tl.load(pointers, mask=seen[:, None], other=0.0)
    else:
        if START + SIZE > DIM:
            return tl.load(pointers, mask=(dims < DIM)[None, :], other=0.0)
        else:
            return tl.load(pointers)


@triton.jit
def store_rows(base, part, rows, stride_row, stride_dim, there, START: tl.constexpr, SIZE: tl.constexpr,
               DIM: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """(rows, SIZE) to features START and on, of the rows that are there."""
    dims = START + tl.arange(0, SIZE)
    if WIDE:
        dims = dims.to(tl.int64)
    pointers = base + rows[:, None] * stride_row + dims[None, :] * stride_dim
    tl.store(pointers, part.to(base.dtype.element_ty), mask=there[:, None] & (dims < DIM)[None, :])


@triton.jit
def load_mask(base, rows, columns, stride_row, stride_column, seen, PER_QUERY: tl.constexpr, BOUNDED: tl.constexpr):
    """(rows, columns) of a mask's tensor, or (1, columns) where it is the same for every query."""
    pointers = base + columns[None, :] * stride_column
    if PER_QUERY:
        pointers += rows[:, None] * stride_row
    if BOUNDED:
        return tl.load(pointers, mask=seen[None, :], other=0)
    else:
        return tl.load(pointers)


@triton.jit
def as_scores(bias):
    """A bias in float32. What is finite stays finite: float64 has numbers that float32 has not."""
    if bias.dtype == tl.float64:
        lowest, highest = -3.4028234663852886e38, 3.4028234663852886e38
        clamped = tl.minimum(tl.maximum(bias, lowest), highest)
        return tl.where(tl.abs(bias) == float("inf"), bias, clamped).to(tl.float32)
    else:
        return bias.to(tl.float32)
