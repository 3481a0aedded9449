"""Rewrites of sizes: leading dimensions, layout, key and value heads, head dim, batch.

Shapes: B batch, H heads, N kv heads, Q query length, K key length, D head dim, E value dim, T packed tokens.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from heedful.lowering.base import After, Before, Kernel, Lowering, Operands
from heedful.masks import Mask, replace_part
from heedful.problem import AttentionProblem
from heedful.strategy import Limits


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


class ChangeLayout(Lowering):
    """Between (B, H, S, D), (B, S, H, D) and packed (T, H, D) by views, and the output back.

    Sequences packed in a batch of one go to kernels that take packed ones as those; no other batch is packed by a view.
    """

    name = "layout"
    mends = frozenset({"layout"})
    gain = "it takes packed sequences so"

    def improves(self, problem: AttentionProblem, limits: Limits) -> bool:
        return problem.layout != "THD" and problem.mask.varlen and {"THD", "varlen"} <= {*limits.layouts, *limits.masks}

    def rewrite(self, problem: AttentionProblem, limits: Limits) -> AttentionProblem | None:
        packed = self.improves(problem, limits)
        layout = next((layout for layout in limits.layouts if (layout == "THD") == packed), None)
        return None if layout is None else problem.replace(layout=layout)

    def before(self, old: AttentionProblem, new: AttentionProblem) -> Before:
        if old.layout == "THD" and new.layout == "BHSD":
            return lambda x: Operands(_as_batch(x.query), _as_batch(x.key), _as_batch(x.value), x.mask)
        if old.layout == "THD":
            return lambda x: Operands(x.query[None], x.key[None], x.value[None], x.mask)
        if new.layout == "THD" and old.layout == "BHSD":
            return lambda x: Operands(_as_packed(x.query), _as_packed(x.key), _as_packed(x.value), x.mask)
        if new.layout == "THD":
            return lambda x: Operands(x.query.squeeze(0), x.key.squeeze(0), x.value.squeeze(0), x.mask)
        return lambda x: Operands(x[0].transpose(1, 2), x[1].transpose(1, 2), x[2].transpose(1, 2), x[3])

    def after(self, old: AttentionProblem, new: AttentionProblem) -> After | None:
        if old.layout == "THD" and new.layout == "BSHD":
            return lambda out, lse, _x, _on: (out.squeeze(0), None if lse is None else lse.squeeze(0))
        if old.layout == "THD":
            return lambda out, lse, _x, _on: (out.squeeze(0).transpose(0, 1), None if lse is None else lse.squeeze(0))
        if new.layout == "THD" and old.layout == "BHSD":
            return lambda out, lse, _x, _on: (_as_batch(out), None if lse is None else lse.unsqueeze(0))
        if new.layout == "THD":
            return lambda out, lse, _x, _on: (out.unsqueeze(0), None if lse is None else lse.unsqueeze(0))
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


class SplitBatch(Lowering):
    """Compute so many batch rows at a time as the kernel takes."""

    name = "split_batch"
    mends = frozenset({"batch"})

    def rewrite(self, problem: AttentionProblem, limits: Limits) -> AttentionProblem | None:
        packed = problem.layout == "THD" or problem.mask.varlen or problem.mask.block
        if packed or limits.max_batch is None:
            return None
        mask = replace(problem.mask, side=None, kept=None, queries_alike=False)  # of the batch as a whole
        return problem.replace(batch=limits.max_batch, mask=mask)

    def around(self, old: AttentionProblem, new: AttentionProblem, run: Kernel) -> Kernel:  # noqa: ARG002
        most = new.batch

        def split(x: Operands) -> tuple[Tensor, Tensor | None]:
            parts = []
            for start in range(0, x.query.shape[0], most):
                rows = slice(start, start + most)
                mask = None if x.mask is None else _rows_of_mask(x.mask, rows)
                parts.append(run(Operands(x.query[rows], x.key[rows], x.value[rows], mask)))
            out = torch.cat([out for out, _ in parts])
            return out, None if parts[0][1] is None else torch.cat([lse for _, lse in parts])  # type: ignore[misc]

        return split


def _padded(dim: int, limits: Limits) -> int:
    multiple = limits.head_dim_multiple
    return max(math.ceil(dim / multiple) * multiple, math.ceil(limits.min_head_dim / multiple) * multiple)


def _as_batch(packed: Tensor) -> Tensor:
    """(T, H, D) to (1, H, T, D)."""
    return packed.transpose(0, 1).unsqueeze(0)


def _as_packed(batch: Tensor) -> Tensor:
    """(1, H, T, D) to (T, H, D)."""
    return batch.squeeze(0).transpose(0, 1)


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


def _rows_of_mask(mask: Mask, rows: slice) -> Mask:
    """A mask for some batch rows: its tensors that have a batch of their own, cut."""

    def cut(tensor: Tensor | None, whole: int) -> Tensor | None:
        return tensor if tensor is None or tensor.dim() < whole or tensor.shape[0] == 1 else tensor[rows]

    return replace_part(
        mask,
        dense=cut(mask.dense, 4),
        bias=cut(mask.bias, 4),
        padding=cut(mask.padding, 2),
        rows=cut(mask.rows, 2),
        profile=None,
    )
