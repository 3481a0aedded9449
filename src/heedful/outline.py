"""A call in constants, for a compiler that may hold sizes as symbols.

Traced code reduces a call to its outline: lengths and batch become stand-ins that keep equalities and order, heads and
head dims become constants, a mask becomes a tuple of its facts. Every comparison made here is a guard of the compiled
code. What the outline of a mask says is turned back into a mask without contents by ``mask_of_outline``, untraced.

Shapes: B batch, H heads, Q query length, K key length.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from heedful.errors import InvalidArgument
from heedful.masks import Mask


def stand_in_lengths(query_length: int, key_length: int) -> tuple[int, int]:
    """Stand-ins for both lengths: zero stays zero, and they compare as the real ones do."""
    if query_length == 0 or key_length == 0:
        return (0 if query_length == 0 else 64, 0 if key_length == 0 else 64)
    if query_length == key_length:
        return (64, 64)
    return (32, 64) if query_length < key_length else (64, 32)


def stand_ins(tensor: Tensor, axis: int, length: int, batch: int) -> tuple[int, ...]:
    """A shape with a stand-in for the length and, in four dimensions, for the batch; heads and head dim as they are."""
    shape = []
    for place in range(tensor.dim()):
        if place == tensor.dim() + axis:
            shape.append(length)
        elif place == 0 and tensor.dim() == 4:
            shape.append(_batch(tensor.shape[0], batch))
        else:
            shape.append(static(tensor.shape[place]))
    return tuple(shape)


def _batch(size: int, whole: int) -> int:
    if size == 0 or size == 1:
        return 0 if size == 0 else 1
    return 2 if size == whole else 3


def static(size: int) -> int:
    """The size as a constant: under dynamic shapes, comparing it with a constant fixes it.

    The constants are written in the function, since dynamo makes symbols of a module's numbers too.
    """
    for common in (64, 128, 8, 16, 32, 12, 24, 40, 72, 80, 96, 160, 256, 512):
        if size == common:
            return common
    return next(number for number in range(1 << 20) if number == size)


def known_number(number: float | None, usual: tuple[float, ...]) -> float | None:
    """A float as a constant. Under dynamic shapes it is a symbol, which only a comparison with a constant can fix;

    an unusual one stays a symbol, and dynamo then refuses the call.
    """
    if number is None:
        return None
    for constant in usual:
        if number == constant:
            return constant
    return number


def usual_scales(head_dim: int) -> tuple[float, ...]:
    """The scales that models use, to compare a symbol with."""
    dim = static(head_dim)
    return (dim**-0.5, 1.0 / math.sqrt(dim), 1.0, 1.0 / dim, 0.125)


def static_window(window: Any) -> Any:
    """A window whose sides are constants; None for an open side."""
    sides = (window, window) if isinstance(window, int) else window
    if not isinstance(sides, (tuple, list)):
        return sides
    return tuple(side if not isinstance(side, int) or side < 0 else static(side) for side in sides)


def mask_outline(attn_mask: Any, sizes: tuple[int, ...]) -> tuple[Any, ...]:
    """A mask in constants: its static parts; of each tensor dtype, stand-in shape and whether it wants a gradient."""
    if attn_mask is None:
        return ()
    if isinstance(attn_mask, Tensor):
        parts = (None, None, None, None, None)
        return (_tensor_outline(attn_mask, sizes), *parts) if attn_mask.dtype == torch.bool else (
            None, _tensor_outline(attn_mask, sizes), *parts[:4],
        )  # fmt: skip
    if isinstance(attn_mask, Mask):
        return (
            None if attn_mask.dense is None else _tensor_outline(attn_mask.dense, sizes),
            None if attn_mask.bias is None else _tensor_outline(attn_mask.bias, sizes),
            None if attn_mask.padding is None else _padding_outline(attn_mask.padding, sizes),
            attn_mask.causal,
            attn_mask.window
            if attn_mask.window is None
            else (*static_window(attn_mask.window[:2]), attn_mask.window[2]),
            "varlen" if attn_mask.varlen is not None else "block" if attn_mask.block is not None else None,
        )
    return (
        None,
        None,
        None,
        None,
        None,
        "block" if type(attn_mask).__name__ == "BlockMask" else type(attn_mask).__name__,
    )


def _tensor_outline(tensor: Tensor, sizes: tuple[int, ...]) -> tuple[Any, ...]:
    batch, query_length, key_length, query_stand_in, key_stand_in = sizes
    shape: list[int] = []
    for back in range(1, tensor.dim() + 1):
        size = tensor.shape[-back]
        if size == 1:
            shape.append(1)
        elif back == 1:
            shape.append(key_stand_in if size == key_length else key_stand_in + 1)
        elif back == 2:
            shape.append(query_stand_in if size == query_length else query_stand_in + 1)
        elif back == 4:
            shape.append(_batch(size, batch))
        else:
            shape.append(static(size))
    return (tensor.dtype, tuple(shape[::-1]), tensor.requires_grad and torch.is_grad_enabled())


def _padding_outline(keep: Tensor, sizes: tuple[int, ...]) -> tuple[Any, ...]:
    """A key padding mask's, (B, K): its sizes are the batch and the keys, also where these are one or equal others."""
    batch, _, key_length, _, key_stand_in = sizes
    keys = key_stand_in if keep.shape[1] == key_length else key_stand_in + 1
    return (keep.dtype, (_batch(keep.shape[0], batch), keys), False)


class _Drawn:
    """Looks like a tensor to all that reads a mask without its contents."""

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...], requires_grad: bool) -> None:
        self.dtype, self.shape, self.requires_grad = dtype, shape, requires_grad

    def dim(self) -> int:
        return len(self.shape)

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point


def mask_of_outline(outline: tuple[Any, ...]) -> Mask | None:
    """A mask whose tensors have shape and dtype but no contents. Raises InvalidArgument as ``as_mask`` would."""
    if not outline:
        return None
    dense, bias, padding, causal, window, other = outline
    if other not in (None, "varlen", "block"):
        raise InvalidArgument("attn_mask", other, "give a tensor, one of heedful's mask values, a BlockMask or None")
    drawn: list[Any] = [None if part is None else _Drawn(*part) for part in (dense, bias, padding)]
    if drawn[1] is not None and not drawn[1].is_floating_point():
        raise InvalidArgument("attn_mask", drawn[1].dtype, "give bool (True may attend) or float (added to the scores)")
    return Mask(
        dense=drawn[0],
        bias=drawn[1],
        padding=drawn[2],
        causal=causal,
        window=window,
        varlen=True if other == "varlen" else None,  # type: ignore[arg-type]
        block=True if other == "block" else None,
    )
