"""The same decision under ``torch.compile``: made in plain Python while dynamo traces, guarded by what it reads.

Dynamo cannot trace the registry, nor a ContextVar, and lengths may be symbols. So the traced part reduces a call to
constants (see ``outline``), an untraced function decides on them, and the bound function that it names is traced in
its place. Every comparison made on the way is a guard, so another relation of lengths, another scope or a changed
registry decides anew.

The compiled code's wish: the call's ``backend``, then the scopes that this thread entered outside of asyncio tasks,
then HEEDFUL_BACKEND, then auto. While scopes are open inside asyncio tasks a call without its own backend is refused.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
from torch import Tensor

from heedful.binding import Run
from heedful.call import checked_numbers, computed_dtype, mask_of_call
from heedful.errors import HeedfulError, InvalidArgument
from heedful.masks import Mask
from heedful.outline import (
    known_number,
    mask_of_outline,
    mask_outline,
    stand_in_lengths,
    stand_ins,
    static_window,
    usual_scales,
)
from heedful.policy import current_wish, mirror
from heedful.problem import problem_for_shapes

if TYPE_CHECKING:
    from heedful.dispatch import AttentionDispatcher

F = TypeVar("F", bound=Callable[..., Any])
_dispatchers: weakref.WeakValueDictionary[str, AttentionDispatcher] = weakref.WeakValueDictionary()
_numbers = itertools.count()
_MOST_OUTLINES = 4096  # that a dispatcher remembers; beyond it all are forgotten, and compiled code compiles anew
_AMBIGUOUS = (
    "a scope is open inside an asyncio task of this thread, and compiled code cannot see whose: "
    "pass backend= to the compiled call"
)
_ELSEWHERE = (
    "this context inherited a scope from another thread, and compiled code sees those of its own thread only: "
    "enter the scope in this thread, or pass backend= to the compiled call"
)
_STAND_INS = "\n(a compiled call is decided once for many lengths and batch sizes: those above are stand-ins)"


class Traced:
    """What a dispatcher's traced calls are bound to; it lives and dies with the dispatcher.

    ``number`` is the name by which traced code refers to the dispatcher: no integer, which dynamo may make a symbol.
    """

    def __init__(self, dispatcher: AttentionDispatcher) -> None:
        self.number = str(next(_numbers))
        _dispatchers[self.number] = dispatcher
        self.forget()

    def forget(self) -> None:
        """Drop all that was bound, since the registry changed."""
        self.names: dict[Any, str] = {}
        self.runs = SimpleNamespace()  # attributes, since dynamo guards each by itself


def attend(
    traced: Traced,
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
    flaw = _flaw(query, key, value, attn_mask, layout, options)
    if flaw is not None:
        return _raise(*flaw)
    if backend is None and mirror.in_coroutines:
        wish: Any = "?"
    else:
        wish = mirror.wish if backend is None else tuple(backend) if isinstance(backend, list) else backend
    axis = {"BHSD": -2, "BSHD": -3, "THD": -3}[layout] if layout in ("BHSD", "BSHD", "THD") else -2
    lengths = stand_in_lengths(query.shape[axis], key.shape[axis])
    batch = max(query.shape[0], key.shape[0])
    shapes = tuple(
        stand_ins(tensor, axis, length, batch)
        for tensor, length in (
            (query, lengths[0]),
            (key, lengths[1]),
            (value, lengths[1] if value.shape[axis] == key.shape[axis] else lengths[1] + 1),
        )
    )
    needs_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    sizes = (batch, query.shape[axis], key.shape[axis], *lengths)
    name = _decide(
        traced.number, epoch, wish, backend is None, shapes, query.dtype, key.dtype, value.dtype,
        query.device.type, query.device.index, mask_outline(attn_mask, sizes), bool(needs_grad),
        known_number(dropout_p, (0.0, 0.1, 0.2, 0.05, 0.15, 0.25, 0.3, 0.4, 0.5)), is_causal,
        None if scale is None else known_number(scale, usual_scales(query.shape[-1])), enable_gqa, layout,
        causal_alignment, static_window(window), known_number(softcap, (50.0, 30.0, 20.0, 15.0)), sinks is not None,
        max_error,
        None if options is None else tuple(options.items()), return_lse,
        torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    route = mirror.route
    if route is None:
        return getattr(traced.runs, name)(query, key, value, attn_mask)
    mirror.route = None  # a strategy's own SDPA calls are not the routed layer's
    try:
        return getattr(traced.runs, name)(query, key, value, attn_mask)
    finally:
        mirror.route = route


def _untraced(function: F) -> F:
    """``torch.compiler.assume_constant_result``, which imports dynamo: a second, at every ``import heedful``."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # all that it does, torch 2.6 to 2.13
    return function


@_untraced
def _decide(number: str, *outline: Any) -> str:
    """The name of the bound function for a call's outline. Raises what the eager call would raise."""
    dispatcher = _dispatchers[number]
    traced = dispatcher.traced
    device = outline[7]
    known: Any = (*outline, torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device))
    try:
        name = traced.names.get(known)
    except TypeError:  # an option that cannot be hashed
        known = name = None
    if name is not None:
        return name
    try:
        run = _bind(dispatcher, *outline)
    except HeedfulError as error:
        raise _passing_dynamo(error, _STAND_INS) from error
    if len(traced.names) >= _MOST_OUTLINES:
        traced.forget()
    name = f"run_{next(_numbers)}"
    setattr(traced.runs, name, run)
    traced.names[known or name] = name
    return name


@_untraced
def _raise(argument: str, observed: str, remedy: str) -> None:
    error = InvalidArgument(argument, observed, remedy)
    raise _passing_dynamo(error) from error


def malformed(argument: str, observed: object, remedy: str) -> NoReturn:
    """Raise InvalidArgument from code that may be traced: dynamo would put an error of its own in its place."""
    if torch.compiler.is_compiling():
        _raise(argument, str(observed), remedy)
    raise InvalidArgument(argument, observed, remedy)


def _passing_dynamo(error: HeedfulError, more: str = "") -> HeedfulError:
    """An equal exception that is also dynamo's error of a user, which it lets through; others it wraps as internal."""
    from torch._dynamo.exc import UserError, UserErrorType

    kind = type(error)
    passing = type(kind.__name__, (kind, UserError), {"__module__": kind.__module__, "__init__": UserError.__init__})
    made: HeedfulError = passing(UserErrorType.INVALID_INPUT, f"{error}{more}")
    made.__dict__.update(error.__dict__)
    return made


def _flaw(query: Any, key: Any, value: Any, attn_mask: Any, layout: Any, options: Any) -> tuple[str, str, str] | None:
    """What is wrong with an argument, where that keeps its sizes from being read: name, what came, remedy."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            return name, type(tensor).__name__, "give a torch.Tensor"
        if tensor.is_nested:
            return name, "a nested tensor", "pack the sequences: layout='THD' and attn_mask=heedful.Varlen(offsets)"
        least = 4 if layout == "BSHD" else 3 if layout == "THD" else 2
        if tensor.dim() < least:
            return name, f"{tensor.dim()} dimensions", f"layout {layout} needs at least {least}"
    if query.shape[-1] == 0:
        return "query", "head dim 0", "give at least one feature"
    if options is not None and not isinstance(options, Mapping):
        return "options", type(options).__name__, "give a mapping from option names to values"
    place = (query.device.type, query.device.index)
    masks = [attn_mask.dense, attn_mask.bias, attn_mask.padding] if isinstance(attn_mask, Mask) else [attn_mask]
    for name, tensor in (("key", key), ("value", value), *(("attn_mask", mask) for mask in masks)):
        if isinstance(tensor, Tensor) and (tensor.device.type, tensor.device.index) != place:
            return name, f"device {tensor.device.type}", f"query is on {query.device.type}; move it there"
    return None


def _bind(
    dispatcher: AttentionDispatcher,
    _epoch: str,
    wish: Any,
    inherited: bool,
    shapes: tuple[tuple[int, ...], ...],
    query_dtype: torch.dtype,
    key_dtype: torch.dtype,
    value_dtype: torch.dtype,
    device: str,
    index: int | None,
    mask_constants: tuple[Any, ...],
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
    if inherited and wish is None and current_wish() is not None:
        raise InvalidArgument("backend", None, _ELSEWHERE)
    words = {"is_causal": is_causal, "causal_alignment": causal_alignment, "window": window}
    mask = _joined(mask_of_outline(mask_constants), words)
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
    return dispatcher.bound_for_tracing(problem, wish, inherited, words, place)


def _joined(mask: Mask | None, words: dict[str, Any]) -> Mask | None:
    more = mask_of_call(**words)
    return more if mask is None else mask if more is None else mask & more
