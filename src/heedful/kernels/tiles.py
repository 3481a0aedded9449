"""Tiles: how many queries and keys a program takes at a time, with how many warps, and how far it loads ahead.

A table, ``tiles.json``, by architecture, width of the dtype in bits, and the larger one of the head dims: the first row
that is wide enough. Rows that are ``masked`` are for calls with a mask or bias that differs from query to query, with a
window or padding: these want registers, too. Those of 8 bits are for scores in int8; where there are none, those of 16
are. Those of ``8 fp8`` are for values in fp8 as well, of no fewer than 32 keys; ``sm_86`` has some for sm_89. An
architecture that is not in it is taken for the newest older one of its maker.

``tiles-backward.json`` is the same for the backward pass, with two tiles: one for keys and values, one for queries and
for a bias.

The table decides, unless `heedful tune --tiles` measured something else on this device: what it found is known by its
kind (``Kind``), and handed to the kernels from outside. Nothing is tuned behind a call's back.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from heedful.kernels.operands import split_of
from heedful.problem import AttentionProblem

_TABLE = Path(__file__).with_name("tiles.json")
_BACKWARD = Path(__file__).with_name("tiles-backward.json")
INTERPRETER = "interpreter"
KEY = "tiles"  # what the classes' names begin with
FORWARD, KEYS, QUERIES = "forward", "keys", "queries"  # passes that have tiles of their own
FP8 = "8 fp8"  # the rows for values in fp8
DESCRIPTORS = "descriptors"  # see Tile
_TEXT = re.compile(r"([0-9]{1,3})x([0-9]{1,3}) ([0-9]{1,2})w ([0-9])s(?: (descriptors))?")
_SIZES, _WARPS, _STAGES = (16, 32, 64, 128, 256), (1, 2, 4, 8, 16), range(1, 9)
_SPANS = (128, 1024)  # up to these many queries, or keys, programs are few, or short of work: another tile may win


class Tile(NamedTuple):
    """Queries and keys of a tile, warps of a program, stages of its loads, and by what these go.

    ``loads``: "" for pointers; DESCRIPTORS for tensor descriptors, of a forward pass that ``streamed`` takes. Any other
    call goes by the table's tile then.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    loads: str = ""

    def __str__(self) -> str:
        return f"{self.queries}x{self.keys} {self.warps}w {self.stages}s {self.loads}".rstrip()

    @classmethod
    def read(cls, text: str) -> Tile:
        """A tile from its text, such as ``128x64 8w 3s``, which may come from anywhere. Raises ValueError."""
        found = _TEXT.fullmatch(text)
        queries, keys, warps, stages = map(int, found.groups()[:4]) if found else (0, 0, 0, 0)
        tile = cls(queries, keys, warps, stages, (found[5] or "") if found else "")
        sizes = tile.queries in _SIZES and tile.keys in _SIZES
        if not (sizes and tile.warps in _WARPS and tile.stages in _STAGES and str(tile) == text):
            raise ValueError(f"{text!r} is no tile such as '128x64 8w 3s'")
        return tile


_OLDER_BELOW = 64  # rows of products: fewer are computed by older matrix instructions


def is_sound(architecture: str, rows: int, stages: int) -> bool:
    """Whether it is not known that such a tile's machine code is wrong; ``rows`` are those of what a loop sums up.

    On Hopper loops want two stages of loads. Where nothing is loaded ahead all operands lie in the same places from
    step to step, and where a head dim has two parts ptxas (12.8, of Triton 3.6 and 3.7) mixes up their addresses: on an
    H200 answers were wrong, or memory was read out of bounds, in such loops, and in none that loads ahead. Rows that
    are not aligned are never loaded ahead, whatever the stages: see ``Call.splits``.
    """
    return known(architecture) != "sm_90" or stages > 1 or rows < _OLDER_BELOW


@functools.cache
def table() -> Mapping[str, Mapping[str, Mapping[int, Tile]]]:
    """The shipped table: architecture, bits of the dtype (``8``, ``8 fp8``, ``16 masked``, …), widest head dim."""
    return _rows(_TABLE, lambda tile: Tile(*tile))


@functools.cache
def backward_table() -> Mapping[str, Mapping[str, Mapping[int, tuple[Tile, Tile]]]]:
    """The same of the backward pass: the tile of keys and values, then that of queries and of a bias."""
    return _rows(_BACKWARD, lambda pair: (Tile(*pair[0]), Tile(*pair[1])))


def _rows(file: Path, read: Callable[[Any], Any]) -> dict[str, dict[str, dict[int, Any]]]:
    return {
        name: {bits: {int(dim): read(tile) for dim, tile in dims.items()} for bits, dims in rows.items()}
        for name, rows in json.loads(file.read_text("utf-8")).items()
    }


@functools.cache
def tile_for(architecture: str, bits: int | str, dim: int, masked: bool = False) -> Tile:
    """The tile of an architecture (``sm_90``, ``gfx942``, ``interpreter``) for a dtype's bits and a head dim."""
    tile: Tile = _row(table()[known(architecture)], bits, dim, masked)
    return tile


@functools.cache
def backward_tiles_for(architecture: str, bits: int, dim: int, masked: bool = False) -> tuple[Tile, Tile]:
    """The tiles of the backward pass, see ``backward_table``."""
    tiles: tuple[Tile, Tile] = _row(backward_table()[known(architecture)], bits, dim, masked)
    return tiles


def usual(architecture: str, role: str, bits: int | str, dim: int, masked: bool = False) -> Tile:
    """The table's tile for a pass: ``forward``, ``keys`` or ``queries``."""
    if role == FORWARD:
        return tile_for(architecture, bits, dim, masked)
    return backward_tiles_for(architecture, bits, dim, masked)[role == QUERIES]


class Kind(NamedTuple):
    """What calls have in common that want one tile; ``dim`` is the larger head dim, made of parts (72 is 80).

    ``role``: the pass; ``bits`` of the scores' operands, as the table's rows have them; ``longest``: of queries, or of
    keys in the pass of keys, up to so many; 0 stands for more.
    """

    role: str
    bits: int | str
    masked: bool
    dim: int
    longest: int

    def __str__(self) -> str:
        """The class by name, a key of the store: ``tiles forward 16 masked 80 to 1024``."""
        name = (
            "int8" if str(self.bits).startswith("8") else self.role if self.role == FORWARD else f"backward {self.role}"
        )
        span = f"to {self.longest}" if self.longest else f"beyond {_SPANS[-1]}"
        return f"{KEY} {name} {self.bits}{' masked' * self.masked} {self.dim} {span}"


def kinds(problem: AttentionProblem, bits: int | str = 0) -> dict[str, Kind]:
    """The kind of each pass of a problem, as the kernels see it; ``bits`` where they are not its dtype's. Pure.

    None where head dims are not whole units of 16 bytes: such calls go by the table (``Call.splits``).
    """
    unit = 16 // problem.dtype.itemsize
    if problem.head_dim % unit or problem.value_dim % unit:
        return {}
    mask = problem.mask
    by_query = any("Q" in (axes or "") for axes in (mask.dense, mask.bias))
    masked = by_query or mask.key_padding or (mask.window is not None and mask.window[0] is not None)
    dim = sum(split_of(max(problem.head_dim, problem.value_dim)))
    lengths = {FORWARD: problem.query_length}
    if problem.needs_grad:
        lengths |= {KEYS: problem.key_length, QUERIES: problem.query_length}
    return {
        role: Kind(role, bits or 8 * problem.dtype.itemsize, masked, dim, _span(length))
        for role, length in lengths.items()
    }


def may_stream(problem: AttentionProblem) -> bool:
    """Whether a problem's calls are among those that ``streamed`` takes, so that its tiles can be measured on them."""
    mask = problem.mask
    hidden = mask.key_padding or mask.query_padding or mask.dense is not None or mask.bias is not None
    one_part = not any(split_of(dim)[1] for dim in (problem.head_dim, problem.value_dim))
    return not hidden and one_part and problem.effective_scale > 0


def _span(length: int) -> int:
    return next((span for span in _SPANS if length <= span), 0)


def _row(rows: Mapping[str, Mapping[int, Any]], bits: int | str, dim: int, masked: bool) -> Any:
    width = str(bits) if str(bits) in rows else "16"
    dims = rows.get(f"{width} masked", rows[width]) if masked else rows[width]
    return dims[min((each for each in dims if each >= dim), default=max(dims))]


@functools.cache
def known(architecture: str) -> str:
    """The architecture in the table that stands for another one."""
    if architecture in table():
        return architecture
    if architecture.startswith("gfx"):
        return "gfx9" if architecture.startswith("gfx9") else "gfx11"
    number = _number(architecture)
    older = [name for name in table() if name.startswith("sm_") and _number(name) <= number]
    return max(older, key=_number, default="sm_75")


def _number(architecture: str) -> int:
    digits = architecture.removeprefix("sm_")
    return int(digits) if digits.isdigit() else 0
