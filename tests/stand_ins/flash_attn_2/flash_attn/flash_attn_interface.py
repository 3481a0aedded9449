"""Stands in for flash-attn 2.8.3, on any device: plain torch, float32 inside.

As the real one: head dims that are no multiple of 8 are padded by the wrapper; causality and windows are aligned to the
bottom right; the LSE of a row without a key is +inf; the LSE carries no gradient; a window's end of K or more counts as
open, and an open right end as K (so with more queries than keys some windows are silently wrong); packed tokens
behind the last sequence, and queries beyond ``max_seqlen_q``, are not written (here: NaN); packed grouped heads with
``max_seqlen_q=1`` must have one query in every sequence. Softcap excludes dropout.

Not imitated: ``block_table``; gradients of unwritten rows, which are not written either; rounding.
"""

import math

import torch


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    _check(q, k, v, dropout_p, softcap)
    (batch, queries, _, dim), keys = q.shape, k.shape[1]
    _check_shape("k", k, (batch, keys, k.shape[2], dim))
    _check_shape("v", v, (batch, keys, k.shape[2], dim))
    if queries == 1 and alibi_slopes is None:
        causal = False
    device = q.device
    distance = torch.arange(keys, device=device)[None, :] - _places(queries, keys, device)[:, None]
    seen = _in_window(distance, window_size, causal, keys)
    bias = _alibi(alibi_slopes, distance, batch, q.shape[2])
    heads_second = [t.transpose(1, 2) for t in (q, k, v)]
    out, lse, probabilities = _attend(*heads_second, seen, bias, dropout_p, softmax_scale, softcap)
    out = out.transpose(1, 2)
    return (out, lse, probabilities) if return_attn_probs else out


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    if block_table is not None:
        raise NotImplementedError("this stand-in has no block_table")
    _check(q, k, v, dropout_p, softcap)
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if cu.dtype != torch.int32:
            raise RuntimeError(f"{name} must have dtype int32")
        if not cu.is_contiguous():
            raise RuntimeError(f"{name} must be contiguous")
        _check_shape(name, cu, cu_seqlens_q.shape)
    if not all(isinstance(length, (int, torch.SymInt)) for length in (max_seqlen_q, max_seqlen_k)):
        raise TypeError("varlen_fwd(): incompatible function arguments")
    (total, heads, dim), keys, kv_heads = q.shape, k.shape[0], k.shape[1]
    _check_shape("k", k, (keys, kv_heads, dim))
    _check_shape("v", v, (keys, kv_heads, dim))
    sequences = cu_seqlens_q.shape[0] - 1
    if sequences < 1:
        raise RuntimeError("batch size must be positive")
    if max_seqlen_q == 1 and alibi_slopes is None:
        causal = False
        one_each = heads > kv_heads and max(window_size) < 0 and dropout_p == 0.0
        if one_each and total != sequences:
            groups = f"[{sequences}, {kv_heads}, {heads // kv_heads}, {dim}]"
            raise RuntimeError(f"shape '{groups}' is invalid for input of size {q.numel()}")
    own_q, place_q = _owners(cu_seqlens_q, total)
    own_k, place_k = _owners(cu_seqlens_k, keys)
    known = own_q.clamp(max=sequences - 1)
    longer = (cu_seqlens_k.diff() - cu_seqlens_q.diff())[known]
    distance = place_k[None, :] - (place_q + longer)[:, None]
    written = (own_q < sequences) & (place_q < max_seqlen_q)
    seen = _in_window(distance, window_size, causal, max_seqlen_k) & (own_q[:, None] == own_k[None, :])
    bias = None
    if alibi_slopes is not None:
        per_query = alibi_slopes[None, :].expand(sequences, -1) if alibi_slopes.dim() == 1 else alibi_slopes
        bias = -per_query[known].T[None, :, :, None] * distance.abs()[None, None]
    heads_first = [t.transpose(0, 1)[None] for t in (q, k, v)]
    out, lse, probabilities = _attend(*heads_first, seen & written[:, None], bias, dropout_p, softmax_scale, softcap)
    out = torch.where(written[:, None, None], out[0].transpose(0, 1), math.nan)
    lse = torch.where(written[None, :], lse[0], math.nan)
    return (out, lse, probabilities) if return_attn_probs else out


def _check(q, k, v, dropout_p, softcap):
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    if not q.dtype == k.dtype == v.dtype:
        raise RuntimeError("query and key must have the same dtype")
    if q.shape[0] == 0:
        raise RuntimeError("batch size must be positive")
    if q.shape[-1] > 256:
        raise RuntimeError("FlashAttention forward only supports head dimension at most 256")
    if q.shape[-2] % k.shape[-2]:
        raise RuntimeError("Number of heads in key/value must divide number of heads in query")
    if softcap > 0 and dropout_p > 0:
        raise RuntimeError("Softcapping does not support dropout for now")


def _check_shape(name, tensor, shape):
    if tuple(tensor.shape) != tuple(shape):
        raise RuntimeError(f"{name} must have shape {tuple(shape)}")


def _places(queries, keys, device):
    return torch.arange(queries, device=device) + keys - queries


def _owners(cu, total):
    """Of each token, its sequence and its place in it; tokens behind the last sequence have its number plus one."""
    tokens = torch.arange(total, device=cu.device)
    owner = torch.searchsorted(cu[1:].contiguous(), tokens, right=True)
    return owner, tokens - cu[owner.clamp(max=cu.shape[0] - 2)]


def _in_window(distance, window_size, causal, keys):
    """Bool like ``distance``; with the real one's rules for ends of K or more, and for open ones."""
    left, right = (-1 if side >= keys else side for side in window_size)
    right = 0 if causal else right
    if left < 0 and right < 0:
        return torch.ones_like(distance, dtype=torch.bool)
    left, right = (keys if side < 0 else side for side in (left, right))
    return (distance >= -left) & (distance <= right)


def _alibi(slopes, distance, batch, heads):
    if slopes is None:
        return None
    if slopes.dtype != torch.float32:
        raise RuntimeError("ALiBi slopes must have dtype fp32")
    return -slopes.expand(batch, heads)[:, :, None, None] * distance.abs()


def _attend(q, k, v, seen, bias, dropout_p, scale, softcap):
    """(B, H, Q, D), (B, N, K, D), (B, N, K, D) to out, LSE (B, H, Q) and what the real one calls S_dmask."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    groups = q.shape[1] // k.shape[1]
    key, value = (t.float().repeat_interleave(groups, dim=1) for t in (k, v))
    scores = q.float() @ key.mT * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~seen, -math.inf)
    highest = scores.detach().amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    weights = torch.exp(scores - highest)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    weights = weights / torch.where(empty, 1.0, total)
    lse = torch.where(empty, math.inf, torch.log(torch.where(empty, 1.0, total)) + highest).squeeze(-1)
    weights = torch.nn.functional.dropout(weights, dropout_p)
    probabilities = weights.to(q.dtype) if dropout_p > 0 else q.new_empty(0)
    return (weights @ value).to(q.dtype), lse.detach(), probabilities.detach()
