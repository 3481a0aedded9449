"""FlashAttention-3, from a build of flash-attention's folder ``hopper`` or the Hub.

Takes fp16/bf16 on Hopper only, head dims up to 256, packed sequences, windows. Refuses dense masks and dropout.
Facts are those of the sources of August 2025 on, when ``return_attn_probs`` came (flash-attention, commit 203b9b3d).
Shapes: B batch, Q queries, K keys, H heads, D head dim, E value dim; T packed tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heedful.masks import Varlen
from heedful.problem import AttentionProblem
from heedful.refusal import Refusal
from heedful.sources import Hub, Package
from heedful.strategies.flash import NAMES
from heedful.strategy import HALF, AttentionStrategy, Limits, Pin, packed_arguments, unit_strides


class Flash3AttentionStrategy(AttentionStrategy):
    """FlashAttention-3, for Hopper: windows, packed sequences and LSE; takes no dense mask and no dropout."""

    name = "flash_3"
    aliases = {
        "_flash_3": Pin(),
        "_flash_varlen_3": Pin(layouts=("THD",)),
        "_flash_3_hub": Pin(source="hub"),
        "_flash_3_varlen_hub": Pin(source="hub", layouts=("THD",)),
    }
    sources = (
        Package(
            "flash_attn_interface",
            NAMES,
            distribution="flash_attn_3",
            install="build it: python setup.py install in the folder hopper of github.com/Dao-AILab/flash-attention",
        ),
        Hub("kernels-community/flash-attn3", 1, NAMES),
    )
    limits = Limits(
        devices=("cuda",),
        min_capability=(9, 0),  # 8.x only where a build kept its kernels
        max_capability=(9, 0),  # sm_90a code runs nowhere else
        dtypes=HALF,
        max_head_dim=256,
        head_dim_multiple=8,
        value_dim_may_differ=False,  # (129..192, 97..128) and (up to 64, up to 512) could; padding takes every pair
        layouts=("BSHD", "THD"),
        masks=frozenset({"causal", "window", "varlen"}),
        mixed_masks=True,
        causal_alignments=("bottom_right",),
        empty_rows=frozenset({"output", "lse"}),
        gqa=True,
        scale=True,
        softcap=True,
        lse=True,
        backward=True,
        deterministic_backward=True,
        compile=True,
    )

    def refusals(self, problem: AttentionProblem) -> tuple[Refusal, ...]:
        """See the base class."""
        found = super().refusals(problem)
        if problem.needs_grad and problem.deterministic and max(problem.head_dim, problem.value_dim) > 192:
            wanted = "head dims up to 192 for a deterministic one"
            found = (*found, Refusal("gradient", f"for {problem.head_dim}", wanted, "use flash or native_math"))
        return found

    def compute_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool = False,
        causal_alignment: str = "bottom_right",  # noqa: ARG002 - the only one it takes
        window: tuple[int | None, int | None] = (None, None),
        window_alignment: str = "bottom_right",  # noqa: ARG002
        varlen: Varlen | None = None,
        scale: float | None = None,
        enable_gqa: bool = False,  # noqa: ARG002 - the kernel reads the head counts
        softcap: float = 0.0,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """See the base class."""
        kernel = self.kernels.flash_attn_func if varlen is None else self.kernels.flash_attn_varlen_func
        packed: dict[str, Any] = {} if varlen is None else packed_arguments(varlen, query, key)
        answer = kernel(
            query,
            key,
            *unit_strides(value),  # one whose tokens are neighbours in memory is refused
            **packed,
            softmax_scale=scale,
            causal=is_causal,
            window_size=tuple(-1 if side is None else side for side in window),
            softcap=softcap,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **({"return_attn_probs": True} if return_lse else {}),
        )
        # Builds from before return_attn_probs always give (out, lse).
        out, lse = answer[:2] if isinstance(answer, tuple) else (answer, None)
        return (out, lse) if return_lse else out
