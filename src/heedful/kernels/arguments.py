"""A strategy's arguments as the kernels' call: what our own strategies have in common.

Shapes: B batch, Q query length, K key length, H heads, D head dim, E value dim, T packed tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heedful.kernels.operands import Call, Packing, call_of
from heedful.masks import Varlen
from heedful.strategy import packed_arguments


def call_of_arguments(
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
    query_padding: Tensor | None = None,
    varlen: Varlen | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,  # noqa: ARG001 - the kernels read the head counts
    softcap: float | None = None,
) -> Call:
    """The call that these arguments mean. One that is not among them is a TypeError."""
    causal = ((None, 0, causal_alignment),) if is_causal else ()
    band = ((*window, window_alignment),) if window is not None else ()
    return call_of(
        query,
        key,
        value,
        scale=scale,
        softcap=softcap,
        bands=(*causal, *band),
        dense=attn_mask if attn_mask is not None and attn_mask.dtype == torch.bool else None,
        bias=bias_of(attn_mask, attn_bias),
        keep=key_padding,
        rows=query_padding,
        packing=None if varlen is None else packing_of(varlen, query, key),
    )


def bias_of(attn_mask: Tensor | None = None, attn_bias: Tensor | None = None, **_rest: Any) -> Tensor | None:
    """The bias among these arguments, as it was given: (B, H, Q, K), any of them 1."""
    return attn_bias if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask


def packing_of(varlen: Varlen, query: Tensor, key: Tensor) -> Packing:
    """A packing as the kernels take it; tidy only where it is known that every token is of a sequence."""
    if len(varlen.cu_seqlens_q) == 1:  # no sequence, so no longest one
        varlen = varlen.with_lengths((), ())
    queries, keys = (t if t.dim() == 3 else t[0].transpose(0, 1) for t in (query, key))
    ends = packed_arguments(varlen, queries, keys)
    longest = ends["max_seqlen_q"], ends["max_seqlen_k"]
    tidy = varlen.packing(len(queries), len(keys)) == "tidy"
    return Packing(ends["cu_seqlens_q"].contiguous(), ends["cu_seqlens_k"].contiguous(), *longest, tidy)


def as_given(query: Tensor, out: Tensor, lse: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Output and LSE of the kernels in the form of the query: packed ones as (T, H, E) and (H, T)."""
    if query.dim() == 4:
        return out, lse
    return out.squeeze(0).transpose(0, 1), None if lse is None else lse.squeeze(0)
