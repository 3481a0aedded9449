"""One attention call of the kernels as a value: views and numbers, nothing copied, nothing expanded.

What broadcasts has stride 0. Packed tensors (T, H, D) stand as (1, H, T, D), beside the ends of their sequences.

Shapes: B batch, H heads, N kv heads, Q query length, K key length, D head dim, E value dim, T packed tokens, S packed
sequences.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

OPEN = 1 << 29  # a side of a band that is open: farther than any key, and places plus it fit in 32 bits
_FAR_STRIDE = 1 << 22  # elements: a tile's last row, 255 strides on, would pass 2^31
Side = int | None


@dataclass(frozen=True)
class Band:
    """Which keys a query may see by its place i: keys from i - left to i + right, both ends included.

    ``left``, ``right`` count from the start of the sequence; ``left_end``, ``right_end`` from its end, where the last
    query stands at the last key. Both may hold at once. OPEN leaves a side open.
    """

    left: int = OPEN
    left_end: int = OPEN
    right: int = OPEN
    right_end: int = OPEN

    @property
    def has_left(self) -> bool:
        """Whether keys far before a query are hidden."""
        return min(self.left, self.left_end) < OPEN

    @property
    def has_right(self) -> bool:
        """Whether keys behind a query are hidden."""
        return min(self.right, self.right_end) < OPEN

    @classmethod
    def of(cls, *bands: tuple[Side, Side, str]) -> Band:
        """Several bands (left, right, alignment) as one; None leaves a side open."""
        sides = {"top_left": [OPEN, OPEN], "bottom_right": [OPEN, OPEN]}
        for *both, alignment in bands:
            for index, side in enumerate(both):
                sides[alignment][index] = min(sides[alignment][index], OPEN if side is None else side)
        (left, right), (left_end, right_end) = sides.values()
        return cls(left, left_end, right, right_end)


@dataclass(frozen=True, eq=False)
class Packing:
    """Sequences packed end to end: int32 (S + 1,) ends on the device, and the most queries and keys of one.

    ``tidy``: every query is of a sequence.
    """

    ends_q: Tensor
    ends_k: Tensor
    longest_q: int
    longest_k: int
    tidy: bool = False

    @property
    def sequences(self) -> int:
        """How many there are."""
        return len(self.ends_q) - 1


@dataclass(frozen=True, eq=False)
class Call:
    """Query (B, H, Q, D), key (B, N, K, D), value (B, N, K, E) in any strides, and all that is asked of them.

    ``dense`` bool and ``bias`` float, (B, H, Q, K); ``keep`` bool (B, K), the keys that are real; ``rows`` bool (B, Q),
    the queries that are. ``scale`` is any number; ``softcap`` c makes scores c * tanh(score / c), before the bias.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    softcap: float | None = None
    band: Band = Band()
    dense: Tensor | None = None
    bias: Tensor | None = None
    keep: Tensor | None = None
    rows: Tensor | None = None
    packing: Packing | None = None

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B, H, Q, K."""
        batch, heads, queries, _ = self.query.shape
        return batch, heads, queries, self.key.shape[2]

    @property
    def group(self) -> int:
        """How many query heads share a key head."""
        return self.query.shape[1] // max(1, self.key.shape[1])

    @property
    def dims(self) -> tuple[int, int]:
        """D and E."""
        return self.query.shape[3], self.value.shape[3]

    @functools.cached_property
    def splits(self) -> bool:
        """Whether head dims are made of two parts: where all rows, and what they hold, are whole units of 16 bytes.

        Others are not copied ahead by Triton's pipeline, so their loops have one stage (``tiles.is_sound``).
        """
        unit = 16 // self.query.element_size()
        return are_aligned(self.query, self.key, self.value) and not any(dim % unit for dim in self.dims)

    def parts(self, dim: int, least: int = 16) -> tuple[int, int]:
        """A head dim as the kernels take it: see ``split_of``; in one where nothing is split."""
        return split_of(dim, least) if self.splits else (max(least, 1 << (dim - 1).bit_length()), 0)

    @property
    def width(self) -> int:
        """The larger head dim, made of parts."""
        return max(sum(self.parts(dim)) for dim in self.dims)

    @property
    def sign(self) -> int:
        """The scale's: the kernels multiply the query by it, so that they scale by what is positive."""
        return 0 if self.scale == 0 else 1 if self.scale > 0 else -1

    @property
    def is_masked(self) -> bool:
        """Whether it needs registers for more than causality: a mask or bias by query, a window, or padding."""
        by_query = any(mask is not None and mask.stride(2) != 0 for mask in (self.dense, self.bias))
        return by_query or self.band.has_left or self.keep is not None

    @property
    def wide(self) -> bool:
        """Whether offsets within a tile may pass 2^31; those between tiles always have 64 bits."""
        return are_wide(self.query, self.key, self.value, self.dense, self.bias, self.keep, self.rows)

    def masks(self) -> dict[str, Any]:
        """The kernels' arguments for ``dense``, ``bias``, ``keep`` and ``rows``: tensors or None, strides, and ranks.

        ``*_PER_QUERY`` says that a mask differs from query to query: where it does not, one row is loaded, not a tile.
        """
        found: dict[str, Any] = {}
        for name, tensor, strides in (("dense", self.dense, "bhmn"), ("bias", self.bias, "bhmn"),
                                      ("keep", self.keep, "bn"), ("rows", self.rows, "bm")):  # fmt: skip
            as_bytes = tensor is not None and tensor.dtype == torch.bool
            found[name] = tensor.view(torch.uint8) if as_bytes else tensor  # type: ignore[union-attr]
            given = (0,) * len(strides) if tensor is None else tensor.stride()
            found |= {f"stride_{name}_{axis}": stride for axis, stride in zip(strides, given, strict=True)}
            if len(strides) == 4:
                found[f"{name.upper()}_PER_QUERY"] = tensor is not None and tensor.stride(2) != 0
        return found

    def places(self) -> dict[str, Any]:
        """The kernels' arguments for lengths, sequences and bands."""
        _, heads, queries, keys = self.sizes
        packing = self.packing
        return {
            "ends_q": None if packing is None else packing.ends_q,
            "ends_k": None if packing is None else packing.ends_k,
            "sequences": 1 if packing is None else packing.sequences,
            "query_length": queries,
            "key_length": keys,
            "heads": heads,
            "group": self.group,
            "left": self.band.left,
            "left_end": self.band.left_end,
            "right": self.band.right,
            "right_end": self.band.right_end,
            "HAS_LEFT": self.band.has_left,
            "HAS_RIGHT": self.band.has_right,
        }

    @property
    def longest_query(self) -> int:
        """The most queries of one sequence."""
        return self.query.shape[2] if self.packing is None else self.packing.longest_q

    @property
    def longest_key(self) -> int:
        """The most keys of one sequence."""
        return self.key.shape[2] if self.packing is None else self.packing.longest_k

    @property
    def sequences(self) -> int:
        """B times S: how many sequences there are to go through."""
        return self.query.shape[0] * (1 if self.packing is None else self.packing.sequences)


@dataclass(frozen=True, eq=False)
class Values:
    """Values in e4m3, (B, N, blocks, P, keys of a block), P the value dim made of parts, and what they are worth.

    The blocks of a sequence start at its first token // keys of a block + its number. A channel is its codes times
    ``scales``, plus ``means``, (B * S, N, P), float32.
    """

    codes: Tensor
    scales: Tensor
    means: Tensor


@dataclass(frozen=True, eq=False)
class Codes:
    """Queries (B, H, Q, P) and keys (B, N, K, P) in int8, P the head dim made of parts, and what they are worth.

    A row of the query is its codes times ``query_scales`` (B, H, Q); the keys of a block, one tile's, are theirs times
    ``key_scales`` (B * S, N, blocks). ``shift`` (B, H, Q): what the scores, scaled, lack in each row; None where
    nothing depends on it. All float32. ``values``: codes of the values, too; None where these stay what they are.
    """

    query: Tensor
    key: Tensor
    query_scales: Tensor
    key_scales: Tensor
    shift: Tensor | None
    values: Values | None = None

    def scales(self) -> dict[str, Any]:
        """The kernels' arguments for the scales and the shift."""
        rows, keys = self.query_scales.stride(), self.key_scales.stride()
        return {
            "query_scales": self.query_scales,
            "key_scales": self.key_scales,
            "shift": self.shift,
            "value_scales": None if self.values is None else self.values.scales,
            "value_means": None if self.values is None else self.values.means,
            **dict(zip(_CODE_STRIDES, (*rows[:2], *keys[:2]), strict=True)),
        }


_CODE_STRIDES = ("stride_row_b", "stride_row_h", "stride_key_scales_s", "stride_key_scales_h")
NO_CODES = {
    **dict.fromkeys(("query_scales", "key_scales", "shift", "value_scales", "value_means")),
    **dict.fromkeys(_CODE_STRIDES, 0),
}


def call_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    bands: tuple[tuple[Side, Side, str], ...] = (),
    dense: Tensor | None = None,
    bias: Tensor | None = None,
    keep: Tensor | None = None,
    rows: Tensor | None = None,
    packing: Packing | None = None,
) -> Call:
    """A call of tensors (B, H, length, dim), or packed (T, H, dim); masks of rank four, and (B, length), broadcast."""
    if query.dim() == 3:
        query, key, value = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
    batch, heads, queries, head_dim = query.shape
    full = (batch, heads, queries, key.shape[2])
    return Call(
        query,
        key,
        value,
        scale=1.0 / math.sqrt(head_dim) if scale is None else float(scale),
        softcap=softcap,
        band=Band.of(*bands),
        dense=None if dense is None else dense.expand(full),
        bias=None if bias is None else bias.expand(full),
        keep=None if keep is None else keep.expand(batch, -1),
        rows=None if rows is None else rows.expand(batch, -1),
        packing=packing,
    )


def of_rank_four(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Packed tensors (T, H, D) as (1, H, T, D), others as they are."""
    return tuple(t if t.dim() == 4 else t.transpose(0, 1).unsqueeze(0) for t in tensors)


def rest_for(call: Call) -> Tensor | None:
    """Where the forward pass leaves what float32 rounds away of the LSE; None without a bias."""
    return None if call.bias is None else call.query.new_zeros(call.sizes[:3], dtype=torch.float32)


def are_wide(*tensors: Tensor | None) -> bool:
    """Whether offsets within a tile of any of these may pass 2^31: a tile has rows and columns, of one head."""
    within = (t.stride()[t.dim() // 2 :] for t in tensors if t is not None)
    return any(max(strides) >= _FAR_STRIDE for strides in within)


def unit_of(*tensors: Tensor) -> int:
    """What divides all strides but the last, which are 1: elements of 16 bytes, or 1.

    The kernels are given strides by this unit. Triton itself looks whether 16 elements divide them; the heads of 72 or
    40 features then count as unaligned, and each element is loaded by itself.
    """
    unit = 16 // tensors[0].element_size()
    aligned = all(t.stride(-1) == 1 and not any(stride % unit for stride in t.stride()[:-1]) for t in tensors)
    return unit if aligned else 1


def are_aligned(*tensors: Tensor) -> bool:
    """Whether all rows of these begin at whole units of 16 bytes."""
    return unit_of(*tensors) > 1 and not any(tensor.data_ptr() % 16 for tensor in tensors)


def strides_of(tensor: Tensor, name: str, axes: str, unit: int = 1) -> dict[str, int]:
    """A tensor's strides as kernels' arguments, ``stride_<name>_<axis>``: by the unit, but for the last."""
    *strides, last = tensor.stride()
    given = (*(stride // unit for stride in strides), last)
    return {f"stride_{name}_{axis}": stride for axis, stride in zip(axes, given, strict=True)}


def split_of(dim: int, least: int = 16) -> tuple[int, int]:
    """A head dim as one or two powers of two of ``least`` and more, as little beyond it as two allow: 72 is 64 + 16."""
    whole = max(least, 1 << (dim - 1).bit_length())
    if dim <= least:
        return least, 0
    large = 1 << (dim.bit_length() - 1)
    small = max(least, 1 << (dim - large - 1).bit_length()) if dim > large else 0
    return (large, small) if large + small < whole else (whole, 0)


def empty_like_query(query: Tensor, value_dim: int) -> Tensor:
    """An output (B, H, Q, E), its axes in memory in the order of the query's: no later transpose copies it."""
    batch, heads, length, _ = query.shape
    if query.stride(1) < query.stride(2):
        return query.new_empty(batch, length, heads, value_dim).transpose(1, 2)
    return query.new_empty(batch, heads, length, value_dim)
