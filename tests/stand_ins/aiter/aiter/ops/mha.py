"""``flash_attn_func`` and ``flash_attn_varlen_func`` of AITER in plain torch; imitates amd-aiter 0.1.7.post2.dev18.

Layouts (B, S, H, D) and (T, H, D); fp16 and bf16; head dims up to 256; grouped heads; causal and windows are aligned
to the bottom right. Its quirks: under autograd ``return_lse`` must be True (an AssertionError otherwise), and then a
tuple comes back; what is returned is a tuple only where more than the output was asked for. A window whose two sides
are both 0 or open goes to the assembly kernels as if it were none: here it is a RuntimeError. A right end of the
longest key sequence or more counts as open, and an open one beside a left end as the number of keys. Cumulative
lengths are int32; the output of rows that see no key is zero, their LSE -inf from one of its kernels and undefined
from the other: here it is NaN.
"""

from __future__ import annotations

import math
from typing import Optional

import torch

_HALF = (torch.float16, torch.bfloat16)


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    bias=None,
    alibi_slopes=None,
    deterministic=True,
    return_lse=False,
    return_attn_probs=False,
    how_v3_bf16_cvt=1,
    cu_seqlens_q: Optional[torch.Tensor] = None,  # noqa: UP045 - the signature is the original's
    cu_seqlens_kv: Optional[torch.Tensor] = None,  # noqa: UP045
):
    """(B, Q, H, D), (B, K, N, D), (B, K, N, E) to (B, Q, H, E); LSE (B, H, Q)."""
    assert bias is None
    assert alibi_slopes is None
    assert cu_seqlens_q is None
    assert cu_seqlens_kv is None
    _check(q, k, v, window_size, return_lse, rank=4)
    out, lse = _attend(q, k, v, dropout_p, softmax_scale, causal, window_size, k.shape[1])
    return _result(q, out, lse, return_lse, return_attn_probs)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    min_seqlen_q=0,
    dropout_p=0.0,
    softmax_scale=None,
    logits_soft_cap=0.0,
    causal=False,
    window_size=(-1, -1),
    bias=None,
    alibi_slopes=None,
    deterministic=False,
    return_lse=False,
    return_attn_probs=False,
    how_v3_bf16_cvt=1,
    block_table=None,
    out=None,
    cu_seqlens_q_padded: Optional[torch.Tensor] = None,  # noqa: UP045
    cu_seqlens_k_padded: Optional[torch.Tensor] = None,  # noqa: UP045
):
    """(T, H, D), (S, N, D), (S, N, E) to (T, H, E); LSE (H, T)."""
    assert bias is None
    assert alibi_slopes is None
    assert block_table is None
    assert out is None
    assert logits_soft_cap == 0.0
    _check(q, k, v, window_size, return_lse, rank=3)
    starts = []
    for cu, longest in ((cu_seqlens_q, max_seqlen_q), (cu_seqlens_k, max_seqlen_k)):
        if cu.dtype != torch.int32 or not cu.is_contiguous():
            raise RuntimeError("cu_seqlens must be contiguous and int32")
        starts.append(cu.tolist())
        assert type(longest) is int
        assert longest >= int(cu.diff().max())
    parts = []
    for i in range(len(starts[0]) - 1):
        (from_q, to_q), (from_k, to_k) = (s[i : i + 2] for s in starts)
        part = (q[None, from_q:to_q], k[None, from_k:to_k], v[None, from_k:to_k])
        parts.append(_attend(*part, dropout_p, softmax_scale, causal, window_size, max_seqlen_k))
    packed = torch.cat([part[0][0] for part in parts])
    return _result(q, packed, torch.cat([part[1][0] for part in parts], -1), return_lse, return_attn_probs)


def _check(q, k, v, window_size, return_lse, rank):
    if q.dim() != rank:
        raise RuntimeError(f"expected {rank} dimensions, got {q.dim()}")
    if q.dtype not in _HALF or not q.dtype == k.dtype == v.dtype:
        raise RuntimeError("invalid argument for fmha_fwd: FlashAttention only support fp16 and bf16 data type")
    if max(q.shape[-1], v.shape[-1]) > 256 or q.shape[-2] % k.shape[-2]:
        raise RuntimeError("invalid argument for fmha_fwd")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        assert return_lse
    if tuple(window_size) != (-1, -1) and max(window_size) <= 0:
        raise RuntimeError("such windows may be ignored by the assembly kernels")


def _attend(q, k, v, p, scale, causal, window_size, longest):
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    length, keys = scores.shape[-2:]
    behind = torch.arange(keys) - (torch.arange(length)[:, None] + keys - length)
    left, right = (-1 if side >= longest else side for side in window_size)
    right = 0 if causal else keys if right < 0 <= left else right
    hidden = torch.zeros(length, keys, dtype=torch.bool)
    hidden = hidden if left < 0 else hidden | (behind < -left)
    hidden = hidden if right < 0 else hidden | (behind > right)
    scores = scores.masked_fill(hidden, -math.inf)
    lse = torch.logsumexp(scores, -1) if keys else scores.new_full(scores.shape[:-1], -math.inf)
    empty = (lse == -math.inf)[..., None]
    weights = torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    weights = torch.nn.functional.dropout(weights, p)
    return (weights @ v).transpose(1, 2), lse.detach().masked_fill(lse == -math.inf, math.nan)


def _result(q, out, lse, return_lse, return_attn_probs):
    out = out.to(q.dtype)
    more = ([lse.float()] if return_lse else []) + ([None] if return_attn_probs else [])
    return (out, *more) if more else out
