"""The backward pass: gradients of query, key and value, tile by tile, and that of a bias; deterministic, in Triton.

Three passes over the scores, each of which recomputes them: one for keys and values, summed over the heads that share
them, one for queries, and one for a bias that wants a gradient. No two programs write to one place, nothing is added
atomically. Takes whatever the forward pass takes. A query that sees nothing gets no gradient and gives none, whatever
its own gradient holds.

Memory beyond the gradients: one float32 a query, and a copy of the output's gradient where its rows are not aligned. A
bias's gradient has the bias's own size; where the bias is the same for all queries (or keys), one float32 for each
block of them and each key (or query) instead.

Shapes: B batch, H heads, N kv heads, Q query length, K key length, D head dim, E value dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from heedful.errors import InvalidArgument
from heedful.kernels.candidates import rows_of
from heedful.kernels.choice import by_choice
from heedful.kernels.forward import TWO_STAGES, architecture_of, constants, options, spans_of
from heedful.kernels.jit.backward import delta_kernel
from heedful.kernels.jit.bias import bias_kernel
from heedful.kernels.jit.keys import keys_kernel
from heedful.kernels.jit.queries import queries_kernel
from heedful.kernels.operands import Call, are_aligned, are_wide, strides_of, unit_of
from heedful.kernels.tiles import KEYS, QUERIES, Tile, backward_tiles_for, is_sound
from heedful.strategy import Tuning

_ROWS = 32  # queries at a time, of the sums of out * dout


class Gradients(NamedTuple):
    """Gradients of query (B, H, Q, D), key (B, N, K, D), value (B, N, K, E) and bias; None where none is wanted."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    bias: Tensor | None


class Passes(NamedTuple):
    """The tile of the pass for keys and values, and that of the passes for queries and bias."""

    keys: Tile
    queries: Tile


class Known(NamedTuple):
    """What the forward pass left, and the gradient of its output (B, H, Q, E): LSE and rest are (B, H, Q), float32.

    ``rest`` is None without a bias.
    """

    out: Tensor
    lse: Tensor
    rest: Tensor | None
    dout: Tensor


def backward(
    call: Call,
    known: Known,
    *,
    query: bool = True,
    key: bool = True,
    value: bool = True,
    bias: tuple[int, ...] | None = None,
    tiles: Passes | None = None,
    architecture: str = "",
    tuning: Tuning | None = None,
) -> Gradients:
    """The gradients that are wanted; that of the bias as a tensor of this shape, each of whose sizes is whole or 1.

    ``tiles`` overrides the table's for ``architecture``, which is the device's by default; ``tuning`` has measured
    ones, which go before both. That of a bias goes by the table's.
    """
    wanted = Gradients(
        torch.empty_like(call.query) if query else None,
        torch.empty_like(call.key) if key or value else None,
        torch.empty_like(call.value) if key or value else None,
        None if bias is None or call.bias is None else call.bias.new_zeros(bias),
    )
    if 0 in (*call.sizes, call.longest_query, call.longest_key, call.sequences):
        return Gradients(*(None if one is None else one.zero_() for one in wanted))
    if call.packing is not None and not call.packing.tidy:
        for one in wanted[:3]:
            if one is not None:
                one.zero_()
    if tiles is not None:  # the table's are sound
        _sound(tiles.keys, call, KEYS), _sound(tiles.queries, call)
    tiles = tiles or tiles_of(call, architecture)
    tuning = tuning if call.splits else None
    if call.splits and not are_aligned(known.dout):  # that of a sum has strides of 0
        known = known._replace(dout=known.dout.clone(memory_format=torch.contiguous_format))
    with torch.cuda.device_of(call.query):
        delta = _delta(call, known)
        given = Given(call, known, delta, spans_of(call))
        if wanted.query is not None:
            dquery = wanted.query
            by_choice(
                tuning, QUERIES, lambda tile: _launch(*queries_pass(given, dquery, _sound(tile, call) or tiles.queries))
            )
        if wanted.key is not None and wanted.value is not None:
            both = wanted.key, wanted.value
            by_choice(
                tuning, KEYS, lambda tile: _launch(*keys_pass(given, *both, _sound(tile, call, KEYS) or tiles.keys))
            )
        found = None if wanted.bias is None else _of_bias(given, wanted.bias, tiles.queries)
    return Gradients(wanted.query, wanted.key if key else None, wanted.value if value else None, found)


def _sound(tile: Tile | None, call: Call, role: str = QUERIES) -> Tile | None:
    """The tile. Raises InvalidArgument for one whose machine code is wrong."""
    if tile is not None and not is_sound(architecture_of(call.query.device), rows_of(tile, role), tile.stages):
        raise InvalidArgument("tile", str(tile), TWO_STAGES)
    return tile


class Given(NamedTuple):
    """What every pass reads."""

    call: Call
    known: Known
    delta: Tensor
    spans: Tensor | None


Launch = tuple[Any, int, dict[str, Any], dict[str, Any]]  # kernel, programs, arguments, options


def queries_pass(given: Given, dquery: Tensor, tile: Tile) -> Launch:
    """The launch that writes the queries' gradient."""
    call = given.call
    arguments = _arguments(given, tile, dquery=dquery)
    programs = triton.cdiv(call.longest_query, tile.queries) * call.sizes[1] * call.sequences
    return queries_kernel, programs, arguments, options(tile)


def keys_pass(given: Given, dkey: Tensor, dvalue: Tensor, tile: Tile) -> Launch:
    """The launch that writes the gradients of keys and values."""
    call = given.call
    arguments = _arguments(given, tile, dkey=dkey, dvalue=dvalue)
    programs = triton.cdiv(call.longest_key, tile.keys) * call.key.shape[1] * call.sequences
    return keys_kernel, programs, arguments, options(tile)


def bias_pass(given: Given, sums: Tensor, shape: tuple[int, ...], tile: Tile) -> Launch:
    """The launch that writes a bias's gradient of that shape, or, where it broadcasts, sums of its blocks."""
    call = given.call
    batch, heads, queries, keys = call.sizes
    arguments = _arguments(given, tile) | {
        "dbias": sums,
        **strides_of(sums, "dbias", "bhmn"),
        "summed_batch": batch // shape[0],
        "summed_heads": heads // shape[1],
        "SUM_M": shape[2] < queries,
        "SUM_N": shape[3] < keys,
    }
    blocks = triton.cdiv(call.longest_query, tile.queries) * triton.cdiv(call.longest_key, tile.keys)
    programs = blocks * shape[1] * shape[0] * (call.sequences // batch)
    return bias_kernel, programs, _of_kernel(bias_kernel, arguments), options(tile)


def block_sums(call: Call, shape: tuple[int, ...], tile: Tile) -> tuple[int, ...]:
    """The sizes of what ``bias_pass`` writes: where the bias broadcasts over a length, one for each of its blocks."""
    lengths = []
    for whole, size, block in zip(call.sizes[2:], shape[2:], (tile.queries, tile.keys), strict=True):
        # Each sequence of a pack begins a block of its own.
        lengths.append(size if size == whole else whole // block + call.sequences // call.sizes[0])
    return (*shape[:2], *lengths)


def _of_bias(given: Given, dbias: Tensor, tile: Tile) -> Tensor:
    """The bias's gradient, with zeros where nothing is seen."""
    sizes = block_sums(given.call, (*dbias.shape,), tile)
    whole = sizes == (*dbias.shape,)
    sums = dbias if whole else dbias.new_zeros(sizes, dtype=torch.float32)
    _launch(*bias_pass(given, sums, (*dbias.shape,), tile))
    return dbias if whole else sums.sum_to_size(dbias.shape).to(dbias.dtype)


def tiles_of(call: Call, architecture: str = "") -> Passes:
    """The table's tiles for a call on its device, or on another architecture."""
    architecture = architecture or architecture_of(call.query.device)
    return Passes(*backward_tiles_for(architecture, 8 * call.query.element_size(), call.width, call.is_masked))


def _delta(call: Call, known: Known) -> Tensor:
    batch, heads, queries, _ = call.sizes
    delta = torch.empty_like(known.lse)
    unit = unit_of(known.out, known.dout)
    arguments = {
        "out": known.out,
        "dout": known.dout,
        "lse": known.lse,
        "delta": delta,
        **strides_of(known.out, "out", "bhme", unit),
        **strides_of(known.dout, "dout", "bhme", unit),
        "stride_lse_b": known.lse.stride(0),
        "stride_lse_h": known.lse.stride(1),
        "query_length": queries,
        "heads": heads,
        "WIDE": are_wide(known.out, known.dout),
        "UNIT": unit,
    }
    programs = triton.cdiv(queries, _ROWS) * heads * batch
    tile = Tile(_ROWS, 16, 4, 1)
    every = _of_kernel(delta_kernel, {**constants(call, tile), **arguments})
    _launch(delta_kernel, programs, every, options(tile))
    return delta


def _launch(kernel: Any, programs: int, arguments: dict[str, Any], how: dict[str, Any]) -> None:
    kernel[(programs,)](**arguments, **how)


def _arguments(given: Given, tile: Tile, **gradients: Tensor) -> dict[str, Any]:
    """A pass's arguments by name, of the kernel that writes these gradients; none are the bias's."""
    call, known = given.call, given.known
    axes = {"query": "bhmd", "key": "bhnd", "value": "bhne", "dout": "bhme"}
    axes |= {f"d{name}": text for name, text in axes.items()}
    tensors = {"query": call.query, "key": call.key, "value": call.value, "dout": known.dout, **gradients}
    unit = unit_of(*tensors.values())
    strides: dict[str, int] = {}
    for name, tensor in tensors.items():
        strides |= strides_of(tensor, name, axes[name], unit)
    every = {
        **tensors,
        **strides,
        "lse": known.lse,
        "rest": known.rest,
        "delta": given.delta,
        "spans": given.spans,
        "scale": abs(call.scale) or 1.0,
        "softcap": call.softcap or 1.0,
        "longest_query": call.longest_query,
        "longest_key": call.longest_key,
        "stride_lse_b": known.lse.stride(0),
        "stride_lse_h": known.lse.stride(1),
        **call.masks(),
        **call.places(),
        **constants(call, tile),
        "WIDE": call.wide or are_wide(*tensors.values()),
        "GUARDED": any(one is not None for one in (call.dense, call.bias, call.keep, call.rows)),
        "GROUPED": call.group > 1,
        "UNIT": unit,
    }
    kernel = queries_kernel if "dquery" in gradients else keys_kernel if "dkey" in gradients else None
    return every if kernel is None else _of_kernel(kernel, every)


def _of_kernel(kernel: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: arguments[name] for name in kernel.arg_names}
