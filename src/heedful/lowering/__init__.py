"""Exact rewrites: a problem that a strategy refuses, or is slow at, becomes one that it is good at: the same answer.

'Exact' means the same function, not the same bits. ``LOWERINGS`` is the order in which they are tried; each is taken
only where it mends a refusal or is known to pay, so a chain is never longer than it needs to be. They serve every
strategy alike, under forced names too.
"""

from dataclasses import replace

from heedful.lowering.base import Computed, Kernel, Lowering, Operands, Step, lower_by
from heedful.lowering.blocks import BlockOfMask
from heedful.lowering.causality import AlignCausal, TrimCausal
from heedful.lowering.chunking import ChunkQueries
from heedful.lowering.masking import DropNoop, MaterialiseMask, ZeroEmptyRows
from heedful.lowering.numbers import CastAutocast, CastBias, FoldScale, Upcast
from heedful.lowering.packing import PackPadding, TidyPacked
from heedful.lowering.padding import GatherKeys
from heedful.lowering.sequences import SplitSequences
from heedful.lowering.shapes import (
    BroadcastLeading,
    ChangeLayout,
    ExpandKVHeads,
    PadHeadDim,
    SplitBatch,
    leading_shape,
)
from heedful.problem import AttentionProblem
from heedful.strategy import Limits

LOWERINGS: tuple[Lowering, ...] = (
    BroadcastLeading(),
    CastAutocast(),
    Upcast(),
    DropNoop(),
    TrimCausal(),
    AlignCausal(),
    TidyPacked(),
    PackPadding(),
    GatherKeys(),
    ChangeLayout(),
    SplitSequences(),
    SplitBatch(),
    ExpandKVHeads(),
    PadHeadDim(),
    BlockOfMask(),
    ChunkQueries(),
    MaterialiseMask(),
    CastBias(),
    ZeroEmptyRows(),
    FoldScale(),
)


OPTIONAL = frozenset(lowering.name for lowering in LOWERINGS if lowering.optional)
Chain = tuple[tuple[Step, ...], AttentionProblem]


def lower(problem: AttentionProblem, limits: Limits) -> Chain:
    """The chain of rewrites that brings a problem within these limits, and the problem it ends in."""
    return lower_by(LOWERINGS, problem, limits)


def chains(problem: AttentionProblem, limits: Limits) -> tuple[Chain, ...]:
    """The usual chain, then those that have one optional rewrite more, or less: candidates for the fastest."""
    usual = lower(problem, limits)
    taken = _optional(usual)
    made = {taken: usual}
    words = {lowering.name: lowering.switch(problem) for lowering in LOWERINGS if lowering.optional}
    for name in sorted(OPTIONAL):
        wanted = limits.faster_with - OPTIONAL - {*words.values()} | {words[one] for one in taken ^ {name}}
        other = lower(problem, replace(limits, faster_with=wanted, faster_from=0))
        made.setdefault(_optional(other), other)
    return tuple(made.values())


def _optional(chain: Chain) -> frozenset[str]:
    return frozenset(step.name for step in chain[0]) & OPTIONAL


__all__ = [
    "LOWERINGS",
    "OPTIONAL",
    "AlignCausal",
    "BlockOfMask",
    "BroadcastLeading",
    "CastAutocast",
    "CastBias",
    "Chain",
    "ChangeLayout",
    "ChunkQueries",
    "Computed",
    "DropNoop",
    "ExpandKVHeads",
    "FoldScale",
    "GatherKeys",
    "Kernel",
    "Lowering",
    "MaterialiseMask",
    "Operands",
    "PackPadding",
    "PadHeadDim",
    "SplitBatch",
    "SplitSequences",
    "Step",
    "TidyPacked",
    "TrimCausal",
    "Upcast",
    "ZeroEmptyRows",
    "chains",
    "leading_shape",
    "lower",
]
