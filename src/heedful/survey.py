"""What the elements of a mask's tensor have in common: read once on its device, named where every element follows.

A ``Survey`` says of each row how many keys it sees, the first and the last, and of each key whether a row sees it.
Every structure is then arithmetic on rows and columns, and exact: a row that sees nothing outside a band, and inside as
many keys as are seen at all, sees just those. Nothing here waits for the device: ``decode`` and ``band_of`` take the
numbers that the caller fetched.

Shapes: lower case b, h, q, k: (B, H, Q, K) without what is expanded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heedful.masks import Mask, Side, Varlen, of_rank_four

# Models hide by adding -1e4 or less. bfloat16 has no 10000: it rounds to 9984, also in what was cast up from it later.
HIDING = -9984.0
NEVER = 1 << 40  # larger than every place
WORD = 8  # bools read at once
GROUP = 128  # words added up at once: their bytes, 0 or 1, stay below 256


def stacked(flags: dict[str, Tensor]) -> Tensor:
    """Scalars as integers (n,)."""
    return torch.stack([flag.long() for flag in flags.values()])


def sides_of(keep: Tensor) -> Tensor:
    """(B, length) as integers (2 + B,): whether all rows keep their first places, their last; how many each keeps."""
    kept, place = keep.sum(-1), torch.arange(keep.shape[-1], device=keep.device)
    right = (keep == (place < kept[:, None])).all()
    left = (keep == (place >= keep.shape[-1] - kept[:, None])).all()
    return torch.cat([torch.stack([right, left]).long(), kept])


def side_of(values: list[int]) -> tuple[Side, tuple[int, ...]]:
    """What ``sides_of`` gave, fetched."""
    return "right" if values[0] else "left" if values[1] else "interior", tuple(values[2:])


def truths(seen: Tensor) -> Tensor:
    """A copy of a bool tensor whose bytes are 0 or 1: of a ``view(torch.bool)`` they may be others."""
    return seen.view(torch.uint8) != 0


def reduced(tensor: Tensor) -> Tensor:
    """(b, h, q, k): four dimensions, of those that are expanded the first place only."""
    tensor = of_rank_four(tensor)
    for axis in range(4):
        if tensor.stride(axis) == 0 and tensor.shape[axis] > 1:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor


@dataclass(frozen=True)
class Survey:
    """All that has to be known of (b, h, q, k): the rest is arithmetic on rows and columns.

    ``column`` bool (b, k): some query sees the key. ``count``, ``first``, ``last`` (b, q): how many keys a query sees,
    and which. ``other``, ``low``, ``heads``: how many elements are neither 0 nor hide, hide by a finite value, differ
    from the first head's. ``places`` (q,): which of the ``queries`` rows these are.
    """

    column: Tensor
    count: Tensor
    first: Tensor
    last: Tensor
    other: Tensor
    low: Tensor
    heads: Tensor
    places: Tensor
    queries: int

    @property
    def some(self) -> Tensor:
        """Bool (b, q): the query sees a key."""
        return self.count > 0

    def flags(self) -> dict[str, Tensor]:
        """Every structure, each with whether the tensor follows it: scalars on the device."""
        some, kept = self.some, self.column.sum(-1)[:, None]
        flags = {
            "other": self.other,
            "low": self.low,
            "heads": self.heads,
            "rows": some.all(),
            "all": (self.count == self.column.shape[1]).all(),
            "padding": (self.count == kept).all(),
            "product": ((self.count == kept) | ~some).all(),
        }
        return flags if self.queries == 1 or self.column.shape[1] == 1 else flags | self._bands()

    def _bands(self) -> dict[str, Tensor]:
        """A row follows a band if it sees nothing outside, and inside as many keys as there are in any row's column."""
        some, place, keys = self.some, self.places, self.column.shape[1]
        prefix = torch.nn.functional.pad(self.column.cumsum(-1), (1, 0))
        columns = torch.arange(keys, device=place.device)

        def follow(name: str, left: Any, right: Any) -> dict[str, Tensor]:
            low = (place - left).clamp(0, keys)
            high = torch.maximum((place + right + 1).clamp(0, keys), low)
            inside = ~some | ((self.first >= place - left) & (self.last <= place + right))
            follows = (self.count == prefix[:, high] - prefix[:, low]) & inside
            reached = (columns <= self.queries - 1 + right) & (columns >= -left)
            return {name: follows.all(), f"{name} only": follows.all() & (self.column | ~reached).all()}

        left = torch.where(some, place - self.first, -NEVER).amax()
        right = torch.where(some, self.last - place, -NEVER).amax()
        runs = ~some | (self.count == self.last - self.first + 1)
        flags = {"left": left, "right": right, "runs": runs.all() & (len(some) == 1)}
        flags |= follow("causal", NEVER, 0) | follow("window", left, right)
        return flags if keys == self.queries else flags | follow("aligned", NEVER, keys - self.queries)


def survey_of(small: Tensor, places: Tensor | None = None, queries: int | None = None) -> Survey:
    """Read (b, h, q, k) once, some rows at a time, so that what is held besides stays small."""
    b, h, q, k = small.shape
    device = small.device
    words = -(-k // WORD)
    words = words if words <= GROUP else -(-words // GROUP) * GROUP
    at_once = min(q, max(1, (1 << (18 if device.type == "cpu" else 25)) // (b * h * k)))
    flat = q == 1 or k == 1  # then only sums are asked for
    buffer = None if flat else torch.zeros(b, at_once, words * WORD, dtype=torch.bool, device=device)
    column = torch.zeros(b, k, dtype=torch.bool, device=device)
    hides, infinite, heads = torch.zeros(3, dtype=torch.int64, device=device).unbind()
    rows = []
    for start in range(0, q, at_once):
        part = small[:, :, start : start + at_once]
        seen = part[:, 0]
        if h > 1:
            heads = heads + torch.count_nonzero(part[:, 1:] != part[:, :1])
        if small.dtype == torch.bool:
            seen = truths(seen)
        else:
            hides = hides + torch.count_nonzero(seen <= HIDING)
            infinite = infinite + torch.count_nonzero(seen == -math.inf)
            seen = seen == 0
        if buffer is None:
            column = column | seen.any(1)
            count = seen.sum(-1)
            rows.append((count, count, count))
        else:
            padded = buffer[:, : seen.shape[1]]
            padded[..., :k] = seen
            column = column | padded.view(torch.uint8).amax(1)[:, :k].bool()
            rows.append(_rows_of(padded))
    count, first, last = (torch.cat(each, 1) for each in zip(*rows, strict=True))
    other = heads.new_zeros(()) if small.dtype == torch.bool else b * q * k - hides - count.sum()
    places = torch.arange(q, device=device) if places is None else places
    return Survey(column, count, first, last, other, hides - infinite, heads, places, queries or q)


def _rows_of(seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of bool (b, rows, words * 8), how many places of each row are set, the first and the last; eight at a time."""
    single, words = seen.view(torch.uint8), seen.view(torch.int64)
    length = words.shape[-1]
    group = min(length, GROUP)
    count = words.unflatten(-1, (length // group, group)).sum(-1).view(torch.uint8).sum(-1)
    hit = (words != 0).view(torch.uint8)
    eight = single.unflatten(-1, (length, WORD))

    def of(word: Tensor) -> Tensor:
        return torch.gather(eight, 2, word[..., None, None].expand(*word.shape, 1, WORD)).squeeze(2)

    first, last = hit.argmax(-1), length - 1 - hit.flip(-1).argmax(-1)
    return (
        count,
        first * WORD + of(first).argmax(-1),
        last * WORD + WORD - 1 - of(last).flip(-1).argmax(-1),
    )


def band_of(told: dict[str, int], queries: int, keys: int) -> tuple[Mask | None, bool]:
    """The band that was followed, and whether nothing else hides: without padding before with it, causal first."""
    shift = keys - queries
    for suffix in (" only", ""):
        if told.get("causal" + suffix):
            return Mask(causal="top_left"), bool(suffix)
        if told.get("aligned" + suffix):
            return Mask(causal="bottom_right"), bool(suffix)
        if told.get("window" + suffix):
            left, right = told["left"], told["right"]
            ends = None if left >= queries - 1 else left, None if right >= keys - 1 else right
            bottom_right = shift != 0 and (right == shift or min(left, right) < 0)
            moved = shift if bottom_right else 0
            sides = (None if ends[0] is None else left + moved, None if ends[1] is None else right - moved)
            if sides != (None, None) and all(side is None or side >= 0 for side in sides):
                return Mask(window=(*sides, "bottom_right" if bottom_right else "top_left")), bool(suffix)
    return None, False


@dataclass(frozen=True)
class Blocks:
    """Blocks along the diagonal: their bounds (q + 1,), padded at the end, and scalars on the device."""

    flags: dict[str, Tensor]
    cu_queries: Tensor
    cu_keys: Tensor

    def decode(self, told: dict[str, int]) -> Mask | None:
        """The packing, or None; causal is read from each block's start, or else from its end."""
        alone = told["block"]
        if not (alone or told["block causal"] or told["block aligned"]):
            return None
        bounds = told["blocks"] + 1
        packed = Varlen(self.cu_queries[:bounds], self.cu_keys[:bounds], told["most queries"], told["most keys"])
        causal = None if alone else "top_left" if told["block causal"] else "bottom_right"
        return Mask(causal=causal, varlen=packed)  # type: ignore[arg-type]


def blocks_of(survey: Survey) -> Blocks:
    """Rows of one batch entry read as blocks: a new one begins where the first key seen is another one."""
    count, first, last = survey.count[0], survey.first[0], survey.last[0]
    place, some = survey.places, count > 0
    used = some.sum()
    moved = torch.cat([some[:1], first[1:] != first[:-1]])
    new = some & moved
    end_of_all = torch.where(some, last + 1, 0).amax()
    first_row = torch.where(new, place, 0).cummax(0).values

    def next_start(starts: Tensor, otherwise: Tensor) -> Tensor:
        later = torch.where(new, starts, NEVER).flip(0).cummin(0).values.flip(0)
        later = torch.cat([later[1:], later.new_full((1,), NEVER)])
        return torch.where(later == NEVER, otherwise, later)

    end, next_row = next_start(first, end_of_all), next_start(place, used)
    within = place - first_row
    rising = ~some[1:] | (first[1:] >= first[:-1])
    sound = (some == (place < used)).all() & rising.all() & (first[0] == 0)
    sound = sound & ((count == last - first + 1) | ~some).all()
    ends = {
        "block": end,
        "block causal": torch.minimum(first + within + 1, end),
        "block aligned": end - (next_row - 1 - place),
    }
    flags = {name: sound & ((last + 1 == expected) | ~some).all() for name, expected in ends.items()}
    flags |= {
        "blocks": new.sum(),
        "most queries": torch.where(some, next_row - first_row, 0).amax(),
        "most keys": torch.where(some, end - first, 0).amax(),
    }

    def bounds(starts: Tensor, total: Tensor) -> Tensor:
        return torch.cat([torch.where(new, starts, NEVER), total[None]]).sort().values.clamp(max=total).int()

    return Blocks(flags, bounds(place, used), bounds(first, end_of_all))
