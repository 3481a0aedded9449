"""torch's varlen_attn: flash attention over packed sequences, as torch itself ships it.

NVIDIA, compute capability 8.0 and up, fp16/bf16, packed (T, H, D) only, no dense mask, no dropout.
Shapes: T packed queries, S packed keys, H heads, N kv heads, D head dim.
"""

from __future__ import annotations

from torch import Tensor

from heedful.masks import Varlen
from heedful.sources import Package
from heedful.strategies.flash import without_clamps
from heedful.strategy import HALF, AttentionStrategy, Limits, packed_arguments, unit_strides


class NativeVarlenAttentionStrategy(AttentionStrategy):
    """torch's flash attention for packed sequences."""

    name = "native_varlen"
    aliases = ("_native_varlen",)
    sources = (
        Package(
            "torch.nn.attention.varlen",
            ("varlen_attn", "AuxRequest"),
            distribution="torch",
            minimum="2.12",  # the first with grouped heads; 2.10 had neither scale nor windows
            install="pip install 'torch>=2.12'",
        ),
    )
    limits = Limits(
        devices=("cuda",),
        min_capability=(8, 0),
        dtypes=HALF,
        max_head_dim=256,
        head_dim_multiple=8,
        layouts=("THD",),
        masks=frozenset({"causal", "window", "varlen"}),
        mixed_masks=True,
        causal_alignments=("bottom_right",),
        empty_rows=frozenset({"output"}),  # their LSE is +inf
        gqa=True,
        scale=True,
        lse=True,
        backward=True,
        deterministic_backward=True,
        compile=True,
    )

    def compute_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool = False,
        causal_alignment: str = "bottom_right",  # noqa: ARG002 - the only one there is
        window: tuple[int | None, int | None] = (None, None),
        window_alignment: str = "bottom_right",  # noqa: ARG002
        varlen: Varlen,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """See the base class."""
        query, key, value = unit_strides(query, key, value)
        packed = packed_arguments(varlen, query, key)
        window = without_clamps(packed, window)
        left, right = (-1 if side is None else side for side in window)
        answer = self.kernels.varlen_attn(
            query,
            key,
            value,
            *(packed[f"{word}_{of}"] for word in ("cu_seqlens", "max_seqlen") for of in "qk"),
            return_aux=self.kernels.AuxRequest(lse=return_lse),
            scale=scale,
            window_size=(left, 0 if is_causal else right),
            enable_gqa=enable_gqa,
        )
        return (answer[0], answer[1].detach()) if return_lse else answer
