"""Torch's unfused SDPA kernel: any device, any shape, O(Q*K) memory, so large problems come in chunks of queries.

No LSE. The aten operator reads a bool mask as a bias of 0 and 1, so bool masks reach it as 0 and -inf.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from heedful.strategy import FLOATS, AttentionStrategy, Limits

_EVERYWHERE = Limits(
    dtypes=FLOATS,
    value_dim_may_differ=True,
    masks=frozenset({"causal", "bias"}),
    bias_backward=True,
    empty_rows=frozenset({"output"}),
    gqa=True,
    scale=True,
    dropout=True,
    backward=True,
    deterministic_backward=True,
    compile=True,
    scores_in_memory=True,
)


class NativeMathAttentionStrategy(AttentionStrategy):
    """torch's unfused SDPA kernel: takes everything, and holds all scores."""

    name = "native_math"
    aliases = ("_native_math",)
    limits = (
        replace(
            _EVERYWHERE,
            devices=("cpu",),
            faster_with=frozenset({"chunk_queries"}),  # benchmarks/lowerings.py
            contends=False,  # up to 5 times as slow as native, and never faster than its best, in six named cases
        ),
        _EVERYWHERE,
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
        enable_gqa: bool = False,
    ) -> Tensor:
        """See the base class."""
        math = torch.ops.aten._scaled_dot_product_attention_math
        out: Tensor = math(
            query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
        )[0]
        return out
