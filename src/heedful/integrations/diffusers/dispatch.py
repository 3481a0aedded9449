"""diffusers' ``dispatch_attention_fn`` and ``attention_backend`` on heedful's strategies.

Unlike diffusers': no argument is dropped, the scope is this thread's or task's own, the checks are always on, and every
argument means the same with every backend. Refuses context parallelism, until heedful has it.

Shapes: B batch, H query heads, N key heads, Q query length, K key length, D head dim, E value dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from heedful import dispatch as core
from heedful.integrations.diffusers.meaning import extras_of, mask_of, windowed
from heedful.integrations.diffusers.names import plain
from heedful.policy import scope
from heedful.tracing import malformed

_PARALLEL = (
    "heedful has no context parallelism yet: leave it None, or, where diffusers' dispatcher is routed through heedful, "
    "call heedful.integrations.diffusers.uninstall()"
)


def dispatch_attention_fn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: Mapping[str, Any] | None = None,
    *,
    backend: Any = None,
    parallel_config: Any = None,
) -> Any:
    """Attention in diffusers' layout.

    Args:
        query: (B, Q, H, D).
        key: (B, K, N, D).
        value: (B, K, N, E).
        attn_mask: bool (True may attend) or float (added): (B, K) is key padding, (B, Q, K) holds for all heads, other
            ranks as SDPA. Where B = Q a two-dimensional mask has two meanings and is refused, as a three-dimensional
            one where B = H. Also heedful's mask values, and a BlockMask. Beside ``is_causal`` both apply.
        dropout_p: probability of dropping an attention weight.
        is_causal: query i sees the keys 0..i, whatever the backend.
        scale: factor of the scores; 1/sqrt(D) by default.
        enable_gqa: N may divide H.
        attention_kwargs: the backend's own options by name; ``window_size`` as flash-attn means it, and ``softcap``.
            An unknown one is refused, as is one that is an argument of this call.
        backend: a name of diffusers' or heedful's (obeyed, or Refused), a list of names (the fallback order), "auto",
            or None: the scope, then HEEDFUL_BACKEND, then auto.
        parallel_config: None; anything else is refused.

    Returns:
        (B, Q, H, E).

    Raises:
        InvalidArgument, UnknownBackend, Refused: as ``heedful.attention``.
    """
    if attention_kwargs is None:
        return attend(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
            backend=backend, parallel_config=parallel_config,
        )  # fmt: skip
    return attend(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
        backend=backend, parallel_config=parallel_config, **extras_of(attention_kwargs),
    )  # fmt: skip


def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *rest: Any, **more: Any) -> Any:
    """``heedful.attention`` with diffusers' masks and names; arguments of ``call_of``."""
    return core.attention(**call_of(query, key, value, attn_mask, *rest, **more))


def call_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    backend: Any = None,
    parallel_config: Any = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float | None = None,
    options: Mapping[str, Any] | None = None,
    return_lse: bool = False,
) -> dict[str, Any]:
    """The arguments of ``heedful.attention`` for a call in diffusers' words."""
    if parallel_config is not None:
        malformed("parallel_config", type(parallel_config).__name__, _PARALLEL)
    if attn_mask is not None:
        attn_mask = mask_of(attn_mask, query, key)
    if window_size != (-1, -1):
        attn_mask = windowed(attn_mask, window_size, query, key)
    return {
        "query": query, "key": key, "value": value, "attn_mask": attn_mask, "dropout_p": dropout_p,
        "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa, "layout": "BSHD", "softcap": softcap or None,
        "options": options or None, "backend": plain(backend), "return_lse": return_lse,
    }  # fmt: skip


def attention_backend(backend: Any = "native") -> scope:
    """Wish for a backend within a ``with`` block, for this thread or asyncio task alone: ``heedful.attention_backend``.

    Also a decorator. Raises UnknownBackend at once.
    """
    return core.attention_backend(plain(backend))
