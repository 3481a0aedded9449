"""torch_xla's flash attention for TPUs.

Takes biases, none with a gradient; bool masks reach it as such. No LSE, no dropout, no gradient: its backward wants
lengths that its blocks divide. Facts are those of torch_xla 2.9 over jax 0.7 (pallas/ops/tpu/flash_attention.py).
Shapes: B batch, H heads, Q query length, K key length, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.problem import AttentionProblem
from heedful.refusal import Refusal
from heedful.sources import Package
from heedful.strategy import AttentionStrategy, Limits

_BLOCK = 512  # keys that it looks at together; more are padded to a multiple
_HIDDEN = -1e30  # not -inf: a row whose first block is all -inf becomes NaN


class NativeXLAAttentionStrategy(AttentionStrategy):
    """torch_xla's flash attention for TPUs."""

    name = "native_xla"
    aliases = ("_native_xla",)
    sources = (
        Package(
            "torch_xla.experimental.custom_kernel",
            ("flash_attention",),
            distribution="torch_xla",
            minimum="2.6",
            install="pip install 'torch_xla[tpu,pallas]'",
        ),
    )
    limits = Limits(
        devices=("xla",),
        dtypes=(torch.bfloat16, torch.float32),
        max_head_dim=128,
        layouts=("BHSD",),
        masks=frozenset({"causal", "bias"}),
        scale=True,
    )

    def refusals(self, problem: AttentionProblem) -> tuple[Refusal, ...]:
        """See the base class; and one query before many blocks of keys, for which the kernel computes nothing."""
        found = super().refusals(problem)
        if problem.mask.causal is None or problem.query_length > 1 or problem.key_length <= _BLOCK:
            return found
        observed = f"causal with 1 query for {problem.key_length} keys"
        return (*found, Refusal("mask", observed, "several queries, or fewer keys", "leave out the keys behind"))

    def compute_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        """See the base class."""
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        sizes = (*query.shape[:3], key.shape[2])
        bias = None
        if attn_mask is not None:  # the kernel adds it before it multiplies
            bias = (attn_mask.float() / factor).clamp(min=_HIDDEN).expand(sizes)
        elif _sees_padding(sizes, is_causal):
            bias = query.new_zeros(()).expand(sizes)  # padded keys are hidden by the bias only
        out: Tensor = self.kernels.flash_attention(query, key, value, is_causal, sm_scale=factor, ab=bias)
        return out


def _sees_padding(sizes: tuple[int, ...], is_causal: bool) -> bool:
    """Whether a query sees the zeros with which the kernel fills the last block of keys."""
    *_, queries, keys = sizes
    return keys > _BLOCK and keys % _BLOCK > 0 and not (is_causal and queries <= keys)
