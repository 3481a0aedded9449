"""How far from the fp64 answer a kernel may be: the rule of ``heedful.tolerance``, and a coarser one for approximate
kernels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from heedful.tolerance import allowed, largest


@dataclass(frozen=True)
class Deviation:
    """How far one answer was from the formula. ``error``: the largest difference of any number; ``units``: in units of
    what is allowed, so that at most 1 is right. Both are NaN where the answer holds a NaN.
    """

    what: str
    error: float
    units: float


class ContractBroken(AssertionError):
    """A strategy did something other than what it declares: the text says what, where and by how much.

    ``deviation``: the same in numbers, where it is a matter of numbers.
    """

    def __init__(self, text: str, deviation: Deviation | None = None) -> None:
        super().__init__(text)
        self.deviation = deviation


@dataclass(frozen=True)
class Tolerance:
    """What an approximate kernel (``exactness`` other than "exact") is held to, on N(0, 1) inputs.

    ``cosine``: least cosine similarity with the fp64 answer; ``relative``: most sum|out - ref| / sum|ref|; ``lse``:
    most absolute error of the LSE.
    """

    cosine: float = 0.99
    relative: float = 0.1
    lse: float = 0.1

    @classmethod
    def of(cls, relative: float) -> Tolerance:
        """What goes with a relative error: an error across the answer of that size leaves a cosine of 1 - r²/2."""
        return cls(1.0 - relative**2 / 2, relative, relative)


def check_close(
    what: str, got: Tensor, want: Tensor, naive: Tensor, dtype: torch.dtype, factor: float = 2.0, terms: int = 1
) -> Deviation:
    """How near ``got`` is to ``want`` (float64); infinities are to be exact. Raises ContractBroken beyond the rule."""
    if got.shape != want.shape:
        raise ContractBroken(f"{what} has shape {tuple(got.shape)}, not {tuple(want.shape)}")
    got, infinite = got.double(), want.isinf()
    if not torch.equal(got[infinite], want[infinite]):
        raise ContractBroken(f"{what} is {got[infinite].tolist()[:4]}… where it must be {want[infinite].tolist()[:4]}…")
    got, want, naive = got[~infinite], want[~infinite], naive[~infinite]
    error, limit = largest(got - want), allowed(want, naive, dtype, factor, terms)
    found = Deviation(what, error, _share(error, limit))
    if not error <= limit:  # a NaN is no smaller than anything
        raise ContractBroken(f"{what} is off by {error:.3g}; at most {limit:.3g} is allowed", found)
    return found


def check_similar(what: str, got: Tensor, want: Tensor, tolerance: Tolerance) -> Deviation:
    """How near an approximate answer is. Raises ContractBroken unless it is about as large and points the same way."""
    if got.shape != want.shape:
        raise ContractBroken(f"{what} has shape {tuple(got.shape)}, not {tuple(want.shape)}")
    got, want = got.double().flatten(), want.flatten()
    size = want.abs().sum().item()
    if size == 0:
        found = Deviation(what, largest(got), _share(largest(got), 0.0))
        if largest(got) != 0:
            raise ContractBroken(f"{what} is {largest(got):.3g} where it must be zero", found)
        return found
    relative = (got - want).abs().sum().item() / size
    norms = got.norm().item() * want.norm().item()
    cosine = (got @ want).item() / norms if norms else math.nan
    units = max(_share(relative, tolerance.relative), _share(1.0 - cosine, 1.0 - tolerance.cosine))
    found = Deviation(what, largest(got - want), math.nan if math.isnan(cosine) else units)
    if not (relative <= tolerance.relative and cosine >= tolerance.cosine):
        raise ContractBroken(
            f"{what}: relative error {relative:.3g} (at most {tolerance.relative}), "
            f"cosine similarity {cosine:.5f} (at least {tolerance.cosine})",
            found,
        )
    return found


def _share(error: float, limit: float) -> float:
    """The error in units of the limit; 0 where both are."""
    return error / limit if limit else math.inf if error else 0.0
