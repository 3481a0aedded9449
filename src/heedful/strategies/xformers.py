"""xFormers' memory-efficient attention: flash-attn 2 or CUTLASS, whichever takes the call.

NVIDIA only. Bool masks reach it as biases, for it would fail on them. Its CUTLASS operator, the only one with float32,
biases and value dims of their own, refuses GPUs newer than 9.0; its flash operator, the only one with free windows,
takes 16-bit types from 8.0 on. No LSE beside a gradient or dropout; no gradient of a bias, which is lost where nothing
else wants one. Facts are those of 0.0.35.

Shapes: B batch, Q query length, K key length, H heads, N kv heads, D head dim, T packed tokens, S packed sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from heedful.masks import Varlen
from heedful.problem import AttentionProblem
from heedful.refusal import Refusal
from heedful.sources import Package
from heedful.strategy import HALF, AttentionStrategy, Limits, packed_arguments

_ALIGNED = 8  # elements: 16 bytes of a 16-bit type; float32 would do with 4
_NAMES = ("memory_efficient_attention", "memory_efficient_attention_forward_requires_grad", "attn_bias")


class _Operators(Limits):
    """Limits of two operators together: what only one of them takes is refused here, where lowerings can mend it."""

    def refusals(self, problem: AttentionProblem) -> Iterator[Refusal]:
        """See Limits. A pack whose mask neither takes is refused as a layout: unpacked, a dense mask can say it."""
        found = [*super().refusals(problem), *_of_operators(problem)]
        if problem.layout == "THD" and {one.field for one in found} & {"mask", "mask mix", "causal alignment"}:
            found.append(Refusal("layout", "THD", "packs whose mask one of its operators takes", "unpack it"))
        return iter(found)


class XFormersAttentionStrategy(AttentionStrategy):
    """xFormers' memory-efficient attention: flash or CUTLASS, whichever takes the call."""

    name = "xformers"
    sources = (Package("xformers.ops.fmha", _NAMES, "xformers", "0.0.29", "pip install xformers"),)
    limits = _Operators(
        devices=("cuda",),
        min_capability=(5, 0),
        dtypes=(torch.float16, torch.bfloat16, torch.float32),
        bfloat16_from=(8, 0),
        head_dim_multiple=8,
        value_dim_may_differ=True,
        layouts=("BSHD", "THD"),
        masks=frozenset({"causal", "window", "varlen", "bias"}),
        mixed_masks=True,
        causal_alignments=("bottom_right",),
        empty_rows=frozenset({"output"}),  # their LSE is +inf from flash, 0 from CUTLASS
        gqa=True,
        scale=True,
        dropout=True,
        lse=True,
        backward=True,
    )

    def compute_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        causal_alignment: str = "bottom_right",  # noqa: ARG002 - the only one it takes
        window: tuple[int | None, int | None] = (None, None),
        window_alignment: str = "bottom_right",  # noqa: ARG002
        varlen: Varlen | None = None,
        dropout_p: float = 0.0,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """See the base class."""
        packed, shape = query.dim() == 3, (*query.shape[:-1], value.shape[-1])
        query, key, value = (aligned(t[None] if packed else t) for t in (query, key, value))
        sizes = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
        classes, band = self.kernels.attn_bias, (window[0], 0 if is_causal else window[1])
        bias = structure(classes, band, varlen, query, key) if attn_mask is None else aligned_bias(attn_mask, sizes)
        if enable_gqa:  # (B, length, N, H / N, D), by views: that is how it takes grouped heads
            grouped = (key.shape[2], query.shape[2] // key.shape[2])
            key, value = (t[:, :, :, None].expand(-1, -1, -1, grouped[1], -1) for t in (key, value))
            query = query.unflatten(2, grouped)
            bias = bias.unflatten(1, grouped) if isinstance(bias, Tensor) else bias
        answer = getattr(self.kernels, _NAMES[return_lse])(query, key, value, bias, dropout_p, scale)
        if not return_lse:
            return answer.reshape(shape)  # type: ignore[no-any-return]
        lse = unpadded(answer[1].flatten(1, -2), varlen, sizes[2])
        return answer[0].reshape(shape), lse.squeeze(0) if packed else lse


def aligned(tensor: Tensor) -> Tensor:
    """The same tensor, copied unless rows and heads begin at multiples of 16 bytes: CUTLASS refuses other ones."""
    fits = tensor.stride(-1) == 1 and not any(x % _ALIGNED for x in (tensor.storage_offset(), *tensor.stride()[:-1]))
    return tensor if fits else tensor.clone(memory_format=torch.contiguous_format)


def aligned_bias(bias: Tensor, sizes: tuple[int, int, int, int]) -> Tensor:
    """The bias as (B, H, Q, K), aligned likewise: a view of rows that are a little too long, if need be."""
    bias = bias.expand(*bias.shape[:-1], sizes[-1])
    more = -sizes[-1] % _ALIGNED
    bias = aligned(torch.nn.functional.pad(bias, (0, more)) if more else bias)
    return bias[..., : sizes[-1]].expand(sizes)


def structure(classes: Any, band: tuple[Any, Any], varlen: Varlen | None, query: Tensor, key: Tensor) -> Any:
    """The bias class for a band that ends bottom right, of each sequence where some are packed; None for no bias.

    A packing gets there without a look at the device: what CUTLASS and flash read of it is the starts, on the device,
    and the longest lengths. ``seqstart_py``, the starts as Python numbers, is for other operators, and left empty.
    """
    left, right = band
    if varlen is not None:
        of = packed_arguments(varlen, query[0], key[0])
        parts = [classes._SeqLenInfo(of[f"cu_seqlens_{x}"].contiguous(), of[f"max_seqlen_{x}"], 0, []) for x in "qk"]
        if right is None:
            return classes.BlockDiagonalMask(*parts)
        if left is None:
            return classes.BlockDiagonalCausalFromBottomRightMask(*parts)
        return classes.BlockDiagonalCausalLocalAttentionFromBottomRightMask(*parts, _window_size=left + 1)
    if left is None and right in (None, 0):
        return None if right is None else classes.LowerTriangularFromBottomRightMask()
    return classes.LocalAttentionFromBottomRightMask(*(query.shape[1] + key.shape[1] if x is None else x for x in band))


def unpadded(lse: Tensor, varlen: Varlen | None, length: int) -> Tensor:
    """The LSE as (B, H, Q) or (1, H, T): CUTLASS pads rows, and has a row for each packed sequence, (S, H, Q)."""
    if varlen is None or lse.shape[0] == 1:
        return lse[..., :length]
    tokens = torch.arange(length, device=lse.device)
    owner = torch.bucketize(tokens, varlen.cu_seqlens_q[1:].long(), right=True)
    return lse[owner, :, tokens - varlen.cu_seqlens_q[owner]].T[None]


def _of_operators(problem: AttentionProblem) -> Iterator[Refusal]:
    kinds, capability = problem.mask.kinds, problem.capability or (0, 0)
    if "window" in kinds and not _takes_window(problem):
        yield Refusal("mask", "window", "16-bit types from 8.0 on, and in packs causal windows", "give a dense mask")
    if "bias" in kinds and len(kinds) > 1:
        yield Refusal("mask mix", " & ".join(kinds), "a bias by itself", "join them into one dense mask")
    if problem.needs_grad and problem.heads != problem.kv_heads:
        yield Refusal("kv heads", f"{problem.kv_heads}", f"{problem.heads} for a gradient", "repeat them")
    if capability > (9, 0) and not _for_flash(problem):
        dims = f"{problem.head_dim}/{problem.value_dim}"
        observed = f"{problem.dtype}, dims {dims}, mask {problem.mask}".removeprefix("torch.")
        yield Refusal("operator", observed, "16-bit, one dim up to 256 and no bias past 9.0", "use native")
    if problem.dropout_p >= 1:
        yield Refusal("dropout", "1.0", "probabilities below 1", "use native")
    if problem.needs_lse and (problem.needs_grad or problem.dropout_p):
        yield Refusal("LSE beside a gradient or dropout", "wanted", "one of them", "use native_efficient")


def _for_flash(problem: AttentionProblem) -> bool:
    suits = problem.dtype in HALF and (problem.capability or (0, 0)) >= (8, 0) and problem.mask.bias is None
    return suits and problem.head_dim == problem.value_dim <= 256


def _takes_window(problem: AttentionProblem) -> bool:
    """Flash takes a right end at the number of keys or past it for an open one, and that for K: wrong where Q > K."""
    mask, keys = problem.mask, problem.key_length
    right = 0 if mask.causal or mask.window is None else mask.window[1]
    fits = right == 0 if mask.varlen else problem.query_length <= keys or (right is not None and right < keys)
    return fits and _for_flash(problem)
