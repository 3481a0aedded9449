"""SageAttention 3: scores, weights and values in 4 bits (FP4 in groups of 16), for consumer Blackwell GPUs.

Takes fp16/bf16 on compute capability 12.0 and 12.1, head dims 64 and 128, causality with as many queries as keys. No
mask (``attn_mask`` is taken and left out), no scale of one's own (swallowed), no LSE, no gradient. Keys are smoothed in
place, in the caller's tensor, so the kernel is given a copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.problem import AttentionProblem
from heedful.refusal import Refusal
from heedful.sources import Hub, Package
from heedful.strategy import HALF, AttentionStrategy, Limits, Pin


class SageBlackwellStrategy(AttentionStrategy):
    """SageAttention 3 in FP4, for consumer Blackwell GPUs; the least exact of all."""

    name = "sage_blackwell"
    aliases = {"sage_blackwell_hub": Pin(source="hub")}
    exactness = "quantised"
    relative_error = 0.5  # four bits: 0.15 on 32 keys and more; on two or three none of the errors cancel
    sources = (
        Package(
            "sageattn3",
            ("sageattn3_blackwell",),
            distribution="sageattn3",
            install="build sageattention3_blackwell of https://github.com/thu-ml/SageAttention",
        ),
        Hub("SageAttention/sage-blackwell", 1, ("sageattn3_blackwell",)),
    )
    limits = Limits(
        devices=("cuda",),
        min_capability=(12, 0),
        max_capability=(12, 1),
        dtypes=HALF,
        min_head_dim=64,
        max_head_dim=128,
        head_dim_multiple=64,
        masks=frozenset({"causal"}),
    )

    def refusals(self, problem: AttentionProblem) -> tuple[Refusal, ...]:
        """Also for unequal lengths: both are padded to multiples of 128 before they are aligned at their ends."""
        found = super().refusals(problem)
        if problem.mask.causal and problem.query_length != problem.key_length:
            observed = f"with {problem.query_length} queries and {problem.key_length} keys"
            found += (Refusal("causality", observed, "as many queries as keys", "use native"),)
        return found

    def compute_attention(self, query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False) -> Tensor:
        """See the base class."""
        key = key.clone(memory_format=torch.contiguous_format)
        with torch.cuda.device_of(query):
            out: Tensor = self.kernels.sageattn3_blackwell(
                query.contiguous(), key, value.contiguous(), is_causal=is_causal
            )
        return out
