"""Stands in for flash-attn-4 4.0.0b36 (CuTe DSL), on any device, which it takes for FLASH_ATTENTION_ARCH (sm_90).

As the real one: it refuses by AssertionError; the answer is always (out, LSE), the LSE None unless ``return_lse`` or an
input requires a gradient; an open end of a window is None, -1 is open only if both ends are negative; causality and
windows are aligned to the bottom right; the LSE of a row without a key is -inf; the LSE carries its gradient with
``return_lse`` only; head dims by architecture (8 to 256 on 9.x; on 10.x and 11.x up to 128, or (192, 128), or
(256, 256)); no backward on 8.x, no deterministic one on 12.x; packed tokens behind the last sequence, and queries
beyond ``max_seqlen_q``, are not written (here: NaN).

Not imitated: float8, everything that is more than plain attention (score_mod, sinks, pages, block sparsity, MLA);
gradients of unwritten rows; rounding.
"""

import math
import os

import torch


def flash_attn_func(
    q,
    k,
    v,
    qv=None,
    gather_kv_indices=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    score_mod=None,
    score_mod_bwd=None,
    mask_mod=None,
    aux_tensors=None,
    aux_scalars=None,
    block_sparse_tensors=None,
    block_sparse_tensors_bwd=None,
    return_lse=False,
    gather_bwd_recompute_p=False,
    gather_bwd_token_chunk=None,
):
    _only_plain(qv, gather_kv_indices, learnable_sink, score_mod, score_mod_bwd, mask_mod, aux_tensors, aux_scalars)
    _only_plain(block_sparse_tensors, block_sparse_tensors_bwd, gather_bwd_token_chunk)
    (batch, queries, _, dim), keys = q.shape, v.shape[-3]
    assert k.shape == (batch, keys, v.shape[-2], dim)
    assert v.shape == (batch, keys, k.shape[-2], v.shape[-1])
    _check(q, k, v)
    place = torch.arange(queries, device=q.device) + keys - queries
    distance = torch.arange(keys, device=q.device)[None, :] - place[:, None]
    seen = _in_window(distance, window_size, causal)
    out, lse = _attend(*(t.transpose(1, 2) for t in (q, k, v)), seen, softmax_scale, softcap)
    return _answer(out.transpose(1, 2), lse, q, k, v, return_lse, deterministic)


def flash_attn_varlen_func(
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    min_seqlen_k=None,
    seqused_q=None,
    seqused_k=None,
    gather_kv_indices=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    score_mod=None,
    score_mod_bwd=None,
    mask_mod=None,
    block_sparse_tensors=None,
    aux_tensors=None,
    aux_scalars=None,
    return_lse=False,
    scheduler_metadata=None,
    seqlen_k_per_split=None,
    disable_scheduler_metadata=False,
    gather_bwd_recompute_p=False,
    gather_bwd_token_chunk=None,
):
    _only_plain(qv, gather_kv_indices, learnable_sink, score_mod, score_mod_bwd, mask_mod, aux_tensors, aux_scalars)
    _only_plain(block_sparse_tensors, seqused_q, seqused_k, page_table, scheduler_metadata, gather_bwd_token_chunk)
    for cu in (cu_seqlens_q, cu_seqlens_k):
        assert cu.shape == cu_seqlens_q.shape, "cu_seqlens_k must have shape (batch_size + 1,)"
        assert cu.dtype == torch.int32, "cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k must be int32"
        assert cu.stride(0) == 1, "cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k must be contiguous"
    total, keys, sequences = q.shape[0], v.shape[0], cu_seqlens_q.shape[0] - 1
    assert k.shape == (keys, v.shape[1], q.shape[2])
    assert v.shape == (keys, k.shape[1], v.shape[2])
    _check(q, k, v)
    own_q, place_q = _owners(cu_seqlens_q, total)
    own_k, place_k = _owners(cu_seqlens_k, keys)
    longer = (cu_seqlens_k.diff() - cu_seqlens_q.diff())[own_q.clamp(max=sequences - 1)]
    distance = place_k[None, :] - (place_q + longer)[:, None]
    written = (own_q < sequences) & (place_q < (total if max_seqlen_q is None else max_seqlen_q))
    seen = _in_window(distance, window_size, causal) & (own_q[:, None] == own_k[None, :]) & written[:, None]
    out, lse = _attend(*(t.transpose(0, 1)[None] for t in (q, k, v)), seen, softmax_scale, softcap)
    out = torch.where(written[:, None, None], out[0].transpose(0, 1), math.nan)
    lse = torch.where(written[None, :], lse[0], math.nan)
    return _answer(out, lse, q, k, v, return_lse, deterministic)


def flash_attn_combine(
    out_partial,
    lse_partial,
    out=None,
    out_dtype=None,
    cu_seqlens=None,
    seqused=None,
    virtual_batch_idx=None,
    return_lse=True,
):
    raise NotImplementedError("this stand-in has only plain attention")


def _only_plain(*extras):
    if any(extra is not None for extra in extras):
        raise NotImplementedError("this stand-in has only plain attention")


def _generation():
    """The major compute capability that the kernels are chosen for; the real one reads the same variable first."""
    digits = os.environ.get("FLASH_ATTENTION_ARCH", "sm_90").lower().removeprefix("sm_").removeprefix("sm")
    return int(digits.rstrip("af")) // 10


def _check(q, k, v):
    assert v.dtype in (torch.float16, torch.bfloat16), "inputs must be float16, bfloat16, fp8 e4m3fn, or fp8 e5m2"
    assert q.dtype == k.dtype == v.dtype, "q, k, v, and qv must have the same dtype"
    generation, dims = _generation(), (q.shape[-1], v.shape[-1])
    assert generation in (8, 9, 10, 11, 12), "Unsupported compute capability. Supported: 8.x, 9.x, 10.x, 11.x, 12.x"
    assert q.shape[-2] % k.shape[-2] == 0, "num_head must be divisible by num_head_kv"
    known = max(dims) <= 256 if generation == 9 else max(dims) <= 128 or dims in ((192, 128), (256, 256))
    known = known and min(dims) >= 8 and not any(dim % 8 for dim in dims)
    assert known or generation in (8, 12), f"(head_dim, head_dim_v)={dims} is not supported on SM{generation}0."


def _answer(out, lse, q, k, v, return_lse, deterministic):
    generation, big = _generation(), q.shape[-1] == v.shape[-1] == 256

    def refuse(_grad):
        assert generation in (9, 10, 11, 12), "Unsupported compute capability. Supported: 9.x, 10.x, 11.x, 12.x"
        assert not deterministic, "deterministic backward not supported on SM 12.0"
        assert not big, "SM100 backward with head_dim=256 does not support dlse"

    refused = generation == 8 or (generation == 12 and deterministic)
    if out.requires_grad and refused:
        out.register_hook(refuse)
    if return_lse and lse.requires_grad and (refused or (big and generation in (10, 11))):
        lse.register_hook(refuse)
    needed = return_lse or any(t.requires_grad for t in (q, k, v))
    return out, (lse if return_lse else lse.detach()) if needed else None


def _owners(cu, total):
    """Of each token, its sequence and its place in it; tokens behind the last sequence have its number plus one."""
    tokens = torch.arange(total, device=cu.device)
    owner = torch.searchsorted(cu[1:].contiguous(), tokens, right=True)
    return owner, tokens - cu[owner.clamp(max=cu.shape[0] - 2)]


def _in_window(distance, window_size, causal):
    left, right = window_size
    if left is not None and right is not None and left < 0 and right < 0:
        left = right = None
    right = 0 if causal else right
    seen = torch.ones_like(distance, dtype=torch.bool)
    seen = seen if left is None else seen & (distance >= -left)
    return seen if right is None else seen & (distance <= right)


def _attend(q, k, v, seen, scale, softcap):
    """(B, H, Q, D), (B, N, K, D), (B, N, K, E) to out and LSE (B, H, Q)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    groups = q.shape[1] // k.shape[1]
    key, value = (t.float().repeat_interleave(groups, dim=1) for t in (k, v))
    scores = q.float() @ key.mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -math.inf)
    highest = scores.detach().amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    weights = torch.exp(scores - highest)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    lse = torch.where(empty, -math.inf, torch.log(total) + highest).squeeze(-1)
    return (weights / total @ value).to(q.dtype), lse
