"""The forward pass with scores in int8 and weights and values in fp8: SageAttention 2's way (arXiv 2411.10958).

Queries and keys as in ``int8``. Values lose their mean over the sequence and become codes in e4m3, each channel with a
scale of its own; weights, at most 1, become codes in steps of 2^-8. The tensor cores of compute capability 8.9 and 9.0
sum such products with some 14 bits, so a tile's sums are made by themselves and added in float32.

Masks, bands, packs, empty rows and the LSE are those of the exact forward pass.

Shapes: B batch, S packed sequences, H heads, N kv heads, Q query length, K key length, E value dim, P value dim made of
parts.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from heedful.kernels import forward as exact
from heedful.kernels import int8
from heedful.kernels.jit import fp8 as jit
from heedful.kernels.operands import Call, Codes, Values, strides_of
from heedful.kernels.tiles import FP8, Tile

_CHUNK = 64  # keys that one program looks at
_CHUNKS = 16  # of which so many at a time are put together


def forward(
    call: Call, *, with_lse: bool = False, tile: Tile | None = None, architecture: str = "", smooth: bool = True
) -> tuple[Tensor, Tensor | None]:
    """See ``int8.forward``. ``smooth=False`` leaves the means of keys and of values where they are."""
    tile = tile or exact.tile_of(call, architecture, FP8)
    quantise = functools.partial(codes_of, smooth=smooth)
    return exact.forward(call, with_lse=with_lse, tile=tile, quantise=quantise)


def codes_of(call: Call, tile: Tile, with_lse: bool = False, *, smooth: bool = True) -> Codes:
    """Queries, keys and values as codes for a tile."""
    seen = int8.seen_of(call, tile)
    codes = int8.codes_among(call, tile, seen, with_lse=with_lse, smooth=smooth)
    return replace(codes, values=values_of(call, tile, seen, smooth=smooth))


def values_of(call: Call, tile: Tile, seen: Tensor | None, *, smooth: bool = True) -> Values:
    """Values as codes for a tile; the keys that are ``seen`` make means and scales, all where it is None."""
    values, room = room_for(call, tile), extremes_for(call)
    chunks, heads = room[0].shape[2], call.key.shape[1]
    options = int8.options_for(call)
    with torch.cuda.device_of(call.value):
        jit.extremes_kernel[(call.sequences * heads * chunks,)](**extremes_arguments(call, seen, *room), **options)
        jit.value_scales_kernel[(call.sequences * heads,)](**scales_arguments(values, *room, smooth=smooth), **options)
        jit.quantise_values_kernel[int8.key_blocks(call, tile)](**values_arguments(call, tile, values, seen), **options)
    return values


def room_for(call: Call, tile: Tile) -> Values:
    """Codes that are still to be computed. Each sequence of a pack may leave most of a block unused."""
    batch, heads, keys, value_dim = call.value.shape
    width = sum(call.parts(value_dim))
    blocks = keys // tile.keys + call.sequences // max(1, batch)
    codes = call.value.new_empty((batch, heads, blocks, width, tile.keys), dtype=torch.float8_e4m3fn)
    scales = call.value.new_empty((call.sequences, heads, width), dtype=torch.float32)
    return Values(codes, scales, torch.empty_like(scales))


def extremes_for(call: Call) -> tuple[Tensor, Tensor]:
    """Room for what ``extremes_kernel`` finds."""
    chunks, width = triton.cdiv(call.longest_key, _CHUNK), sum(call.parts(call.dims[1]))
    counts = call.value.new_empty((call.sequences, call.key.shape[1], chunks), dtype=torch.float32)
    return counts.new_empty((*counts.shape, 3, width)), counts


def extremes_arguments(call: Call, seen: Tensor | None, extremes: Tensor, counts: Tensor) -> dict[str, Any]:
    """The arguments of ``extremes_kernel``."""
    return {"extremes": extremes, "counts": counts, "chunks": counts.shape[2], "CHUNK": _CHUNK,
            **_of_values(call, seen)}  # fmt: skip


def scales_arguments(values: Values, extremes: Tensor, counts: Tensor, *, smooth: bool) -> dict[str, Any]:
    """The arguments of ``value_scales_kernel``."""
    width = values.scales.shape[2]
    return {"extremes": extremes, "counts": counts, "scales": values.scales, "means": values.means,
            "chunks": counts.shape[2], "SMOOTH": smooth, "P": width, "BLOCK": triton.next_power_of_2(width),
            "CHUNKS": _CHUNKS}  # fmt: skip


def values_arguments(call: Call, tile: Tile, values: Values, seen: Tensor | None) -> dict[str, Any]:
    """The arguments of ``quantise_values_kernel``."""
    return {"codes": values.codes, "scales": values.scales, "means": values.means, "longest": call.longest_key,
            "BLOCK_N": tile.keys, **int8.strides_named(values.codes, "codes"), **_of_values(call, seen)}  # fmt: skip


def _of_values(call: Call, seen: Tensor | None) -> dict[str, Any]:
    """What the kernels that read values are given alike."""
    places, (large, small) = call.places(), call.parts(call.dims[1])
    return {"value": call.value, "seen": seen, **strides_of(call.value, "value", "bhne"),
            **int8.strides_named(seen, "seen"), "heads": call.value.shape[1], "E": call.dims[1], "E0": large,
            "E1": small, "WIDE": call.wide,
            **{name: places[name] for name in ("ends_k", "sequences", "key_length")}}  # fmt: skip
