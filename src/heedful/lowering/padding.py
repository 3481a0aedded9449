"""Padded keys left out by gathering the others: no mask is left for the kernel to read, and less to compute.

It needs to know how many keys each batch row keeps, as plain numbers: the mask's analysis tells them. Rows that keep no
key are left out, too; their output is zero, their LSE -inf.

Shapes: B batch, H heads, Q query length, K key length, E value dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from heedful.lowering.base import Computed, Kernel, Lowering, Memory, Operands
from heedful.masks import Mask, MaskFacts, PaddingProfile, replace_part
from heedful.problem import AttentionProblem
from heedful.strategy import Limits

PADDING = {"key_padding", "query_padding"}
_QUERIES_A_COPY = 80  # that must be spared a key for the copy of one that is kept (benchmarks/lowerings.py)
_MOST_EIGHTHS = 7  # of the keys kept; above it, copying them costs what it saves


class GatherKeys(Lowering):
    """Give the kernel only the keys that are kept, the batch rows that keep equally many together."""

    name = "gather_keys"
    optional = True
    mends = frozenset({"mask"})
    gain = "leaves padded keys out"
    drops_keys = True
    optional = True

    def improves(self, problem: AttentionProblem, limits: Limits) -> bool:
        mask, kept = problem.mask, problem.mask.kept or 0
        unmeasured = limits.faster_from == 0  # then it is wanted wherever it applies
        pays = mask.query_padding or kept <= _MOST_EIGHTHS or unmeasured
        if mask.side == "interior" and not unmeasured:  # keys are copied, and each is read by too few queries
            pays = pays and (8 - kept) * problem.query_length >= _QUERIES_A_COPY * kept
        return super().improves(problem, limits) and mask.kept is not None and pays

    def rewrite(self, problem: AttentionProblem, limits: Limits) -> AttentionProblem | None:
        mask = problem.mask
        if mask.side is None or problem.compiling or not set(mask.kinds) <= {*PADDING, "causal", "window"}:
            return None
        if limits.masks & {"dense", "bias"} and not self.improves(problem, limits):
            return None  # a mask costs less than copies
        if mask.causal or mask.window:  # places must not move
            aligned = {mask.causal, mask.window[2] if mask.window else None} <= {None, "top_left"}
            if mask.side != "right" or not aligned or mask.query_padding:
                return None
        left = replace(without_padding(mask), rows_seen=mask.window is None)
        keys = max(1, problem.key_length * (mask.kept or 0) // 8)
        return problem.replace(key_length=keys, mask=left)

    def around(self, old: AttentionProblem, new: AttentionProblem, run: Kernel) -> Kernel:
        axis = -2 if old.layout == "BHSD" else -3
        banded = bool(new.mask.kinds)

        def gathered(x: Operands) -> Computed:
            profile, keep = _profile(x)
            mask = None
            if banded and x.mask is not None:
                mask = replace_part(x.mask, padding=None, rows=None, profile=None)
            groups = _groups(profile, x.query.shape[0], x.query.shape[axis])
            if len(groups) == 1 and groups[0].keys and groups[0].queries == x.query.shape[axis]:
                every = slice(0, x.query.shape[0])
                key, value = (_kept(t, every, axis, groups[0].keys, profile, keep) for t in (x.key, x.value))
                return run(Operands(x.query, key, value, mask))
            return _in_groups(x, groups, axis, profile, keep, mask, run)

        return gathered


@dataclass(frozen=True)
class _Group:
    """Batch rows that keep equally many keys and queries."""

    rows: tuple[int, ...]
    keys: int
    queries: int


_orders = Memory()


def without_padding(mask: MaskFacts) -> MaskFacts:
    """What is left of a mask whose padded keys and queries were left out."""
    return replace(
        mask, key_padding=False, query_padding=False, side=None, kept=None, rows_seen=True, queries_alike=False
    )


def _profile(x: Operands) -> tuple[PaddingProfile, Tensor]:
    assert x.mask is not None
    assert x.mask.profile is not None
    assert x.mask.padding is not None
    return x.mask.profile, x.mask.padding


def _groups(profile: PaddingProfile, batch: int, query_length: int) -> list[_Group]:
    kept = profile.kept * batch if len(profile.kept) == 1 else profile.kept
    queries = (query_length,) if profile.queries is None else profile.queries
    queries = queries * batch if len(queries) == 1 else queries
    rows: dict[tuple[int, int], list[int]] = {}
    for row, sizes in enumerate(zip(kept, queries, strict=True)):
        rows.setdefault(sizes, []).append(row)
    return [_Group(tuple(own), *sizes) for sizes, own in rows.items()]


def _in_groups(
    x: Operands, groups: list[_Group], axis: int, profile: PaddingProfile, keep: Tensor, mask: Mask | None, run: Kernel
) -> Computed:
    """Compute group by group, into zeros."""
    out: Tensor | None = None
    lse: Tensor | None = None
    for group in groups:
        if not group.keys or not group.queries:
            continue
        rows = _indices(group.rows, x.query.device)
        query = _kept_queries(x.query[rows], rows, axis, group.queries, x.mask, profile)
        key, value = (_kept(t[rows], rows, axis, group.keys, profile, keep) for t in (x.key, x.value))
        part, part_lse = run(Operands(query, key, value, mask))
        if out is None:
            out = part.new_zeros((*x.query.shape[:-1], x.value.shape[-1]))
            lse = None if part_lse is None else part_lse.new_full(_lse_shape(x, axis == -2), -math.inf)
        _put(out, part, rows, axis, group.queries, x.mask, profile)
        if lse is not None and part_lse is not None:
            _put(lse, part_lse, rows, -1, group.queries, x.mask, profile)
    if out is None:
        return no_answer(x, axis == -2)
    return out, lse


def no_answer(x: Operands, heads_first: bool) -> Computed:
    """The answer where no query sees a key: zeros that still hang on the inputs, and -inf."""
    out = sum((t[..., :0].sum() for t in x[:3]), x.query.new_zeros((*x.query.shape[:-1], x.value.shape[-1])))
    return out, x.query.new_full(_lse_shape(x, heads_first), -math.inf, dtype=torch.float32)


def _lse_shape(x: Operands, heads_first: bool) -> tuple[int, ...]:
    *batch, one, two = x.query.shape[:-1]
    return (*batch, one, two) if heads_first else (*batch, two, one)


def _indices(rows: tuple[int, ...], device: torch.device) -> Tensor | slice:
    """Batch rows as a slice where they are neighbours, so that nothing is copied."""
    if rows == tuple(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return torch.tensor(rows, device=device)


def _order(profile: PaddingProfile, what: str, keep: Tensor) -> Tensor:
    """(B or 1, K): the kept places of each row, in order, then the others."""
    return _orders.get(profile, what, lambda: torch.argsort(~keep, dim=-1, stable=True), keep.device)


def _of_rows(order: Tensor, rows: Tensor | slice, count: int) -> Tensor:
    return (order[rows] if order.shape[0] > 1 else order)[:, :count]


def _kept(tensor: Tensor, rows: Tensor | slice, axis: int, count: int, profile: PaddingProfile, keep: Tensor) -> Tensor:
    """The kept keys or values of batch rows that were cut out already, along the sequence's axis."""
    if profile.side == "right":
        return tensor.narrow(axis, 0, count)
    if profile.side == "left":
        return tensor.narrow(axis, tensor.shape[axis] - count, count)
    return _along(tensor, axis, _of_rows(_order(profile, "keys", keep), rows, count))


def _along(tensor: Tensor, axis: int, places: Tensor) -> Tensor:
    """Elements of a sequence, by places (B or 1, n)."""
    shape = (places.shape[0], *(places.shape[1] if at == tensor.dim() + axis else 1 for at in (1, 2)), 1)
    sizes = [size if at != tensor.dim() + axis else places.shape[1] for at, size in enumerate(tensor.shape)]
    return tensor.gather(axis, places.view(shape).expand(sizes))


def _query_places(rows: Tensor | slice, count: int, mask: Mask | None, profile: PaddingProfile) -> Tensor:
    assert mask is not None
    assert mask.rows is not None
    return _of_rows(_order(profile, "queries", mask.rows), rows, count)


def _kept_queries(
    query: Tensor, rows: Tensor | slice, axis: int, count: int, mask: Mask | None, profile: PaddingProfile
) -> Tensor:
    if count == query.shape[axis]:
        return query
    if profile.query_side == "right":
        return query.narrow(axis, 0, count)
    if profile.query_side == "left":
        return query.narrow(axis, query.shape[axis] - count, count)
    return _along(query, axis, _query_places(rows, count, mask, profile))


def _put(
    into: Tensor, part: Tensor, rows: Tensor | slice, axis: int, count: int, mask: Mask | None, profile: PaddingProfile
) -> None:
    """Write the answers of batch rows to their places."""
    length = into.shape[axis]
    if count == length or profile.query_side != "interior":
        start = length - count if profile.query_side == "left" else 0
        places: Any = (rows, *[slice(None)] * (into.dim() + axis - 1), slice(start, start + count))
        into[places] = part
        return
    at = _query_places(rows, count, mask, profile)
    shape = [1] * part.dim()
    shape[0], shape[part.dim() + axis] = at.shape
    into[rows] = into[rows].scatter(axis, at.view(shape).expand(part.shape), part)
