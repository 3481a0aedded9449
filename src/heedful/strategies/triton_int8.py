"""Our own Triton kernels with scores in int8, after SageAttention (arXiv 2410.02367): keys smoothed, no CUDA build.

Takes fp16/bf16 on GPUs on which Triton multiplies eight bits (compute capability 8.0 and up, AMD), and all else that
``triton`` takes: any head dim to 256, a value dim of its own, every mask but block masks, packs, grouped heads, soft
caps, the LSE. No dropout, no gradient. Quantising takes time, too: it is for some thousands of keys.

``relative_error`` has a margin. Measured in Triton's interpreter on 256 and 1024 keys it is 0.011 on N(0, 1), with
channels of a large mean in the keys or without, and 0.026 where the scores' deviation is 6; at most 0.04 in any 16
neighbouring queries. The LSE is off by 0.01, and by 0.16 with such a deviation.

Shapes: B batch, Q query length, K key length, H heads, N kv heads, D head dim, E value dim, T packed tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from heedful.strategies.triton import AMD, INTERPRETER, TritonKernelStrategy
from heedful.strategy import HALF, Answer, Tuning


class TritonInt8AttentionStrategy(TritonKernelStrategy):
    """our own Triton kernels, scores in int8: SageAttention's way, with masks, packs and odd head dims."""

    name = "triton_int8"
    exactness = "quantised"
    bits: int | str = 8
    relative_error = 0.1
    limits = (
        INTERPRETER,
        replace(
            INTERPRETER,
            devices=("cuda",),
            min_capability=(8, 0),
            architectures=AMD,
            dtypes=HALF,
            contends=True,
        ),
    )

    def compute_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        return_lse: bool = False,
        tuning: Tuning | None = None,
        **asked: Any,
    ) -> Answer:
        """See the base class; ``asked`` are the arguments of ``call_of_arguments``."""
        from heedful.kernels.arguments import as_given, call_of_arguments
        from heedful.kernels.choice import by_choice
        from heedful.kernels.tiles import FORWARD

        call, forward = call_of_arguments(query, key, value, **asked), self.forward()
        tuning = tuning if call.splits else None  # tiles are measured where rows are aligned
        out, lse = by_choice(tuning, FORWARD, lambda tile: forward(call, with_lse=return_lse, tile=tile))
        out, lse = as_given(query, out, lse)
        return out if lse is None else (out, lse)

    def forward(self) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """The kernels' forward pass."""
        from heedful.kernels import int8

        return int8.forward
