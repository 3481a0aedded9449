"""FlexAttention: masks and soft caps as small functions that its kernel generator compiles in.

On a GPU it is compiled by torch. On a CPU the operator runs uncompiled and gives no gradient (torch 2.13 has none
there); under a user's ``torch.compile`` it is refused on a CPU, where the generated code is silently wrong at short
lengths (torch 2.13, lengths below 32 with head dim 8 or 16).

Shapes: B batch, H heads, Q query length, K key length.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from heedful.masks import Mask
from heedful.strategy import FLOATS, HALF, AttentionStrategy, Limits

_COMMON = Limits(
    devices=("cpu",),
    dtypes=FLOATS,
    value_dim_may_differ=True,
    masks=frozenset({"causal", "window", "key_padding", "dense", "bias", "block"}),
    mixed_masks=True,
    causal_alignments=("top_left", "bottom_right"),
    bias_in_query_dtype=False,
    empty_rows=frozenset({"output", "lse"}),
    gqa=True,
    scale=True,
    softcap=True,
    lse=True,
    options=frozenset({"kernel_options"}),
    contends=False,  # uncompiled
)


class FlexAttentionStrategy(AttentionStrategy):
    """FlexAttention: every mask and soft caps; compiled on GPUs, plain on a CPU."""

    name = "flex"
    limits = (
        replace(_COMMON, scores_in_memory=True),
        replace(
            _COMMON,
            devices=("cuda", "xpu"),
            min_capability=(7, 5),
            architectures=("gfx",),
            dtypes=(torch.float32, *HALF),
            bfloat16_from=(8, 0),  # below it torch leaves the call uncompiled
            min_head_dim=16,
            backward=True,
            compile=True,
            contends=True,
            faster_with=frozenset({"block_mask"}),  # which it would make of the same mask at every call
        ),
    )

    def compute_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        attn_mask: Tensor | None = None,
        attn_bias: Tensor | None = None,
        is_causal: bool = False,
        causal_alignment: str = "top_left",
        window: tuple[int | None, int | None] | None = None,
        window_alignment: str = "top_left",
        key_padding: Tensor | None = None,
        block_mask: Any = None,
        scale: float | None = None,
        enable_gqa: bool = False,
        softcap: float | None = None,
        return_lse: bool = False,
        kernel_options: dict[str, Any] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """See the base class; ``kernel_options`` are FlexAttention's."""
        lengths = (query.shape[-2], key.shape[-2])
        bias = attn_mask if attn_mask is not None and attn_mask.dtype != torch.bool else attn_bias
        dense = attn_mask if attn_mask is not None and attn_mask.dtype == torch.bool else None
        full = (query.shape[0], query.shape[1], *lengths)
        conditions: list[Callable[..., Tensor]] = []
        if is_causal:
            conditions.append(_band(None, 0, causal_alignment, *lengths))
        if window is not None:
            conditions.append(_band(*window, window_alignment, *lengths))
        if key_padding is not None:
            keep = key_padding.expand(query.shape[0], -1)
            conditions.append(lambda b, h, q, k: keep[b, k])  # noqa: ARG005
        if dense is not None:
            conditions.append(_lookup(dense.expand(full)))
        if block_mask is not None and (conditions or query.device.type == "cpu"):  # only alone is it compiled as it is
            listed = Mask(block=block_mask).visible(*lengths, query.device)
            assert listed is not None
            conditions.append(_lookup(listed.expand(full)))
            block_mask = None
        score = _score(softcap, None if bias is None else _lookup(bias.expand(full)))
        given = (query, key, value, score, conditions)
        if query.device.type == "cpu":
            return _eager(*given, scale, return_lse, kernel_options)
        return _compiled(*given, block_mask, scale, enable_gqa, return_lse, kernel_options)


def _eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score: Callable[..., Tensor] | None,
    conditions: list[Callable[..., Tensor]],
    scale: float | None,
    return_lse: bool,
    kernel_options: dict[str, Any] | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The operator itself. ``flex_attention`` would trace it anew at every call and stop compiling after eight."""
    from torch._higher_order_ops.flex_attention import flex_attention as operator
    from torch.nn.attention import flex_attention as flex

    if torch._C._functorch.maybe_current_level() is not None:  # the operator's own error there is a bare KeyError
        raise NotImplementedError("flex: torch.func transforms do not pass through it; use native_math or reference")
    if any(forward_ad.unpack_dual(t).tangent is not None for t in (query, key, value)):
        raise NotImplementedError("flex: no forward-mode gradient passes through it; use native_math or reference")
    query, key, value = query.detach(), key.detach(), value.detach()  # it refuses inputs that could want a gradient
    block = list(flex._create_empty_block_mask(query, key).as_tuple())
    if conditions:
        block[-1] = flex.and_masks(*conditions)
    options = {"BACKEND": "AUTO", "OUTPUT_LOGSUMEXP": return_lse, "OUTPUT_MAX": False, **(kernel_options or {})}
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    out, lse = operator(query, key, value, score or flex._identity, tuple(block), scale, options)[:2]
    return (out, (lse * math.log(2.0)).float()) if return_lse else out


def _compiled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score: Callable[..., Tensor] | None,
    conditions: list[Callable[..., Tensor]],
    block_mask: Any,
    scale: float | None,
    enable_gqa: bool,
    return_lse: bool,
    kernel_options: dict[str, Any] | None,
) -> Tensor | tuple[Tensor, Tensor]:
    from torch.nn.attention import flex_attention as flex

    if conditions:
        sizes = (query.shape[0], query.shape[1], query.shape[-2], key.shape[-2])
        block_mask = flex.create_block_mask(flex.and_masks(*conditions), *sizes, device=str(query.device))
    call: Any = flex.flex_attention if torch.compiler.is_compiling() else _compile_once()
    answer = call(
        query,
        key,
        value,
        score_mod=score,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=enable_gqa,
        kernel_options=kernel_options,
        **_ask_for_lse(return_lse),
    )
    if not return_lse:
        return answer  # type: ignore[no-any-return]
    out, extra = answer
    return out, getattr(extra, "lse", extra).float()


def _ask_for_lse(wanted: bool) -> dict[str, Any]:
    """``return_lse`` until torch 2.8; from 2.9 on it warns, and ``return_aux`` takes its place."""
    from torch.nn.attention import flex_attention as flex

    if not wanted:
        return {}
    return {"return_aux": flex.AuxRequest(lse=True)} if hasattr(flex, "AuxRequest") else {"return_lse": True}


@functools.lru_cache(maxsize=1)
def _compile_once() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _lookup(table: Tensor) -> Callable[..., Tensor]:
    return lambda b, h, q, k: table[b, h, q, k]


def _band(
    left: int | None, right: int | None, alignment: str, query_length: int, key_length: int
) -> Callable[..., Tensor]:
    shift = key_length - query_length if alignment == "bottom_right" else 0

    def within(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = k == k
        if right is not None:
            seen = seen & (k <= q + shift + right)
        return seen if left is None else seen & (k >= q + shift - left)

    return within


def _score(softcap: float | None, bias: Callable[..., Tensor] | None) -> Callable[..., Tensor] | None:
    if softcap is None and bias is None:
        return None

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        return score if bias is None else score + bias(b, h, q, k)

    return score_mod
