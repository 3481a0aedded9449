"""flash-attn 2, from the installed package or the Hub.

Takes fp16/bf16 on NVIDIA GPUs from Ampere on (never Turing), head dims up to 256, packed sequences, windows, dropout.
Refuses dense masks. Facts are those of the sources of 2.6.3 to 2.8.3 (csrc/flash_attn), the versions that are known.
Shapes: B batch, Q queries, K keys, H heads, D head dim; N sequences of T packed tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from heedful.masks import Varlen
from heedful.problem import AttentionProblem
from heedful.refusal import Refusal
from heedful.sources import Hub, Package
from heedful.strategy import HALF, AttentionStrategy, Limits, Pin, packed_arguments

NAMES = ("flash_attn_func", "flash_attn_varlen_func")
# At least 144 KB of shared memory for one block; elsewhere (99 KB) the backward for 256 with dropout launches nothing.
_MUCH_SHARED_MEMORY = {(8, 0), (8, 7), (9, 0), (10, 0), (10, 3)}


class FlashAttentionStrategy(AttentionStrategy):
    """flash-attn 2: dropout, windows, packed sequences and LSE; takes no dense mask."""

    name = "flash"
    aliases = {
        "flash_hub": Pin(source="hub"),
        "flash_varlen": Pin(layouts=("THD",)),
        "flash_varlen_hub": Pin(source="hub", layouts=("THD",)),
    }
    sources = (
        Package(
            "flash_attn.flash_attn_interface",  # `flash_attn` alone may be the namespace of flash-attn-4
            NAMES,
            distribution="flash-attn",
            minimum="2.6.3",
            install="pip install flash-attn --no-build-isolation",
        ),
        Hub("kernels-community/flash-attn2", 3, NAMES),
    )
    limits = Limits(
        devices=("cuda",),
        min_capability=(8, 0),
        dtypes=HALF,
        max_head_dim=256,
        head_dim_multiple=8,
        layouts=("BSHD", "THD"),
        masks=frozenset({"causal", "window", "varlen"}),
        mixed_masks=True,
        causal_alignments=("bottom_right",),
        empty_rows=frozenset({"output"}),  # their LSE is +inf
        gqa=True,
        scale=True,
        softcap=True,
        dropout=True,
        lse=True,
        backward=True,
        deterministic_backward=True,
        compile=True,
    )

    def refusals(self, problem: AttentionProblem) -> tuple[Refusal, ...]:
        """See the base class."""
        return (*super().refusals(problem), *_own_refusals(problem))

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
        dropout_p: float = 0.0,
        scale: float | None = None,
        enable_gqa: bool = False,  # noqa: ARG002 - the kernel reads the head counts
        softcap: float = 0.0,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """See the base class."""
        kernel, packed = self.kernels.flash_attn_func, {}
        if varlen is not None:
            kernel, packed = self.kernels.flash_attn_varlen_func, packed_arguments(varlen, query, key)
            window = without_clamps(packed, window)
            if packed["max_seqlen_q"] == 1 and len(query) != len(packed["cu_seqlens_q"]) - 1:
                packed["max_seqlen_q"] = 2  # with 1, grouped heads are folded as if every sequence had its query
        answer = kernel(
            query,
            key,
            value,
            **packed,
            dropout_p=dropout_p,
            softmax_scale=scale,
            causal=is_causal,
            window_size=tuple(-1 if side is None else side for side in window),
            softcap=softcap,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            return_attn_probs=return_lse,
        )
        return (answer[0], answer[1]) if return_lse else answer


def without_clamps(packed: dict[str, Any], window: tuple[int | None, int | None]) -> tuple[int | None, int | None]:
    """A window of packed sequences, its open right end as a number, and a longest key sequence that outreaches it.

    The kernels take a right end of ``max_seqlen_k`` or more for open, and an open one beside a left end for
    ``max_seqlen_k``; both hide or show wrong keys where a sequence has more queries than keys.
    """
    left, right = window
    if left is None and right is None:
        return window
    right = packed["max_seqlen_q"] if right is None else min(right, packed["max_seqlen_q"])
    packed["max_seqlen_k"] = max(packed["max_seqlen_k"], right + 1)
    return left, right


def _own_refusals(problem: AttentionProblem) -> Iterator[Refusal]:
    if problem.softcap is not None and problem.dropout_p > 0:
        yield Refusal("softcap", f"{problem.softcap} with dropout", "one of both", "use flex or reference")
    small = problem.capability is not None and problem.capability not in _MUCH_SHARED_MEMORY
    if small and problem.needs_grad and problem.dropout_p > 0 and problem.head_dim > 192:
        wanted = "at most 192 for a gradient with dropout on this GPU"
        yield Refusal("head dim", str(problem.head_dim), wanted, "use native or reference")
    if problem.mask.window is not None and problem.mask.causal is None and problem.layout != "THD":
        left, right, _ = problem.mask.window
        queries, keys = problem.query_length, problem.key_length
        clamped = keys <= right < queries - 1 if right is not None else queries > keys + 1 and (left or 0) < keys
        if clamped:  # see without_clamps
            observed = f"{left}..{right} with {queries} queries for {keys} keys"
            yield Refusal("window", observed, "right ends below the number of keys", "give a dense mask")
