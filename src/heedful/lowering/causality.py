"""Rewrites of causality and windows: what a band never reaches cut away, and one alignment said as the other.

A band lets query i see the keys from place(i) - left to place(i) + right. Its place is i (``top_left``), or i + K - Q
(``bottom_right``). Causality is the band (None, 0).

Shapes: B batch, H heads, N kv heads, Q query length, K key length, D head dim, E value dim.
"""

from __future__ import annotations

import math
from dataclasses import replace

from torch.nn.functional import pad

from heedful.lowering.base import Before, Computed, Kernel, Lowering, Operands
from heedful.masks import MaskFacts, replace_part
from heedful.problem import AttentionProblem
from heedful.strategy import Limits
from heedful.visibility import Window


class AlignCausal(Lowering):
    """Say a band in the alignment that the kernel knows.

    With as many queries as keys both mean the same, as they do in packed sequences that queries and keys share. Else
    the places differ by K - Q, and so do both sides of the band, where the kernel takes windows and neither side
    becomes negative (which kernels read as open).
    """

    name = "align_causal"
    mends = frozenset({"causal alignment"})

    def rewrite(self, problem: AttentionProblem, limits: Limits) -> AttentionProblem | None:
        alignment, mask = limits.causal_alignments[0], problem.mask
        if mask.packed_alike if mask.varlen else problem.query_length == problem.key_length:
            return problem.replace(mask=aligned(mask, alignment))
        if mask.varlen or problem.compiling or not limits.masks >= {*mask.kinds, "window"} - {"causal"}:
            return None  # compiled code serves many lengths, and a window is a constant
        longer = problem.key_length - problem.query_length
        window = shifted(mask, longer if alignment == "bottom_right" else -longer, alignment)
        seen = not problem.may_hide_rows
        return (
            None if window is None else problem.replace(mask=replace(mask, causal=None, window=window, rows_seen=seen))
        )

    def before(self, old: AttentionProblem, new: AttentionProblem) -> Before:  # noqa: ARG002
        causal, window = new.mask.causal, new.mask.window

        def align(x: Operands) -> Operands:
            return x if x.mask is None else x._replace(mask=replace_part(x.mask, causal=causal, window=window))

        return align


class TrimCausal(Lowering):
    """Cut away the keys that no query sees because of where a band ends, and the queries that see no key for it.

    The output of such a query is zero, its LSE -inf. What is left is square where the band is causality alone, so that
    the alignment no longer matters; and every query in it sees a key, also where nothing had to be cut away.
    """

    name = "trim_causal"
    mends = frozenset({"causal alignment", "empty rows"})
    drops_keys = True

    def rewrite(self, problem: AttentionProblem, limits: Limits) -> AttentionProblem | None:
        mask = problem.mask
        if set(mask.kinds) - {"causal", "window"} or not mask.kinds or problem.layout == "THD" or problem.compiling:
            return None
        if mixed(mask):
            return None
        queries, keys = _reach(mask, problem.query_length, problem.key_length)
        left = {"query_length": queries.stop - queries.start, "key_length": keys.stop - keys.start}
        if problem.replace(**left) == problem and (not problem.may_hide_rows or {"output", "lse"} <= limits.empty_rows):
            return None
        return problem.replace(**left, mask=replace(mask, rows_seen=True))

    def around(self, old: AttentionProblem, new: AttentionProblem, run: Kernel) -> Kernel:
        axis = -2 if old.layout == "BHSD" else -3
        queries, keys = _reach(old.mask, old.query_length, old.key_length)
        if (new.query_length, new.key_length) == (old.query_length, old.key_length):
            return run
        before, behind = queries.start, old.query_length - queries.stop

        def trimmed(x: Operands) -> Computed:
            query = x.query.narrow(axis, queries.start, queries.stop - queries.start)
            key, value = (t.narrow(axis, keys.start, keys.stop - keys.start) for t in (x.key, x.value))
            out, lse = run(Operands(query, key, value, x.mask))
            if not before and not behind:
                return out, lse
            rows = (before, behind)
            out = pad(out, (0, 0, *rows) if axis == -2 else (0, 0, 0, 0, *rows))
            return out, None if lse is None else pad(lse, rows, value=-math.inf)

        return trimmed


def band_of(mask: MaskFacts) -> tuple[float, float, str]:
    """The band that causality and window leave together: left, right (inf where open), alignment."""
    left, right, alignment = math.inf, math.inf, str(mask.causal or "top_left")
    if mask.window is not None:
        left, right = (math.inf if side is None else side for side in mask.window[:2])
        alignment = mask.window[2]
    return left, min(right, 0) if mask.causal else right, alignment


def mixed(mask: MaskFacts) -> bool:
    """Whether there are two bands of different alignment."""
    return bool(mask.causal and mask.window and mask.window[2] != mask.causal)


def aligned(mask: MaskFacts, alignment: str) -> MaskFacts:
    """The mask with its bands called by another alignment."""
    window = (*mask.window[:2], alignment) if mask.window else None
    return replace(mask, causal=alignment if mask.causal else None, window=window)  # type: ignore[arg-type]


def shifted(mask: MaskFacts, by: int, alignment: str) -> Window | None:
    """The band as a window around places that are ``by`` further on; None where that cannot be said."""
    left, right, _ = band_of(mask)
    sides = (left + by, right - by)
    if mixed(mask) or min(sides) < 0:
        return None
    numbers = [None if side == math.inf else int(side) for side in sides]
    return numbers[0], numbers[1], alignment


def _reach(mask: MaskFacts, query_length: int, key_length: int) -> tuple[slice, slice]:
    """The queries that see a key, and the keys that a query sees."""
    left, right, alignment = band_of(mask)
    shift = key_length - query_length if alignment == "bottom_right" else 0
    first_query = max(0, -shift - right)
    past_query = min(query_length, key_length - shift + left)
    first_key = max(0, first_query + shift - left)
    past_key = min(key_length, past_query + shift + right)
    return slice(int(first_query), int(past_query)), slice(int(first_key), int(past_key))
