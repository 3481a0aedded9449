"""Exact rewrites: a problem that a strategy refuses becomes one that it takes, with the same answer.

'Exact' means the same function, not the same bits. A lowering has a face for problems, which is pure and enough to
plan and explain, and faces for tensors, which are bound once a plan is fixed. ``LOWERINGS`` is the order in which they
are tried; each is taken only where it mends a refusal, so a chain is never longer than it needs to be.

Bound functions read lengths from the tensors they are given, never from the problem: under ``torch.compile`` one
binding serves every length.

Shapes: B batch, H heads, N kv heads, Q query length, K key length, D head dim, E value dim, T packed tokens.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from heedful.masks import Mask, MaskFacts
from heedful.problem import AttentionProblem
from heedful.strategy import Limits


class Operands(NamedTuple):
    """The tensors of a call on their way to the kernel. ``empty``: bool (B, H, Q, 1), True for rows that see no key."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Mask | None
    empty: Tensor | None = None


Before = Callable[[Operands], Operands]
After = Callable[[Tensor, Tensor | None, Operands, Operands], tuple[Tensor, Tensor | None]]


class Lowering(ABC):
    """One rewrite. ``mends`` are the refusal fields that it can make go away."""

    name: ClassVar[str]
    mends: ClassVar[frozenset[str]]

    @abstractmethod
    def rewrite(self, problem: AttentionProblem, limits: Limits) -> AttentionProblem | None:
        """The problem after the rewrite, or None where it does not apply."""

    @abstractmethod
    def before(self, old: AttentionProblem, new: AttentionProblem) -> Before:
        """What it does to the tensors of a problem that was rewritten from old to new."""

    def after(self, old: AttentionProblem, new: AttentionProblem) -> After | None:  # noqa: ARG002
        """What it does to output and LSE, given the operands as they came and as they went on; None where nothing."""
        return None


@dataclass(frozen=True)
class Step:
    """A lowering that was taken, the refusals it mends, and the problems on either side."""

    lowering: Lowering
    mended: tuple[str, ...]
    old: AttentionProblem
    new: AttentionProblem

    @property
    def name(self) -> str:
        """The lowering's name."""
        return self.lowering.name


def lower(problem: AttentionProblem, limits: Limits) -> tuple[tuple[Step, ...], AttentionProblem]:
    """The shortest chain, in the declared order, that mends what these limits refuse; and the problem it ends in."""
    steps: list[Step] = []
    for lowering in LOWERINGS:
        refused = {refusal.field for refusal in limits.refusals(problem)}
        mended = refused & lowering.mends
        if not mended:
            continue
        rewritten = lowering.rewrite(problem, limits)
        if rewritten is not None:
            steps.append(Step(lowering, tuple(sorted(mended)), problem, rewritten))
            problem = rewritten
    return tuple(steps), problem


class BroadcastLeading(Lowering):
    """Bring (…, length, dim) of any rank to (B, H, length, dim), expanding sizes that broadcast, and back."""

    name = "broadcast"
    mends = frozenset({"leading sizes"})

    def rewrite(self, problem: AttentionProblem, limits: Limits) -> AttentionProblem | None:  # noqa: ARG002
        return problem.replace(broadcast=False)

    def before(self, old: AttentionProblem, new: AttentionProblem) -> Before:  # noqa: ARG002
        def broadcast(x: Operands) -> Operands:
            lead = leading_shape(*x[:3])
            query, key, value = (_as_4d(t, lead) for t in x[:3])
            return Operands(query, key, value, x.mask if x.mask is None else _flatten_mask(x.mask, lead))

        def broadcast_heads_third(x: Operands) -> Operands:
            on = broadcast(Operands(x.query.transpose(1, 2), x.key.transpose(1, 2), x.value.transpose(1, 2), x.mask))
            return Operands(on.query.transpose(1, 2), on.key.transpose(1, 2), on.value.transpose(1, 2), on.mask)

        def broadcast_packed(x: Operands) -> Operands:
            heads = max(t.shape[1] for t in x[:3])
            query, key, value = (t.expand(-1, heads, -1) for t in x[:3])
            return Operands(query, key, value, x.mask)

        return {"BHSD": broadcast, "BSHD": broadcast_heads_third, "THD": broadcast_packed}[old.layout]

    def after(self, old: AttentionProblem, new: AttentionProblem) -> After | None:  # noqa: ARG002
        if old.layout != "BHSD":
            return None

        def restore(out: Tensor, lse: Tensor | None, x: Operands, _on: Operands) -> tuple[Tensor, Tensor | None]:
            lead = leading_shape(*x[:3])
            lse = None if lse is None else lse.reshape(*lead, lse.shape[-1])
            return out.reshape(*lead, *out.shape[-2:]), lse

        return restore


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


class ChangeLayout(Lowering):
    """Between (B, H, S, D) and (B, S, H, D), or from packed (T, H, D) to either, by views; and the output back."""

    name = "layout"
    mends = frozenset({"layout"})

    def rewrite(self, problem: AttentionProblem, limits: Limits) -> AttentionProblem | None:
        layout = next((layout for layout in limits.layouts if layout != "THD"), None)  # packing is no view
        return None if layout is None else problem.replace(layout=layout)

    def before(self, old: AttentionProblem, new: AttentionProblem) -> Before:
        if old.layout == "THD" and new.layout == "BHSD":
            return lambda x: Operands(_as_batch(x.query), _as_batch(x.key), _as_batch(x.value), x.mask)
        if old.layout == "THD":
            return lambda x: Operands(x.query[None], x.key[None], x.value[None], x.mask)
        return lambda x: Operands(x[0].transpose(1, 2), x[1].transpose(1, 2), x[2].transpose(1, 2), x[3])

    def after(self, old: AttentionProblem, new: AttentionProblem) -> After | None:
        if old.layout == "THD" and new.layout == "BSHD":
            return lambda out, lse, _x, _on: (out.squeeze(0), None if lse is None else lse.squeeze(0))
        if old.layout == "THD":
            return lambda out, lse, _x, _on: (out.squeeze(0).transpose(0, 1), None if lse is None else lse.squeeze(0))
        return lambda out, lse, _x, _on: (out.transpose(1, 2), lse)


class ExpandKVHeads(Lowering):
    """Repeat each key and value head for the query heads that share it (grouped-query attention)."""

    name = "expand_kv_heads"
    mends = frozenset({"kv heads"})

    def rewrite(self, problem: AttentionProblem, limits: Limits) -> AttentionProblem | None:  # noqa: ARG002
        return problem.replace(kv_heads=problem.heads)

    def before(self, old: AttentionProblem, new: AttentionProblem) -> Before:  # noqa: ARG002
        times, axis = old.heads // old.kv_heads, -3 if old.layout == "BHSD" else -2
        return lambda x: Operands(
            x.query, x.key.repeat_interleave(times, dim=axis), x.value.repeat_interleave(times, dim=axis), x.mask
        )


class AlignCausal(Lowering):
    """With as many queries as keys both causal alignments mean the same: take the one that the kernel knows."""

    name = "align_causal"
    mends = frozenset({"causal alignment"})

    def rewrite(self, problem: AttentionProblem, limits: Limits) -> AttentionProblem | None:
        if problem.query_length != problem.key_length:
            return None
        alignment, mask = limits.causal_alignments[0], problem.mask
        window = (mask.window[0], mask.window[1], alignment) if mask.window else None
        causal = alignment if mask.causal else None
        return problem.replace(mask=replace(mask, causal=causal, window=window))  # type: ignore[arg-type]

    def before(self, old: AttentionProblem, new: AttentionProblem) -> Before:  # noqa: ARG002
        causal, window = new.mask.causal, new.mask.window

        def align(x: Operands) -> Operands:
            return x if x.mask is None else x._replace(mask=replace_part(x.mask, causal=causal, window=window))

        return align


class MaterialiseMask(Lowering):
    """Join all parts of a mask into one dense tensor: bool where the kernel takes it, else a bias of 0 and -inf."""

    name = "materialise_mask"
    mends = frozenset({"mask", "mask mix", "causal alignment"})

    def rewrite(self, problem: AttentionProblem, limits: Limits) -> AttentionProblem | None:
        mask = problem.mask
        as_bias = mask.bias is not None or "dense" not in limits.masks
        if not limits.masks & {"dense", "bias"} or (as_bias and "bias" not in limits.masks):
            return None
        if not as_bias:
            return problem.replace(mask=MaskFacts(dense=_joined_axes(mask)))
        dtype = mask.bias_dtype if mask.bias is not None else problem.dtype
        return problem.replace(
            mask=MaskFacts(bias=_joined_axes(mask), bias_dtype=dtype, bias_needs_grad=mask.bias_needs_grad)
        )

    def before(self, old: AttentionProblem, new: AttentionProblem) -> Before:
        as_bias, dtype = new.mask.bias is not None, new.mask.bias_dtype
        length = -2 if old.layout == "BHSD" else -3

        def materialise(x: Operands) -> Operands:
            if x.mask is None:
                return x
            seen = x.mask.visible(x.query.shape[length], x.key.shape[length], x.query.device)
            if not as_bias:
                return x._replace(mask=Mask(dense=seen))
            bias = x.mask.bias
            if seen is not None:
                zero = torch.zeros((), dtype=dtype, device=x.query.device) if bias is None else bias
                bias = torch.where(seen, zero, -math.inf)
            return x._replace(mask=Mask(bias=bias))

        return materialise


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


class ZeroEmptyRows(Lowering):
    """Show rows that see no key all of them, so that the kernel stays finite; then make them zeros, their LSE -inf."""

    name = "zero_empty_rows"
    mends = frozenset({"empty rows"})

    def rewrite(self, problem: AttentionProblem, limits: Limits) -> AttentionProblem | None:  # noqa: ARG002
        if problem.layout == "THD" or problem.mask.kinds not in (("dense",), ("bias",)):
            return None
        return problem.replace(mask=replace(problem.mask, rows_seen=True))

    def before(self, old: AttentionProblem, new: AttentionProblem) -> Before:  # noqa: ARG002
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

        def zero(out: Tensor, lse: Tensor | None, _x: Operands, on: Operands) -> tuple[Tensor, Tensor | None]:
            if on.empty is None:
                return out, lse
            lse = None if lse is None else lse.masked_fill(on.empty.squeeze(-1), -math.inf)
            return out.masked_fill(on.empty.transpose(1, 2) if heads_third else on.empty, 0.0), lse

        return zero


class PadHeadDim(Lowering):
    """Pad head and value dim with zeros to what the kernel takes, keep the scale, and cut the output back."""

    name = "pad_head_dim"
    mends = frozenset({"head dim padding", "value dim"})

    def rewrite(self, problem: AttentionProblem, limits: Limits) -> AttentionProblem | None:
        head_dim, value_dim = (_padded(dim, limits) for dim in (problem.head_dim, problem.value_dim))
        if not limits.value_dim_may_differ:
            head_dim = value_dim = max(head_dim, value_dim)
        scale = problem.effective_scale if head_dim != problem.head_dim else problem.scale
        return problem.replace(head_dim=head_dim, value_dim=value_dim, scale=scale)

    def before(self, old: AttentionProblem, new: AttentionProblem) -> Before:
        more_head, more_value = new.head_dim - old.head_dim, new.value_dim - old.value_dim

        def widen(x: Operands) -> Operands:
            query, key = (pad(t, (0, more_head)) if more_head else t for t in (x.query, x.key))
            return x._replace(query=query, key=key, value=pad(x.value, (0, more_value)) if more_value else x.value)

        return widen

    def after(self, old: AttentionProblem, new: AttentionProblem) -> After | None:
        width = old.value_dim
        return None if width == new.value_dim else lambda out, lse, _x, _on: (out[..., :width], lse)


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


LOWERINGS: tuple[Lowering, ...] = (
    BroadcastLeading(),
    CastAutocast(),
    ChangeLayout(),
    ExpandKVHeads(),
    AlignCausal(),
    MaterialiseMask(),
    CastBias(),
    ZeroEmptyRows(),
    PadHeadDim(),
    FoldScale(),
)


def cast_bias(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """A bias in another dtype; finite values that do not fit become its lowest or highest, infinities stay."""
    if bias.dtype == dtype or torch.finfo(dtype).max >= torch.finfo(bias.dtype).max:
        return bias.to(dtype)
    bounds = torch.finfo(dtype)
    return torch.where(bias.isinf(), bias, bias.clamp(bounds.min, bounds.max)).to(dtype)


def replace_part(mask: Mask, **parts: object) -> Mask:
    """A mask with some parts exchanged (``dataclasses.replace`` would call the subclass's own constructor)."""
    fields = ("causal", "window", "padding", "varlen", "dense", "bias", "block")
    return Mask(**{name: parts.get(name, getattr(mask, name)) for name in fields})  # type: ignore[arg-type]


def _padded(dim: int, limits: Limits) -> int:
    multiple = limits.head_dim_multiple
    return max(math.ceil(dim / multiple) * multiple, math.ceil(limits.min_head_dim / multiple) * multiple)


def _joined_axes(mask: MaskFacts) -> str:
    """Which of B, H, Q, K the joined tensor has; an upper bound where a part's own sizes are not known."""
    axes = set((mask.dense or "") + (mask.bias or ""))
    axes |= set("QK") if mask.causal or mask.window or mask.varlen else set()
    axes |= set("BK") if mask.key_padding else set()
    axes |= set("BHQK") if mask.block else set()
    return "".join(axis for axis in "BHQK" if axis in axes)


def _as_batch(packed: Tensor) -> Tensor:
    """(T, H, D) to (1, H, T, D)."""
    return packed.transpose(0, 1).unsqueeze(0)


def _as_rows(empty: Tensor) -> Tensor:
    """(…, Q, 1) to four dimensions, for broadcasting against the output."""
    return empty.reshape((1,) * (4 - empty.dim()) + tuple(empty.shape)) if empty.dim() < 4 else empty


def leading_shape(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    """The leading shape (…, H) of the answer to tensors (…, H, length, dim); of grouped heads the query's count."""
    heads = [t.shape[-3:-2] for t in (query, key, value)]
    grouped = all(heads) and heads[1] == heads[2] and heads[1][0] not in (1, heads[0][0]) and heads[0][0] != 1
    leads = [t.shape[:-2] for t in (query, key, value)]
    if grouped:
        return (*torch.broadcast_shapes(*(lead[:-1] for lead in leads)), query.shape[-3])
    return tuple(torch.broadcast_shapes(*leads))


def _as_4d(tensor: Tensor, lead: tuple[int, ...]) -> Tensor:
    """Expand (…, length, dim) to the leading shape (…, H), repeating grouped heads; flatten all before the heads."""
    if lead and tensor.dim() > 2 and tensor.shape[-3] not in (1, lead[-1]):
        tensor = tensor.repeat_interleave(lead[-1] // tensor.shape[-3], dim=-3)
    full = tensor.expand(*lead, *tensor.shape[-2:])
    return full.reshape(math.prod(lead[:-1]), lead[-1] if lead else 1, *tensor.shape[-2:])


def _flatten_mask(mask: Mask, lead: tuple[int, ...]) -> Mask:
    """Bring a mask's tensors to the four dimensions of the flattened problem, where that had more."""
    if len(lead) <= 2:
        return mask

    def flatten(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or tensor.dim() <= 3:
            return tensor
        full = tensor.expand(*lead[:-1], *tensor.shape[-3:])
        return full.reshape(math.prod(lead[:-1]), *tensor.shape[-3:])

    return replace_part(mask, dense=flatten(mask.dense), bias=flatten(mask.bias))
