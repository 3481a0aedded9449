"""The oracle of the contract suite: attention written down as its definition, on purpose without heedful's own code.

    out = softmax(softcap(scale * q k^T) + bias, over the keys that are seen) v
    lse = log(sum(exp(the same scores)))

A query that sees no key gets zeros and -inf. The strategies, the reference among them, are judged against this in
float64; in the dtype of the call it is the naive kernel of flash-attn's tolerance rule.

Shapes: … leading sizes, H heads, N kv heads, Q queries, K keys, D head dim, E value dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Meaning:
    """What a call means, beside its three tensors. ``seen`` and ``bias`` broadcast to (…, H, Q, K).

    ``groups``: query heads for each kv head. ``drop``: factor (…, H, Q, K) of the weights, for known dropout.
    """

    scale: float
    seen: Tensor | None = None
    softcap: float | None = None
    groups: int = 1
    drop: Tensor | None = None


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, meaning: Meaning) -> tuple[Tensor, Tensor]:
    """Out (…, H, Q, E) and LSE (…, H, Q), all in the dtype of the query; gradients flow to all four tensors."""
    if meaning.groups > 1:
        key, value = (tensor.repeat_interleave(meaning.groups, dim=-3) for tensor in (key, value))
    scores = (query @ key.transpose(-2, -1)) * meaning.scale
    if meaning.softcap is not None:
        scores = meaning.softcap * torch.tanh(scores / meaning.softcap)
    if bias is not None:
        scores = scores + _narrowed(_of_rank(bias, scores), scores.dtype)
    if key.shape[-2] == 0:
        return scores @ value, scores.detach().sum(-1) - math.inf
    if meaning.seen is not None:
        scores = torch.where(_of_rank(meaning.seen, scores), scores, -math.inf)
    peak = scores.detach().amax(-1, keepdim=True)
    peak = torch.where(peak == -math.inf, 0.0, peak)
    weights = torch.exp(scores - peak)
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total == 0, 1.0, total)
    if meaning.drop is not None:
        weights = weights * meaning.drop.to(scores.dtype)
    return weights @ value, (peak + torch.log(total)).detach().squeeze(-1)


def band(
    query_length: int, key_length: int, left: int | None, right: int | None, alignment: str, device: torch.device
) -> Tensor:
    """Bool (Q, K), pair by pair: the query at place p sees keys p - left to p + right, both included; None is open.

    The place of query i is i ("top_left") or i + K - Q ("bottom_right").
    """
    shift = key_length - query_length if alignment == "bottom_right" else 0
    rows = [
        [
            (left is None or key >= query + shift - left) and (right is None or key <= query + shift + right)
            for key in range(key_length)
        ]
        for query in range(query_length)
    ]
    return torch.tensor(rows, dtype=torch.bool, device=device).reshape(query_length, key_length)


def _of_rank(tensor: Tensor, scores: Tensor) -> Tensor:
    """Masks may have four dimensions where the scores have fewer: the first ones are 1 then."""
    while tensor.dim() > scores.dim():
        tensor = tensor.squeeze(0)
    return tensor


def _narrowed(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """A bias in the dtype of the scores; finite values stay finite."""
    bounds = torch.finfo(dtype)
    return torch.where(bias.isinf(), bias, bias.clamp(bounds.min, bounds.max)).to(dtype)
