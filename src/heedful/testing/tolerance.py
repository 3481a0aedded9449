"""How far from the fp64 answer a kernel may be: the rule of ``heedful.tolerance``, and a coarser one for approximate
kernels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from heedful.tolerance import allowed, largest


class ContractBroken(AssertionError):
    """A strategy did something other than what it declares: the text says what, where and by how much."""


@dataclass(frozen=True)
class Tolerance:
    """What an approximate kernel (``exactness`` other than "exact") is held to, on N(0, 1) inputs.

    ``cosine``: least cosine similarity with the fp64 answer; ``relative``: most sum|out - ref| / sum|ref|; ``lse``:
    most absolute error of the LSE.
    """

    cosine: float = 0.99
    relative: float = 0.1
    lse: float = 0.1


def check_close(
    what: str, got: Tensor, want: Tensor, naive: Tensor, dtype: torch.dtype, factor: float = 2.0, terms: int = 1
) -> None:
    """Raise ContractBroken unless ``got`` is as near to ``want`` (float64) as the rule demands; infinities exact."""
    if got.shape != want.shape:
        raise ContractBroken(f"{what} has shape {tuple(got.shape)}, not {tuple(want.shape)}")
    got, infinite = got.double(), want.isinf()
    if not torch.equal(got[infinite], want[infinite]):
        raise ContractBroken(f"{what} is {got[infinite].tolist()[:4]}… where it must be {want[infinite].tolist()[:4]}…")
    got, want, naive = got[~infinite], want[~infinite], naive[~infinite]
    error, limit = largest(got - want), allowed(want, naive, dtype, factor, terms)
    if not error <= limit:  # a NaN is no smaller than anything
        raise ContractBroken(f"{what} is off by {error:.3g}; at most {limit:.3g} is allowed")


def check_similar(what: str, got: Tensor, want: Tensor, tolerance: Tolerance) -> None:
    """Raise ContractBroken unless an approximate answer is about as large and points the same way."""
    if got.shape != want.shape:
        raise ContractBroken(f"{what} has shape {tuple(got.shape)}, not {tuple(want.shape)}")
    got, want = got.double().flatten(), want.flatten()
    size = want.abs().sum().item()
    if size == 0:
        if largest(got) != 0:
            raise ContractBroken(f"{what} is {largest(got):.3g} where it must be zero")
        return
    relative = (got - want).abs().sum().item() / size
    norms = got.norm().item() * want.norm().item()
    cosine = (got @ want).item() / norms if norms else math.nan
    if not (relative <= tolerance.relative and cosine >= tolerance.cosine):
        raise ContractBroken(
            f"{what}: relative error {relative:.3g} (at most {tolerance.relative}), "
            f"cosine similarity {cosine:.5f} (at least {tolerance.cosine})"
        )
