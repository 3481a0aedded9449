"""diffusers' registry calls, on heedful's: what is registered is a strategy, open to every call of heedful.

Refuses a name that is taken. Has no active backend of the process: the scope is a thread's or a task's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from heedful.errors import InvalidArgument
from heedful.factory import AttentionStrategyFactory
from heedful.integrations.diffusers.backends import BY_BACKEND, native_like
from heedful.integrations.diffusers.names import backend_names, plain, spelling
from heedful.policy import current_wish
from heedful.strategy import AttentionStrategy, Limits

F = TypeVar("F", bound=Callable[..., Any])
_FEATURES = {"scale": "scale", "dropout": "dropout_p", "gqa": "enable_gqa", "lse": "return_lse"}


class AttentionBackendRegistry:
    """Class methods as those of diffusers' ``_AttentionBackendRegistry``."""

    @classmethod
    def register(
        cls,
        backend: Any,
        constraints: Sequence[Callable[..., None]] | None = None,
        supports_context_parallel: bool = False,  # noqa: ARG003  # nothing asks for it: such calls are refused
    ) -> Callable[[F], F]:
        """Register a function of diffusers' kind as a strategy: ``function(query, key, value, …)`` on (B, S, H, D).

        What it takes is read from its parameters: those of SDPA, and ``return_lse`` with which it returns (out, lse).
        A call that wants more is rewritten, or refused. ``constraints`` are called with its arguments before it.
        Gradients and torch.compile are refused, since a signature does not tell of them: subclass AttentionStrategy.
        Raises RegistrationError for a name that is taken.
        """
        name = plain(backend)

        def decorator(function: F) -> F:
            kind = _strategy(name, function, tuple(constraints or ()))
            AttentionStrategyFactory.default().register_strategy(name, kind)
            return function

        return decorator

    @classmethod
    def get_active_backend(cls) -> tuple[Any, Callable[..., Any]]:
        """The scope's backend, a member of AttentionBackendName where it has one, and its function.

        "auto" where no scope is open: the call's backend is then HEEDFUL_BACKEND's or auto's.
        """
        wish = current_wish()
        if wish is None:
            return "auto", native_like(None)
        name = spelling(wish)
        member = next((one for one in backend_names() if one.value == name), wish)
        return member, BY_BACKEND[name] if name in BY_BACKEND else native_like(wish)

    @classmethod
    def set_active_backend(cls, backend: Any) -> None:
        """Always refused: it would hold for the whole process, other threads included."""
        raise InvalidArgument(
            "set_active_backend",
            repr(plain(backend)),
            "no backend holds for the whole process: use `with attention_backend(name)`, heedful.set_attention_backend("
            "model, name), or the environment variable HEEDFUL_BACKEND",
        )

    @classmethod
    def list_backends(cls) -> list[Any]:
        """All that a call may name: the members of AttentionBackendName, then heedful's other names."""
        members = list(backend_names())
        known = {one.value for one in members}
        return [*members, *(name for name in AttentionStrategyFactory.default().strategies() if name not in known)]

    @classmethod
    def _is_context_parallel_available(cls, backend: Any) -> bool:  # noqa: ARG003  # the same for all
        return False


def _strategy(
    name: str, function: Callable[..., Any], constraints: tuple[Callable[..., None], ...]
) -> type[AttentionStrategy]:
    takes = inspect.signature(function).parameters
    masks = {"causal": "is_causal", "dense": "attn_mask", "bias": "attn_mask"}
    features: dict[str, Any] = {limit: word in takes for limit, word in _FEATURES.items()}

    class Registered(AttentionStrategy):
        """Registered by diffusers' registry call."""

        limits = Limits(
            layouts=("BSHD",),
            masks=frozenset(kind for kind, word in masks.items() if word in takes),
            **features,
        )

        def compute_attention(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Any:
            for check in constraints:
                check(query=query, key=key, value=value, **kwargs)
            return function(query, key, value, **kwargs)

    Registered.__name__ = Registered.__qualname__ = f"Registered_{name}"
    Registered.name = name
    return Registered
