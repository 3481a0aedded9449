"""The forward pass over tensor descriptors: for calls without masks or bias, where a measured tile asks for it.

fp16 and bf16, head dims that are one part (64, 128; 72 is two), strides and addresses of whole 16 bytes. What it
does not take, ``forward`` computes by pointers. The table of tiles never asks for it.

Shapes: B batch, H heads, N kv heads, Q query length, K key length, D head dim, E value dim.
"""

from __future__ import annotations

import contextvars
from typing import Any

import torch
import triton
from torch import Tensor

from heedful.kernels.jit.streamed import streamed_kernel
from heedful.kernels.operands import Call
from heedful.kernels.tiles import Tile


def takes(call: Call) -> bool:
    """Whether descriptors can stand for the tensors of a call, and all that it asks is in the kernel."""
    tensors = (call.query, call.key, call.value)
    if any(one is not None for one in (call.dense, call.bias, call.keep, call.rows)) or call.sign != 1:
        return False
    if call.query.element_size() != 2 or any(call.parts(dim)[1] for dim in call.dims):
        return False
    return call.splits and all(one.stride(2) > 0 for one in tensors)


def arguments(call: Call, tile: Tile, given: dict[str, Any]) -> dict[str, Any]:
    """The kernel's arguments out of those of ``forward_kernel``."""
    whole = not (call.band.has_left or call.band.has_right or call.packing or call.sizes[3] % tile.keys)
    return {name: whole if name == "WHOLE" else given[name] for name in streamed_kernel.arg_names}


def launch(programs: int, given: dict[str, Any], options: dict[str, Any], device: torch.device) -> None:
    """Launch it, with room on the device for descriptors; other kernels of this process see none of that."""

    def room(size: int, _alignment: int, _stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    def within() -> None:
        triton.set_allocator(room)
        streamed_kernel[(programs,)](**given, **options)

    contextvars.copy_context().run(within)
