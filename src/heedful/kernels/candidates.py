"""Tiles that are worth measuring beside the table's own: its neighbours, without those that cannot fit.

Pure. What is known beforehand are lower bounds: the loads that a program has under way lie in shared memory, its sums
and scores in registers. What really fits only the compiler knows.
"""

from __future__ import annotations

from collections.abc import Iterator

from heedful.kernels.operands import split_of
from heedful.kernels.tiles import DESCRIPTORS, FORWARD, FP8, INTERPRETER, KEYS, Tile, is_sound, known, usual

MOST = 16
# Shared memory of a program, in KiB, by the rows of the table.
SHARED = {"sm_75": 64, "sm_80": 163, "sm_86": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx9": 64, "gfx11": 64}
_LEAST_KEYS = 32  # of fp8: tensor cores multiply so many at a time
_REGISTERS = 255  # of a thread; gfx9 has twice as many
# Loads by the copy engine, which these rows of the table have. Triton 3.6 can also give loads warps of their own: on an
# H200 most of such tiles gave wrong answers, so none is tried.
_STREAMED = (
    Tile(64, 128, 4, 2, DESCRIPTORS), Tile(128, 64, 4, 2, DESCRIPTORS), Tile(128, 128, 4, 3, DESCRIPTORS),
    Tile(128, 128, 8, 3, DESCRIPTORS),
)  # fmt: skip
STREAMED = {"sm_90": _STREAMED, "sm_100": _STREAMED, "sm_120": _STREAMED[:2]}
_SIZES, _WARPS = (16, 32, 64, 128, 256), (4, 8)


def candidates(architecture: str, role: str, bits: int | str, dim: int, masked: bool = False) -> tuple[Tile, ...]:
    """The table's tile first, then at most fifteen others: those by descriptors, then the nearest first.

    ``role``: ``forward``, ``keys`` or ``queries``; ``bits`` and ``dim`` as in the table.
    """
    first = usual(architecture, role, bits, dim, masked)
    row = known(architecture)
    others = (
        tile
        for tile in _neighbours(first)
        if _is_one(tile, first, row) and is_sound(row, rows_of(tile, role), tile.stages)
    )
    streamed = STREAMED.get(row, ()) if role == FORWARD and bits == 16 and not masked and not split_of(dim)[1] else ()
    fitting = (tile for tile in (*streamed, *others) if fits(tile, row, role, bits, dim))
    return tuple(dict.fromkeys((first, *fitting)))[:MOST]


def rows_of(tile: Tile, role: str) -> int:
    """The rows of what a pass sums up."""
    return tile.keys if role == KEYS else tile.queries


def _neighbours(tile: Tile) -> Iterator[Tile]:
    queries, keys, warps, stages, _ = tile
    other = 4 if warps == 8 else 8
    yield Tile(queries, keys, warps, stages + 1)
    yield Tile(queries, keys, warps, stages - 1)
    yield Tile(queries, keys, other, stages)
    yield Tile(queries, keys // 2, warps, stages)
    yield Tile(queries, keys // 2, warps, stages + 1)
    yield Tile(queries, 2 * keys, warps, stages)
    yield Tile(queries, 2 * keys, warps, stages - 1)
    yield Tile(queries // 2, keys, warps, stages)
    yield Tile(queries // 2, keys, other, stages)
    yield Tile(2 * queries, keys, warps, stages)
    yield Tile(queries // 2, 2 * keys, warps, stages)
    yield Tile(2 * queries, keys // 2, warps, stages)
    yield Tile(queries // 2, keys // 2, 4, stages)


def _is_one(tile: Tile, first: Tile, row: str) -> bool:
    """Whether it is another tile at all: the interpreter knows no warps and stages, AMD's no more than two stages."""
    if tile.queries not in _SIZES or tile.keys not in _SIZES:
        return False
    if row == INTERPRETER:
        return tile[2:] == first[2:]
    return tile.warps in (*_WARPS, first.warps) and 1 <= tile.stages <= (2 if row.startswith("gfx") else 4)


def fits(tile: Tile, row: str, role: str, bits: int | str, dim: int) -> bool:
    """Whether nothing is known against a tile on an architecture of the table."""
    if row == INTERPRETER:
        return True
    if bits == FP8 and tile.keys < _LEAST_KEYS:
        return False
    width, scored = sum(split_of(dim)), int(str(bits).split()[0])
    loaded = tile.queries if role == KEYS else tile.keys
    operands = scored + (
        8 if bits == FP8 else max(16, scored)
    )  # of a loop's step: keys and values, or queries and gradients of the output
    shared = (tile.stages - 1) * loaded * width * operands // 8
    sums = {FORWARD: tile.queries * width, KEYS: 2 * tile.keys * width}.get(role, tile.queries * width)
    if row == "sm_100":  # sums lie in memory of the tensor cores' own
        sums = 0
    scores = tile.queries * tile.keys * (1 if role == FORWARD else 2)
    threads = tile.warps * (64 if row == "gfx9" else 32)
    most = _REGISTERS * (2 if row == "gfx9" else 1)
    return shared <= SHARED[row] * 1024 and sums + scores <= most * threads
