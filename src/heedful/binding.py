"""A plan made into one function: query, key, value and the user's mask in, the answer out.

Everything that the problem fixes is worked out here, once; the function only touches tensors. It serves every call with
the same plan, and is what ``torch.compile`` traces, so it never holds a length.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from heedful.call import mask_of_call
from heedful.lowering import ChangeLayout, Operands
from heedful.masks import Mask
from heedful.problem import AttentionProblem
from heedful.select import Plan
from heedful.strategy import Answer, AttentionStrategy, mask_arguments, static_arguments

Run = Callable[[Tensor, Tensor, Tensor, Any], Answer]


def bind(plan: Plan, strategy: AttentionStrategy | None, mask_words: dict[str, Any]) -> Run:
    """The function of a plan that chose ``strategy``, or, with None, of an empty problem.

    ``mask_words`` are the call's mask arguments other than ``attn_mask`` itself.
    """
    if plan.chosen is None or strategy is None:
        return _empty_answer(plan.problem)
    compute = strategy.compute_attention
    static = static_arguments(plan.chosen.lowered)
    steps = plan.chosen.steps
    if set(plan.problem.mask.kinds) <= {"causal"} and plan.problem.mask.causal == plan.chosen.lowered.mask.causal:
        if not steps:
            return _direct(compute, static)
        if [type(step.lowering) for step in steps] == [ChangeLayout] and plan.problem.layout == "BSHD":
            return _transposed(compute, static, plan.problem.needs_lse)
    run = _chained(compute, static, plan, mask_words)
    return _without_autocast(run, plan.problem.device) if plan.problem.autocast else run


def _direct(compute: Callable[..., Answer], static: dict[str, Any]) -> Run:
    if not static:
        return lambda query, key, value, _mask: compute(query, key, value)
    return lambda query, key, value, _mask: compute(query, key, value, **static)


def _transposed(compute: Callable[..., Answer], static: dict[str, Any], needs_lse: bool) -> Run:
    """What ``_chained`` would do for the one step that diffusers' models need at every call, 2 us faster."""

    if not static:
        return lambda query, key, value, _mask: compute(  # type: ignore[union-attr]
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        ).transpose(1, 2)

    def run(query: Tensor, key: Tensor, value: Tensor, _mask: Any) -> Answer:
        answer = compute(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), **static)
        return (answer[0].transpose(1, 2), answer[1]) if needs_lse else answer.transpose(1, 2)  # type: ignore[union-attr]

    return run


def _chained(compute: Callable[..., Answer], static: dict[str, Any], plan: Plan, mask_words: dict[str, Any]) -> Run:
    assert plan.chosen is not None
    steps = plan.chosen.steps
    befores = tuple(step.lowering.before(step.old, step.new) for step in steps)
    afters = tuple(step.lowering.after(step.old, step.new) for step in steps)
    needs_lse = plan.problem.needs_lse

    def run(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any) -> Answer:
        stages = [Operands(query, key, value, mask_of_call(attn_mask=attn_mask, **mask_words))]
        for before in befores:
            stages.append(before(stages[-1]))
        last = stages[-1]
        answer = compute(last.query, last.key, last.value, **static, **mask_arguments(last.mask))
        out, lse = answer if needs_lse else (answer, None)
        for index in range(len(afters) - 1, -1, -1):
            after = afters[index]
            if after is not None:
                out, lse = after(out, lse, stages[index], stages[index + 1])  # type: ignore[arg-type]
        return (out, lse) if needs_lse else out  # type: ignore[return-value]

    return run


def _without_autocast(run: Run, device: str) -> Run:
    """The inputs were cast already; the kernel's own arithmetic is not to be cast again."""

    def outside(query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Answer:
        with torch.autocast(device, enabled=False):
            return run(query, key, value, mask)

    return outside


def _empty_answer(problem: AttentionProblem) -> Run:
    """Zeros, and -inf as LSE: there is no output element, or no key (which crashes a CPU kernel of torch 2.13)."""
    layout, dtype, lse = problem.layout, problem.dtype, problem.needs_lse
    heads_axis = {"BHSD": -3, "BSHD": -2, "THD": -2}[layout]

    def run(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any) -> Answer:
        lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2]) if problem.broadcast else None
        shape = query.shape[:-1] if lead is None or layout != "BHSD" else (*lead, query.shape[-2])
        bias = attn_mask.bias if isinstance(attn_mask, Mask) else attn_mask
        inputs = [query, key, value, *([bias] if isinstance(bias, Tensor) and bias.is_floating_point() else [])]
        # Sums over nothing, so that gradients are zeros and not missing.
        zero = sum((t.sum() * 0 for t in inputs if t.requires_grad), torch.zeros((), dtype=dtype, device=query.device))
        out = zero.to(dtype).expand(*shape, value.shape[-1]).clone()
        if not lse:
            return out
        full = torch.full(shape, -math.inf, device=query.device)
        return out, full if heads_axis == -3 else full.transpose(-1, -2)

    return run
