"""Parts of masks for samples: each makes the mask that heedful is given and, apart from it, what the mask means.

Frozen and printable, so that Hypothesis can show them. Shapes: L leading sizes (…, H) of the answer, Q queries, K keys.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heedful import masks


@dataclass(frozen=True)
class Room:
    """Where a mask is to fit: leading sizes (…, H) of the answer, lengths, the dtype of the query, and its device."""

    lead: tuple[int, ...]
    query_length: int
    key_length: int
    dtype: torch.dtype
    device: torch.device
    draw: torch.Generator

    def shape(self, axes: str, rank: int) -> tuple[int, ...]:
        """A shape of ``rank`` that has the sizes of ``axes`` (of B, H, Q, K) and is 1 elsewhere; B is all but H."""
        outer = self.lead[:-1] if rank > 4 else (self.lead[-2:-1] or (1,))
        sizes = [*((size if "B" in axes else 1) for size in outer)]
        named = {"H": (self.lead or (1,))[-1], "Q": self.query_length, "K": self.key_length}
        sizes += [size if axis in axes else 1 for axis, size in named.items()]
        return tuple(sizes)[len(sizes) - min(rank, len(sizes)) :] if rank else ()

    def uniform(self, shape: tuple[int, ...]) -> Tensor:
        """Numbers from [0, 1), drawn on the CPU so that every device gets the same."""
        return torch.rand(shape, generator=self.draw)


@dataclass(frozen=True)
class Made:
    """A mask part made: ``argument`` as a user would pass it, ``mask`` as a heedful value, and its meaning."""

    argument: Any
    mask: masks.Mask
    seen: Tensor | None = None
    bias: Tensor | None = None


class Part(ABC):
    """One part of a mask."""

    @abstractmethod
    def make(self, room: Room) -> Made:
        """Draw the part's tensors."""


@dataclass(frozen=True)
class Bool(Part):
    """A bool tensor with the sizes of ``axes``. Some row sees nothing if ``empty_row``; else all do if axes has K."""

    axes: str = "BHQK"
    rank: int = 4
    empty_row: bool = False
    strides: str = "contiguous"

    def make(self, room: Room) -> Made:
        """See the base class."""
        keep = (room.uniform(room.shape(self.axes, self.rank)) < 0.6).contiguous()
        if not self.axes:
            keep.fill_(True)
        if "K" in self.axes and keep.numel():
            keep[..., 0] = True
        if self.empty_row and keep.numel():
            keep.reshape(-1, keep.shape[-1])[0] = False
        keep = strided(keep, self.strides, room.device)
        return Made(keep, masks.Dense(keep), seen=keep)


@dataclass(frozen=True)
class Float(Part):
    """A bias with the sizes of ``axes``, N(0, 1); ``hidden`` of the keys get ``lowest`` instead.

    ``dtype`` None is the query's. ``full_row``: a row gets ``lowest`` everywhere.
    """

    axes: str = "BHQK"
    rank: int = 4
    dtype: torch.dtype | None = None
    hidden: float = 0.0
    lowest: float = -math.inf
    full_row: bool = False
    needs_grad: bool = False
    strides: str = "contiguous"

    def make(self, room: Room) -> Made:
        """See the base class."""
        shape = room.shape(self.axes, self.rank)
        bias = torch.randn(shape, generator=room.draw).contiguous()
        hide = room.uniform(shape) < self.hidden
        if hide.numel() and hide.dim():
            hide[..., 0] = False
        bias = bias.masked_fill(hide, self.lowest)
        if self.full_row and bias.numel():
            bias.reshape(-1, bias.shape[-1])[0] = self.lowest
        bias = strided(bias.to(self.dtype or room.dtype), self.strides, room.device)
        bias = bias.requires_grad_(self.needs_grad)
        return Made(bias, masks.Bias(bias), bias=bias)


@dataclass(frozen=True)
class Padding(Part):
    """Keys kept per batch row: ``right``, ``left`` or ``interior`` padding, ``none``; with ``row`` one keeps none.

    ``queries`` says likewise which queries are real, "" for all.
    """

    kind: str = "right"
    queries: str = ""

    def make(self, room: Room) -> Made:
        """See the base class."""
        rows, keys = math.prod(room.lead[:-1]), room.key_length
        keep = kept_places(self.kind, rows, keys).to(room.device)
        heads = (1,) if room.lead else ()
        seen = keep.reshape(*room.lead[:-1], *heads, 1, keys)
        if not self.queries:
            value = masks.KeyPadding(keep)
            return Made(value, value, seen=seen)
        used = kept_places(self.queries, rows, room.query_length).to(room.device)
        value = masks.KeyPadding(keep, used)
        return Made(value, value, seen=seen & used.reshape(*room.lead[:-1], *heads, room.query_length, 1))


@dataclass(frozen=True)
class Structured(Part):
    """A dense tensor with a structure that can be read off: ``padding``, ``both`` (queries, too), ``causal``, ``band``,
    ``blocks``, ``all``. ``axes`` are those that it really has; it comes as bool, or as a bias of 0 and ``lowest``.
    """

    kind: str
    axes: str = "BQK"
    lowest: float | None = None

    def make(self, room: Room) -> Made:
        """See the base class."""
        rows, queries, keys = math.prod(room.lead[:-1]), room.query_length, room.key_length
        q, k = torch.arange(queries)[:, None], torch.arange(keys)[None]
        padding = kept_places("right", rows, keys)[:, None, None]
        seen = {
            "all": k == k,
            "padding": padding,
            "both": padding & kept_places("right", rows, queries)[:, None, :, None],
            "causal": k <= q,
            "band": (k >= q - 2) & (k <= q + 1),
            "blocks": (q < 4) == (k < 5),
        }[self.kind]
        sizes = {"B": rows, "H": room.lead[-1], "Q": queries, "K": keys}
        tensor = seen.expand(*(sizes[axis] if axis in self.axes else 1 for axis in "BHQK")).clone().to(room.device)
        if self.lowest is None:
            return Made(tensor, masks.Dense(tensor), seen=tensor)
        bias = torch.zeros(tensor.shape, dtype=room.dtype, device=room.device).masked_fill(~tensor, self.lowest)
        return Made(bias, masks.Bias(bias), bias=bias)


@dataclass(frozen=True)
class Packed(Part):
    """Sequences one behind the other, by their lengths; tokens behind the last belong to none.

    ``band``, (left, right, alignment), lets each query see only keys around its own place in its sequence.
    """

    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.int32
    band: tuple[int | None, int | None, str] | None = None

    def make(self, room: Room) -> Made:
        """See the base class."""
        keys = self.query_lengths if self.key_lengths is None else self.key_lengths
        owners = [_owners(self.query_lengths, room.query_length), _owners(keys, room.key_length)]
        seen = torch.tensor([[q == k and q >= 0 for k in owners[1]] for q in owners[0]], device=room.device)
        ends = [self._ends(self.query_lengths, room), None if self.key_lengths is None else self._ends(keys, room)]
        value: masks.Mask = masks.Varlen(*ends)  # type: ignore[arg-type]
        if self.band is not None:
            seen, (left, right, alignment) = seen & self._bands(keys, room), self.band
            known = masks.as_alignment(alignment)
            causal = (left, right) == (None, 0)
            value = value & (masks.Causal(known) if causal else masks.SlidingWindow(left, right, known))
        return Made(value, value, seen=seen.reshape(room.query_length, room.key_length))

    def _bands(self, key_lengths: tuple[int, ...], room: Room) -> Tensor:
        """Bool (Q, K): the band of each sequence by itself."""
        from heedful.testing.oracle import band

        assert self.band is not None
        pairs = zip(self.query_lengths, key_lengths, strict=True)
        own = [band(queries, keys, *self.band, room.device) for queries, keys in pairs]
        joined = torch.block_diag(*own).to(torch.bool)
        behind = (0, room.key_length - joined.shape[1], 0, room.query_length - joined.shape[0])
        return torch.nn.functional.pad(joined, behind)

    def _ends(self, lengths: tuple[int, ...], room: Room) -> Tensor:
        ends = [sum(lengths[:count]) for count in range(len(lengths) + 1)]
        return torch.tensor(ends, dtype=self.dtype, device=room.device)


@dataclass(frozen=True)
class Band(Part):
    """Causality or a window, given as a mask value and not by the call's own arguments."""

    left: int | None = None
    right: int | None = 0
    alignment: str = "top_left"

    def make(self, room: Room) -> Made:
        """See the base class."""
        from heedful.testing.oracle import band

        value: masks.Mask = masks.SlidingWindow(self.left, self.right, self.alignment)  # type: ignore[arg-type]
        if (self.left, self.right) == (None, 0):
            value = masks.Causal(self.alignment)  # type: ignore[arg-type]
        sides = (self.left, self.right, self.alignment)
        return Made(value, value, seen=band(room.query_length, room.key_length, *sides, room.device))


@dataclass(frozen=True)
class Block(Part):
    """A FlexAttention BlockMask: a query sees the keys up to ``reach`` behind its place; one head of two sees less."""

    reach: int = 2
    by_head: bool = False

    def make(self, room: Room) -> Made:
        """See the base class."""
        from torch.nn.attention.flex_attention import create_block_mask

        reach, by_head = self.reach, self.by_head
        heads = room.lead[-1] if by_head else 1

        def sees(_batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return key <= query + (reach - head % 2 if by_head else reach)

        lengths = (room.query_length, room.key_length)
        block = create_block_mask(sees, None, heads if by_head else None, *lengths, device=str(room.device))
        places = [torch.arange(size, device=room.device) for size in (heads, *lengths)]
        head, query, key = places[0][:, None, None], places[1][:, None], places[2]
        return Made(block, masks.Mask(block=block), seen=sees(head, head, query, key).expand(heads, *lengths))


def kept_places(kind: str, rows: int, length: int) -> Tensor:
    """Bool (rows, length): which places are real, see ``Padding``."""
    place = torch.arange(length)
    lengths = torch.tensor([max(1, length - 1 - 3 * row) for row in range(rows)])[:, None]
    keep = place < lengths
    if kind == "left":
        keep = place >= length - lengths
    elif kind == "interior":
        keep = (place % 3 != 1) ^ (place > lengths)
        keep[:, :1] = True
    elif kind == "none":
        keep = torch.ones_like(keep)
    elif kind == "row":
        keep[:1] = False
    return keep


def strided(tensor: Tensor, kind: str, device: torch.device) -> Tensor:
    """The same numbers on the device, in storage of another kind; ``expanded`` repeats the first of the leading ones.

    ``transposed``: the two dimensions before the last swapped in memory; ``features``: the last two; ``sliced``: every
    second number; ``offset``: starting at an odd address; ``chunk``: the middle third of a wider tensor.
    """
    if kind == "transposed" and tensor.dim() >= 3:
        return tensor.transpose(-3, -2).contiguous().to(device).transpose(-3, -2)
    if kind == "features" and tensor.dim() >= 2:
        return tensor.transpose(-2, -1).contiguous().to(device).transpose(-2, -1)
    if kind == "expanded" and tensor.dim() >= 3:
        first = tensor[(slice(0, 1),) * (tensor.dim() - 2)]
        return first.contiguous().to(device).expand(tensor.shape)
    copies = {"sliced": 2, "offset": 1, "chunk": 3}.get(kind, 0)
    if not copies or not tensor.dim():
        return tensor.contiguous().to(device)
    last = tensor.shape[-1]
    if kind == "offset":
        return torch.cat([torch.zeros_like(tensor[..., :1]), tensor], -1).to(device)[..., 1:]
    if kind == "chunk":
        return torch.cat([tensor] * 3, -1).to(device)[..., last : 2 * last]
    return torch.stack([tensor, tensor], -1).flatten(-2).to(device)[..., ::2]


def _owners(lengths: tuple[int, ...], total: int) -> list[int]:
    """For each token, the sequence that it belongs to, -1 for none."""
    owners = [number for number, length in enumerate(lengths) for _ in range(length)]
    return owners + [-1] * (total - len(owners))
