"""A launch by the tile that was measured, or by the table's where that one cannot run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

from triton.errors import TritonError

from heedful.errors import InvalidArgument
from heedful.kernels.tiles import Tile
from heedful.strategy import Tuning

T = TypeVar("T")
_read = functools.lru_cache(maxsize=256)(Tile.read)


def by_choice(tuning: Tuning | None, role: str, run: Callable[[Tile | None], T]) -> T:
    """What ``run`` gives by the tile that ``tuning`` has for a pass; by None, the table's, where it has none.

    One that does not compile, wants more than the device has, or is no tile, is dropped, and the table's runs. Triton
    says so before anything is launched.
    """
    if tuning is None:
        return run(None)
    label = tuning.get(role)
    if label is None:
        return run(None)
    try:
        tile = _read(label)
    except ValueError as error:
        tuning.drop(role, label, str(error))
        return run(None)
    try:
        return run(tile)
    except (TritonError, InvalidArgument) as error:
        reason = f"{type(error).__name__}: {error}"
    except RuntimeError as error:
        if "PassManager" not in str(error):  # which Triton's own passes raise where they fail (3.7)
            raise
        reason = f"it does not compile: {error}"
    tuning.drop(role, label, reason)
    return run(None)
