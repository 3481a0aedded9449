"""Torch's flash kernels, called as the aten operators that SDPA would pick.

CUDA: flash-attn 2, fp16/bf16, compute capability 8.0 and up, no dense mask. CPU: every float dtype, masks as biases, no
dropout, equal head dims. The operators are called directly: ``sdpa_kernel`` sets the choice for the whole process.
"""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.strategy import FLOATS, HALF, AttentionStrategy, Limits, unit_strides


class NativeFlashAttentionStrategy(AttentionStrategy):
    """torch's flash kernel: gives the LSE; takes dense masks on a CPU only."""

    name = "native_flash"
    aliases = ("_native_flash",)
    limits = (
        Limits(
            devices=("cpu",),
            dtypes=FLOATS,
            masks=frozenset({"causal", "bias"}),
            empty_rows=frozenset({"output"}),  # their LSE is 0.0 (torch 2.13)
            scale=True,
            lse=True,
            backward=True,
            deterministic_backward=True,
            compile=True,
            contends=False,  # it is the kernel that native picks
        ),
        Limits(
            devices=("cuda",),
            min_capability=(8, 0),
            architectures=("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201"),
            dtypes=HALF,
            max_head_dim=256,
            head_dim_multiple=8,
            masks=frozenset({"causal"}),
            gqa=True,
            scale=True,
            dropout=True,
            lse=True,
            backward=True,
            deterministic_backward=True,
            compile=True,
        ),
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
        enable_gqa: bool = False,  # noqa: ARG002 - the CUDA kernel reads the head counts
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """See the base class."""
        aten = torch.ops.aten
        query, key, value = unit_strides(query, key, value)
        if query.device.type == "cpu":
            out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
            )
        else:
            flash = aten._scaled_dot_product_flash_attention
            out, lse = flash(query, key, value, dropout_p, is_causal, False, scale=scale)[:2]
        return (out, lse.float()) if return_lse else out
