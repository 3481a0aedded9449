"""Rewrites of masks: one that hides nothing dropped, parts joined into one tensor, rows that see no key set to zero.

Shapes: B batch, H heads, N kv heads, Q query length, K key length, D head dim, E value dim, T packed tokens.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from heedful.lowering.base import After, Before, Lowering, Memory, Operands, lasting
from heedful.masks import NO_MASK, Mask, MaskFacts, without_keys
from heedful.problem import AttentionProblem
from heedful.strategy import Limits

_joined = Memory()


class DropNoop(Lowering):
    """Leave out a mask that hides nothing and adds nothing, as its analysis found."""

    name = "drop_noop_mask"
    gain = "it hides nothing"

    def improves(self, problem: AttentionProblem, limits: Limits) -> bool:  # noqa: ARG002
        return problem.mask.noop and set(problem.mask.kinds) <= {"dense", "bias"}

    def rewrite(self, problem: AttentionProblem, limits: Limits) -> AttentionProblem | None:  # noqa: ARG002
        return problem.replace(mask=NO_MASK)

    def before(self, old: AttentionProblem, new: AttentionProblem) -> Before:  # noqa: ARG002
        return lambda x: x._replace(mask=None)


class MaterialiseMask(Lowering):
    """Join all parts of a mask into one dense tensor: bool where the kernel takes it, else a bias of 0 and -inf.

    Of a mask that analysis found it is made once. Rows that see no key can be found in any such tensor.
    """

    name = "materialise_mask"
    mends = frozenset({"mask", "mask mix", "causal alignment", "empty rows"})

    def rewrite(self, problem: AttentionProblem, limits: Limits) -> AttentionProblem | None:
        mask = problem.mask
        as_bias = mask.bias is not None or "dense" not in limits.masks
        if ("bias" if as_bias else "dense") not in limits.masks or problem.layout == "THD":
            return None
        refused = {refusal.field for refusal in limits.refusals(problem)} & self.mends
        if refused == {"empty rows"} and ZeroEmptyRows().rewrite(problem, limits) is not None:
            return None
        joined = MaskFacts(dense=joined_axes(mask))
        if as_bias:
            dtype = mask.bias_dtype if mask.bias is not None else problem.dtype
            joined = MaskFacts(bias=joined_axes(mask), bias_dtype=dtype, bias_needs_grad=mask.bias_needs_grad)
        lowered = problem.replace(mask=joined)
        hidden = any(refusal.field == "empty rows" for refusal in limits.refusals(lowered))
        return problem.replace(mask=replace(joined, rows_seen=hidden and not problem.may_hide_rows))

    def before(self, old: AttentionProblem, new: AttentionProblem) -> Before:
        as_bias, dtype = new.mask.bias is not None, new.mask.bias_dtype
        length = -2 if old.layout == "BHSD" else -3

        def materialise(x: Operands) -> Operands:
            mask, device = x.mask, x.query.device
            if mask is None:
                return x
            lengths = (x.query.shape[length], x.key.shape[length])

            def join() -> Mask:
                seen, bias = mask.visible(*lengths, device), mask.bias
                if as_bias and seen is not None:
                    zero = torch.zeros((), dtype=dtype, device=device) if bias is None else bias
                    bias = torch.where(seen, zero, -math.inf)
                return Mask(bias=bias) if as_bias else Mask(dense=seen)

            part = lasting(mask)
            if part is None:
                return x._replace(mask=join())
            return x._replace(mask=_joined.get(part, (mask.causal, mask.window, *lengths, device, dtype), join, device))

        return materialise


class ZeroEmptyRows(Lowering):
    """Make the answers of rows that see no key zeros, their LSE -inf.

    A dense mask shows such rows all keys first, so that the kernel stays finite. Rows that a band leaves without keys
    are known by their places; there the kernel must give zeros itself, and only its LSE is mended.
    """

    name = "zero_empty_rows"
    mends = frozenset({"empty rows"})

    def rewrite(self, problem: AttentionProblem, limits: Limits) -> AttentionProblem | None:
        mask, kinds = problem.mask, set(problem.mask.kinds)
        banded = kinds <= {"causal", "window", "varlen"} and mask.packing in ("", "tidy")
        by_contents = problem.layout != "THD" and mask.kinds in (("dense",), ("bias",))
        if not by_contents and not (banded and "output" in limits.empty_rows):
            return None
        return problem.replace(mask=replace(mask, rows_seen=True))

    def before(self, old: AttentionProblem, new: AttentionProblem) -> Before:  # noqa: ARG002
        axis = -2 if old.layout == "BHSD" else -3

        def known(x: Operands) -> Operands:
            assert x.mask is not None
            rows = without_keys(x.mask, x.query.shape[axis], x.key.shape[axis], x.query.device)
            return x._replace(empty=rows[:, None])

        if set(old.mask.kinds) <= {"causal", "window", "varlen"}:
            return known

        def show(x: Operands) -> Operands:
            if x.mask is None:
                return x
            if x.mask.dense is not None:
                empty = ~x.mask.dense.any(-1, keepdim=True)
                mask = Mask(dense=x.mask.dense | empty)
            else:
                bias = x.mask.bias
                assert bias is not None
                empty = (bias == -math.inf).all(-1, keepdim=True)
                mask = Mask(bias=bias.masked_fill(empty, 0.0))
            return Operands(x.query, x.key, x.value, mask, _as_rows(empty))

        return show

    def after(self, old: AttentionProblem, new: AttentionProblem) -> After | None:  # noqa: ARG002
        heads_third = old.layout != "BHSD"

        if set(old.mask.kinds) <= {"causal", "window", "varlen"}:
            return lambda out, lse, _x, on: (
                out,
                lse if lse is None or on.empty is None else lse.masked_fill(on.empty[:, 0], -math.inf),
            )

        def zero(out: Tensor, lse: Tensor | None, _x: Operands, on: Operands) -> tuple[Tensor, Tensor | None]:
            if on.empty is None:
                return out, lse
            lse = None if lse is None else lse.masked_fill(on.empty.squeeze(-1), -math.inf)
            return out.masked_fill(on.empty.transpose(1, 2) if heads_third else on.empty, 0.0), lse

        return zero


def joined_axes(mask: MaskFacts) -> str:
    """Which of B, H, Q, K the joined tensor has; an upper bound where a part's own sizes are not known."""
    axes = set((mask.dense or "") + (mask.bias or ""))
    axes |= set("QK") if mask.causal or mask.window or mask.varlen else set()
    axes |= set("BK") if mask.key_padding else set()
    axes |= set("BQ") if mask.query_padding else set()
    axes |= set("BHQK") if mask.block else set()
    return "".join(axis for axis in "BHQK" if axis in axes)


def _as_rows(empty: Tensor) -> Tensor:
    """(…, Q, 1) to four dimensions, for broadcasting against the output."""
    return empty.reshape((1,) * (4 - empty.dim()) + tuple(empty.shape)) if empty.dim() < 4 else empty
