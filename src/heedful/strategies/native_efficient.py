"""Torch's memory-efficient kernel, called as the aten operator that SDPA would pick.

GPU, compute capability 5.0 and up, any head dim that is a multiple of 8 (16-bit) or 4 (32-bit); masks as biases whose
last stride is 1 and whose row stride is a multiple of 16 bytes and more.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from heedful.strategy import AttentionStrategy, Limits, unit_strides

_ALIGNED = 16  # elements: SDPA pads the bias to this for the kernel's vector loads


class NativeEfficientAttentionStrategy(AttentionStrategy):
    """torch's memory-efficient kernel: old GPUs too, with masks."""

    name = "native_efficient"
    aliases = ("_native_efficient",)
    limits = Limits(
        devices=("cuda",),
        min_capability=(5, 0),
        architectures=("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201"),
        dtypes=(torch.float32, torch.float16, torch.bfloat16),
        bfloat16_from=(8, 0),
        head_dim_multiple=8,
        value_dim_may_differ=True,
        masks=frozenset({"causal", "bias"}),
        bias_backward=True,
        scale=True,
        dropout=True,
        lse=True,
        backward=True,
        compile=True,
    )

    def compute_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        dropout_p: float = 0.0,
        scale: float | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """See the base class."""
        query, key, value = unit_strides(query, key, value)
        bias = None if attn_mask is None else aligned_bias(attn_mask, query, key)
        wants_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        need_lse = return_lse or wants_grad
        out, lse = efficient(query, key, value, bias, need_lse, dropout_p, is_causal, scale=scale)[:2]
        # The kernel pads the LSE's last dimension to a multiple of 32.
        return (out, lse[..., : query.shape[-2]].float()) if return_lse else out


def aligned_bias(bias: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The bias expanded to (B, H, Q, K), as a view of storage whose rows are aligned for vector loads."""
    length = key.shape[-2]
    if bias.shape[-1] == 1:
        bias = bias.expand(*bias.shape[:-1], length)
    if length % _ALIGNED or bias.stride(-1) != 1:
        bias = pad(bias, (0, -length % _ALIGNED))[..., :length]
    return bias.expand(query.shape[0], query.shape[1], query.shape[-2], length)
