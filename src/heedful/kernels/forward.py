"""The forward pass: out = softmax(scores) v, tile by tile, and the LSE, in Triton.

fp16, bf16 and fp32 (in full float32: no tf32); products are summed in float32. Head dims of up to 256, in one or two
parts that are powers of two. A query that sees no key gets zeros and an LSE of -inf. NaN before the first
key that padding leaves, or behind the last, does not reach the output; that under a mask or bias does.

Shapes: B batch, H heads, N kv heads, Q query length, K key length, D head dim, E value dim, T packed tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from heedful.errors import InvalidArgument
from heedful.kernels import streamed
from heedful.kernels.jit.forward import forward_kernel, spans_kernel
from heedful.kernels.operands import NO_CODES, Call, Codes, empty_like_query, strides_of, unit_of
from heedful.kernels.tiles import INTERPRETER, Tile, is_sound, tile_for

TWO_STAGES = "give one with two stages or more: on Hopper the code of one is wrong"
_SCANNED = 1024  # keys at a time


def is_interpreted() -> bool:
    """Whether Triton interprets these kernels: it decided so when they were defined."""
    return not isinstance(forward_kernel, triton.runtime.JITFunction)


def forward(
    call: Call,
    *,
    with_lse: bool = False,
    rest: Tensor | None = None,
    tile: Tile | None = None,
    architecture: str = "",
    quantise: Callable[[Call, Tile, bool], Codes] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Out (B, H, Q, E) and, if wanted, the LSE (B, H, Q), float32, natural logarithm.

    ``rest``, of the same form, is filled with what float32 rounds away of the LSE, if there is a bias. ``tile``
    overrides the table's for ``architecture``, which is the device's by default. ``quantise`` gives the codes that
    queries and keys are replaced by, for a call, a tile, and whether the LSE is wanted.
    """
    batch, heads, queries, keys = call.sizes
    out = empty_like_query(call.query, call.dims[1])
    lse = call.query.new_empty((batch, heads, queries), dtype=torch.float32) if with_lse else None
    if 0 in (out.numel(), keys) or (call.packing is not None and not call.packing.tidy):
        out.zero_()
        if lse is not None:
            lse.fill_(-math.inf)
    if 0 in (out.numel(), keys, call.longest_query, call.sequences):
        return out, lse
    spans = spans_of(call)
    if tile is not None and tile.loads and quantise is not None:
        raise InvalidArgument("tile", str(tile), "give one without descriptors: codes are loaded by pointers")
    if tile is None or (tile.loads and not streamed.takes(call)):
        tile = tile_of(call, architecture)
    elif not is_sound(architecture or architecture_of(call.query.device), tile.queries, tile.stages):
        raise InvalidArgument("tile", str(tile), TWO_STAGES)
    codes = None if quantise is None else quantise(call, tile, with_lse)
    programs = triton.cdiv(call.longest_query, tile.queries) * heads * call.sequences
    given = {**arguments(call, out, lse, spans, codes, rest), **constants(call, tile, codes)}
    with torch.cuda.device_of(call.query):
        if tile.loads:
            streamed.launch(programs, streamed.arguments(call, tile, given), options(tile), call.query.device)
        else:
            forward_kernel[(programs,)](**given, **options(tile))
    return out, lse


def options(tile: Tile) -> dict[str, Any]:
    """How the kernel is compiled. Fused multiply-adds are asked for: Triton 3.10 leaves them out by default."""
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}


def arguments(
    call: Call,
    out: Tensor,
    lse: Tensor | None,
    spans: Tensor | None,
    codes: Codes | None = None,
    rest: Tensor | None = None,
) -> dict[str, Any]:
    """The kernel's arguments by name, tensors, strides and numbers."""
    query, key = (call.query, call.key) if codes is None else (codes.query, codes.key)
    values = None if codes is None else codes.values
    unit = unit_of(call.value, out, query, key) if values is None else unit_of(out, query, key)
    return {
        "UNIT": unit,
        "query": query,
        "key": key,
        "value": call.value if values is None else values.codes,
        "out": out,
        "lse": lse,
        "rest": rest,
        "spans": spans,
        "scale": abs(call.scale) or 1.0,
        "softcap": call.softcap or 1.0,
        "longest_query": call.longest_query,
        **strides_of(query, "query", "bhmd", unit),
        **strides_of(key, "key", "bhnd", unit),
        **strides_of(call.value if values is None else values.codes[:, :, 0], "value", "bhne", unit),
        **strides_of(out, "out", "bhme", unit),
        "stride_lse_b": 0 if lse is None else lse.stride(0),
        "stride_lse_h": 0 if lse is None else lse.stride(1),
        **(NO_CODES if codes is None else codes.scales()),
        **call.masks(),
        **call.places(),
    }


def constants(call: Call, tile: Tile, codes: Codes | None = None) -> dict[str, Any]:
    """The kernel's compile-time arguments that are not part of ``arguments``."""
    value_dim = call.dims[1]
    head_dim = call.dims[0] if codes is None else codes.query.shape[3]
    names = ("D", "D0", "D1", "E", "E0", "E1")
    return {
        "SIGN": call.sign if codes is None else 1,
        "SOFTCAP": call.softcap is not None,
        "BLOCK_M": tile.queries,
        "BLOCK_N": tile.keys,
        "WIDE": call.wide,
        **dict(zip(names, (head_dim, *call.parts(head_dim), value_dim, *call.parts(value_dim)), strict=True)),
    }


def spans_of(call: Call) -> Tensor | None:
    """Where each batch row's kept keys lie, int32 (B, 3); None without padding, and for packs, whose rows hold many."""
    keep = call.keep
    if keep is None or call.packing is not None:
        return None
    spans = keep.new_empty((keep.shape[0], 3), dtype=torch.int32)
    block = min(_SCANNED, triton.next_power_of_2(keep.shape[1]))
    with torch.cuda.device_of(keep):
        launch = spans_kernel[(keep.shape[0],)]
        launch(keep.view(torch.uint8), spans, *keep.stride(), keep.shape[1], BLOCK=block, enable_fp_fusion=True)
    return spans


def tile_of(call: Call, architecture: str = "", bits: int | str = 0) -> Tile:
    """The table's tile for a call on its device, or on another architecture; for other ``bits`` than its dtype's."""
    architecture = architecture or architecture_of(call.query.device)
    return tile_for(architecture, bits or 8 * call.query.element_size(), call.width, call.is_masked)


def architecture_of(device: torch.device) -> str:
    """``sm_90``, ``gfx942``; ``interpreter`` where kernels are interpreted."""
    if is_interpreted():
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"
