"""Stand-in for sageattention 2.2.0, tag v2.2.0 (eb615cf6) of thu-ml/SageAttention, ``sageattention/core.py``.

It really quantises: Q and K to int8 in the groups of each kernel, V to fp16 or fp8, so that answers are as approximate
as the real ones. What it imitates besides:

- every function swallows unknown keywords, ``attn_mask`` among them; only the fp16 Triton one knows that name. A float
  mask is added there to scores that are in base 2 already, so it counts 1/1.44 of what it says. Rows that see no key
  average the keys that they must not see;
- K is smoothed, and the LSE corrected for it: natural logarithm, of the true scores, rounded as q·mean(K) is in the
  dtype of q. Grouped heads with an LSE break, or fail, by layout: the count is read from axis 2;
- head dims up to 128, padded to 64 or 128 inside; fp16 and bf16 only; the last stride must be 1;
- causal is top-left. The fp16 Triton form asserts equal lengths; the others do not, and their documentation says
  "only applicable when qo_len == kv_len"; where sageattn_varlen would read beyond its scales, this gives NaN;
- no backward: the output has no gradient, without a word;
- an 8-bit value channel of zeros only is NaN.

Older versions that call themselves 2.1.1 and 2.2.0 (before 4 August 2025) do not know ``attn_mask`` in the Triton form,
and their Triton kernels count keys beyond the last, up to a multiple of 64, as keys with score 0: see the tests.

Unlike the real one it takes CPU tensors; ``get_cuda_arch_versions`` says which GPU ``sageattn`` supposes.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sageattention._arithmetic import LOG2_E, Products, attend, blocks, key_threads, quantise, query_threads

SM80_ENABLED = SM89_ENABLED = SM90_ENABLED = True


def get_cuda_arch_versions() -> list[str]:
    return ["sm80"]


def sageattn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    return_lse: bool = False,
    **kwargs: Any,
):
    arch = get_cuda_arch_versions()[q.device.index or 0]
    call = {"tensor_layout": tensor_layout, "is_causal": is_causal, "sm_scale": sm_scale, "return_lse": return_lse}
    if arch == "sm80":
        return sageattn_qk_int8_pv_fp16_cuda(q, k, v, pv_accum_dtype="fp32", **call)
    if arch == "sm86":
        return sageattn_qk_int8_pv_fp16_triton(q, k, v, **call)
    if arch == "sm89":
        return sageattn_qk_int8_pv_fp8_cuda(q, k, v, pv_accum_dtype="fp32+fp16", **call)
    if arch == "sm90":
        return sageattn_qk_int8_pv_fp8_cuda_sm90(q, k, v, pv_accum_dtype="fp32+fp32", **call)
    if arch == "sm120":
        return sageattn_qk_int8_pv_fp8_cuda(q, k, v, qk_quant_gran="per_warp", pv_accum_dtype="fp32+fp16", **call)
    raise ValueError(f"Unsupported CUDA architecture: {arch}")


def sageattn_qk_int8_pv_fp16_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    quantization_backend: str = "triton",
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    sm_scale: float | None = None,
    smooth_k: bool = True,
    return_lse: bool = False,
    **kwargs: Any,
):
    _check(q, k, v)
    if attn_mask is not None:
        known = attn_mask.dtype in (torch.bool, q.dtype)
        assert known, "attn_mask must be of dtype bool or the same dtype as q."
        assert attn_mask.device == q.device, "All tensors must be on the same device."
    head_dim, (q, k, v) = q.size(-1), _padded(q, k, v)
    correction = _lse_correction(q, k, tensor_layout, 1) if smooth_k and return_lse else None
    scale = head_dim**-0.5 if sm_scale is None else sm_scale
    if quantization_backend not in ("triton", "cuda"):
        raise ValueError(f"Unsupported quantization backend: {quantization_backend}")
    if is_causal:
        assert attn_mask is None, "Mask should be None for causal attention."
    q_len, k_len = (t.size(1 if tensor_layout == "NHD" else 2) for t in (q, k))
    if is_causal:
        assert q_len == k_len, "qo_len and kv_len must be equal for causal attention"
    elif attn_mask is not None:
        shape = (q.shape[0], q.shape[2 if tensor_layout == "NHD" else 1], q_len, k_len)
        try:
            attn_mask = attn_mask.expand(shape)
        except RuntimeError:
            raise AssertionError(f"attn_mask shape {attn_mask.shape} cannot be broadcast to {shape}") from None
    with torch.no_grad():
        smooth = _smooth(k, 1 if tensor_layout == "NHD" else 2) if smooth_k else k
        query, key, value = _heads_second(tensor_layout, q, smooth, v.to(torch.float16))
        out, lse = attend(
            quantise(query.float() * (scale * LOG2_E), blocks(q_len, 128)),
            quantise(key.float(), blocks(k_len, 64)),
            value.float(),
            causal=is_causal,
            mask=attn_mask,
            products=Products(sums=torch.float16),
        )
    return _answer(out, lse, q, tensor_layout, head_dim, return_lse, correction, scale)


def sageattn_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool = False,
    sm_scale: float | None = None,
    smooth_k: bool = True,
    **kwargs: Any,
) -> Tensor:
    _check(q, k, v)
    head_dim, (q, k, v) = q.size(-1), _padded(q, k, v)
    contiguous = cu_seqlens_q.is_contiguous() and cu_seqlens_k.is_contiguous()
    assert contiguous, "cu_seqlens_q and cu_seqlens_k must be contiguous."
    scale = head_dim**-0.5 if sm_scale is None else sm_scale
    out = torch.full(q.shape, float("nan"), dtype=q.dtype)  # torch.empty there
    with torch.no_grad():
        smooth = _smooth(k, 0) if smooth_k else k
        starts, ends = (
            [cu[side].tolist() for cu in (cu_seqlens_q, cu_seqlens_k)] for side in (slice(-1), slice(1, None))
        )
        for q_from, q_to, k_from, k_to in zip(starts[0], ends[0], starts[1], ends[1], strict=True):
            q_to = min(q_to, q_from + (max_seqlen_q + 127) // 128 * 128)  # the grid ends there
            part = [t[lo:hi].transpose(0, 1)[None] for t, lo, hi in ((q, q_from, q_to), (smooth, k_from, k_to))]
            if q_from >= q_to or (is_causal and k_to - k_from < q_to - q_from):
                continue
            if k_from == k_to:
                out[q_from:q_to] = 0
                continue
            query, key, value = _heads_second("HND", *part, v[k_from:k_to].transpose(0, 1)[None].to(torch.float16))
            made, _ = attend(
                quantise(query.float() * (scale * LOG2_E), blocks(query.shape[2], 128)),
                quantise(key.float(), blocks(key.shape[2], 64)),
                value.float(),
                causal=is_causal,
                products=Products(sums=torch.float16),
            )
            out[q_from:q_to] = made[0].transpose(0, 1).to(q.dtype)
    return out[..., :head_dim]


def sageattn_qk_int8_pv_fp16_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    qk_quant_gran: str = "per_thread",
    sm_scale: float | None = None,
    pv_accum_dtype: str = "fp32",
    smooth_k: bool = True,
    smooth_v: bool = False,
    return_lse: bool = False,
    **kwargs: Any,
):
    assert SM80_ENABLED, "SM80 kernel is not available. make sure you GPUs with compute capability 8.0 or higher."
    if pv_accum_dtype not in ("fp32", "fp16", "fp16+fp32"):
        raise ValueError(f"Unsupported pv_accum_dtype: {pv_accum_dtype}")
    warp = 16 if q.size(-1) > 64 and pv_accum_dtype == "fp16+fp32" else 32
    products = Products(sums=torch.float32 if pv_accum_dtype == "fp32" else torch.float16)
    return _cuda(q, k, v, tensor_layout, is_causal, qk_quant_gran, sm_scale, smooth_k, return_lse, (warp, 64), products)


def sageattn_qk_int8_pv_fp8_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    qk_quant_gran: str = "per_thread",
    sm_scale: float | None = None,
    pv_accum_dtype: str = "fp32+fp16",
    smooth_k: bool = True,
    smooth_v: bool = False,
    return_lse: bool = False,
    **kwargs: Any,
):
    assert SM89_ENABLED, "SM89 kernel is not available. Make sure you GPUs with compute capability 8.9."
    if pv_accum_dtype != "fp32" and smooth_v:
        warnings.warn(f"pv_accum_dtype is '{pv_accum_dtype}', smooth_v will be ignored.", stacklevel=2)
    in_half = pv_accum_dtype == "fp32+fp16"
    products = Products(
        values=torch.float8_e4m3fn,
        sums=torch.float16 if in_half else torch.float32,
        largest=2.25 if in_half else 448.0,
    )
    return _cuda(q, k, v, tensor_layout, is_causal, qk_quant_gran, sm_scale, smooth_k, return_lse, (32, 64), products)


def sageattn_qk_int8_pv_fp8_cuda_sm90(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    qk_quant_gran: str = "per_thread",
    sm_scale: float | None = None,
    pv_accum_dtype: str = "fp32+fp32",
    smooth_k: bool = True,
    return_lse: bool = False,
    **kwargs: Any,
):
    assert SM90_ENABLED, "SM90 kernel is not available. Make sure you GPUs with compute capability 9.0."
    if pv_accum_dtype == "fp32":
        raise NotImplementedError("Please use pv_accum_dtype='fp32+fp32' for sm90.")
    products = Products(values=torch.float8_e4m3fn, block=128)
    return _cuda(q, k, v, tensor_layout, is_causal, qk_quant_gran, sm_scale, smooth_k, return_lse, (16, 128), products)


def _cuda(q, k, v, layout, causal, granularity, sm_scale, smooth_k, return_lse, warps, products):
    """What the three CUDA forms share; ``warps``: how many queries and keys one warp holds."""
    _check(q, k, v)
    assert granularity in ["per_warp", "per_thread"], "qk_quant_gran must be either 'per_warp' or 'per_thread'."
    head_dim, (q, k, v) = q.size(-1), _padded(q, k, v)
    scale = head_dim**-0.5 if sm_scale is None else sm_scale
    q_len, k_len = (t.size(1 if layout == "NHD" else 2) for t in (q, k))
    correction = _lse_correction(q, k, layout, 2 if layout == "NHD" else 1) if smooth_k and return_lse else None
    in_threads = granularity == "per_thread"
    groups = (query_threads, key_threads) if in_threads else (blocks, blocks)
    with torch.no_grad():
        smooth = _smooth(k, 1 if layout == "NHD" else 2) if smooth_k else k
        query, key, value = _heads_second(layout, q, smooth, v)
        out, lse = attend(
            quantise(query.float(), groups[0](q_len, warps[0]), 1e-7 if in_threads else 1e-7 / 127),
            quantise(key.float(), groups[1](k_len, warps[1]), 1e-7 if in_threads else 1e-7 / 127),
            value.float(),
            factor=scale * LOG2_E,
            causal=causal,
            products=products,
        )
    return _answer(out, lse, q, layout, head_dim, return_lse, correction, scale)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    assert q.dtype in [torch.float16, torch.bfloat16], (
        "Input tensors must be in dtype of torch.float16 or torch.bfloat16"
    )
    assert q.device == k.device == v.device, "All tensors must be on the same device."
    assert q.dtype == k.dtype == v.dtype, "All tensors must have the same dtype."


def _padded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    head_dim = q.size(-1)
    if head_dim > 128:
        raise ValueError(f"Unsupported head_dim: {head_dim}")
    more = (64 if head_dim <= 64 else 128) - head_dim
    q, k, v = (pad(t, (0, more)) if more else t for t in (q, k, v))
    assert all(t.stride(-1) == 1 for t in (q, k, v)), "Last dim of qkv must be contiguous."
    return q, k, v


def _smooth(k: Tensor, axis: int) -> Tensor:
    return k - k.mean(dim=axis, keepdim=True)


def _lse_correction(q: Tensor, k: Tensor, layout: str, heads_axis: int) -> Tensor:
    mean = k.mean(dim=1 if layout == "NHD" else 2, keepdim=True)
    groups = q.size(2) // k.size(2)
    mean = torch.repeat_interleave(mean, groups, dim=heads_axis) if groups > 1 else mean
    if layout == "NHD":
        return torch.matmul(q.transpose(1, 2), mean.transpose(1, 2).transpose(2, 3)).squeeze(-1).float()
    return torch.matmul(q, mean.transpose(2, 3)).squeeze(-1).float()


def _heads_second(layout: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, H, length, D), with each key and value head repeated for the query heads that share it."""
    q, k, v = (t.transpose(1, 2) if layout == "NHD" else t for t in (q, k, v))
    return q, *(t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))


def _answer(out, lse, q, layout, head_dim, return_lse, correction, scale):
    out = (out.transpose(1, 2) if layout == "NHD" else out).to(q.dtype).contiguous()[..., :head_dim]
    if not return_lse:
        return out
    return out, lse / LOG2_E + correction * scale if correction is not None else lse / LOG2_E
