"""What diffusers' own functions do while heedful is installed.

Whose wish counts for a call of diffusers' dispatcher, first to last:

1. the rule of ``heedful.set_attention_backend`` for the layer that makes the call;
2. the call's ``backend``, which is the ``_attention_backend`` of the layer's processor;
3. the innermost scope, ``diffusers.attention_backend`` or ``heedful.attention_backend``: this thread's or task's own;
4. diffusers' process-wide backend (``DIFFUSERS_ATTN_BACKEND``, ``set_active_backend``), unless it is its default,
   ``native``, which says nothing;
5. ``HEEDFUL_BACKEND``;
6. auto.

The checks are always on; with ``DIFFUSERS_ATTN_CHECKS`` every kind of call is also logged, once, at level INFO of the
logger "heedful": the problem, what computes it and why.

Refuses context parallelism, until heedful has it.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Mapping
from typing import Any

import torch

from heedful import dispatch as core
from heedful.integrations.diffusers.dispatch import call_of
from heedful.integrations.diffusers.meaning import extras_of
from heedful.integrations.diffusers.names import plain, spelling
from heedful.models import reset_attention_backend, set_attention_backend
from heedful.policy import current_wish, mirror, scope
from heedful.routing import Route

_log = logging.getLogger("heedful")
_compiling = torch.compiler.is_compiling
_told: set[str] = set()
_models: weakref.WeakSet[Any] = weakref.WeakSet()  # that diffusers' set_attention_backend was called on
_lock = threading.Lock()


def dispatch(
    registry: Any, *operands: Any, attention_kwargs: Mapping[str, Any] | None, backend: Any, parallel_config: Any
) -> Any:
    """``dispatch_attention_fn``. ``registry`` is diffusers' own; ``operands`` are query to enable_gqa."""
    extras = {} if attention_kwargs is None else extras_of(attention_kwargs)
    if isinstance(mirror.route, Route):  # its wish is the innermost scope
        backend = None
    elif backend is None:
        backend = _inherited(registry)
    call = call_of(*operands, backend=backend, parallel_config=parallel_config, **extras)
    if registry._checks_enabled and not _compiling():
        _tell(call)
    return core.attention(**call)


def _inherited(registry: Any) -> Any:
    """diffusers' process-wide backend, where no scope is open; None where that is heedful's to say."""
    active = registry._active_backend
    if active == "native":
        return None
    if _compiling():
        return active if mirror.wish is None and not mirror.in_coroutines else None
    return active if current_wish() is None else None


def _tell(call: Mapping[str, Any]) -> None:
    plan = core.explain(**call)
    message = f"diffusers: {plan.problem} -> {plan.backend}: {plan.rung} (wish {plan.wish!r} from {plan.origin})"
    if message not in _told:
        _told.add(message)
        _log.info("heedful: %s", message)


def attention_backend(backend: Any) -> scope:
    """``attention_backend``: heedful's scope, so other threads see nothing of it."""
    return core.attention_backend(plain(backend))


def get_active_backend(registry: Any) -> tuple[Any, Any]:
    """``_AttentionBackendRegistry.get_active_backend``: the scope's, where diffusers has a member for it."""
    name = None if _compiling() else spelling(current_wish())
    found = next((one for one in registry._backends if one.value == name), registry._active_backend)
    return found, registry._backends[found]


def set_on_model(model: Any, backend: Any) -> None:
    """``model.set_attention_backend``: ``heedful.set_attention_backend``, undone when heedful is uninstalled.

    Nothing outside of the model is changed. Raises NothingCovered for a model without a layer that can be reached.
    """
    backend = plain(backend)
    report = set_attention_backend(model, backend.lower() if isinstance(backend, str) else backend)
    with _lock:
        _models.add(model)
    for layer in report:
        if not layer.covered:
            _log.warning("heedful: %s of %s is not covered: %s", layer.path, type(model).__name__, layer.reason)


def reset_on_model(model: Any) -> None:
    """``model.reset_attention_backend``, before diffusers' own runs on what was there before."""
    reset_attention_backend(model)
    with _lock:
        _models.discard(model)


def reset_all() -> None:
    """Put every model back that ``set_on_model`` was called on."""
    with _lock:
        models = list(_models)
        _models.clear()
    for model in models:
        reset_attention_backend(model)
