"""AITER's flash attention for AMD Instinct: from its own package, or as a kernel of the Hub.

The package: fp16/bf16 and gradients. The Hub's kernel, by the name of diffusers: bf16, head dims 64 and 128, no
gradient. No dense mask, no biases.
Shapes: B batch, Q query length, K key length, H heads, N kv heads, D head dim, T packed tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from heedful.masks import Varlen
from heedful.problem import AttentionProblem
from heedful.refusal import Refusal
from heedful.sources import Hub, Package, Source
from heedful.strategy import HALF, AttentionStrategy, Limits, Pin, packed_arguments, unit_strides

_FUNCTIONS = ("flash_attn_func", "flash_attn_varlen_func")


class AiterAttentionStrategy(AttentionStrategy):
    """AITER's flash attention for AMD Instinct GPUs."""

    name = "aiter"
    aliases = {"aiter_fa2_hub": Pin(source="hub")}
    sources = (
        Package("aiter", _FUNCTIONS, distribution="amd-aiter", minimum="0.1.7", install="pip install amd-aiter"),
        Hub("kernels-community/aiter-flash-attn-ck", 1, _FUNCTIONS),
    )
    limits = Limits(
        devices=("cuda",),
        architectures=("gfx942", "gfx950"),
        dtypes=HALF,
        max_head_dim=256,
        head_dim_multiple=8,
        layouts=("BSHD", "THD"),
        masks=frozenset({"causal", "window", "varlen"}),
        mixed_masks=True,
        causal_alignments=("bottom_right",),
        empty_rows=frozenset({"output"}),
        gqa=True,
        scale=True,
        dropout=True,
        lse=True,
        backward=True,
        deterministic_backward=True,
    )

    def limits_for(self, device: str) -> Limits:
        """See the base class; the Hub's kernel is built for less."""
        limits = super().limits_for(device)
        if self.pin.source != "hub":
            return limits
        return replace(
            limits,
            dtypes=(torch.bfloat16,),
            max_head_dim=128,
            head_dim_multiple=64,
            backward=False,
            deterministic_backward=False,
        )

    def wanted_sources(self) -> tuple[Source, ...]:
        """The package unless the Hub is named: their limits differ, so one does not stand in for the other."""
        return tuple(one for one in self.sources if one.kind == (self.pin.source or "package"))

    def refusals(self, problem: AttentionProblem) -> tuple[Refusal, ...]:
        """See the base class; and windows that its kernels take for other ones, or for none (0.1.7)."""
        found, window = super().refusals(problem), problem.mask.window
        if problem.dropout_p >= 1:
            found = (*found, Refusal("dropout", "1.0", "probabilities below 1", "use native"))
        if window is None:
            return found
        left, right = _sides(window[:2], problem.mask.causal is not None)
        open_end = right is None or right >= problem.key_length  # and that is taken for the number of keys
        more_queries = problem.query_length > problem.key_length or problem.layout == "THD"
        if max(left or 0, right or 0) > 0 and not (open_end and more_queries):
            return found
        wanted = "a side above 0, and a right end below the number of keys"
        return (*found, Refusal("window", f"{left}..{right}", wanted, "use native or reference"))

    def compute_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool = False,
        causal_alignment: str = "bottom_right",  # noqa: ARG002 - the only one there is
        window: tuple[int | None, int | None] | None = None,
        window_alignment: str = "bottom_right",  # noqa: ARG002
        varlen: Varlen | None = None,
        dropout_p: float = 0.0,
        scale: float | None = None,
        enable_gqa: bool = False,  # noqa: ARG002 - the kernel reads the head counts
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """See the base class."""
        tensors, alone = unit_strides(query, key, value), query.dim() == 3 and varlen is None
        wants_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        left, right = (-1 if side is None else side for side in _sides(window, is_causal))
        options = {
            "dropout_p": dropout_p,
            "softmax_scale": scale,
            "causal": is_causal and window is None,
            "window_size": (left, right) if window is not None else (-1, -1),
            "return_lse": return_lse or wants_grad,  # it asserts so: the backward reads the LSE
        }
        if self.pin.source != "hub":
            options["deterministic"] = torch.are_deterministic_algorithms_enabled()
        if varlen is None:
            answer = self.kernels.flash_attn_func(*((t[None] for t in tensors) if alone else tensors), **options)
        else:
            packed = packed_arguments(varlen, query, key)
            packed["max_seqlen_k"] = max(
                packed["max_seqlen_k"], right + 1
            )  # a right end of as much would count as open
            answer = self.kernels.flash_attn_varlen_func(*tensors, **packed, **options)
        out, lse = answer[:2] if options["return_lse"] else (answer, None)
        out, lse = (out[0], None if lse is None else lse[0]) if alone else (out, lse)
        return (out, lse.detach()) if return_lse and lse is not None else out


def _sides(window: tuple[int | None, int | None] | None, is_causal: bool) -> tuple[int | None, int | None]:
    """The window with causality in it."""
    left, right = window or (None, None)
    return left, 0 if is_causal else right
