"""torch_npu's fused attention for Ascend NPUs.

Takes bool masks, which it wants inverted: True is masked out. Causality is one of its sparse modes, and wants the same
triangle of 2048 x 2048 whatever the lengths. No biases: it would multiply them by the scale. Facts are those of the
schema and the documentation of 2.13.
Shapes: B batch, Q query length, K key length, H heads, N kv heads, D head dim.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from heedful.problem import AttentionProblem
from heedful.refusal import Refusal
from heedful.sources import Package
from heedful.strategy import AttentionStrategy, Limits, unit_strides

_TRIANGLE = 2048
_CAUSAL_MODES = {"top_left": 2, "bottom_right": 3}


class NativeNPUAttentionStrategy(AttentionStrategy):
    """torch_npu's fused attention for Ascend NPUs."""

    name = "native_npu"
    aliases = ("_native_npu",)
    sources = (
        Package(
            "torch_npu",
            ("npu_fusion_attention",),
            distribution="torch-npu",
            minimum="2.1",
            install="pip install torch-npu, in the version of this torch",
        ),
    )
    limits = Limits(
        devices=("npu",),
        dtypes=(torch.bfloat16, torch.float16, torch.float32),
        max_head_dim=768,
        layouts=("BSHD",),
        masks=frozenset({"causal", "dense"}),
        causal_alignments=("top_left", "bottom_right"),
        gqa=True,
        scale=True,
        dropout=True,
        lse=True,
        backward=True,
    )

    def refusals(self, problem: AttentionProblem) -> tuple[Refusal, ...]:
        """See the base class."""
        found = super().refusals(problem)
        if problem.dropout_p >= 1:
            return (*found, Refusal("dropout", "1.0", "probabilities below 1", "use native"))
        return found

    def compute_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        causal_alignment: str = "top_left",
        dropout_p: float = 0.0,
        scale: float | None = None,
        enable_gqa: bool = False,  # noqa: ARG002 - the kernel reads the head counts
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """See the base class."""
        query, key, value = unit_strides(query, key, value)
        hidden = triangle(query.device) if is_causal else None
        if attn_mask is not None:
            hidden = hidden_of(attn_mask, (query.shape[0], query.shape[2], query.shape[1], key.shape[1]))
        answer = self.kernels.npu_fusion_attention(
            query,
            key,
            value,
            query.shape[2],
            "BSND",
            atten_mask=hidden,
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            keep_prob=1.0 - dropout_p,
            sparse_mode=_CAUSAL_MODES[causal_alignment] if is_causal else 0,
        )
        if not return_lse:
            return answer[0]  # type: ignore[no-any-return]
        maximum, total = (statistic[..., 0].float() for statistic in answer[1:3])  # (B, H, Q, 8), eight times the same
        return answer[0], maximum + torch.log(total)


def hidden_of(attn_mask: Tensor, sizes: tuple[int, int, int, int]) -> Tensor:
    """What a bool mask hides, in a shape that the kernel takes: Q and K whole, B whole or, with one head, 1."""
    batch, heads, length, keys = sizes
    own_heads = attn_mask.shape[1] > 1
    shape = (batch if own_heads else attn_mask.shape[0], heads if own_heads else 1, length, keys)
    return (~attn_mask).expand(shape).contiguous()


@functools.lru_cache(maxsize=16)
def triangle(device: torch.device) -> Tensor:
    """What causality hides, True above the diagonal, as the sparse modes want it: 4 MB, kept for each device."""
    with torch.inference_mode(False):  # kept beyond this call, and saved for gradients in another
        return torch.ones(_TRIANGLE, _TRIANGLE, dtype=torch.bool, device=device).triu_(1)
