"""The arithmetic of the stand-in, which the real package has in CUDA and Triton: int8 scores, 16- or 8-bit values.

Shapes: B batch, H heads, Q query length, K key length, D head dim. Scores are in base 2, as the kernels have them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

LOG2_E = 1.44269504
FP8_OFFSET = 8.807  # log2 of 448, the largest float8_e4m3fn: weights are stretched to its range


@dataclass(frozen=True)
class Products:
    """How the weights meet the values. ``values``: their dtype; ``sums``: the dtype of the sum over one block of keys.

    ``largest``: what the largest value of a channel is scaled to in 8 bits.
    """

    values: torch.dtype = torch.float16
    sums: torch.dtype = torch.float32
    largest: float = 448.0
    block: int = 64


def quantise(x: Tensor, groups: Tensor, floor: float = 0.0) -> tuple[Tensor, Tensor]:
    """(B, H, L, D) as whole numbers to 127 and their scales (B, H, L, 1); tokens of one group (L,) share a scale."""
    count = int(groups.max()) + 1
    largest = x.abs().amax(-1)
    highest = x.new_zeros(*x.shape[:2], count).scatter_reduce(2, groups.expand_as(largest), largest, "amax")
    scale = (highest / 127.0 + floor)[:, :, groups, None]
    scaled = (x / scale).nan_to_num()  # a group of zeros has scale 0, and is 0 again whatever its integers are
    return torch.trunc(scaled + 0.5 * torch.where(scaled >= 0, 1.0, -1.0)), scale


def blocks(length: int, size: int) -> Tensor:
    """Groups of ``size`` neighbours."""
    return torch.arange(length) // size


def query_threads(length: int, warp: int) -> Tensor:
    """The queries that one thread of a warp of ``warp`` queries holds: every eighth."""
    place = torch.arange(length)
    return place // warp * 8 + place % 8


def key_threads(length: int, warp: int) -> Tensor:
    """The keys that one thread holds: of every eight neighbours, two."""
    place = torch.arange(length)
    return place // warp * 4 + place % 8 // 2


def attend(
    query: tuple[Tensor, Tensor],
    key: tuple[Tensor, Tensor],
    value: Tensor,
    *,
    factor: float = 1.0,
    causal: bool = False,
    mask: Tensor | None = None,
    products: Products = Products(),
) -> tuple[Tensor, Tensor]:
    """Out (B, H, Q, D), float32, and LSE (B, H, Q), in base 2: block after block of keys, as the kernels do it.

    ``factor`` brings the scores to base 2. ``mask`` is bool, or added to the scores as they are (in base 2).
    """
    in_eight_bits = products.values == torch.float8_e4m3fn
    rescale = 1.0
    if in_eight_bits:
        rescale = value.abs().amax(-2, keepdim=True) / products.largest  # a channel of zeros becomes NaN, as there
        value = value * (1.0 / rescale)
    value = value.to(products.values).float()
    offset = FP8_OFFSET if in_eight_bits else 0.0
    scores_of = query[0] @ key[0].mT * (query[1] * key[1].mT) * factor
    if mask is not None:  # keys beyond the last are hidden as others are, and a row of hidden keys averages them, too
        more = -scores_of.shape[3] % products.block
        scores_of, value = pad(scores_of, (0, more)), pad(value, (0, 0, 0, more))
        mask = pad(mask, (0, more)) if mask.dtype == torch.bool else pad(mask.float(), (0, more), value=-1.0e6)
    high = torch.full(scores_of.shape[:3], -math.inf)
    total, out = torch.ones_like(high), torch.zeros(*high.shape, value.shape[-1])
    places = torch.arange(scores_of.shape[2])[:, None]
    for start in range(0, scores_of.shape[3], products.block):
        part = slice(start, start + products.block)
        scores = scores_of[..., part]
        if causal:
            keys = torch.arange(scores_of.shape[3])[part]
            scores = scores.masked_fill(keys > places, -math.inf)
        if mask is not None:
            here = mask[..., part]
            scores = scores + (torch.where(here, 0.0, -1.0e6) if mask.dtype == torch.bool else here)
        new_high = torch.maximum(high, scores.amax(-1) - offset)
        weights = torch.exp2(scores - new_high[..., None])
        shrink = torch.exp2(high - new_high).nan_to_num()
        weighted = (weights.to(products.values).float() @ value[..., part, :]).to(products.sums).float()
        state = new_high, total * shrink + weights.sum(-1), out * shrink[..., None] + weighted
        used = _used(mask, part, high)
        high, total, out = (
            torch.where(used if new.dim() == 3 else used[..., None], new, old)
            for new, old in zip(state, (high, total, out), strict=True)
        )
    return out / total[..., None] * rescale, torch.log2(total) + high


def _used(mask: Tensor | None, part: slice, like: Tensor) -> Tensor:
    """Bool (B, H, Q): a block of 128 queries passes over a block of keys of which a bool mask hides all."""
    if mask is None or mask.dtype != torch.bool:
        return torch.ones_like(like, dtype=torch.bool)
    rows = [rows.any(-1).any(-1, keepdim=True).expand(rows.shape[:3]) for rows in mask[..., part].split(128, dim=2)]
    return torch.cat(rows, dim=2)
