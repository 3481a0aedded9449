"""Who sees whom: bands around a query's place, packed sequences and block lists, as bool tensors.

All are made for some queries and a run of keys, so that whoever goes through the queries in parts never holds all of
Q * K at once.

Shapes: B batch, H heads, Q query length, K key length, R queries asked for, S keys asked for, N packed sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Window = tuple[int | None, int | None, str]


Rows = slice | Tensor
EVERY = slice(None)


def is_every(rows: Rows) -> bool:
    """Whether no row is left out. Compared with nothing, so that lengths may be a compiler's symbols."""
    return isinstance(rows, slice) and rows.start is None and rows.stop is None


def places_of(rows: Rows, length: int, device: torch.device) -> Tensor:
    """The indices that are meant, int64 (R,): of a slice that may be open, or an index tensor as it is."""
    if isinstance(rows, Tensor):
        return rows
    if is_every(rows):
        return torch.arange(length, device=device)
    return torch.arange(rows.start or 0, length if rows.stop is None else min(rows.stop, length), device=device)


def cut(tensor: Tensor, axis: int, rows: Rows) -> Tensor:
    """Only these rows along the last axis (-1) or the one before (-2), where the tensor has it and broadcasts not."""
    if is_every(rows) or tensor.dim() < -axis or tensor.shape[axis] == 1:
        return tensor
    if isinstance(rows, Tensor):
        return tensor.index_select(axis, rows.to(tensor.device))
    return tensor[..., rows] if axis == -1 else tensor[..., rows, :]


def rows_of(tensor: Tensor, rows: Tensor) -> Tensor:
    """The rows (…, R, K) of a mask's tensor; one that every query shares stays one, and so do expanded copies."""
    if tensor.dim() < 2:
        return tensor
    for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        tensor = tensor.narrow(axis, 0, 1) if size > 1 and stride == 0 else tensor
    return cut(tensor, -2, rows)


def band(query: Tensor, key: Tensor, left: int | None, right: int | None, shift: int = 0) -> Tensor:
    """Bool (R, S), of their indices: key j is seen by query i where i + shift - left <= j <= i + shift + right."""
    return within(query[:, None] + shift, key[None, :], left, right)


def reach(bands: list[Window], queries: slice, query_length: int, key_length: int) -> slice:
    """The keys that these queries, start and stop given, see at most; of length 0 where the bands leave none."""
    first, past = 0, key_length
    for left, right, alignment in bands:
        shift = key_length - query_length if alignment == "bottom_right" else 0
        first = first if left is None else max(first, queries.start + shift - left)
        past = past if right is None else min(past, queries.stop + shift + right)
    return slice(first, max(first, past))


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


def sequence_of(cu_seqlens: Tensor, places: Tensor) -> Tensor:
    """The packed sequence of the tokens at these places; N for tokens behind the last."""
    return torch.searchsorted(cu_seqlens[1:].contiguous(), places.to(cu_seqlens.dtype).contiguous(), right=True)


def seen_by_blocks(
    block: Any, query_length: int, key_length: int, device: torch.device, rows: Rows = EVERY, keys: slice = EVERY
) -> Tensor:
    """What a ``BlockMask`` lets see: all of its full blocks, its function in its partial blocks, nothing elsewhere."""
    from torch.nn.attention.flex_attention import create_mask

    at, key_at = places_of(rows, query_length, device), places_of(keys, key_length, device)
    row_block, column_block = block.BLOCK_SIZE

    def listed(counts: Tensor, indices: Tensor) -> Tensor:
        counts, indices = counts[..., at // row_block], indices[..., at // row_block, :]
        blocks = -(-key_length // column_block)
        used = torch.arange(indices.shape[-1], device=device) < counts[..., None]
        table = torch.zeros(*counts.shape, blocks + 1, dtype=torch.bool, device=device)  # the last takes the unused
        table = table.scatter(-1, torch.where(used, indices.long(), blocks), True)
        return table[..., key_at // column_block]

    def moved(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen: Tensor = block.mask_mod(b, h, at[q], key_at[k])
        return seen

    batch, heads = block.kv_num_blocks.shape[:2]
    whole = is_every(rows) and is_every(keys)
    if not whole and 0 in (len(at), len(key_at)):  # nothing can be looked up in no places
        return torch.zeros(batch, heads, len(at), len(key_at), dtype=torch.bool, device=device)
    seen = create_mask(block.mask_mod if whole else moved, batch, heads, len(at), len(key_at), device=str(device))
    seen = seen & listed(block.kv_num_blocks, block.kv_indices)
    if block.full_kv_num_blocks is None:
        return seen
    return seen | listed(block.full_kv_num_blocks, block.full_kv_indices)
