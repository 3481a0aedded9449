"""Which rows of an answer to look at: where kernels go wrong, and some at random.

First and last rows, borders of blocks, ends of packed sequences, and the rows that see the fewest keys, those that see
none before all: by arithmetic for bands and padding, by counting for tensors, of which a bounded part is read.

Shapes: B batch, H heads, Q query length, K key length, R rows.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import torch
from torch import Tensor

from heedful.masks import Mask
from heedful.problem import AttentionProblem

_COUNTED = 1 << 24  # elements of a mask that are read in search of the rows that see the fewest keys
_CHUNK = 1 << 20  # of these at once
_SEAMS = (64, 128, 256)  # block sizes of kernels


def choose_rows(problem: AttentionProblem, mask: Mask | None, count: int = 16, seed: int | None = None) -> Tensor:
    """At most ``count`` rows, int64 (R,), sorted, on the CPU: ends, seams of blocks, rows that see the fewest keys;

    the rest, a quarter at the least, at random. ``seed`` None draws anew each time; torch's generators are not used.
    """
    length = problem.query_length
    if count >= length:
        return torch.arange(length)
    draw = random.Random(seed)
    fixed = count - max(1, -(-count // 4))
    rows: dict[int, None] = dict.fromkeys([0, length - 1][:fixed])
    special = [_fewest_keys(problem, mask, draw), _ends_of_sequences(mask, length, draw), _seams(length, draw)]
    while len(rows) < fixed and any(special):  # one of each in turn
        special = [each for each in special if each]
        for each in special:
            if len(rows) < fixed:
                rows[each.pop(0)] = None
    while len(rows) < count:
        rows[draw.randrange(length)] = None
    return torch.tensor(sorted(rows))


def _seams(length: int, draw: random.Random) -> list[int]:
    """The rows on both sides of a few borders of blocks."""
    found: list[int] = []
    for size in _SEAMS:
        if length > size:
            seam = size * draw.randint(1, (length - 1) // size)
            found += [seam, seam - 1]
    return found


def _ends_of_sequences(mask: Mask | None, length: int, draw: random.Random) -> list[int]:
    if mask is None or mask.varlen is None:
        return []
    ends = mask.varlen.cu_seqlens_q.tolist()
    found = {place for end in ends for place in (end - 1, end) if 0 <= place < length}
    return draw.sample(sorted(found), min(8, len(found)))


def _fewest_keys(problem: AttentionProblem, mask: Mask | None, draw: random.Random) -> list[int]:
    """Rows that see the fewest keys, those without any first, then rows that see the fewest but some."""
    counts = [] if mask is None or mask.noop else list(_keys_seen(problem, mask))
    if not counts:
        return []
    seen = torch.stack(counts).amin(0).cpu()
    least = seen.min()
    first = (seen == least).nonzero().flatten().tolist()
    if len(first) == len(seen):
        return []
    more = torch.where(seen == least, problem.key_length + 1, seen)
    return [*draw.sample(first, min(3, len(first))), int(more.argmin()), first[-1], first[0]]


def _keys_seen(problem: AttentionProblem, mask: Mask) -> Iterator[Tensor]:
    """For each part of a mask that treats queries unequally, int64 (Q,): how many keys it leaves, at the least."""
    queries, keys = problem.query_length, problem.key_length
    if mask.varlen is None and (mask.bands or mask.rows is not None):
        yield _within_bands(mask, queries, keys)
    if mask.block is not None:
        full = mask.block.full_kv_num_blocks
        blocks = mask.block.kv_num_blocks if full is None else mask.block.kv_num_blocks + full
        tall, wide = mask.block.BLOCK_SIZE
        yield blocks.flatten(0, -2).amin(0).long().mul(wide).repeat_interleave(tall)[:queries]
    for tensor in (mask.dense, mask.bias):
        if tensor is not None and tensor.dim() >= 2 and tensor.shape[-2] == queries > 1 and tensor.stride(-2):
            yield _of_tensor(tensor, keys)


def _within_bands(mask: Mask, queries: int, keys: int) -> Tensor:
    """Bands, and the padding within them, by arithmetic."""
    tensor = mask.rows if mask.padding is None else mask.padding
    place = torch.arange(queries, device=None if tensor is None else tensor.device)
    first, last = torch.zeros_like(place), torch.full_like(place, keys - 1)
    for left, right, alignment in mask.bands:
        at = place + (keys - queries) if alignment == "bottom_right" else place
        first = first if left is None else torch.maximum(first, at - left)
        last = last if right is None else torch.minimum(last, at + right)
    seen = (last - first + 1).clamp(min=0)[None]
    if mask.padding is not None:
        step = -(-mask.padding.shape[0] * (queries + keys) // _CHUNK)
        sums = torch.nn.functional.pad(mask.padding[::step].long().cumsum(-1), (1, 0))
        seen = sums[:, (last + 1).clamp(0, keys)] - sums[:, first.clamp(0, keys)]
        seen = seen.clamp(min=0)
    if mask.rows is not None:
        seen = torch.cat([seen.amin(0, keepdim=True), torch.where(mask.rows, keys, 0).amin(0, keepdim=True)])
    return seen.amin(0)


def _of_tensor(tensor: Tensor, keys: int) -> Tensor:
    """The fewest keys that a bool tensor or a bias leaves to each query, in some of its batches and heads."""
    for axis, (size, stride) in enumerate(zip(tensor.shape[:-2], tensor.stride(), strict=False)):
        tensor = tensor.narrow(axis, 0, 1) if size > 1 and stride == 0 else tensor
    sheets = tensor.detach().flatten(0, -3) if tensor.dim() > 2 else tensor.detach()[None]
    queries, columns = sheets.shape[-2:]
    fewest = torch.full((queries,), keys, device=tensor.device)
    room = max(1, _COUNTED // (queries * columns))
    step_q = max(1, -(-queries * columns // _COUNTED))  # of a mask that is too long, some rows only
    for sheet in sheets[:: -(-len(sheets) // room)]:
        for start in range(0, queries, max(1, _CHUNK // columns) * step_q):
            part = sheet[start : start + max(1, _CHUNK // columns) * step_q : step_q]
            seen = (part if part.dtype == torch.bool else part > -math.inf).sum(-1)
            seen = torch.where(seen > 0, keys, 0) if columns == 1 else seen
            places = slice(start, start + len(part) * step_q, step_q)
            fewest[places] = torch.minimum(fewest[places], seen)
    return fewest
