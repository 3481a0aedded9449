"""Who sees whom: bands around a query's place, packed sequences and block lists, as bool tensors.

Shapes: B batch, H heads, Q query length, K key length, N packed sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Window = tuple[int | None, int | None, str]


def band(
    query_length: int, key_length: int, left: int | None, right: int | None, alignment: str, device: torch.device
) -> Tensor:
    """Bool (Q, K): key j is seen by query i where place(i) - left <= j <= place(i) + right."""
    place = torch.arange(query_length, device=device)[:, None]
    if alignment == "bottom_right":
        place = place + (key_length - query_length)
    return within(place, torch.arange(key_length, device=device)[None, :], left, right)


def within(place: Tensor, keys: Tensor, left: int | None, right: int | None) -> Tensor:
    """Which keys lie within a band around each query's place; None leaves a side open."""
    if left is None:
        return keys <= place + right if right is not None else keys == keys + 0 * place
    return keys >= place - left if right is None else (keys >= place - left) & (keys <= place + right)


def sees_none(place: Tensor, query_length: Tensor | int, key_length: Tensor | int, bands: list[Window]) -> Tensor:
    """Which queries no key is left for, by where the bands around their places end."""
    first, last = torch.zeros_like(place), torch.zeros_like(place) + key_length - 1
    for left, right, alignment in bands:
        at = place + key_length - query_length if alignment == "bottom_right" else place
        first = first if left is None else torch.maximum(first, at - left)
        last = last if right is None else torch.minimum(last, at + right)
    return first > last


def sequence_of(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The packed sequence of each token; N for tokens behind the last."""
    places = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), places, right=True)


def seen_by_blocks(block: Any, query_length: int, key_length: int, device: torch.device) -> Tensor:
    """What a ``BlockMask`` lets see: all of its full blocks, its function in its partial blocks, nothing elsewhere."""
    from torch.nn.attention.flex_attention import create_mask

    def listed(counts: Tensor, indices: Tensor) -> Tensor:
        rows, columns = block.BLOCK_SIZE
        blocks = -(-key_length // columns)
        used = torch.arange(indices.shape[-1], device=device) < counts[..., None]
        table = torch.zeros(*counts.shape, blocks + 1, dtype=torch.bool, device=device)  # the last takes the unused
        table = table.scatter(-1, torch.where(used, indices.long(), blocks), True)[..., :blocks]
        within = table.repeat_interleave(rows, -2).repeat_interleave(columns, -1)
        return within[..., :query_length, :key_length]

    batch, heads = block.kv_num_blocks.shape[:2]
    seen = create_mask(block.mask_mod, batch, heads, query_length, key_length, device=str(device))
    seen = seen & listed(block.kv_num_blocks, block.kv_indices)
    if block.full_kv_num_blocks is None:
        return seen
    return seen | listed(block.full_kv_num_blocks, block.full_kv_indices)
