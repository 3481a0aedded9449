"""The attention function that transformers calls, in terms of ``heedful.attention``.

Takes what models of transformers 5 hand over: grouped heads, a bias of positions (T5), softcap (Gemma 2), packed
sequences (``cu_seq_lens_q``). Refuses, by name, what it would have to leave out: weights as an output, a window that no
mask holds, sparse indices, a paged cache, and any argument that it does not know. Sinks go to the dispatcher, which
says why no backend computes them.

Shapes: B batch, H heads, N kv heads, Q query length, K key length, D head size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from heedful.dispatch import attention
from heedful.integrations.transformers.masks import StructuredMask
from heedful.masks import Bias, Causal, Mask, Varlen, as_mask
from heedful.tracing import malformed

# What models pass through to every attention function, and "sdpa" ignores, too: it changes no weight.
_OF_NO_WEIGHT = frozenset({
    "cache_position", "deterministic", "layer_idx", "logits_to_keep", "max_length_k", "max_length_q",
    "num_items_in_batch", "output_hidden_states", "output_router_logits", "position_ids", "return_dict", "seq_idx",
    "target_dtype", "use_cache",
})  # fmt: skip
_EAGER = "model.set_attn_implementation('eager') computes it"


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    output_attentions: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, by the backend that is wished for.

    Args:
        module: the layer; ``module.is_causal`` counts where ``is_causal`` is None.
        query: (B, H, Q, D); key and value (B, N, K, D), where N divides H.
        attention_mask: what ``masks.attention_mask`` made, or a tensor with SDPA's meaning, or None: then queries see
            the keys up to their own place where the layer is causal, and all keys where it is not, or where Q is 1.
        position_bias: float, broadcastable to (B, H, Q, K), added to the scaled scores.
        sliding_window: known by the mask already.

    Returns:
        The output (B, Q, H, D), and None in place of weights, which no backend makes.

    Raises:
        InvalidArgument: an argument would have to be left out. Refused: no wanted backend computes the problem.
    """
    if output_attentions:
        malformed("output_attentions", True, f"heedful makes no matrix of weights; {_EAGER}")
    _check_others(others)
    causal = _is_causal(module, query, key, attention_mask, is_causal)
    mask = _given(attention_mask, key)
    if mask is None:
        _check_window(sliding_window, key)
        mask = _packed(cu_seq_lens_q, cu_seq_lens_k)
    if position_bias is not None:
        parts = (Bias(position_bias), as_mask(mask), Causal() if causal else None)
        mask, causal = _joined(*parts), False
    out = attention(
        query,
        key,
        value,
        mask,
        dropout,
        causal,
        scaling,
        query.shape[1] != key.shape[1],
        softcap=softcap,
        sinks=s_aux if sinks is None else sinks,
    )
    return out.transpose(1, 2).contiguous(), None


def _check_others(others: dict[str, Any]) -> None:
    for name, given in others.items():
        if name not in _OF_NO_WEIGHT and given is not None and given is not False:
            remedy = "heedful does not know what it changes; model.set_attn_implementation('sdpa') leaves it out"
            malformed(name, type(given).__name__, remedy)


def _is_causal(module: nn.Module, query: Tensor, key: Tensor, attention_mask: Any, is_causal: bool | None) -> bool:
    """Whether causality is left to the attention function: where no mask came, and there is more than one query."""
    wanted = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is not None or not wanted or query.shape[2] == 1:
        return False
    if query.shape[2] != key.shape[2]:
        observed = f"None for {query.shape[2]} queries and {key.shape[2]} keys of a causal layer"
        malformed("attention_mask", observed, "give a mask, for which keys they see cannot be told")
    return True


def _given(attention_mask: Any, key: Tensor) -> Any:
    """The mask as a value where its structure is known; a tensor's keys past the last are those of an empty cache."""
    if isinstance(attention_mask, StructuredMask):
        return attention_mask.simplest
    if isinstance(attention_mask, Tensor) and attention_mask.shape[-1] > key.shape[2]:
        return attention_mask[..., : key.shape[2]]
    return attention_mask


def _check_window(sliding_window: int | None, key: Tensor) -> None:
    if sliding_window is not None and key.shape[2] > sliding_window:
        observed = f"{sliding_window}, of {key.shape[2]} keys, and no mask that holds it"
        malformed("sliding_window", observed, "give a mask, or let the model make it")


def _packed(ends_q: Tensor | None, ends_k: Tensor | None) -> Mask | None:
    return None if ends_q is None else Varlen(ends_q, ends_k)


def _joined(bias: Mask, *parts: Mask | None) -> Mask:
    for part in parts:
        bias = bias if part is None else bias & part
    return bias
