"""Stands in for FlashAttention-3, on any device: flash_attn_3 3.0.0, flash-attention's folder hopper after August 2025.

As the real one: the answer is a tensor, or (out, LSE) with ``return_attn_probs``; no dropout; causality and windows are
aligned to the bottom right; the LSE of a row without a key is -inf, and carries no gradient; head dims are multiples of
8 up to 256, and of values differ only as (129..192, 97..128) or (up to 64, up to 512); values whose tokens are
neighbours in memory are refused; no deterministic backward for head dims above 192; packed tokens behind the last
sequence, and queries beyond ``max_seqlen_q``, are not written (here: NaN).

Not imitated: float8, ``qv``, ``attention_chunk``, ``seqused_*``; gradients of unwritten rows; rounding.
"""

import math

import torch


def flash_attn_func(
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    _only_plain(qv, q_descale, k_descale, v_descale, attention_chunk)
    _check(q, k, v, deterministic)
    batch, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    _check_shape("k", k, (batch, keys, k.shape[2], q.shape[3]))
    _check_shape("v", v, (batch, keys, k.shape[2], v.shape[3]))
    place = torch.arange(queries, device=q.device) + keys - queries
    distance = torch.arange(keys, device=q.device)[None, :] - place[:, None]
    seen = _in_window(distance, window_size, causal, queries, keys)
    out, lse = _attend(*(t.transpose(1, 2) for t in (q, k, v)), seen, softmax_scale, softcap)
    out = _maybe_refuse_backward(out.transpose(1, 2), q, v, deterministic)
    return (out, lse) if return_attn_probs else out


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    _only_plain(qv, q_descale, k_descale, v_descale, attention_chunk, seqused_q, seqused_k)
    _check(q, k, v, deterministic)
    for name, cu, longest in (("q", cu_seqlens_q, max_seqlen_q), ("k", cu_seqlens_k, max_seqlen_k)):
        if cu.dtype != torch.int32:
            raise RuntimeError(f"cu_seqlens_{name} must have dtype torch.int32")
        if not cu.is_contiguous():
            raise RuntimeError(f"cu_seqlens_{name} must be contiguous")
        if longest is None:
            raise RuntimeError(f"max_seqlen_{name} must be provided if cu_seqlens_{name} is provided")
        _check_shape(f"cu_seqlens_{name}", cu, cu_seqlens_q.shape)
    total, keys, sequences = q.shape[0], k.shape[0], cu_seqlens_q.shape[0] - 1
    _check_shape("k", k, (keys, k.shape[1], q.shape[2]))
    _check_shape("v", v, (keys, k.shape[1], v.shape[2]))
    own_q, place_q = _owners(cu_seqlens_q, total)
    own_k, place_k = _owners(cu_seqlens_k, keys)
    longer = (cu_seqlens_k.diff() - cu_seqlens_q.diff())[own_q.clamp(max=sequences - 1)]
    distance = place_k[None, :] - (place_q + longer)[:, None]
    written = (own_q < sequences) & (place_q < max_seqlen_q)
    seen = _in_window(distance, window_size, causal, max_seqlen_q, max_seqlen_k)
    seen = seen & (own_q[:, None] == own_k[None, :]) & written[:, None]
    out, lse = _attend(*(t.transpose(0, 1)[None] for t in (q, k, v)), seen, softmax_scale, softcap)
    out = torch.where(written[:, None, None], out[0].transpose(0, 1), math.nan)
    lse = torch.where(written[None, :], lse[0], math.nan)
    out = _maybe_refuse_backward(out, q, v, deterministic)
    return (out, lse) if return_attn_probs else out


def _only_plain(*extras):
    if any(extra is not None and extra != 0 for extra in extras):
        raise NotImplementedError("this stand-in has only plain attention")


def _check(q, k, v, deterministic):
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("FlashAttention only supports fp16, bf16, and fp8_e4m3 data type")
    if not q.dtype == k.dtype == v.dtype:
        raise RuntimeError("query and key must have the same dtype")
    if v.stride(-1) != 1 and v.stride(-3) == 1:  # every other layout is copied by the wrapper
        raise RuntimeError("Input tensor must have contiguous last dimension")
    dim, value_dim = q.shape[-1], v.shape[-1]
    if dim > 256:
        raise RuntimeError("FlashAttention forward only supports head dimension at most 256")
    if q.shape[-2] % k.shape[-2]:
        raise RuntimeError("Number of heads in key/value must divide number of heads in query")
    pairs = (128 < dim <= 192 and 96 < value_dim <= 128) or (dim <= 64 and value_dim <= 512)
    if dim != value_dim and not pairs:
        raise RuntimeError("If V headdim is different from Q/K dim, we only support Q/K headdim in (128, 192] and ...")
    if dim % 8 or value_dim % 8:
        raise RuntimeError("head_size should be a multiple of 8")


def _check_shape(name, tensor, shape):
    if tuple(tensor.shape) != tuple(shape):
        raise RuntimeError(f"{name} must have shape {tuple(shape)}")


def _maybe_refuse_backward(out, q, v, deterministic):
    if deterministic and max(q.shape[-1], v.shape[-1]) > 192 and out.requires_grad:

        def refuse(_grad):
            raise RuntimeError("Deterministic backward not supported for hdim 256.")

        out.register_hook(refuse)
    return out


def _owners(cu, total):
    """Of each token, its sequence and its place in it; tokens behind the last sequence have its number plus one."""
    tokens = torch.arange(total, device=cu.device)
    owner = torch.searchsorted(cu[1:].contiguous(), tokens, right=True)
    return owner, tokens - cu[owner.clamp(max=cu.shape[0] - 2)]


def _in_window(distance, window_size, causal, queries, keys):
    left, right = window_size
    right = 0 if causal else right
    left, right = (keys if left < 0 else left), (queries if right < 0 else right)
    return (distance >= -left) & (distance <= right) if max(window_size) >= 0 or causal else distance == distance


def _attend(q, k, v, seen, scale, softcap):
    """(B, H, Q, D), (B, N, K, D), (B, N, K, E) to out and LSE (B, H, Q)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    groups = q.shape[1] // k.shape[1]
    key, value = (t.float().repeat_interleave(groups, dim=1) for t in (k, v))
    scores = q.float() @ key.mT * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -math.inf)
    highest = scores.detach().amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    weights = torch.exp(scores - highest)
    total = weights.sum(-1, keepdim=True)
    lse = (torch.log(total) + highest).squeeze(-1)
    out = weights / torch.where(total == 0, 1.0, total) @ value
    return out.to(q.dtype), lse.detach()
