"""The kernels below ``torch.nn.attention.varlen`` in plain torch, for CPU tensors; imitates torch 2.12 and 2.13.

The real ``varlen_attn`` runs: its checks, its custom operator, its autograd. ``installed()`` exchanges the two aten
operators that it calls, ``_flash_attention_forward`` and ``_flash_attention_backward``. Quirks: fp16 and bf16 only,
head dims that are multiples of 8 up to 256, alike for all three; cumulative lengths are contiguous int32; causal and
windows are aligned to the bottom right; a right end of the longest key sequence or more counts as open, and an open
one beside a left end as the number of keys; the LSE is (H, T), not (T, H) as its documentation says, and +inf on rows
that see no key, whose output is zero.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from unittest import mock

import torch


def _sequences(query, key, value, cu_q, cu_k, is_causal, scale, left, right):
    """For each sequence: its places among queries and keys, (H, length, dim) of all three, weights, and LSE (H, Q)."""
    starts_q, starts_k = cu_q.tolist(), cu_k.tolist()
    for i in range(len(starts_q) - 1):
        of_q, of_k = (slice(*starts[i : i + 2]) for starts in (starts_q, starts_k))
        q, k, v = (t.double().transpose(0, 1) for t in (query[of_q], key[of_k], value[of_k]))
        k, v = (t.repeat_interleave(q.shape[0] // t.shape[0], 0) for t in (k, v))
        scores = q @ k.mT * scale
        length, keys = scores.shape[-2:]
        behind = torch.arange(keys) - (torch.arange(length)[:, None] + keys - length)
        end = 0 if is_causal else keys if right < 0 <= left else right
        hidden = torch.zeros(length, keys, dtype=torch.bool)
        hidden = hidden | (behind < -left) if left >= 0 else hidden
        hidden = hidden | (behind > end) if end >= 0 else hidden
        scores = scores.masked_fill(hidden, -math.inf)
        lse = torch.logsumexp(scores, -1) if keys else scores.new_full(scores.shape[:-1], -math.inf)
        weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
        yield of_q, of_k, q, k, v, weights, lse


def flash_attention_forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
    window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None, block_table=None, num_splits=None,
):  # fmt: skip
    """The operator ``aten::_flash_attention_forward`` with packed sequences."""
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    if len({t.shape[-1] for t in (query, key, value)}) != 1 or query.shape[-1] % 8 or query.shape[-1] > 256:
        raise RuntimeError("head dims must be one multiple of 8, at most 256")
    for cu, longest, tensor in ((cum_seq_q, max_q, query), (cum_seq_k, max_k, key)):
        if cu.dtype != torch.int32 or not cu.is_contiguous():
            raise RuntimeError("cu_seqlens must have dtype int32 and be contiguous")
        assert longest >= int(cu.diff().max())
        assert tensor.stride(-1) == 1
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    sides = _side(window_size_left, max_k), _side(window_size_right, max_k)
    out = torch.zeros_like(query)
    lse = torch.full((query.shape[1], query.shape[0]), -math.inf)
    for of_q, _, _, _, v, weights, part in _sequences(
        query, key, value, cum_seq_q, cum_seq_k, is_causal, scale, *sides
    ):
        out[of_q] = (weights @ v).transpose(0, 1).to(query.dtype)
        lse[:, of_q] = part.float()
    lse = lse.masked_fill(lse == -math.inf, math.inf)
    return out, lse, torch.zeros(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)


def flash_attention_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state,
    unused, *, scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    """The operator ``aten::_flash_attention_backward`` with packed sequences."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    sides = _side(window_size_left, max_k), _side(window_size_right, max_k)
    grads = [torch.zeros_like(t, dtype=torch.float64) for t in (query, key, value)]
    for of_q, of_k, q, k, v, weights, _ in _sequences(
        query, key, value, cum_seq_q, cum_seq_k, is_causal, scale, *sides
    ):
        grad = grad_out[of_q].double().transpose(0, 1)
        of_weights = grad @ v.mT
        of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * scale
        grads[0][of_q] = (of_scores @ k).transpose(0, 1)
        for place, of_heads in ((1, of_scores.mT @ q), (2, weights.mT @ grad)):
            grouped = of_heads.unflatten(0, (key.shape[1], -1)).sum(1)
            grads[place][of_k] = grouped.transpose(0, 1)
    return tuple(grad.to(query.dtype) for grad in grads)


def _side(window: int | None, longest: int) -> int:
    return -1 if window is None or window >= longest else window


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """``varlen_attn`` with these kernels, on CPU tensors."""
    import torch.nn.attention.varlen  # the operators are registered before the exchange

    aten = torch.ops.aten
    with (
        mock.patch.object(aten, "_flash_attention_forward", flash_attention_forward),
        mock.patch.object(aten, "_flash_attention_backward", flash_attention_backward),
    ):
        yield
