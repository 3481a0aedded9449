"""FlashAttention-4 (CuTe DSL), from the installed package or the Hub.

Takes fp16/bf16 on NVIDIA GPUs from Ampere on, which head dims and gradients depends on the generation; packed sequences
and windows. Refuses dense masks, dropout, and being traced. Facts are those of 4.0.0b36, and of 4.0.0.beta8, which
version 0 of the Hub holds.
Shapes: B batch, Q queries, K keys, H heads, D head dim, E value dim; T packed tokens.
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
from heedful.strategies.flash import NAMES
from heedful.strategy import HALF, AttentionStrategy, Limits, Pin, packed_arguments


class Flash4AttentionStrategy(AttentionStrategy):
    """FlashAttention-4 (CuTe DSL), for Hopper and Blackwell: windows, packed sequences and LSE; takes no dense mask."""

    name = "flash_4"
    aliases = {"flash_4_hub": Pin(source="hub")}
    sources = (
        Package(
            "flash_attn.cute.interface",
            # flash-attn 2.8.3 holds an older module of this name, without return_lse: it has no flash_attn_combine.
            (*NAMES, "flash_attn_combine"),
            distribution="flash-attn-4",
            install="pip install --pre flash-attn-4",
        ),
        Hub("kernels-community/flash-attn4", 0, NAMES),
    )
    limits = Limits(
        devices=("cuda",),
        min_capability=(8, 0),
        max_capability=(12, 9),
        dtypes=HALF,
        min_head_dim=8,
        max_head_dim=256,
        head_dim_multiple=8,
        value_dim_may_differ=True,
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
        compile=False,  # the kernels are compiled at their first call, by a compiler that dynamo cannot trace
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
        scale: float | None = None,
        enable_gqa: bool = False,  # noqa: ARG002 - the kernel reads the head counts
        softcap: float = 0.0,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """See the base class."""
        kernel = self.kernels.flash_attn_func if varlen is None else self.kernels.flash_attn_varlen_func
        packed: dict[str, Any] = {} if varlen is None else packed_arguments(varlen, query, key)
        # By name, all of them: between beta8 and b36 the fourth positional argument changed.
        out, lse = kernel(
            query,
            key,
            value,
            **packed,
            softmax_scale=scale,
            causal=is_causal,
            window_size=window,  # an open end is None here; (-1, 0) would be a window of one key
            softcap=softcap,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            return_lse=return_lse,
        )
        return (out, lse.detach()) if return_lse else out  # it can carry a gradient of its own


def _own_refusals(problem: AttentionProblem) -> Iterator[Refusal]:
    generation = problem.capability[0] if problem.capability else None
    dims = (problem.head_dim, problem.value_dim)
    # 10.x and 11.x also take (256, 256), but not in beta8, and beside it no deterministic or capped gradient.
    if generation not in (None, 9) and max(dims) > 128 and (dims != (192, 128) or generation not in (10, 11)):
        wanted = "at most 128" + (", or 192 with values of 128" if generation in (10, 11) else "")
        yield Refusal("head dim", "/".join(map(str, dims)), f"{wanted} on {problem.architecture}", "use flash")
    if problem.needs_grad and generation == 8:
        yield Refusal("gradient", f"wanted on {problem.architecture}", "9.0 and newer for a gradient", "use flash")
    if problem.needs_grad and problem.softcap is not None:
        # Until beta8 the gradient is that of uncapped scores, without a word; b36 has the right one.
        yield Refusal("softcap", f"{problem.softcap} with a gradient", "calls without one", "use flash or flex")
    if problem.needs_grad and problem.deterministic and generation == 12:
        yield Refusal("deterministic gradient", "wanted", "nondeterministic ones only on sm_120", "use flash")
