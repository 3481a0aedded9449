"""Packed sequences one by one, for kernels that know no packing.

It needs to know how long each sequence is, as plain numbers: the mask's analysis tells them.

Shapes: B batch, H heads, Q query length, K key length, D head dim, E value dim, T packed tokens, N sequences.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from heedful.lowering.base import Computed, Kernel, Lowering, Operands
from heedful.masks import Mask
from heedful.problem import AttentionProblem
from heedful.strategy import Limits

_BANDS = {"causal", "window", "varlen"}


class SplitSequences(Lowering):
    """Compute each packed sequence by itself, neighbours of one length together as a batch: views, and no mask.

    Work and memory are those of the sequences, not of T * T. Kernels that skip hidden blocks in one call are left that.
    """

    name = "split_sequences"
    mends = frozenset({"mask"})
    drops_keys = True

    def rewrite(self, problem: AttentionProblem, limits: Limits) -> AttentionProblem | None:
        mask = problem.mask
        if mask.packing != "tidy" or set(mask.kinds) - _BANDS or problem.layout == "THD" or problem.compiling:
            return None
        if "varlen" in limits.masks or "block_mask" in limits.faster_with or limits.max_batch is not None:
            return None
        left = replace(mask, varlen=False, packing="", packed_alike=False, rows_seen=not problem.may_hide_rows)
        if problem.may_hide_rows and not left.may_hide_rows(problem.query_length, problem.key_length):
            return problem.replace(query_length=problem.key_length + 1, mask=left)  # the end of a sequence hides some
        return problem.replace(mask=left)

    def around(self, old: AttentionProblem, new: AttentionProblem, run: Kernel) -> Kernel:
        heads_first = old.layout == "BHSD"
        mask = Mask(causal=new.mask.causal, window=new.mask.window) if new.mask.kinds else None

        def split(x: Operands) -> Computed:
            assert x.mask is not None
            assert x.mask.varlen is not None
            assert x.mask.varlen.lengths is not None
            parts, query_at, key_at = [], 0, 0
            for (queries, keys), run_of in groupby(zip(*x.mask.varlen.lengths, strict=True)):
                count = len(list(run_of))
                query = _as_batch(x.query, query_at, count, queries, heads_first)
                key, value = (_as_batch(t, key_at, count, keys, heads_first) for t in (x.key, x.value))
                parts.append(_as_pack(*run(Operands(query, key, value, mask)), heads_first))
                query_at, key_at = query_at + count * queries, key_at + count * keys
            if len(parts) == 1:
                return parts[0]
            out = torch.cat([out for out, _ in parts], dim=-2 if heads_first else -3)
            lse = [lse for _, lse in parts if lse is not None]
            return out, torch.cat(lse, dim=-1) if lse else None

        return split


def _as_batch(packed: Tensor, start: int, count: int, length: int, heads_first: bool) -> Tensor:
    """Some sequences of equal length as a batch of their own: (1, H, T, D) to (N, H, length, D), or heads third."""
    axis = 2 if heads_first else 1
    run = packed.narrow(axis, start, count * length)
    if count == 1:
        return run
    shape = run.shape
    run = run.view(*shape[1:axis], count, length, *shape[axis + 1 :])
    return run.transpose(0, 1) if heads_first else run


def _as_pack(out: Tensor, lse: Tensor | None, heads_first: bool) -> Computed:
    """The way back: (N, H, length, E) to (1, H, T, E), and the LSE (N, H, length) to (1, H, T)."""
    if out.shape[0] == 1:
        return out, lse
    out = out.transpose(0, 1).flatten(1, 2)[None] if heads_first else out.flatten(0, 1)[None]
    return out, None if lse is None else lse.transpose(0, 1).flatten(1, 2)[None]
