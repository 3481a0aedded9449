"""The judge: attention as the formula says, in float64, a block of queries at a time. Right everywhere, and slow.

out = softmax(scale * q k^T, soft-capped, biased, masked) v;  lse = logsumexp of the same scores, natural log.
The soft cap is cap * tanh(score / cap), before bias and mask, as in Gemma 2 (arXiv 2408.00118).
Devices without float64 (MPS) compute in float32.

Shapes: B batch, H heads, N kv heads, Q query length, K key length, D head dim, E value dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from heedful.masks import Mask, Varlen
from heedful.strategy import ALL_MASKS, FLOATS, AttentionStrategy, Limits
from heedful.visibility import EVERY, cut

_BYTES = 32 * 2**20  # for one block of scores; four times as much is no faster on two CPU cores


class ReferenceAttentionStrategy(AttentionStrategy):
    """The fp64 formula in blocks of queries: the judge of all others."""

    name = "reference"
    limits = Limits(
        dtypes=FLOATS,
        value_dim_may_differ=True,
        masks=ALL_MASKS,
        mixed_masks=True,
        loose_packs=True,
        causal_alignments=("top_left", "bottom_right"),
        bias_in_query_dtype=False,
        bias_backward=True,
        empty_rows=frozenset({"output", "lse"}),
        gqa=True,
        scale=True,
        softcap=True,
        dropout=True,
        lse=True,
        backward=True,
        deterministic_backward=True,
        compile=True,
        contends=False,
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
        causal_alignment: Any = "top_left",
        window: tuple[int | None, int | None] | None = None,
        window_alignment: str = "top_left",
        key_padding: Tensor | None = None,
        query_padding: Tensor | None = None,
        varlen: Varlen | None = None,
        block_mask: Any = None,
        dropout_p: float = 0.0,
        scale: float | None = None,
        enable_gqa: bool = False,
        softcap: float | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """See the base class. Gradients recompute each block, so memory stays bounded by one."""
        dense, bias = (attn_mask, attn_bias) if _is_bool(attn_mask) else (None, attn_mask)
        mask = Mask(
            causal=causal_alignment if is_causal else None,
            window=(*window, window_alignment) if window else None,
            padding=key_padding,
            rows=query_padding,
            varlen=varlen,
            dense=dense,
            block=block_mask,
        )
        lengths = query.shape[-2], key.shape[-2]
        exact = torch.float32 if query.device.type == "mps" else torch.float64
        groups = query.shape[1] // key.shape[1] if enable_gqa else 1
        wide_key, wide_value = (t.to(exact).repeat_interleave(groups, dim=1) for t in (key, value))
        scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
        rows = _rows_per_block(query, key)
        blocks = []
        whole = rows == query.shape[-2]
        for start in (0,) if whole else range(0, query.shape[-2], rows):
            block = EVERY if whole else slice(start, start + rows)  # holds no length when traced
            part = query[..., block, :].to(exact) * scale
            seen = mask.visible_rows(block, *lengths, query.device)
            limits = (seen, None if bias is None else cut(bias, -2, block))
            if torch.is_grad_enabled() and not whole:
                recomputed = (_attend, part, wide_key, wide_value, *limits, softcap, dropout_p)
                blocks.append(checkpoint(*recomputed, use_reentrant=False))
            else:
                blocks.append(_attend(part, wide_key, wide_value, *limits, softcap, dropout_p))
        out = torch.cat([out for out, _ in blocks], dim=-2).to(query.dtype)
        return (out, torch.cat([lse for _, lse in blocks], dim=-1).float().detach()) if return_lse else out


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    scores = query @ key.transpose(-2, -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    lse = torch.logsumexp(scores, dim=-1)
    empty = (scores == -math.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)
    if dropout_p > 0:
        weights = torch.dropout(weights, dropout_p, train=True)
    return weights @ value, lse


def _is_bool(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.dtype == torch.bool


def _rows_per_block(query: Tensor, key: Tensor) -> int:
    if torch.compiler.is_compiling():
        return int(query.shape[-2])
    per_row = max(1, query.shape[0] * query.shape[1] * key.shape[-2] * 8)
    return max(1, min(query.shape[-2], _BYTES // per_row))
