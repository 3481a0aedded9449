"""The same decision under ``torch.compile``: made in plain Python while dynamo traces, guarded by what it reads.

Dynamo cannot trace the registry, nor a ContextVar, and lengths may be symbols. So the traced part reduces a call to
constants (``Outline``: sizes that may be symbols become stand-ins which keep their equalities and order), an untraced
function decides on them, and the bound function that it names is traced in its place. Every comparison made on the way
is a guard, so another relation of lengths, another scope or a changed registry decides anew.

The compiled code's wish: the call's ``backend``, then the scopes that this thread entered outside of asyncio tasks,
then HEEDFUL_BACKEND, then auto. While scopes are open inside asyncio tasks a call without its own backend is refused.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from heedful.binding import Run
from heedful.call import checked_numbers, computed_dtype, mask_of_call
from heedful.errors import InvalidArgument
from heedful.masks import Mask
from heedful.policy import mirror
from heedful.problem import problem_for_shapes

if TYPE_CHECKING:
    from heedful.dispatch import AttentionDispatcher

_dispatchers: weakref.WeakValueDictionary[str, AttentionDispatcher] = weakref.WeakValueDictionary()
_numbers = itertools.count()
_bound = SimpleNamespace()  # attributes, since dynamo guards each by itself
_names: dict[Any, str] = {}
_AMBIGUOUS = (
    "a scope is open inside an asyncio task of this thread, and compiled code cannot see whose: "
    "pass backend= to the compiled call"
)


def enrol(dispatcher: AttentionDispatcher) -> str:
    """Give a dispatcher the name by which traced code refers to it: no integer, which dynamo may make a symbol."""
    number = str(next(_numbers))
    _dispatchers[number] = dispatcher
    return number


def attend(
    number: str,
    epoch: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    layout: str,
    causal_alignment: str,
    window: Any,
    softcap: float | None,
    sinks: Tensor | None,
    max_error: float | None,
    options: Mapping[str, Any] | None,
    backend: Any,
    return_lse: bool,
) -> Any:
    """``AttentionDispatcher.attention`` as dynamo traces it."""
    if backend is None and mirror.in_coroutines:
        wish: Any = "?"
    else:
        wish = mirror.wish if backend is None else tuple(backend) if isinstance(backend, list) else backend
    axis = {"BHSD": -2, "BSHD": -3, "THD": -3}[layout] if layout in ("BHSD", "BSHD", "THD") else -2
    lengths = _lengths(query.shape[axis], key.shape[axis])
    batch = max(query.shape[0], key.shape[0])
    shapes = tuple(
        _stand_ins(tensor, axis, length, batch)
        for tensor, length in (
            (query, lengths[0]),
            (key, lengths[1]),
            (value, lengths[1] if value.shape[axis] == key.shape[axis] else lengths[1] + 1),
        )
    )
    needs_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    sizes = (batch, query.shape[axis], key.shape[axis], *lengths)
    name = _decide(
        number, epoch, wish, backend is None, shapes, query.dtype, key.dtype, value.dtype,
        query.device.type, query.device.index, _mask_outline(attn_mask, sizes), bool(needs_grad),
        _known(dropout_p, (0.0, 0.1, 0.2, 0.05, 0.15, 0.25, 0.3, 0.4, 0.5)), is_causal,
        _known(scale, _scales(query.shape[-1])), enable_gqa, layout,
        causal_alignment, _static_window(window), _known(softcap, (50.0, 30.0, 20.0, 15.0)), sinks is not None,
        max_error,
        None if options is None else tuple(options.items()), return_lse,
        torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return getattr(_bound, name)(query, key, value, attn_mask)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _decide(*outline: Any) -> str:
    """The name of the bound function for a call's outline. Raises what the eager call would raise."""
    known = (*outline, torch.is_autocast_enabled(outline[8]) and torch.get_autocast_dtype(outline[8]))
    if known not in _names:
        run = _bind(*outline)
        name = f"run_{len(_names)}"
        setattr(_bound, name, run)
        _names[known] = name
    return _names[known]


def _bind(
    number: str,
    _epoch: str,
    wish: Any,
    inherited: bool,
    shapes: tuple[tuple[int, ...], ...],
    query_dtype: torch.dtype,
    key_dtype: torch.dtype,
    value_dtype: torch.dtype,
    device: str,
    index: int | None,
    mask_outline: tuple[Any, ...],
    needs_grad: bool,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    layout: str,
    causal_alignment: str,
    window: Any,
    softcap: float | None,
    sinks: bool,
    max_error: float | None,
    options: tuple[tuple[str, Any], ...] | None,
    return_lse: bool,
    deterministic: bool,
) -> Run:
    if wish == "?":
        raise InvalidArgument("backend", None, _AMBIGUOUS)
    dispatcher = _dispatchers[number]
    words = {"is_causal": is_causal, "causal_alignment": causal_alignment, "window": window}
    mask = _joined(_mask_of_outline(mask_outline), words)
    dtype, autocast = computed_dtype(query_dtype, key_dtype, value_dtype, device)
    fields = checked_numbers(
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        softcap=softcap,
        max_error=max_error,
        options=None if options is None else dict(options),
        return_lse=return_lse,
    )
    place = torch.device(device) if index is None else torch.device(device, index)
    problem = problem_for_shapes(
        *shapes,
        dtype=dtype,
        device=dispatcher.facts.device(place),
        mask=mask,
        layout=layout,
        enable_gqa=enable_gqa,
        sinks=sinks,
        needs_grad=needs_grad or (mask is not None and mask.bias is not None and mask.bias.requires_grad),
        deterministic=deterministic,
        autocast=autocast,
        compiling=True,
        **fields,
    )
    return dispatcher.bound_for_tracing(problem, wish, inherited, {**words, "attn_mask": None})


def _joined(mask: Mask | None, words: dict[str, Any]) -> Mask | None:
    more = mask_of_call(**words)
    return more if mask is None else mask if more is None else mask & more


def _lengths(query_length: int, key_length: int) -> tuple[int, int]:
    """Stand-ins for both lengths: zero stays zero, and they compare as the real ones do."""
    if query_length == 0 or key_length == 0:
        return (0 if query_length == 0 else 64, 0 if key_length == 0 else 64)
    if query_length == key_length:
        return (64, 64)
    return (32, 64) if query_length < key_length else (64, 32)


def _stand_ins(tensor: Tensor, axis: int, length: int, batch: int) -> tuple[int, ...]:
    """A shape with a stand-in for the length and, in four dimensions, for the batch; heads and head dim as they are."""
    shape = []
    for place in range(tensor.dim()):
        if place == tensor.dim() + axis:
            shape.append(length)
        elif place == 0 and tensor.dim() == 4:
            shape.append(_batch(tensor.shape[0], batch))
        else:
            shape.append(_static(tensor.shape[place]))
    return tuple(shape)


def _batch(size: int, whole: int) -> int:
    if size == 0 or size == 1:
        return 0 if size == 0 else 1
    return 2 if size == whole else 3


def _static(size: int) -> int:
    """The size as a constant: under dynamic shapes, comparing it with a constant fixes it.

    The constants are written in the function, since dynamo makes symbols of a module's numbers too.
    """
    for common in (64, 128, 8, 16, 32, 12, 24, 40, 72, 80, 96, 160, 256, 512):
        if size == common:
            return common
    return next(number for number in range(1 << 20) if number == size)


def _known(number: float | None, usual: tuple[float, ...]) -> float | None:
    """A float as a constant. Under dynamic shapes it is a symbol, which only a comparison with a constant can fix;

    an unusual one stays a symbol, and dynamo then refuses the call.
    """
    if number is None:
        return None
    for constant in usual:
        if number == constant:
            return constant
    return number


def _scales(head_dim: int) -> tuple[float, ...]:
    dim = _static(head_dim)
    return (dim**-0.5, 1.0 / math.sqrt(dim), 1.0, 1.0 / dim, 0.125)


def _static_window(window: Any) -> Any:
    sides = (window, window) if isinstance(window, int) else window
    return None if sides is None else tuple(side if side is None or side < 0 else _static(side) for side in sides)


def _mask_outline(attn_mask: Any, sizes: tuple[int, ...]) -> tuple[Any, ...]:
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
            None if attn_mask.padding is None else _tensor_outline(attn_mask.padding, sizes),
            attn_mask.causal,
            attn_mask.window
            if attn_mask.window is None
            else (*_static_window(attn_mask.window[:2]), attn_mask.window[2]),
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
        elif back == 2 and tensor.dtype == torch.bool and tensor.dim() == 2 and size != query_length:
            shape.append(_batch(size, batch))  # a key padding mask, (B, K)
        elif back == 2:
            shape.append(query_stand_in if size == query_length else query_stand_in + 1)
        elif back == 4:
            shape.append(_batch(size, batch))
        else:
            shape.append(_static(size))
    return (tensor.dtype, tuple(shape[::-1]), tensor.requires_grad and torch.is_grad_enabled())


class _Drawn:
    """Looks like a tensor to all that reads a mask without its contents."""

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...], requires_grad: bool) -> None:
        self.dtype, self.shape, self.requires_grad = dtype, shape, requires_grad

    def dim(self) -> int:
        return len(self.shape)

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point


def _mask_of_outline(outline: tuple[Any, ...]) -> Mask | None:
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
