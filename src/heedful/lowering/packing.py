"""Sequences packed end to end, for kernels that take them so: padded keys are left out, and nothing is padded.

Where a batch has padding, packing needs to know how many keys each batch row keeps, as plain numbers: the mask's
analysis tells them, as it tells how long the sequences of a given pack are.

Shapes: B batch, H heads, Q query length, K key length, E value dim, T packed tokens, N sequences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor
from torch.compiler import is_compiling

from heedful.lowering.base import Computed, Kernel, Lowering, Memory, Operands
from heedful.lowering.causality import aligned, band_of, mixed, shifted
from heedful.lowering.padding import PADDING, no_answer, without_padding
from heedful.masks import Mask, MaskFacts, Varlen, replace_part
from heedful.problem import AttentionProblem
from heedful.strategy import Limits


class PackPadding(Lowering):
    """Pack the kept keys, and the queries that see one, of all batch rows end to end, for kernels that take them so.

    With a band, each batch row must keep as many queries as keys: then both alignments mean the same within it.
    """

    name = "pack"
    mends = frozenset({"mask", "layout"})
    drops_keys = True

    def improves(self, problem: AttentionProblem, limits: Limits) -> bool:  # noqa: ARG002
        return False

    def rewrite(self, problem: AttentionProblem, limits: Limits) -> AttentionProblem | None:
        mask, kinds = problem.mask, set(problem.mask.kinds)
        padded = bool(kinds & PADDING)
        if not {"THD", "varlen"} <= {*limits.layouts, *limits.masks} or not kinds <= {*PADDING, "causal", "window"}:
            return None
        if not (kinds & PADDING - limits.masks or limits.layouts == ("THD",)):
            return None
        tokens, keys = (problem.batch * length for length in (problem.query_length, problem.key_length))
        if not padded:
            alike = problem.query_length == problem.key_length
            left = replace(mask, rows_seen=not problem.may_hide_rows)
        elif mask.side is None or problem.compiling:
            return None
        else:
            alike, keys = bool(kinds - PADDING), max(1, keys * (mask.kept or 0) // 8)
            moved = _moved_band(problem, limits.causal_alignments[0]) if alike else without_padding(mask)
            if moved is None:
                return None
            left = moved
        left = replace(left, varlen=True, packing="tidy", packed_alike=alike)
        return problem.replace(layout="THD", batch=1, query_length=tokens, key_length=keys, mask=left)

    def around(self, old: AttentionProblem, new: AttentionProblem, run: Kernel) -> Kernel:
        heads_third, heads_first = old.layout == "BSHD", old.layout == "BHSD"
        padded = bool(set(old.mask.kinds) & PADDING)
        alike, causal, window = padded and new.mask.packed_alike, new.mask.causal, new.mask.window

        def packed(x: Operands) -> Computed:
            query, key, value = x[:3] if heads_third else (t.transpose(1, 2) for t in x[:3])
            sizes = (query.shape[0], query.shape[1], key.shape[1])
            pack = _padded_pack(x, *sizes[:2], alike) if padded else _whole_pack(*sizes, query.device)
            if padded and not pack.varlen.max_seqlen_q:
                return no_answer(x, heads_first)
            query = _take(query.flatten(0, 1), pack.queries)
            key, value = (_take(t.flatten(0, 1), pack.keys) for t in (key, value))
            mask = Mask(causal=causal, window=window, varlen=pack.varlen)
            out, lse = run(Operands(query, key, value, mask))
            total = sizes[0] * sizes[1]
            out = _spread(out, pack.queries, total, 0).unflatten(0, sizes[:2])
            if lse is not None:
                lse = _spread(lse, pack.queries, total, -1, -math.inf).unflatten(1, sizes[:2]).transpose(0, 1)
            return out if heads_third else out.transpose(1, 2), lse

        return packed


class TidyPacked(Lowering):
    """Take tokens out of a pack that belong to no sequence, and sequences without keys: kernels do not write them."""

    name = "tidy_pack"
    mends = frozenset({"packing", "mask"})  # tidy, it can be split for kernels that know no packing
    drops_keys = True

    def rewrite(self, problem: AttentionProblem, limits: Limits) -> AttentionProblem | None:
        mask = problem.mask
        if "varlen" not in limits.masks and "block_mask" in limits.faster_with:
            return None  # blocks are skipped as they lie
        if mask.packing != "loose" or set(mask.kinds) - {"causal", "window", "varlen"} or problem.compiling:
            return None
        return problem.replace(mask=replace(mask, packing="tidy"))

    def around(self, old: AttentionProblem, new: AttentionProblem, run: Kernel) -> Kernel:  # noqa: ARG002
        axis = {"BHSD": 2, "BSHD": 1, "THD": 0}[old.layout]

        def tidy(x: Operands) -> Computed:
            assert x.mask is not None
            assert x.mask.varlen is not None
            given, device = x.mask.varlen, x.query.device
            pack = _tidied.get(given, device, lambda: _tidy(given, device), device)
            if not pack.varlen.max_seqlen_q:
                return no_answer(x, axis == 2)
            query, key, value = (
                _take(t, at, axis) for t, at in zip(x[:3], (pack.queries, *[pack.keys] * 2), strict=True)
            )
            out, lse = run(Operands(query, key, value, replace_part(x.mask, varlen=pack.varlen)))
            total = x.query.shape[axis]
            lse = None if lse is None else _spread(lse, pack.queries, total, -1, -math.inf)
            return _spread(out, pack.queries, total, axis), lse

        return tidy


@dataclass(frozen=True, eq=False)
class _Pack:
    """Where the kept queries and keys lie among all; None where all are kept."""

    queries: Tensor | None
    keys: Tensor | None
    varlen: Varlen


_packs, _tidied = Memory(), Memory()


def _moved_band(problem: AttentionProblem, alignment: str) -> MaskFacts | None:
    """The band once padding is gone, where each batch row keeps as many queries as keys; None where it does not.

    Kept queries and keys lie at the starts of their rows, or at the ends, so that the places differ by K - Q. Queries
    whose padding is not given are left out along with the keys of their place, where these are all that they would see.
    """
    mask, longer = problem.mask, problem.key_length - problem.query_length
    _left, right, meant = band_of(mask)
    if longer and mixed(mask):
        return None
    if not mask.queries_alike and not (mask.side == "left" and not longer and not mask.query_padding and right == 0):
        return None
    by = (longer if mask.side == "left" else 0) - (longer if meant == "bottom_right" else 0)
    plain = without_padding(mask)
    if by == 0 or not longer:
        return replace(aligned(plain, alignment), rows_seen=True)
    window = shifted(plain, by, alignment)
    return None if window is None else replace(plain, causal=None, window=window, rows_seen=True)


def _padded_pack(x: Operands, batch: int, query_length: int, alike: bool) -> _Pack:
    """The pack of a padded batch: made once for each mask."""
    mask, device = x.mask, x.query.device
    assert mask is not None
    assert mask.profile is not None
    profile, padding, rows = mask.profile, mask.padding, mask.rows
    assert padding is not None

    def make() -> _Pack:
        kept, keys = profile.kept, padding.expand(batch, -1)
        if profile.queries is not None and rows is not None:
            queries, used = profile.queries, rows.expand(batch, -1)
        elif alike:
            queries, used = kept, keys
        else:
            queries, used = (query_length,), torch.ones(batch, query_length, dtype=torch.bool, device=device)
        kept, queries = (each * (batch // len(each)) for each in (kept, queries))
        pairs = [(q, k) if q and k else (0, 0) for q, k in zip(queries, kept, strict=True)]
        seen = torch.tensor([bool(q) for q, _ in pairs], device=device)[:, None]
        places = [_first(flags & seen, sum(pair[side] for pair in pairs)) for side, flags in ((0, used), (1, keys))]
        return _Pack(places[0], places[1], _varlen([pair for pair in pairs if pair[0]], alike, device))

    return _packs.get(profile, (batch, query_length, alike), make, device)


def _whole_pack(batch: int, query_length: int, key_length: int, device: torch.device) -> _Pack:
    """The pack of a batch without padding; its lengths may be a compiler's symbols."""
    steps = torch.arange(batch + 1, dtype=torch.int32, device=device)
    keys = None if query_length == key_length else steps * key_length
    varlen = Varlen(steps * query_length, keys, query_length, key_length)
    if not is_compiling():
        varlen = varlen.with_lengths((query_length,) * batch, (key_length,) * batch)
    return _Pack(None, None, varlen)


def _tidy(given: Varlen, device: torch.device) -> _Pack:
    """A pack without tokens of no sequence, and without sequences that lack queries or keys."""
    assert given.lengths is not None
    pairs = list(zip(*given.lengths, strict=True))
    wanted = [bool(q and k) for q, k in pairs]
    queries, keys = (_places(lengths, wanted, device) for lengths in given.lengths)
    return _Pack(queries, keys, _varlen([pair for pair in pairs if all(pair)], given.alike, device))


def _first(flags: Tensor, count: int) -> Tensor | None:
    """The flat places of the ``count`` flags that are set, which is known: ``nonzero`` would wait for the device."""
    if count == flags.numel():
        return None
    return torch.argsort(~flags.flatten(), stable=True)[:count]


def _places(lengths: tuple[int, ...], wanted: list[bool], device: torch.device) -> Tensor:
    """The places of the wanted sequences' tokens in a pack."""
    ends = list(accumulate(lengths, initial=0))
    runs = [torch.arange(start, start + n) for start, n, take in zip(ends, lengths, wanted, strict=False) if take]
    return torch.cat(runs or [torch.arange(0)]).to(device)


def _varlen(pairs: list[tuple[int, int]], alike: bool, device: torch.device) -> Varlen:
    """A packing of sequences with so many queries and keys; with the same ends if they are ``alike``."""
    queries, keys = tuple(q for q, _ in pairs), tuple(k for _, k in pairs)
    ends = [torch.tensor([0, *accumulate(n)], dtype=torch.int32, device=device) for n in (queries, keys)]
    return Varlen(ends[0], None if alike else ends[1]).with_lengths(queries, keys)


def _take(tensor: Tensor, places: Tensor | None, axis: int = 0) -> Tensor:
    return tensor if places is None else tensor.index_select(axis, places)


def _spread(tensor: Tensor, places: Tensor | None, total: int, axis: int, fill: float = 0.0) -> Tensor:
    """The elements of a tensor put at their places among ``total`` along an axis; the others are ``fill``."""
    if places is None:
        return tensor
    shape = [*tensor.shape]
    shape[axis] = total
    return tensor.new_full(shape, fill).index_copy(axis, places, tensor)
