"""How far from the formula a kernel may be: flash-attn's rule, as a pure function.

max|out - ref| <= 2 max|naive - ref| + 2 max|ref + 0.3 - 0.3 - ref|, where naive is the formula in the dtype of the
call (factor 3 with a soft cap), as in flash-attn's tests (tests/test_flash_attn.py). Gradients follow the same rule.
To it comes a floor of a few units in the last place, because on few keys the naive formula is exact by luck.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Units in the last place of the largest value. 16-bit kernels sum in float32 and round once; 32- and 64-bit ones sum
# in another order than the naive formula, and its luck is not theirs.
FLOOR = {torch.float16: 1.0, torch.bfloat16: 1.0, torch.float32: 8.0, torch.float64: 8.0}


def allowed(want: Tensor, naive: Tensor, dtype: torch.dtype, factor: float = 2.0, terms: int = 1) -> float:
    """The largest error that the rule lets pass. ``want`` is float64; ``naive`` is the formula computed in ``dtype``.

    ``terms``: how many numbers were summed into each one; they may cancel, and their roundings add up as a random walk.

    A float64 kernel has no wider judge: ``naive`` is float32 then, and its error is scaled to float64's precision.
    """
    if want.numel() == 0:
        return 0.0
    return allowed_by_row(want.flatten(), naive.flatten(), dtype, factor, terms).item()


def allowed_by_row(want: Tensor, naive: Tensor, dtype: torch.dtype, factor: float = 2.0, terms: int = 1) -> Tensor:
    """The rule for each row alone: (…, E) to (…,)."""
    rounded = want.to(dtype)
    unit = torch.finfo(dtype).eps
    rounding = _peak((rounded + 0.3 - 0.3 - rounded).to(want.dtype))
    luck = _peak(naive.to(want.dtype) - want) * (unit / torch.finfo(naive.dtype).eps)
    floor = _peak(want).clamp(min=1.0) * (FLOOR[dtype] * unit * math.sqrt(terms))
    return factor * luck + 2.0 * rounding + floor


def largest(tensor: Tensor) -> float:
    """max|tensor|; NaN where there is one, 0 where there is nothing."""
    return tensor.abs().max().item() if tensor.numel() else 0.0


def _peak(tensor: Tensor) -> Tensor:
    return tensor.abs().amax(-1)
