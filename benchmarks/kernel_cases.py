"""The calls that ``kernels.py`` measures, the most telling first: targets, odd head dims, masks, lengths, real models.

TFLOP/s count 2 (D + E) operations for each pair of a query and a key, of each head: all pairs, half of them for
causality, those that padding, a window or packing leaves; all under a mask or bias that is a tensor, for no exact
kernel can know. A backward pass counts 2.5 times its forward pass.

Shapes: B batch, H heads, N kv heads, Q query length, K key length, D head dim, E value dim, T packed tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from heedful.call import mask_of_call, problem_of_call
from heedful.cases import CASES, Case
from heedful.masks import Mask, Varlen
from heedful.problem import AttentionProblem

Direction = Literal["forward", "backward"]
Extra = Literal["", "dense", "biased", "window", "packed"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
SHARES = (5, 2, 1)  # of each batch row's length, the sequences that are packed
WINDOW = 16  # a window's sides are the keys over it
KEPT = 0.5


@dataclass(frozen=True)
class Grid:
    """The sizes of all calls that are no model's. Targets and masks have the last of the lengths."""

    batch: int = 4
    heads: int = 16
    lengths: tuple[int, ...] = (512, 2048, 8192)
    dims: tuple[int, ...] = (64, 128)
    odd_dims: tuple[int, ...] = (72, 80, 96, 160)
    masked_dim: int = 128


TINY = Grid(1, 2, (16, 32), (16,), (24,), 16)  # for tests


@dataclass(frozen=True)
class Work:
    """One call to measure. ``group`` says why; ``extra`` is a mask that cases have none of."""

    group: str
    case: Case
    direction: Direction
    dtype: torch.dtype
    extra: Extra = ""

    @property
    def name(self) -> str:
        """Such as ``d128-causal-8192-backward``."""
        return f"{self.case.name}-{self.direction}"

    @property
    def mask(self) -> str:
        """In one word."""
        return self.extra or {"key_padding": "padded"}.get(self.case.mask, self.case.mask)

    @property
    def causal(self) -> bool:
        """Whether query i sees the keys up to i."""
        return self.case.mask == "causal"

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        names = ("batch", "heads", "kv_heads", "query_length", "key_length", "head_dim", "value_dim")
        return {
            "name": self.name,
            "group": self.group,
            "direction": self.direction,
            "mask": self.mask,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": {name: getattr(self.case, name) for name in names},
        }

    def arguments(self, keep: Tensor | None, device: torch.device) -> dict[str, Any]:
        """Those of ``heedful.attention`` beside query, key and value, which all copies share. ``keep``: bool (B, K)."""
        case, draw = self.case, torch.Generator(device=device).manual_seed(1)
        size = (1, 1, case.query_length, case.key_length)
        found: dict[str, Any] = {"enable_gqa": True} if case.kv_heads != case.heads else {}
        if self.causal:
            found["is_causal"] = True
        if keep is not None:
            found["attn_mask"] = keep[:, None, None, :]
        if self.extra == "dense":
            found["attn_mask"] = torch.rand(size, generator=draw, device=device) < KEPT
            found["attn_mask"][..., 0] = True  # every query sees a key
        elif self.extra == "biased":
            found["attn_mask"] = torch.randn(size, generator=draw, device=device).to(self.dtype)
        elif self.extra == "window":
            found["window"] = (case.key_length // WINDOW,) * 2
        elif self.extra == "packed":
            ends = torch.tensor(self.packed_lengths).cumsum(0)
            starts = torch.cat([ends.new_zeros(1), ends]).to(device, torch.int32)
            found |= {"attn_mask": Varlen(starts, max_seqlen_q=max(self.packed_lengths)), "layout": "THD"}
        return found

    @property
    def packed_lengths(self) -> tuple[int, ...]:
        """Of the sequences that are packed: in each batch row's length by SHARES, what is left over in the first."""
        length = self.case.key_length
        row = [length * share // sum(SHARES) for share in SHARES]
        return (length - sum(row[1:]), *row[1:]) * self.case.batch


@dataclass(frozen=True, eq=False)
class Drawn:
    """A work's tensors, one of several copies; in the call's layout."""

    work: Work
    query: Tensor
    key: Tensor
    value: Tensor
    arguments: dict[str, Any]
    kept: int  # keys of all batch rows that padding leaves

    @classmethod
    def of(cls, work: Work, device: torch.device, seed: int, first: Drawn | None = None) -> Drawn:
        """N(0, 1), seeded; with a gradient where the backward pass is measured. ``first``: whose mask it shares."""
        *tensors, keep = work.case.tensors(work.dtype, device, seed)
        if work.extra == "packed":
            tensors = [tensor.transpose(1, 2).flatten(0, 1) for tensor in tensors]
        query, key, value = (tensor.requires_grad_(work.direction == "backward") for tensor in tensors)
        if first is not None:
            return cls(work, query, key, value, first.arguments, first.kept)
        kept = work.case.batch * work.case.key_length if keep is None else int(keep.sum())
        return cls(work, query, key, value, work.arguments(keep, device), kept)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value."""
        return self.query, self.key, self.value

    @property
    def mask(self) -> Mask | None:
        """All that the call hides and adds, as one mask."""
        words = {name: value for name, value in self.arguments.items() if name in {"attn_mask", "is_causal", "window"}}
        return mask_of_call(**words)

    @property
    def problem(self) -> AttentionProblem:
        """What is asked, before any rewrite."""
        return problem_of_call(*self.tensors, **self.arguments)

    @property
    def pairs(self) -> int:
        """Of a query and a key that count, of one head and all batch rows."""
        case, work = self.work.case, self.work
        if work.extra == "packed":
            return sum(length * length for length in work.packed_lengths)
        if work.extra == "window":
            return case.batch * banded(case.query_length, case.key_length, *self.arguments["window"])
        return case.query_length * self.kept // (2 if work.causal else 1)

    @property
    def flops(self) -> int:
        """Of one call in the work's direction."""
        forward = 2 * self.work.case.heads * self.pairs * (self.work.case.head_dim + self.work.case.value_dim)
        return forward if self.work.direction == "forward" else forward * 5 // 2

    @property
    def input_bytes(self) -> int:
        """Of query, key and value."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    @property
    def moved(self) -> int:
        """Bytes that are read and written at least: inputs, output, the mask's tensor; backward the gradients, too."""
        case, mask = self.work.case, self.arguments.get("attn_mask")
        out = case.batch * case.heads * case.query_length * case.value_dim * self.query.element_size()
        given = mask.numel() * mask.element_size() if isinstance(mask, Tensor) else 0
        once = self.input_bytes + out + given
        return once if self.work.direction == "forward" else once + out + self.input_bytes


def banded(queries: int, keys: int, left: int, right: int) -> int:
    """Pairs within a window that starts at the first query."""
    return sum(max(0, min(place + right, keys - 1) - max(place - left, 0) + 1) for place in range(queries))


def works(grid: Grid, dtype: torch.dtype, pattern: str = "*", models: bool = True) -> list[Work]:
    """All that fit the shell pattern by their names, in the order of their weight."""
    every = [*_grid(grid, dtype), *(_models(dtype) if models else ())]
    return [work for work in every if fnmatchcase(work.name, pattern)]


def _grid(grid: Grid, dtype: torch.dtype) -> Iterator[Work]:
    longest = grid.lengths[-1]
    for direction in DIRECTIONS:
        for dim in grid.dims:
            yield Work("dense", _case(grid, dim, longest), direction, dtype)
            yield Work("dense", _case(grid, dim, longest, "causal"), direction, dtype)
    for direction in DIRECTIONS:
        for dim in grid.odd_dims:
            yield Work("odd head dims", _case(grid, dim, longest), direction, dtype)
        yield from _masked(grid, longest, direction, dtype)
    for length in grid.lengths[:-1]:
        for direction in DIRECTIONS:
            for dim in grid.dims:
                yield Work("lengths", _case(grid, dim, length), direction, dtype)
                yield Work("lengths", _case(grid, dim, length, "causal"), direction, dtype)
        for dim in grid.odd_dims:
            yield Work("lengths", _case(grid, dim, length), "forward", dtype)


def _masked(grid: Grid, length: int, direction: Direction, dtype: torch.dtype) -> Iterator[Work]:
    dim = grid.masked_dim
    yield Work("masks", _case(grid, dim, length, "padded"), direction, dtype)
    extras: tuple[Extra, ...] = ("dense", "biased", "packed", "window")
    for extra in extras:
        yield Work("masks", _case(grid, dim, length, extra), direction, dtype, extra)


def _models(dtype: torch.dtype) -> Iterator[Work]:
    return (Work("models", case, "forward", dtype) for case in CASES)


def _case(grid: Grid, dim: int, length: int, word: str = "") -> Case:
    return Case(
        name="-".join(filter(None, (f"d{dim}", word, str(length)))),
        model="none",
        batch=grid.batch,
        heads=grid.heads,
        query_length=length,
        key_length=length,
        head_dim=dim,
        mask="causal" if word == "causal" else "key_padding" if word == "padded" else "none",
        kept_keys=KEPT if word == "padded" else None,
        source="chosen here",
    )
