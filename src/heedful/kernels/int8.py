"""The forward pass with scores in int8: SageAttention's way (arXiv 2410.02367), within our own forward kernel.

Keys lose their mean over the sequence, and queries and keys become codes of eight bits: each row of queries has a scale
of its own, each block of keys, a tile's, one. The papers give a block of queries one scale; a row's costs nothing more
here, because the kernel scales rows anyway, and a row of large numbers then spoils none of its neighbours. Weights and
values meet in the values' own dtype, summed in float32: bfloat16 values would have to be cast to float16, where they
may overflow, for an error that is not measurably smaller.

Everything else is the exact forward pass: masks, bands, padding, packs, grouped heads, any head dims. The LSE is that
of the true scores. A query that sees no key gets zeros and -inf. It is a forward pass alone.

Shapes: B batch, S packed sequences, H heads, N kv heads, Q query length, K key length, D head dim, P head dim made of
parts.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from heedful.kernels import forward as exact
from heedful.kernels.jit import int8 as jit
from heedful.kernels.operands import Call, Codes, strides_of
from heedful.kernels.tiles import Tile

LEAST_PART = 32  # what tensor cores multiply at a time in eight bits
_CHUNK, _ROWS = 512, 64  # keys that one program sums, and how many of them at a time


def forward(
    call: Call, *, with_lse: bool = False, tile: Tile | None = None, architecture: str = "", smooth: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Out (B, H, Q, E) and, if wanted, the LSE (B, H, Q), float32, natural logarithm.

    ``tile`` overrides the table's for ``architecture``, which is the device's by default. ``smooth=False`` leaves the
    keys' mean where it is, to see what it does.
    """
    tile = tile or exact.tile_of(call, architecture, 8)
    quantise = functools.partial(codes_of, smooth=smooth)
    return exact.forward(call, with_lse=with_lse, tile=tile, quantise=quantise)


def codes_of(call: Call, tile: Tile, with_lse: bool = False, *, smooth: bool = True) -> Codes:
    """Queries and keys as codes for a tile."""
    return codes_among(call, tile, seen_of(call, tile), with_lse=with_lse, smooth=smooth)


def codes_among(call: Call, tile: Tile, seen: Tensor | None, *, with_lse: bool, smooth: bool) -> Codes:
    """The same, where it is known which keys are ``seen``."""
    means = means_of(call, seen) if smooth else None
    codes = room_for(call, tile, with_shift=smooth and (with_lse or call.softcap is not None))
    options = options_for(call)
    query_blocks = triton.cdiv(call.longest_query, tile.queries) * call.query.shape[1] * call.sequences
    with torch.cuda.device_of(call.query):
        jit.quantise_keys_kernel[key_blocks(call, tile)](**keys_arguments(call, tile, codes, seen, means), **options)
        jit.quantise_queries_kernel[(query_blocks,)](**queries_arguments(call, tile, codes, means), **options)
    return codes


def room_for(call: Call, tile: Tile, *, with_shift: bool) -> Codes:
    """Codes that are still to be computed."""
    width, blocks = sum(call.parts(call.dims[0], LEAST_PART)), triton.cdiv(call.longest_key, tile.keys)
    query = call.query.new_empty((*call.query.shape[:3], width), dtype=torch.int8)
    key = call.key.new_empty((*call.key.shape[:3], width), dtype=torch.int8)
    query_scales = query.new_empty(query.shape[:3], dtype=torch.float32)
    key_scales = key.new_empty((call.sequences, key.shape[1], blocks), dtype=torch.float32)
    return Codes(query, key, query_scales, key_scales, torch.empty_like(query_scales) if with_shift else None)


def options_for(call: Call) -> dict[str, Any]:
    """How the kernels here are compiled: with enough warps that a block's rows stay in registers."""
    return {"num_warps": 4 if call.dims[0] <= 64 else 8, "enable_fp_fusion": True}


def seen_of(call: Call, tile: Tile) -> Tensor | None:
    """Which keys some query of the heads that share them sees, uint8 (B, N, K); None where it is plain that all are."""
    if not _may_hide_keys(call):
        return None
    seen = call.key.new_empty(call.key.shape[:3], dtype=torch.uint8)
    with torch.cuda.device_of(call.key):
        jit.seen_kernel[key_blocks(call, tile)](**seen_arguments(call, tile, seen), **options_for(call))
    return seen


def seen_arguments(call: Call, tile: Tile, seen: Tensor) -> dict[str, Any]:
    """The arguments of ``seen_kernel``."""
    return {"seen": seen, "longest": call.longest_key, **strides_named(seen, "seen"), **call.masks(), **call.places(),
            "BLOCK_M": min(tile.queries, 64), "BLOCK_N": tile.keys, "WIDE": call.wide}  # fmt: skip


def _may_hide_keys(call: Call) -> bool:
    """Whether a key may be there that no query sees."""
    if any(mask is not None for mask in (call.dense, call.bias, call.keep, call.rows)):
        return True
    band, (_, _, queries, keys) = call.band, call.sizes
    if call.packing is not None:
        return band.has_left or band.has_right or call.packing.ends_k is not call.packing.ends_q
    left, right = min(band.left, band.left_end + queries - keys), min(band.right, band.right_end + keys - queries)
    return left < 0 or queries - 1 + right < keys - 1


def means_of(call: Call, seen: Tensor | None) -> Tensor:
    """The mean of the keys that are seen, of each sequence and kv head: float32 (B * S, N, P)."""
    kv_heads, chunks = call.key.shape[1], triton.cdiv(call.longest_key, _CHUNK)
    sums = call.key.new_empty(
        (call.sequences, kv_heads, chunks, sum(call.parts(call.dims[0], LEAST_PART))), dtype=torch.float32
    )
    counts = sums.new_empty(sums.shape[:3])
    with torch.cuda.device_of(call.key):
        jit.sums_kernel[(call.sequences * kv_heads * chunks,)](
            **sums_arguments(call, seen, sums, counts), **options_for(call)
        )
    return sums.sum(2) / counts.sum(2).clamp(min=1.0).unsqueeze(2)


def sums_arguments(call: Call, seen: Tensor | None, sums: Tensor, counts: Tensor) -> dict[str, Any]:
    """The arguments of ``sums_kernel``."""
    return {"seen": seen, "sums": sums, "counts": counts, "chunks": sums.shape[2], "CHUNK": _CHUNK, "BLOCK_N": _ROWS,
            **_of_keys(call, seen)}  # fmt: skip


def keys_arguments(call: Call, tile: Tile, codes: Codes, seen: Tensor | None, means: Tensor | None) -> dict[str, Any]:
    """The arguments of ``quantise_keys_kernel``."""
    scales = codes.key_scales
    return {"means": means, "codes": codes.key, "scales": scales, "longest": call.longest_key, "BLOCK_N": tile.keys,
            "stride_scales_s": scales.stride(0), "stride_scales_h": scales.stride(1),
            **strides_named(codes.key, "codes"), **_of_keys(call, seen)}  # fmt: skip


def _of_keys(call: Call, seen: Tensor | None) -> dict[str, Any]:
    """What the kernels that read keys are given alike."""
    places = call.places()
    return {"key": call.key, "seen": seen, **strides_of(call.key, "key", "bhnd"), **strides_named(seen, "seen"),
            "heads": call.key.shape[1], **{name: places[name] for name in ("ends_k", "sequences", "key_length")},
            **_dims(call)}  # fmt: skip


def queries_arguments(call: Call, tile: Tile, codes: Codes, means: Tensor | None) -> dict[str, Any]:
    """The arguments of ``quantise_queries_kernel``."""
    masks, places = call.masks(), call.places()
    return {"query": call.query, "codes": codes.query, "scales": codes.query_scales, "shift": codes.shift,
            "means": means, "softmax_scale": abs(call.scale) or 1.0, "longest": call.longest_query, "SIGN": call.sign,
            "BLOCK_M": tile.queries, **strides_of(call.query, "query", "bhmd"), **strides_named(codes.query, "codes"),
            **strides_named(codes.query_scales, "row"), **_dims(call),
            **{name: masks[name] for name in ("rows", "stride_rows_b", "stride_rows_m")},
            **{name: places[name] for name in ("ends_q", "sequences", "query_length", "heads", "group")}}  # fmt: skip


def key_blocks(call: Call, tile: Tile) -> tuple[int]:
    """The grid of kernels that take a block of keys each."""
    return (triton.cdiv(call.longest_key, tile.keys) * call.key.shape[1] * call.sequences,)


def strides_named(tensor: Tensor | None, name: str) -> dict[str, int]:
    """The strides of a tensor's first two axes."""
    strides = (0, 0) if tensor is None else tensor.stride()[:2]
    return {f"stride_{name}_b": strides[0], f"stride_{name}_h": strides[1]}


def _dims(call: Call) -> dict[str, Any]:
    large, small = call.parts(call.dims[0], LEAST_PART)
    return {"D": call.dims[0], "D0": large, "D1": small, "WIDE": call.wide}
