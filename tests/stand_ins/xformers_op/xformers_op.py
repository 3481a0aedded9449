"""The kernels below xFormers, in plain torch: the real package (0.0.35) does all the rest, on CPU tensors.

xFormers is Python over two kernels of torch, ``aten::_flash_attention_forward`` (its operator fa2F) and
``aten::_efficient_attention_forward`` (cutlassF), each with a backward. ``installed()`` exchanges these four, and
tells xFormers that CPU tensors are on a GPU of the given compute capability. Its own validation, choice of operator,
refusals, autograd and bias classes stay as they are. What can be seen through it:

- a bool tensor as bias is a TypeError; a bias of another shape than (B, H, Q, K) a ValueError; one with strides that
  are no multiples of 16 bytes a NotImplementedError, as are float64, bf16 before capability 8.0, 5-D inputs in a
  backward, windows beside float32, and all that only cutlassF can do (float32, tensor biases, value dims of their own)
  on GPUs newer than 9.0;
- the LSE of fa2F is (B, H, Q) or packed (1, H, T), +inf on rows that see no key; that of cutlassF is padded to a
  multiple of 32 with +inf, (B, H, Q') or one row for each packed sequence (N, H, Q'), and 0 on rows that see no key;
- a right end of a window at the longest key sequence or past it counts as open, an open one beside a left end as the
  number of keys;
- the output of a row that sees no key is zero; the LSE has no gradient;
- ``seqstart_py`` of a BlockDiagonalMask is not read, only ``seqstart``, as in the kernels.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

Sequences = list[tuple[slice, slice]]


def _sequences(cu_q: Tensor | None, cu_k: Tensor | None) -> Sequences:
    starts_q, starts_k = cu_q.tolist(), cu_k.tolist()
    return [
        (slice(starts_q[i], starts_q[i + 1]), slice(starts_k[i], starts_k[i + 1])) for i in range(len(starts_q) - 1)
    ]


def _attend(q, k, v, *, scale, bias=None, causal=None, left=-1, right=-1, p=0.0, seed=None):
    """(B, Q, H, D) to (B, Q, H, E) and LSE (B, H, Q), float64; ``causal`` is None, "top_left" or "bottom_right"."""
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias.double()
    length, keys = scores.shape[-2:]
    place = torch.arange(length)[:, None] + (0 if causal == "top_left" else keys - length)
    behind = torch.arange(keys) - place
    seen = torch.ones(length, keys, dtype=torch.bool)
    right = 0 if causal else keys if right < 0 <= left else right
    seen = seen if left < 0 else seen & (behind >= -left)
    seen = seen if right < 0 else seen & (behind <= right)
    scores = scores.masked_fill(~seen, -math.inf)
    lse = torch.logsumexp(scores, -1) if keys else scores.new_full(scores.shape[:-1], -math.inf)
    empty = (lse == -math.inf)[..., None]
    weights = torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    if p:
        kept = torch.rand(weights.shape, generator=torch.Generator().manual_seed(int(seed)), dtype=torch.float64) >= p
        weights = weights * kept / (1 - p)
    return (weights @ v).transpose(1, 2), lse


def _flash(query, key, value, cu_q, cu_k, longest, p, scale, causal, left, right, seed):
    """Out like the query, LSE (B, H, Q) or (H, T)."""
    left, right = (-1 if side >= longest else side for side in (left, right))
    how = {"scale": scale, "causal": "bottom_right" if causal else None, "left": left, "right": right}
    if cu_q is None:
        return _attend(query, key, value, **how, p=p, seed=seed)
    parts = [
        _attend(query[None, qs], key[None, ks], value[None, ks], **how, p=p, seed=seed)
        for qs, ks in _sequences(cu_q, cu_k)
    ]
    out = torch.cat([part[0][0] for part in parts] or [query.double() * 0])
    return out, torch.cat([part[1][0] for part in parts], -1)


def flash_fwd(
    query, key, value, cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q, max_seqlen_k, p, softmax_scale, is_causal,
    window_left, window_right, return_softmax, block_tables,
):  # fmt: skip
    """The operator ``xformers_flash::flash_fwd``."""
    assert seqused_k is None
    assert block_tables is None
    assert query.dtype in (torch.float16, torch.bfloat16)
    assert query.shape[-1] == value.shape[-1] <= 256
    seed = torch.randint(2**31, (1,))
    out, lse = _flash(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_k,
        p,
        softmax_scale,
        is_causal,
        window_left,
        window_right,
        seed,
    )
    return out.to(query.dtype), lse.masked_fill(lse == -math.inf, math.inf).float(), seed


def flash_bwd(
    grads_share_storage, grad, query, key, value, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, p,
    softmax_scale, is_causal, window_left, window_right, rng_state,
):  # fmt: skip
    """The operator ``xformers_flash::flash_bwd``."""
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_() for t in (query, key, value)]
        again, _ = _flash(
            *inputs,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_k,
            p,
            softmax_scale,
            is_causal,
            window_left,
            window_right,
            rng_state,
        )
    return tuple(t.to(query.dtype) for t in torch.autograd.grad(again, inputs, grad.double()))


def _efficient(query, key, value, bias, cu_q, cu_k, p, custom_mask_type, scale, window_size, seed):
    """Out (B, Q, H, E) and the list of LSEs (H, Q), one for each sequence."""
    causal = (None, "top_left", "bottom_right")[custom_mask_type]
    how = {"scale": scale, "causal": causal, "left": -1 if window_size is None else window_size - 1}
    if cu_q is None:
        out, lse = _attend(query, key, value, bias=bias, **how, p=p, seed=seed)
        return out, list(lse)
    assert bias is None, "cu seqlen + bias not supported"
    parts = [
        _attend(query[:, qs], key[:, ks], value[:, ks], **how, p=p, seed=seed) for qs, ks in _sequences(cu_q, cu_k)
    ]
    return torch.cat([part[0] for part in parts], 1), [part[1][0] for part in parts]


def efficient_forward(
    query, key, value, bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, custom_mask_type,
    compute_log_sumexp=False, *, scale=None, seqlen_k=None, window_size=None,
):  # fmt: skip
    """The operator ``aten::_efficient_attention_forward``."""
    assert seqlen_k is None
    _check_bias(query, bias)
    seed = torch.randint(2**31, (1,))
    out, parts = _efficient(
        query, key, value, bias, cu_seqlens_q, cu_seqlens_k, dropout_p, custom_mask_type, scale, window_size, seed
    )
    longest = query.shape[1] if cu_seqlens_q is None else max_seqlen_q
    lse = torch.full((len(parts), query.shape[2], -(-longest // 32) * 32), math.inf)
    for row, part in zip(lse, parts, strict=True):
        row[:, : part.shape[-1]] = part.masked_fill(part == -math.inf, 0.0)
    lse = lse if compute_log_sumexp else torch.empty(0)
    return out.to(query.dtype), lse, seed, torch.tensor(0), max_seqlen_q, max_seqlen_k


def efficient_backward(
    grad_out, query, key, value, bias, out, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, logsumexp,
    dropout_p, philox_seed, philox_offset, custom_mask_type, bias_requires_grad, *, scale=None, num_splits_key=None,
    window_size=None, shared_storage_dqdkdv=False,
):  # fmt: skip
    """The operator ``aten::_efficient_attention_backward``."""
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_() for t in (query, key, value, *([bias] if bias_requires_grad else []))]
        seen = inputs[3] if bias_requires_grad else bias
        again, _ = _efficient(
            *inputs[:3], seen, cu_seqlens_q, cu_seqlens_k, dropout_p, custom_mask_type, scale, window_size, philox_seed
        )
    grads = [t.to(query.dtype) for t in torch.autograd.grad(again, inputs, grad_out.double())]
    return (*grads[:3], grads[3] if bias_requires_grad else None)


def _check_bias(query: Tensor, bias: Tensor | None) -> None:
    if bias is not None and bias.dtype != query.dtype:
        raise RuntimeError("invalid dtype for bias - should match query's dtype")


class _Stream:
    """cutlassF runs head groups on streams of their own."""

    def __init__(self, device: object = None) -> None:
        del device

    def wait_stream(self, other: object) -> None:
        """Nothing to wait for."""


@contextlib.contextmanager
def installed(capability: tuple[int, int] = (8, 0)) -> Iterator[None]:
    """xFormers with these kernels, on CPU tensors that it takes for ones on a GPU of that compute capability."""
    from xformers.ops.fmha import common, cutlass, flash

    original = common.AttentionOpBase.not_supported_reasons.__func__

    def reasons(cls, d):
        found = [reason for reason in original(cls, d) if not reason.startswith("bf16 is only supported")]
        if d.query.dtype is torch.bfloat16 and capability[0] < 8:
            found.append("bf16 is only supported on A100+ GPUs")
        if capability < cls.CUDA_MINIMUM_COMPUTE_CAPABILITY:
            found.append(f"requires device with capability >= {cls.CUDA_MINIMUM_COMPUTE_CAPABILITY}")
        elif cls.CUDA_MAXIMUM_COMPUTE_CAPABILITY is not None and capability > cls.CUDA_MAXIMUM_COMPUTE_CAPABILITY:
            found.append(f"requires device with capability <= {cls.CUDA_MAXIMUM_COMPUTE_CAPABILITY}")
        return found

    def alignment(d):
        half = d.query.dtype != torch.float32
        return max(4 if capability >= (8, 0) else 1, 8 if half and capability >= (7, 0) else 1)

    kernels = {
        cutlass.FwOp: efficient_forward,
        cutlass.BwOp: efficient_backward,
        flash.FwOp: flash_fwd,
        flash.BwOp: flash_bwd,
    }
    with contextlib.ExitStack() as stack:
        for op, kernel in kernels.items():
            stack.enter_context(mock.patch.object(op, "OPERATOR", staticmethod(kernel)))
            stack.enter_context(mock.patch.object(op, "SUPPORTED_DEVICES", {"cpu"}))
        for owner, name, value in (
            (common.AttentionOpBase, "not_supported_reasons", classmethod(reasons)),
            (cutlass, "_minimum_gemm_alignment", alignment),
            (torch.version, "cuda", "12.8"),
            (torch.cuda, "get_device_capability", lambda device=None: capability),
            (torch.cuda, "current_stream", _Stream),
            (torch.cuda, "Stream", _Stream),
            (torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield
