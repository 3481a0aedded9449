"""cuDNN's attention inside torch, called as the aten operator that SDPA would pick.

NVIDIA, compute capability 8.0 and up, fp16/bf16, head dim up to 128 (256 from 9.0), masks as biases.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from heedful.problem import AttentionProblem
from heedful.refusal import Refusal
from heedful.strategy import HALF, AttentionStrategy, Limits, unit_strides

_UP_TO_128 = Limits(
    devices=("cuda",),
    min_capability=(8, 0),
    dtypes=HALF,
    max_head_dim=128,
    head_dim_multiple=8,
    value_dim_may_differ=True,
    masks=frozenset({"causal", "bias"}),
    gqa=True,
    scale=True,
    dropout=True,
    lse=True,
    backward=True,
    compile=True,
)
_UP_TO_256 = replace(_UP_TO_128, max_head_dim=256)


class NativeCudnnAttentionStrategy(AttentionStrategy):
    """cuDNN's attention inside torch: the fastest dense one on many Hopper shapes."""

    name = "native_cudnn"
    aliases = ("_native_cudnn",)
    limits = _UP_TO_128

    def refusals(self, problem: AttentionProblem) -> tuple[Refusal, ...]:
        """From compute capability 9.0 on, the forward pass takes head dims up to 256."""
        hopper = problem.capability is not None and problem.capability >= (9, 0) and not problem.needs_grad
        return tuple((_UP_TO_256 if hopper else _UP_TO_128).refusals(problem))

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
        enable_gqa: bool = False,  # noqa: ARG002 - the kernel reads the head counts
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """See the base class."""
        query, key, value = unit_strides(query, key, value)
        if attn_mask is not None:
            attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[-2], key.shape[-2])
        wants_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
        need_lse = return_lse or wants_grad
        out, lse = cudnn(query, key, value, attn_mask, need_lse, dropout_p, is_causal, False, scale=scale)[:2]
        # cuDNN gives (B, H, Q, 1)
        return (out, lse.reshape(query.shape[:-1]).float()) if return_lse else out
