"""How far from the fp64 answer a kernel may be: flash-attn's rule, and a coarser one for approximate kernels.

max|out - ref| <= 2 max|naive - ref| + 2 max|ref + 0.3 - 0.3 - ref|, where naive is the formula in the dtype of the
call (factor 3 with a soft cap), as in flash-attn's tests (tests/test_flash_attn.py). Gradients follow the same rule.
To it comes a floor of a few units in the last place, because on few keys the naive formula is exact by luck.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Units in the last place of the largest value. 16-bit kernels sum in float32 and round once; 32- and 64-bit ones sum
# in another order than the naive formula, and its luck is not theirs.
_FLOOR = {torch.float16: 1.0, torch.bfloat16: 1.0, torch.float32: 8.0, torch.float64: 8.0}


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


def allowed(want: Tensor, naive: Tensor, dtype: torch.dtype, factor: float = 2.0, terms: int = 1) -> float:
    """The largest error that the rule lets pass. ``want`` is float64; ``naive`` is the formula computed in ``dtype``.

    ``terms``: how many numbers were summed into each one; they may cancel, and their roundings add up as a random walk.

    A float64 kernel has no wider judge: ``naive`` is float32 then, and its error is scaled to float64's precision.
    """
    if want.numel() == 0:
        return 0.0
    rounded = want.to(dtype)
    unit = torch.finfo(dtype).eps
    rounding = largest((rounded + 0.3 - 0.3 - rounded).double())
    luck = largest(naive.double() - want) * unit / torch.finfo(naive.dtype).eps
    floor = _FLOOR[dtype] * unit * max(1.0, largest(want)) * math.sqrt(terms)
    return factor * luck + 2.0 * rounding + floor


def largest(tensor: Tensor) -> float:
    """max|tensor|; NaN where there is one, 0 where there is nothing."""
    return tensor.abs().max().item() if tensor.numel() else 0.0


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
