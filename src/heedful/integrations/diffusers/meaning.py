"""What diffusers' arguments mean: masks by their rank, and the extra arguments of single backends.

Refuses what has two meanings: a mask whose shape fits both of them, an extra argument that would override another.
Shapes: B batch, H heads, Q query length, K key length; query (B, Q, H, D), key (B, K, N, D).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from heedful.masks import KeyPadding, SlidingWindow, as_mask
from heedful.tracing import malformed

# What attention_kwargs may not say: it would override an argument of the call, or change what is returned.
SEMANTIC = frozenset({
    "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa", "attention_kwargs",
    "backend", "parallel_config", "_parallel_config", "return_lse", "return_attn_probs",
})  # fmt: skip


def mask_of(attn_mask: Any, query: Any, key: Any) -> Any:
    """diffusers' mask as heedful takes it.

    (B, K) is key padding, bool or to be added; (B, Q, K) holds for all heads. (Q, K) and (H, Q, K), SDPA's meaning of
    these ranks, are taken where only they fit; where both do and B > 1, the mask is refused. Other ranks mean what they
    mean to SDPA. Mask values, such as ``heedful.Causal("bottom_right")``, and a ``BlockMask`` pass as they are.
    """
    if not isinstance(attn_mask, Tensor) or attn_mask.dim() not in (2, 3):
        return attn_mask
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and query.dim() == key.dim() == 4):
        return attn_mask  # which heedful refuses
    batch, queries, heads, first = query.shape[0], query.shape[1], query.shape[2], attn_mask.shape[0]
    if first == 1 or first != batch:
        return attn_mask
    if attn_mask.dim() == 3:
        if batch == heads:
            malformed("attn_mask", f"3 dimensions where batch = heads = {batch}", _OF_THREE)
        return attn_mask[:, None]
    if attn_mask.shape[1] != key.shape[1]:
        return attn_mask
    if batch == queries:
        malformed("attn_mask", f"2 dimensions where batch = queries = {batch}", _OF_TWO)
    return KeyPadding(attn_mask) if attn_mask.dtype == torch.bool else attn_mask[:, None, None, :]


_OF_TWO = (
    "it could be (batch, keys) or (queries, keys); say which: "
    "attn_mask[:, None, None, :] is key padding, attn_mask[None, None] holds for every batch row"
)
_OF_THREE = (
    "it could be (batch, queries, keys) or (heads, queries, keys); say which: "
    "attn_mask[:, None] is for each batch row, attn_mask[None] for each head"
)


def extras_of(attention_kwargs: Any) -> dict[str, Any]:
    """``attention_kwargs`` as ``window_size``, ``softcap`` and ``options``: the backend's own, which it may refuse.

    A name that is an argument of the call raises InvalidArgument: nothing is overridden. None is as good as not given.
    """
    if not isinstance(attention_kwargs, Mapping):
        malformed(
            "attention_kwargs", type(attention_kwargs).__name__, "give a mapping from option names to values, or None"
        )
    options = {name: value for name, value in attention_kwargs.items() if value is not None}
    for name in options:
        if name in SEMANTIC:
            malformed(
                f"attention_kwargs[{name!r}]",
                "an argument of the call",
                "pass it as that argument; no option overrides it",
            )
    return {
        "window_size": options.pop("window_size", (-1, -1)),
        "softcap": options.pop("softcap", 0.0),
        "options": options,
    }


def windowed(attn_mask: Any, window_size: tuple[int, int], query: Any, key: Any) -> Any:
    """The mask within flash-attn's window: (left, right), both included, -1 open, aligned to the ends of the lengths.

    Unlike ``is_causal``, which means what it means to SDPA: aligned to the starts.
    """
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        malformed("window_size", repr(window_size), "give (left, right), -1 for an open side")
    left, right = window_size
    if left in (-1, None) and right in (-1, None):
        return attn_mask
    even = query.dim() == key.dim() == 4 and query.shape[1] == key.shape[1]
    window = SlidingWindow(left, right, "top_left" if even else "bottom_right")
    mask = as_mask(attn_mask)
    return window if mask is None else mask & window
