"""``flash_attention`` for TPUs in plain torch; imitates torch_xla 2.9.0 over the Pallas kernel of jax.

Layout (B, H, S, D), equal shapes of key and value, no grouped heads. Its quirks: ``sm_scale`` is 1 unless given, and
multiplies the bias ``ab`` as well; -inf in ``ab`` becomes NaN where it hides the first whole block of a row's keys;
past 512 keys, the keys are padded with zeros to a multiple of 512 and nothing hides these unless ``ab`` is given;
causal is aligned to the top left, and past 512 keys a single query computes nothing; head dims over 128 must be
multiples of 128 past 512 keys. The backward wants lengths that its blocks divide and computes other ones wrongly or
not at all: absent here.
"""

from __future__ import annotations

import math

import torch

_BLOCK = 512
_MASKED = -0.7 * torch.finfo(torch.float32).max


def flash_attention(
    q,
    k,
    v,
    causal=False,
    q_segment_ids=None,
    kv_segment_ids=None,
    sm_scale=1.0,
    *,
    ab=None,
    partition_spec=None,
    mesh=None,
):
    """(B, H, Q, D), (B, H, K, D) twice, to (B, H, Q, D)."""
    if any(x is not None for x in (q_segment_ids, kv_segment_ids, partition_spec, mesh)):
        raise NotImplementedError("not imitated: segments and meshes")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, *([] if ab is None else [ab]))):
        raise NotImplementedError("not imitated: the backward")
    if k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    if q.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"the TPU compiler has no {q.dtype}")
    length, keys, head_dim = q.shape[2], k.shape[2], q.shape[3]
    if ab is not None and tuple(ab.shape) != (*q.shape[:3], keys):
        raise ValueError(f"Attention bias shape mismatch: {tuple(ab.shape)}")
    if keys > _BLOCK and head_dim > 128 and head_dim % 128:
        raise NotImplementedError(f"{head_dim=} should be a multiple of 128 if larger")
    if keys > _BLOCK and length == 1 and causal:
        return torch.zeros_like(q)
    more = -keys % _BLOCK if keys > _BLOCK else 0
    k, v = (torch.nn.functional.pad(t, (0, 0, 0, more)) for t in (k, v))
    scores = q.float() @ k.float().mT
    if ab is not None:
        scores = scores + torch.nn.functional.pad(ab, (0, more), value=torch.finfo(ab.dtype).min).float()
    scores = scores * sm_scale
    if causal:
        later = torch.arange(keys + more) > torch.arange(length)[:, None]
        scores = scores + torch.where(later, _MASKED, 0.0)
    lost = (scores[..., :_BLOCK] == -math.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.double(), -1).masked_fill(lost, math.nan)
    return (weights @ v.double()).to(q.dtype)
