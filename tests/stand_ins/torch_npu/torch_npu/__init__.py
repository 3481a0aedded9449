"""``npu_fusion_attention`` in plain torch; imitates torch_npu 2.13.0, read from its schema and documentation.

Its quirks: ``atten_mask`` is True where a key is masked OUT, of shape (B, N, Q, K), (B, 1, Q, K), (1, 1, Q, K) or (Q,
K) and no other; without one ``sparse_mode`` is not looked at, so that a causal mode gives full attention; modes 2
(causal from the top left), 3 (from the bottom right) and 4 (band from the bottom right) want the triangle of 2048 x
2048, whatever the lengths. ``scale`` is 1 unless given. In the default mode ``pre_tockens`` and ``next_tockens`` must
agree with the mask: here a mask is cut to them. ``pse`` is added before scaling, says the formula of the
documentation, and after it, says its example: refused here. A row that sees no key is the mean of all values. The
outputs are seven, with maximum and sum of the softmax as (B, N, Q, 8), each repeated eight times, without gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASKED = -40000.0
_ALL = 2147483647


def npu_fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = 2147483647,
    next_tockens: int = 2147483647,
    inner_precise: int = 0,
    prefix: list[int] | None = None,
    actual_seq_qlen: list[int] | None = None,
    actual_seq_kvlen: list[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    sink: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    seed: int = 0,
    offset: int = 0,
):
    """Out in the query's layout, softmax maximum, softmax sum, an empty tensor, and three numbers."""
    if input_layout not in ("BSND", "BNSD") or any(x is not None for x in (pse, padding_mask, prefix, sink)):
        raise RuntimeError(f"not imitated: {input_layout}, pse, padding_mask, prefix or sink")
    if len({query.dtype, key.dtype, value.dtype}) != 1 or query.dtype not in (
        torch.float16,
        torch.bfloat16,
        torch.float32,
    ):
        raise RuntimeError("query, key and value must all be of float16, bfloat16 or float32")
    q, k, v = (t.double().transpose(1, 2) if input_layout == "BSND" else t.double() for t in (query, key, value))
    if not 0 < keep_prob <= 1:
        raise RuntimeError("keep_prob must be in (0, 1]")
    if q.shape[1] != head_num or head_num % k.shape[1] or head_num > 256:
        raise RuntimeError(f"head_num is {head_num}, for {q.shape[1]} and {k.shape[1]} heads")
    if k.shape != v.shape or q.shape[-1] != k.shape[-1] or not 1 <= q.shape[-1] <= 768:
        raise RuntimeError("key and value must have one shape, with the head dim of the query, at most 768")
    k, v = (t.repeat_interleave(head_num // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * scale
    hidden = _hidden(atten_mask, tuple(scores.shape), sparse_mode, pre_tockens, next_tockens)
    if hidden is not None:
        scores = scores.masked_fill(hidden, _MASKED)
    maximum = scores.amax(-1, keepdim=True)
    exps = torch.exp(scores - maximum)
    total = exps.sum(-1, keepdim=True)
    out = torch.nn.functional.dropout(exps / total, 1 - keep_prob) @ v
    out = (out.transpose(1, 2) if input_layout == "BSND" else out).to(query.dtype)
    statistics = (t.detach().float().expand(*t.shape[:-1], 8).contiguous() for t in (maximum, total))
    return (out, *statistics, query.new_empty(0), 0, 0, 0)


def _hidden(mask: Tensor | None, sizes: tuple[int, ...], mode: int, before: int, after: int) -> Tensor | None:
    if mask is None:
        return None
    if mask.dtype not in (torch.bool, torch.uint8) or not mask.is_contiguous():
        raise RuntimeError("atten_mask must be bool or uint8, and contiguous")
    batch, heads, length, keys = sizes
    behind = torch.arange(keys) - torch.arange(length)[:, None]
    from_bottom_right = behind - (keys - length)
    if mode in (0, 1):
        fitting = [(batch, heads, length, keys), (batch, 1, length, keys), (1, 1, length, keys), (length, keys)]
        if tuple(mask.shape) not in fitting:
            raise RuntimeError(f"atten_mask of shape {tuple(mask.shape)} is none of {fitting}")
        return mask.bool() if mode == 1 else mask.bool() | (behind > after) | (behind < -before)
    if mode not in (2, 3, 4):
        raise RuntimeError(f"not imitated: sparse_mode {mode}")
    if tuple(mask.shape) != (2048, 2048) or not torch.equal(mask.bool(), torch.ones(2048, 2048).triu(1).bool()):
        raise RuntimeError("this sparse_mode wants the triangle of 2048 x 2048")
    if mode == 2:
        return behind > 0
    if mode == 3:
        return from_bottom_right > 0
    return (from_bottom_right > after) | (from_bottom_right < -before)


def logsumexp(maximum: Tensor, total: Tensor) -> Tensor:
    """What the statistics mean, for tests: (B, N, Q)."""
    lse = maximum[..., 0] + torch.log(total[..., 0])
    return torch.where(lse < _MASKED / 2, -math.inf, lse)
