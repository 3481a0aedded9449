"""diffusers' own functions sent through heedful, and put back.

A function of diffusers' is imported by name into some sixty modules, more of them later. So not the names are replaced
but what the one function object runs: its ``__code__``. Whoever holds the function, since whenever and under whatever
name, calls heedful from then on; code that dynamo compiled is compiled anew, since it guards on it.

Replaced are ``dispatch_attention_fn``, ``attention_backend``, ``_AttentionBackendRegistry.get_active_backend``,
``ModelMixin.set_attention_backend`` and ``ModelMixin.reset_attention_backend``; see ``routed`` for what they do then.
The backends' own functions are left alone, and none of them is called meanwhile, nor one that somebody registered with
diffusers' registry (registered with this package's registry, it is a strategy). What diffusers checks of packages, and
downloads from the Hub, is not run either: heedful's own sources decide.

Refuses a diffusers whose functions have other parameters than those known here.
"""

from __future__ import annotations

import importlib
import threading
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

from heedful.errors import HeedfulError
from heedful.integrations.diffusers import routed

if TYPE_CHECKING:
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

_lock = threading.RLock()
_swaps: list[Swap] = []


def install() -> None:
    """Route diffusers' own dispatcher through heedful, for the whole process, until ``uninstall()``.

    Imports diffusers. Installing again changes nothing. What a layer is computed by is then found as in ``routed``.
    Raises HeedfulError, with nothing changed, for a diffusers that this does not fit.
    """
    with _lock:
        if _swaps:
            return
        swaps = [Swap(function, replacement) for function, replacement in _pairs()]
        for swap in swaps:
            _swaps.append(swap)  # before it is applied: an interrupt in between is undone by uninstall()
            swap.apply()


def uninstall() -> None:
    """Put diffusers back as it was, and the models whose ``set_attention_backend`` was called since ``install()``.

    Copies that were made of such a model meanwhile are models of their own: ``heedful.reset_attention_backend(copy)``.
    Uninstalling again changes nothing.
    """
    with _lock:
        for swap in reversed(_swaps):
            swap.undo()
        if _swaps:
            _swaps.clear()
            routed.reset_all()


def is_installed() -> bool:
    """Whether diffusers' dispatcher is routed through heedful."""
    return bool(_swaps)


class Swap:
    """One function's code, replaced and put back."""

    def __init__(self, function: FunctionType, replacement: FunctionType) -> None:
        self.function, self.replacement = function, replacement
        self.code, self.kwdefaults = function.__code__, function.__kwdefaults__
        if _positional(self.code) != _positional(replacement.__code__) or self.code.co_freevars:
            version = importlib.import_module("diffusers").__version__
            raise HeedfulError(
                f"diffusers {version}: {function.__qualname__} has the parameters {_positional(self.code)}, "
                f"heedful knows {_positional(replacement.__code__)}; use a version of diffusers that it was tested with"
            )

    def apply(self) -> None:
        """Keyword-only parameters that this diffusers lacks yet get their defaults first."""
        self.function.__kwdefaults__ = {**(self.replacement.__kwdefaults__ or {}), **(self.kwdefaults or {})} or None
        self.function.__code__ = self.replacement.__code__

    def undo(self) -> None:
        """In the opposite order, so that calls in other threads always find the defaults that they need."""
        self.function.__code__ = self.code
        self.function.__kwdefaults__ = self.kwdefaults

    def original(self) -> FunctionType:
        """The function as it was before."""
        return FunctionType(self.code, self.function.__globals__, self.function.__name__, self.function.__defaults__)


def run_original(name: str, *operands: Any) -> Any:
    """Call one of the replaced functions as it was before, by its qualified name."""
    found = next((swap for swap in list(_swaps) if swap.function.__qualname__ == name), None)
    return found.original()(*operands) if found is not None else None


def _positional(code: CodeType) -> tuple[str, ...]:
    return code.co_varnames[: code.co_argcount]


def _pairs() -> list[tuple[Any, Any]]:
    attention = importlib.import_module("diffusers.models.attention_dispatch")
    model = importlib.import_module("diffusers.models.modeling_utils").ModelMixin
    return [
        (model.set_attention_backend, _set_attention_backend),
        (model.reset_attention_backend, _reset_attention_backend),
        (attention._AttentionBackendRegistry.get_active_backend.__func__, _get_active_backend),
        (attention.attention_backend.__wrapped__, _attention_backend),
        (attention.dispatch_attention_fn, _dispatch_attention_fn),
    ]


# The replacements. Their code runs as diffusers' functions, with the globals of diffusers' modules: what they use of
# heedful they must import themselves.


def _dispatch_attention_fn(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: Any = None,
    *,
    backend: Any = None,
    parallel_config: Any = None,
) -> Any:
    from heedful.integrations.diffusers.routed import dispatch

    return dispatch(
        _AttentionBackendRegistry, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
        attention_kwargs=attention_kwargs, backend=backend, parallel_config=parallel_config,
    )  # fmt: skip


def _attention_backend(backend: Any = "native") -> Any:
    from heedful.integrations.diffusers.routed import attention_backend

    with attention_backend(backend):
        yield


def _get_active_backend(cls: Any) -> Any:
    from heedful.integrations.diffusers.routed import get_active_backend

    return get_active_backend(cls)


def _set_attention_backend(self: Any, backend: Any) -> None:
    from heedful.integrations.diffusers.routed import set_on_model

    set_on_model(self, backend)


def _reset_attention_backend(self: Any) -> None:
    from heedful.integrations.diffusers.installation import run_original
    from heedful.integrations.diffusers.routed import reset_on_model

    reset_on_model(self)
    run_original("ModelMixin.reset_attention_backend", self)
