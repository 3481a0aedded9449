"""One sample put to one strategy: computed and judged, or refused with honest reasons. There is no third outcome.

Aspects of a sample: ``forward``; ``lse``, with the LSE returned; ``gradient``; ``both`` of these; ``garbage``: finite
garbage in the keys that nothing sees must not change the answer; ``dropout`` and ``compile`` in their own functions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from heedful.errors import Refused
from heedful.testing.samples import GARBAGE, Built, Sample, logical
from heedful.testing.subject import Outcome, Subject
from heedful.testing.tolerance import ContractBroken, Deviation, check_close, check_similar

_SEEDS = {"forward": (0, 1)}  # the second call of a kind runs the memoised plan, on other tensors and other masks


def examine(subject: Subject, sample: Sample, aspect: str) -> Outcome:
    """Put one sample to the strategy. Raises ContractBroken, or whatever the strategy raised."""
    if aspect == "dropout":
        return examine_dropout(subject, sample)
    if aspect == "compile":
        return examine_compiled(subject, sample)
    found: list[Deviation] = []
    for seed in _SEEDS.get(aspect, (0,)):
        built = sample.build(subject.device, needs_grad=aspect in {"gradient", "both"}, seed=subject.seed + seed)
        arguments = built.arguments | ({"return_lse": True} if aspect in {"lse", "both"} else {})
        outcome = _refusal(subject, built, arguments)
        if outcome is not None:
            return outcome
        for asked in _poisoned(subject, built, arguments) if aspect == "garbage" else (built,):
            try:
                found += _ask(subject, asked, built, arguments)
            except Refused as refused:  # by its own look at the tensors, at the call
                return _own_refusal(subject, refused)
        if seed == 0 and aspect in {"forward", "gradient"}:
            found += _ask_alone(subject, built, arguments)
    return Outcome(deviations=tuple(found))


def _poisoned(subject: Subject, built: Built, arguments: dict[str, Any]) -> list[Built]:
    """The call with finite garbage in hidden keys; with NaN, too, where the plan says that it leaves these out."""
    with built.surroundings():
        plan = subject.dispatcher.explain(*built.tensors, **arguments, backend=subject.name)
    immune = plan.chosen is not None and plan.chosen.drops_hidden_keys(plan.problem)
    return [built.poisoned(garbage) for garbage in (GARBAGE, -GARBAGE, *([math.nan] if immune else []))]


def _refusal(subject: Subject, built: Built, arguments: dict[str, Any]) -> Outcome | None:
    """The outcome if the plan refuses the call."""
    call = dict(zip(("query", "key", "value"), built.tensors, strict=True)) | arguments
    with built.surroundings():
        plan = subject.dispatcher.explain(**call, backend=subject.name)
        outcome = subject.refused(plan, call) if plan.refused else None
    wanted = built.sample.must_refuse
    if wanted and wanted not in {one.field for one in (outcome.refused if outcome else ())}:
        raise ContractBroken(f"{subject.name} must refuse this call for {wanted}: {plan}")
    return outcome


def _own_refusal(subject: Subject, refused: Refused) -> Outcome:
    reasons = refused.refusals[subject.name]
    if not subject.strategy.has_own_validation():
        raise ContractBroken(f"explain says that {subject.name} takes the call, and it refuses: {refused}")
    return Outcome(reasons)


def _ask(subject: Subject, asked: Built, clean: Built, arguments: dict[str, Any]) -> tuple[Deviation, ...]:
    """Ask with the tensors of ``asked``, judge by ``clean``, and look that nothing that was given was changed."""
    inputs = [*asked.tensors, *_tensors_of(asked)]
    copies = [tensor.detach().clone() for tensor in inputs]
    versions = [None if tensor.is_inference() else tensor._version for tensor in inputs]
    with asked.surroundings():
        answer = subject.dispatcher.attention(*asked.tensors, **arguments, backend=subject.name)
    found = check_answer(subject, clean, arguments, answer)
    for tensor, copy, version in zip(inputs, copies, versions, strict=True):
        if not torch.allclose(tensor, copy, 0, 0, equal_nan=True) or (
            version is not None and tensor._version != version
        ):
            raise ContractBroken(f"{subject.name} changed an input of shape {tuple(tensor.shape)} in place")
    return found


def _ask_alone(subject: Subject, built: Built, arguments: dict[str, Any]) -> tuple[Deviation, ...]:
    """Ask the strategy without any lowering: it must answer rightly within its bare limits, and refuse beyond."""
    if built.sample.is_empty and subject.strategy.has_own_validation():  # it may trust the dispatcher with these
        return ()
    machine: dict[str, Any] = {} if subject.machine is None else {"facts": subject.machine}
    strategy, call = subject.strategy, dict(zip(("query", "key", "value"), built.tensors, strict=True)) | arguments
    with built.surroundings():
        try:
            strategy.validate_constraints(**call, **machine)
        except Refused:
            _check_that_it_refuses(subject, call | machine)
            return ()
        answer = strategy.validate_and_compute(**call, **machine)
    return check_answer(subject, built, arguments, answer)


def _check_that_it_refuses(subject: Subject, call: dict[str, Any]) -> None:
    try:
        subject.strategy.validate_and_compute(**call)
    except Refused:
        return
    raise ContractBroken(f"{subject.name}.validate_constraints refuses what validate_and_compute answers")


def check_answer(
    subject: Subject, built: Built, arguments: dict[str, Any], answer: Any, drop: Tensor | None = None
) -> tuple[Deviation, ...]:
    """How far an answer and its gradients are from the oracle's. Raises ContractBroken for what is too far, or of
    another form.
    """
    out, lse = answer if arguments.get("return_lse") else (answer, None)
    out, lse = _in_form(built, out, lse)
    narrow = torch.float32 if built.dtype == torch.float64 else built.dtype
    want, want_lse, leaves = built.answer(torch.float64, drop)
    naive, naive_lse, naive_leaves = built.answer(narrow, drop)
    deviations = [_check(subject, built, "the output", out.detach(), want.detach(), naive.detach())]
    empty = want_lse == -math.inf
    if out.detach()[empty].any():
        raise ContractBroken("the output of a query that sees no key is not zero")
    if lse is not None:
        dtype = torch.float32 if built.dtype == torch.float64 else built.dtype
        deviations.append(_check(subject, built, "the LSE", lse, want_lse, naive_lse, dtype))
    if built.leaves:
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        weights = weights.to(out.device).to(out.dtype)
        found = torch.autograd.grad(out, built.leaves, weights)
        wanted = torch.autograd.grad(want, leaves, weights.double())
        naively = torch.autograd.grad(naive, naive_leaves, weights.to(narrow))
        for leaf, got, right, rough in zip(built.leaves, found, wanted, naively, strict=True):
            what = f"the gradient of a {leaf.dtype} input of shape {tuple(leaf.shape)}"
            if got.dtype != leaf.dtype:
                raise ContractBroken(f"{what} is {got.dtype}")
            terms = built.summed_into(leaf)
            deviations.append(_check(subject, built, what, got, right.double(), rough, terms=terms))
    return tuple(deviations)


def _in_form(built: Built, out: Tensor, lse: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Out and LSE as logical tensors, once shape, dtype and device are as documented."""
    layout, sample = built.sample.layout, built.sample
    if not isinstance(out, Tensor) or (out.dtype, out.device) != (built.dtype, built.tensors[0].device):
        raise ContractBroken(f"the output must be {built.dtype} on {built.tensors[0].device}, not {out!r:.80}")
    out = logical(out, layout) if out.dim() == built.tensors[0].dim() or layout == "BHSD" else out
    shape = (*built.lead, sample.query_length, sample.shapes()[2][-1])
    if tuple(out.shape) != shape:
        raise ContractBroken(f"the output has the logical shape {tuple(out.shape)}, not {shape}")
    if lse is not None:
        if lse.dtype != torch.float32 or lse.requires_grad:
            raise ContractBroken(f"the LSE must be float32 without gradient, not {lse.dtype}")
        lse = lse.unsqueeze(0) if layout == "THD" else lse
    return out, lse


def _check(
    subject: Subject,
    built: Built,
    what: str,
    got: Tensor,
    want: Tensor,
    naive: Tensor,
    dtype: torch.dtype | None = None,
    terms: int = 1,
) -> Deviation:
    if not subject.is_exact:
        finite = want.isfinite()
        return check_similar(what, got[finite], want[finite], subject.tolerance)
    factor = 3.0 if "softcap" in built.sample.call else 2.0
    return check_close(what, got, want, naive, dtype or built.dtype, factor, terms)


def _tensors_of(built: Built) -> list[Tensor]:
    """The tensors in the mask of a call."""
    every: list[Tensor] = []
    for part in built.parts:
        packing = part.mask.varlen
        ends = [] if packing is None else [packing.cu_seqlens_q, packing.cu_seqlens_k]
        every += [t for t in (part.mask.dense, part.mask.bias, part.mask.padding, *ends) if t is not None]
    return every


def examine_compiled(subject: Subject, sample: Sample) -> Outcome:
    """The call under torch.compile, traced whole; the kernel itself is not compiled (backend "eager")."""
    from heedful.problem import AttentionProblem

    built = sample.build(subject.device, seed=subject.seed)
    arguments = built.arguments
    problem: AttentionProblem = subject.dispatcher.explain(*built.tensors, **arguments, backend=subject.name).problem
    plan = subject.dispatcher.plan(problem.replace(compiling=True), subject.name)
    dispatcher, name = subject.dispatcher, subject.name

    def call(query: Tensor, key: Tensor, value: Tensor) -> Any:
        return dispatcher.attention(query, key, value, **arguments, backend=name)

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    if plan.refused:
        for refusal in plan.verdicts[0].refusals:
            subject.check_honest(refusal, plan.verdicts[0].lowered)
        try:
            compiled(*built.tensors)
        except Exception as error:  # dynamo wraps it in exceptions of its own
            if "refuses" not in str(error):
                raise
            return Outcome(plan.verdicts[0].refusals)
        raise ContractBroken(f"{name} refuses tracing, and the traced call gives an answer")
    return Outcome(deviations=check_answer(subject, built, arguments, compiled(*built.tensors)))


def examine_dropout(subject: Subject, sample: Sample) -> Outcome:
    """Dropout, with the identity as value, so that the output shows each weight: dropped, or scaled by 1/(1 - p).

    The dropped share must be that of independent coins, calls must differ, a seed must repeat them, and LSE and
    gradients must be those of the very weights that were kept. ``sample`` needs as many keys as value features.
    """
    wants = [aspect for aspect in sample.aspects if aspect != "dropout"] or ["forward"]
    outcome = Outcome()
    for aspect in wants:
        built = _showing_weights(sample.build(subject.device, needs_grad=aspect == "gradient", seed=subject.seed))
        arguments = built.arguments | ({"return_lse": True} if aspect == "lse" else {})
        refusal = _refusal(subject, built, arguments)
        found = () if refusal is not None else _check_dropout(subject, built, arguments)
        refused = outcome.refused if refusal is None else refusal.refused
        outcome = Outcome(refused, (*outcome.deviations, *found))
    return outcome


def _showing_weights(built: Built) -> Built:
    from dataclasses import replace

    from heedful.testing.samples import given

    query, key, value = built.tensors
    shape = logical(value, built.sample.layout).shape
    identity = torch.eye(shape[-1], dtype=value.dtype, device=value.device).expand(shape)
    shown = given(identity, built.sample.layout).contiguous().requires_grad_(value.requires_grad)
    return replace(built, tensors=(query, key, shown))


def _check_dropout(subject: Subject, built: Built, arguments: dict[str, Any]) -> tuple[Deviation, ...]:
    drop_p = built.sample.call["dropout_p"]
    first, second, again = (_seeded(subject, built, arguments, seed) for seed in (0, 1, 0))
    outs = [a[0] if arguments.get("return_lse") else a for a in (first, second, again)]
    if not torch.equal(outs[0], outs[2]):
        raise ContractBroken("the same seed drops other weights")
    if 0 < drop_p < 1 and torch.equal(outs[0], outs[1]):
        raise ContractBroken("two seeds drop the same weights")
    kept = logical(outs[0].detach(), built.sample.layout) != 0
    if 0 < drop_p < 1 and torch.equal(kept[0, 0], kept[0, 1]):
        raise ContractBroken("two heads drop the same weights")
    there = built.answer(torch.float64)[0] > 0
    count, dropped = int(there.sum()), int((there & ~kept).sum())
    limit = 6.0 * math.sqrt(drop_p * (1 - drop_p) / count)
    if abs(dropped / count - drop_p) > limit:
        raise ContractBroken(f"{dropped / count:.4f} of the weights are dropped, not {drop_p} ± {limit:.4f}")
    factor = 1.0 / (1.0 - drop_p) if drop_p < 1 else 0.0
    return check_answer(subject, built, arguments, first, drop=kept * factor)


def _seeded(subject: Subject, built: Built, arguments: dict[str, Any], seed: int) -> Any:
    kind = subject.device
    with torch.random.fork_rng(devices=[] if kind == "cpu" else None, device_type="cuda" if kind == "cpu" else kind):
        torch.manual_seed(seed)
        return subject.dispatcher.attention(*built.tensors, **arguments, backend=subject.name)
