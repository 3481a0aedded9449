"""A plan made into one function: query, key, value and the user's mask in, the answer out.

Everything that the problem fixes is worked out here, once; the function only touches tensors. It serves every call with
the same plan, and is what ``torch.compile`` traces, so it never holds a length.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from heedful.call import mask_of_call
from heedful.lowering import (
    ChangeLayout,
    Computed,
    Kernel,
    MaterialiseMask,
    Operands,
    ZeroEmptyRows,
    leading_shape,
)
from heedful.masks import Mask, of_rank_four, savable
from heedful.problem import AttentionProblem
from heedful.select import Plan
from heedful.strategy import Answer, AttentionStrategy, Tuning, mask_arguments, static_arguments

Run = Callable[[Tensor, Tensor, Tensor, Any], Answer]


def bind(
    plan: Plan, strategy: AttentionStrategy | None, mask_words: dict[str, Any], tuning: Tuning | None = None
) -> Run:
    """The function of a plan that chose ``strategy``, or, with None, of an empty problem.

    ``mask_words`` are the call's mask arguments other than ``attn_mask`` itself; ``tuning`` goes to the strategy.
    """
    if plan.chosen is None or strategy is None:
        return _empty_answer(plan.problem)
    run = _to_kernel(plan, strategy, mask_words, tuning)
    given = plan.problem.mask
    if (
        plan.problem.needs_grad
        and not plan.problem.compiling
        and (given.bias is not None or given.dense is not None or given.key_padding)
    ):
        return lambda query, key, value, mask: run(query, key, value, savable(mask))
    return run


def _to_kernel(plan: Plan, strategy: AttentionStrategy, mask_words: dict[str, Any], tuning: Tuning | None) -> Run:
    assert plan.chosen is not None
    compute = strategy.compute_attention
    static = static_arguments(plan.chosen.lowered) | ({} if tuning is None else {"tuning": tuning})
    mask = _lone_mask(plan)
    if mask is not None:
        rest = [type(step.lowering) for step in plan.chosen.steps if step.name not in mask.by]
        if not rest:
            return _direct(compute, static, mask.read)
        if rest == [ChangeLayout] and plan.problem.layout == "BSHD":
            return _transposed(compute, static, mask.read, plan.problem.needs_lse)
    run = _chained(compute, static, plan, mask_words)
    return _without_autocast(run) if plan.problem.autocast else run


class _LoneMask(NamedTuple):
    """A mask that reaches the kernel as ``attn_mask`` alone, or not at all.

    ``read`` gives it from the user's ``attn_mask``, None where there is none; it does what the lowerings ``by`` would.
    """

    read: Callable[[Any], Tensor] | None
    by: tuple[str, ...] = ()


def _lone_mask(plan: Plan) -> _LoneMask | None:
    """How to read a mask without building the values in between, 3 to 5 us a call; None where it takes those."""
    assert plan.chosen is not None
    given, taken = plan.problem.mask, plan.chosen.lowered.mask
    if given == taken and given.kinds in ((), ("causal",)):
        return _LoneMask(None)
    if given == taken and given.kinds == ("dense",):
        return _LoneMask(lambda mask: of_rank_four(mask if isinstance(mask, Tensor) else mask.dense))
    if given == taken and given.kinds == ("bias",):
        return _LoneMask(lambda mask: of_rank_four(mask if isinstance(mask, Tensor) else mask.bias))
    zeroed = any(step.name == ZeroEmptyRows.name for step in plan.chosen.steps)
    if given.kinds == ("key_padding",) and taken.kinds == ("dense",) and not zeroed:
        return _LoneMask(lambda mask: mask.padding.view(-1, 1, 1, mask.padding.shape[-1]), by=(MaterialiseMask.name,))
    return None


def _direct(compute: Callable[..., Answer], static: dict[str, Any], read: Callable[[Any], Tensor] | None) -> Run:
    if read is not None:
        return lambda query, key, value, mask: compute(query, key, value, attn_mask=read(mask), **static)
    if static:
        return lambda query, key, value, _mask: compute(query, key, value, **static)
    return lambda query, key, value, _mask: compute(query, key, value)


def _transposed(
    compute: Callable[..., Answer], static: dict[str, Any], read: Callable[[Any], Tensor] | None, needs_lse: bool
) -> Run:
    """What ``_chained`` would do for the one step that diffusers' models need at every call, 1.7 us faster."""
    swap = torch.transpose  # in benchmarks/overhead.py 0.3 us a call faster than the four methods

    if read is None and not static:
        return lambda query, key, value, _mask: swap(
            compute(swap(query, 1, 2), swap(key, 1, 2), swap(value, 1, 2)),  # type: ignore[arg-type]
            1,
            2,
        )

    def run(query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Answer:
        more = static if read is None else {"attn_mask": read(mask), **static}
        answer = compute(swap(query, 1, 2), swap(key, 1, 2), swap(value, 1, 2), **more)
        return (swap(answer[0], 1, 2), answer[1]) if needs_lse else swap(answer, 1, 2)  # type: ignore[arg-type]

    return run


def _chained(compute: Callable[..., Answer], static: dict[str, Any], plan: Plan, mask_words: dict[str, Any]) -> Run:
    assert plan.chosen is not None
    needs_lse = plan.problem.needs_lse

    def kernel(x: Operands) -> Computed:
        answer = compute(x.query, x.key, x.value, **static, **mask_arguments(x.mask))
        return answer if needs_lse else (answer, None)  # type: ignore[return-value]

    through: Kernel = kernel
    for step in reversed(plan.chosen.steps):
        through = step.lowering.around(step.old, step.new, through)

    def run(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any) -> Answer:
        out, lse = through(Operands(query, key, value, mask_of_call(attn_mask=attn_mask, **mask_words)))
        return (out, lse) if needs_lse else out  # type: ignore[return-value]

    return run


def _without_autocast(run: Run) -> Run:
    """The inputs were cast already; the kernel's own arithmetic is not to be cast again."""

    def outside(query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Answer:
        with torch.autocast(query.device.type, enabled=False):
            return run(query, key, value, mask)

    return outside


def _empty_answer(problem: AttentionProblem) -> Run:
    """Zeros, and -inf as LSE: there is no output element, or no key (which crashes a CPU kernel of torch 2.13)."""
    heads_first, dtype, wants_lse = problem.layout == "BHSD", problem.dtype, problem.needs_lse

    def run(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any) -> Answer:
        views = [t if heads_first else t.transpose(-3, -2) for t in (query, key, value)]
        shape = (*leading_shape(*views), views[0].shape[-2])
        bias = attn_mask.bias if isinstance(attn_mask, Mask) else attn_mask
        inputs = [query, key, value, *([bias] if isinstance(bias, Tensor) and bias.is_floating_point() else [])]
        # Sums over nothing, so that gradients are zeros and not missing.
        zero = sum((t[..., :0].sum() for t in inputs if t.requires_grad), torch.zeros((), device=query.device))
        out = zero.to(dtype).expand(*shape, value.shape[-1]).clone()
        out = out if heads_first else out.transpose(-3, -2)
        if not wants_lse:
            return out
        return out, torch.full(shape, -math.inf, dtype=torch.float32, device=query.device)

    return run
