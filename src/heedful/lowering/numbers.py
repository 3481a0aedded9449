"""Rewrites of numbers: dtypes, and the factor of the scores.

Shapes: B batch, H heads, N kv heads, Q query length, K key length, D head dim, E value dim, T packed tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from heedful.lowering.base import After, Before, Lowering, Operands
from heedful.masks import replace_part
from heedful.problem import AttentionProblem
from heedful.strategy import HALF, Limits


class CastAutocast(Lowering):
    """Cast floating inputs and the bias to the dtype that autocast computes attention in, as SDPA does."""

    name = "autocast"
    mends = frozenset({"autocast"})

    def rewrite(self, problem: AttentionProblem, limits: Limits) -> AttentionProblem | None:  # noqa: ARG002
        mask = problem.mask
        mask = replace(mask, bias_dtype=problem.dtype) if mask.bias is not None else mask
        return problem.replace(autocast=False, mask=mask)

    def before(self, old: AttentionProblem, new: AttentionProblem) -> Before:  # noqa: ARG002
        dtype = new.dtype

        def cast(x: Operands) -> Operands:
            mask = x.mask
            if mask is not None and mask.bias is not None:
                mask = replace_part(mask, bias=cast_bias(mask.bias, dtype))
            return Operands(x.query.to(dtype), x.key.to(dtype), x.value.to(dtype), mask)

        return cast


class CastBias(Lowering):
    """Cast a bias to the query's dtype. Finite values stay finite: -1e9 in fp16 becomes its lowest, not -inf."""

    name = "cast_bias"
    mends = frozenset({"bias dtype"})

    def rewrite(self, problem: AttentionProblem, limits: Limits) -> AttentionProblem | None:  # noqa: ARG002
        return problem.replace(mask=replace(problem.mask, bias_dtype=problem.dtype))

    def before(self, old: AttentionProblem, new: AttentionProblem) -> Before:  # noqa: ARG002
        dtype = new.dtype

        def cast(x: Operands) -> Operands:
            if x.mask is None or x.mask.bias is None:
                return x
            return x._replace(mask=replace_part(x.mask, bias=cast_bias(x.mask.bias, dtype)))

        return cast


class FoldScale(Lowering):
    """Multiply the query so that a scale which the kernel takes gives the wanted one.

    Where it takes any positive scale, only the sign or the zero is folded, which no dtype rounds.
    """

    name = "fold_scale"
    mends = frozenset({"scale"})

    def rewrite(self, problem: AttentionProblem, limits: Limits) -> AttentionProblem | None:
        return problem.replace(scale=-problem.effective_scale if limits.scale and problem.effective_scale < 0 else None)

    def before(self, old: AttentionProblem, new: AttentionProblem) -> Before:
        factor = old.effective_scale / new.effective_scale
        return lambda x: x._replace(query=x.query * factor)


class Upcast(Lowering):
    """Compute 16-bit floats in float32, and round the output: CPUs without fast 16-bit arithmetic gain by it.

    Which CPUs have it differs by dtype, so limits name ``upcast`` for float16, and ``upcast_bfloat16``.
    """

    name = "upcast"
    optional = True
    mends = frozenset({"dtype"})

    def switch(self, problem: AttentionProblem) -> str:
        return "upcast_bfloat16" if problem.dtype == torch.bfloat16 else self.name

    def rewrite(self, problem: AttentionProblem, limits: Limits) -> AttentionProblem | None:
        if problem.dtype not in HALF or problem.device != "cpu" or torch.float32 not in limits.dtypes:
            return None
        return problem.replace(dtype=torch.float32)

    def before(self, old: AttentionProblem, new: AttentionProblem) -> Before:  # noqa: ARG002
        return lambda x: x._replace(query=x.query.float(), key=x.key.float(), value=x.value.float())

    def after(self, old: AttentionProblem, new: AttentionProblem) -> After | None:  # noqa: ARG002
        dtype = old.dtype
        return lambda out, lse, _x, _on: (out.to(dtype), lse)


def cast_bias(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """A bias in another dtype; finite values that do not fit become its lowest or highest, infinities stay."""
    if bias.dtype == dtype or torch.finfo(dtype).max >= torch.finfo(bias.dtype).max:
        return bias.to(dtype)
    bounds = torch.finfo(dtype)
    return torch.where(bias.isinf(), bias, bias.clamp(bounds.min, bounds.max)).to(dtype)
