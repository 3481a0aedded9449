"""A chunk of queries at a time, each with the keys that its band reaches: memory that does not grow with Q * K.

Shapes: B batch, H heads, N kv heads, Q query length, K key length, D head dim, E value dim.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from heedful.lowering.base import Computed, Kernel, Lowering, Operands
from heedful.lowering.causality import band_of
from heedful.lowering.masking import MaterialiseMask, joined_axes
from heedful.lowering.padding import no_answer
from heedful.masks import Mask, MaskFacts, replace_part
from heedful.problem import AttentionProblem
from heedful.strategy import Limits
from heedful.visibility import cut, reach

CHUNK = 256  # queries of a band; 128 to 512 are about alike (benchmarks/lowerings.py, two CPU cores)
MOST_BYTES = 32 * 2**20  # of a mask, or of scores, that are still made whole
_STRUCTURE = {"causal", "window", "varlen", "block"}


class ChunkQueries(Lowering):
    """Compute a chunk of queries at a time, with the keys that its band reaches, and every part of the mask cut so.

    It is taken for two reasons. For memory, wherever more than ``MOST_BYTES`` of scores would be held by a kernel that
    holds them all (``Limits.scores_in_memory``, ``native_math`` under its own name too), or of a mask that would be
    joined and that the user did not give. With a gradient that gains nothing, because autograd keeps every chunk. And
    for speed, where the limits name it: a kernel that computes all scores and then hides half of them is spared that
    half, from two chunks on.

    Dropout stays whole, so that a seed means the same however large the problem is.
    """

    name = "chunk_queries"
    optional = True

    def improves(self, problem: AttentionProblem, limits: Limits) -> bool:
        return _bounds_memory(problem, limits) or self._saves_work(problem, limits)

    def gain_of(self, problem: AttentionProblem, limits: Limits) -> str:
        return "faster" if self._saves_work(problem, limits) else "holds less at once"

    def _saves_work(self, problem: AttentionProblem, limits: Limits) -> bool:
        banded = set(problem.mask.kinds) & {"causal", "window"} and not problem.mask.varlen
        return super().improves(problem, limits) and bool(banded) and problem.query_length >= 2 * CHUNK

    def rewrite(self, problem: AttentionProblem, limits: Limits) -> AttentionProblem | None:
        mask = problem.mask
        if problem.layout == "THD" or problem.compiling or problem.dropout_p > 0:
            return None
        structured = bool(set(mask.kinds) & _STRUCTURE)
        if structured and not limits.masks & {"dense", "bias"}:
            return None
        axes = joined_axes(replace(mask, bias=None, key_padding=False, query_padding=False))
        left = MaskFacts(
            dense=axes if structured or mask.dense is not None else None,
            bias=mask.bias,
            bias_dtype=mask.bias_dtype,
            bias_needs_grad=mask.bias_needs_grad,
            key_padding=mask.key_padding,
            query_padding=mask.query_padding,
            rows_seen=not problem.may_hide_rows,
        )
        kept = _elements("BH", problem) if limits.scores_in_memory else _elements(axes.strip("QK"), problem)
        rows = _rows_of_a_chunk(mask, problem.key_length, kept * (1 + problem.dtype.itemsize))
        return problem.replace(query_length=min(problem.query_length, rows), mask=left)

    def around(self, old: AttentionProblem, new: AttentionProblem, run: Kernel) -> Kernel:
        axis = -2 if old.layout == "BHSD" else -3
        rows = new.query_length

        def chunked(x: Operands) -> Computed:
            queries, keys = x.query.shape[axis], x.key.shape[axis]
            bands = [] if x.mask is None or x.mask.varlen is not None else x.mask.bands
            parts = []
            for start in range(0, queries, rows):
                chunk = slice(start, min(start + rows, queries))
                part = _part(x, chunk, reach(bands, chunk, queries, keys), axis)
                parts.append(run(part) if part.key.shape[axis] else no_answer(part, axis == -2))
            return torch.cat([out for out, _ in parts], dim=axis), _joined([lse for _, lse in parts])

        return chunked


def _bounds_memory(problem: AttentionProblem, limits: Limits) -> bool:
    """Whether all scores, or a mask as large as they that nobody gave, would be held at once, and are large."""
    if problem.needs_grad:
        return False
    scores = _elements("BHQK", problem) * problem.dtype.itemsize if limits.scores_in_memory else 0
    return max(scores, _joined_bytes(problem, limits)) > MOST_BYTES


def _joined_bytes(problem: AttentionProblem, limits: Limits) -> int:
    """The bytes of the mask that would be joined, as bool and as what kernels make of it; 0 if it is the user's own."""
    refused = {refusal.field for refusal in limits.refusals(problem)} & MaterialiseMask.mends
    joined = MaterialiseMask().rewrite(problem, limits) if refused else None
    if joined is None:
        return 0
    axes, mask = joined.mask.dense or joined.mask.bias or "", problem.mask
    elements = _elements(axes, problem)
    if not {*"QK"} <= {*axes} or elements <= max(_elements(given or "", problem) for given in (mask.dense, mask.bias)):
        return 0
    return elements * (1 + problem.dtype.itemsize)


def _elements(axes: str, problem: AttentionProblem) -> int:
    sizes = {"B": problem.batch, "H": problem.heads, "Q": problem.query_length, "K": problem.key_length}
    return math.prod(sizes[axis] for axis in axes)


def _rows_of_a_chunk(mask: MaskFacts, key_length: int, bytes_of_a_key: int) -> int:
    """As many queries as keep what is held within the bound; of a band so few that little is computed beside it."""
    left, right, _ = band_of(mask)
    banded = min(left, right) < math.inf and not mask.varlen
    keys = min(key_length, CHUNK + left + right) if banded else key_length
    most = max(1, int(MOST_BYTES // max(1, keys * bytes_of_a_key)))
    return min(CHUNK, most) if banded else most


def _part(x: Operands, queries: slice, keys: slice, axis: int) -> Operands:
    """The operands of some queries and the keys that they reach."""
    query = x.query.narrow(axis, queries.start, queries.stop - queries.start)
    key, value = (t.narrow(axis, keys.start, keys.stop - keys.start) for t in (x.key, x.value))
    return Operands(query, key, value, None if x.mask is None else _part_of_mask(x, x.mask, queries, keys, axis))


def _part_of_mask(x: Operands, mask: Mask, queries: slice, keys: slice, axis: int) -> Mask:
    structure = replace_part(mask, padding=None, rows=None, bias=None, profile=None)
    lengths = x.query.shape[axis], x.key.shape[axis]
    return Mask(
        dense=structure.visible_rows(queries, *lengths, x.query.device, keys),
        bias=None if mask.bias is None else cut(cut(mask.bias, -2, queries), -1, keys),
        padding=None if mask.padding is None else cut(mask.padding, -1, keys),
        rows=None if mask.rows is None else cut(mask.rows, -1, queries),
    )


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    every = [part for part in parts if part is not None]
    return torch.cat(every, dim=-1) if every else None
