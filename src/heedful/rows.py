"""One check of an answer: some of its query rows, chosen to be where kernels go wrong, held to the formula.

An exact kernel is held to flash-attn's rule (``tolerance``), row by row, so that one head of large values, or one row
whose scores are lost in a bias of -1e9, excuses no other. The naive formula's error on a single row may be zero by
luck. So where that rule is broken one looks again, with care: hidden keys are left out for good, even where they are
NaN, and what independent roundings of the scores would do to the row is allowed as well, to first order,

    sigma^2 = sum_j p_j^2 (rounding of score j)^2 (|v_j| + |out|)^2

times ``_SIGMAS``. An approximate kernel is held to its sum|out - ref| / sum|ref| alone, the relative L1 error that
SageAttention's papers report (arXiv 2410.02367), with zeros for queries that see no key.

Nothing of the size Q x K is ever built, the global random state is not touched, and no gradient is recorded. Elements
where the formula itself is not finite are left out, and so is output that is not finite where some key, hidden or not,
is not: whether a kernel keeps NaN of hidden keys out is promised by plans that drop these keys only.

Shapes: B batch, H heads, N kv heads, G = H / N, Q query length, K key length, R rows, D head dim, E value dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from heedful.errors import InvalidArgument
from heedful.masks import Mask, of_rank_four, replace_part
from heedful.problem import AttentionProblem
from heedful.sampling import choose_rows as choose_rows
from heedful.tolerance import FLOOR, allowed_by_row
from heedful.visibility import rows_of

_BYTES = 64 << 20  # for the copies in float64 of one group of heads, with their scores
_MASK = 1 << 22  # elements of the rows' visibility at once
_SIGMAS = 2.0  # of a unit in the last place: a rounding's own deviation is 0.3 of one
_LSE = 0.1  # what an approximate kernel's LSE may be off, of max(1, |LSE|)


@dataclass(frozen=True)
class RowsVerdict:
    """What became of a check.

    ``rows``: the queries that were looked at, in every batch and head. ``error`` and ``allowed``: max|out - reference|
    of the row that is nearest to its limit, or farthest beyond, and that limit; ``error`` is inf where an element is
    not finite and should be. ``relative``: sum|out - reference| / sum|reference| over all rows. ``fault``: "" where all
    is right; else a sentence with what is wrong, in which row, and the numbers.
    """

    rows: tuple[int, ...]
    error: float = 0.0
    allowed: float = 0.0
    relative: float = 0.0
    fault: str = ""

    @property
    def right(self) -> bool:
        """Whether no fault was found."""
        return not self.fault


# The check


def check_rows(
    problem: AttentionProblem,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask | None,
    answer: Tensor | tuple[Tensor, Tensor],
    *,
    rows: Tensor | None = None,
    count: int = 16,
    max_error: float | None = None,
    seed: int | None = None,
) -> RowsVerdict:
    """Hold some rows of an answer to the formula.

    Args:
        problem: the call's own problem, before any lowering, without dropout and sinks.
        query, key, value: the call's tensors in its layout.
        mask: all that the call hides and adds, joined, as ``call.mask_of_call`` gives it.
        answer: out, or (out, lse), as the call gave it.
        rows: the queries to look at, int64 (R,); by default ``choose_rows(problem, mask, count, seed)``.
        max_error: the relative error that an approximate kernel may have; None holds the answer to the exact rule.

    Raises InvalidArgument for a problem with dropout or sinks, whose answer no formula without them knows.
    """
    if problem.dropout_p > 0 or problem.sinks:
        observed = f"dropout {problem.dropout_p}" if problem.dropout_p > 0 else "sinks"
        raise InvalidArgument("problem", observed, "check calls without dropout and sinks")
    out, lse = answer if isinstance(answer, tuple) else (answer, None)
    if problem.is_empty:
        return RowsVerdict(())
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        call = _Call.of(problem, query, key, value, mask)
        fault = call.malformed(out, lse)
        if fault:
            return RowsVerdict((), math.inf, 0.0, math.inf, fault)
        rows = (choose_rows(problem, mask, count, seed) if rows is None else rows).to(query.device)
        # What is within floor and rounding of the formula in float32 is within the rule, which allows that formula's
        # own error as well. float64 takes twice the time, and is then not needed; ``error`` is the distance to float32.
        exact = max_error is None
        quick = exact and problem.dtype == torch.float32
        judged = _judge(call, rows, out, lse, torch.float32 if quick else call.wide, careful=False)
        if quick and _trouble(judged, exact):
            judged = _judge(call, rows, out, lse, call.wide, careful=False)
        if _trouble(judged, exact):
            judged = _judge(call, rows, out, lse, call.wide, careful=True)
        return _verdict(call, rows.tolist(), judged, max_error)


@dataclass(frozen=True, eq=False)
class _Call:
    """A call with all leading sizes but the heads made one: query (·, H, Q, D), key and value (·, N, K, …).

    ``places``: for query, key and value, which of their own flattened sheets each batch row has; None for each its own.
    """

    problem: AttentionProblem
    lead: tuple[int, ...]
    tensors: tuple[Tensor, Tensor, Tensor]
    places: tuple[Tensor | None, Tensor | None, Tensor | None]
    mask: Mask | None
    kv_heads: int

    @classmethod
    def of(cls, problem: AttentionProblem, query: Tensor, key: Tensor, value: Tensor, mask: Mask | None) -> _Call:
        tensors = [_heads_first(tensor.detach(), problem.layout) for tensor in (query, key, value)]
        outer = tuple(torch.broadcast_shapes(*(tensor.shape[:-3] for tensor in tensors)))
        ranked = [tensor if tensor.dim() > 2 else tensor[None] for tensor in tensors]
        kv_heads = max(ranked[1].shape[-3], ranked[2].shape[-3])
        rank = max(tensor.dim() for tensor in tensors)
        lead = (*outer, problem.heads)[-max(0, rank - 2) :] if rank > 2 else ()
        flat, places = zip(*(_flattened(tensor, outer) for tensor in ranked), strict=True)
        return cls(problem, lead, flat, places, mask, kv_heads)

    @property
    def wide(self) -> torch.dtype:
        """The dtype of the reference: float64 wherever there is one.

        float32 would do for 16-bit inputs, were it float32: on GPUs with TF32 allowed, and on CPUs with float32 matmul
        precision below "highest", probabilities would be rounded to as few bits as the kernel's own, and these
        settings, being the process's, are not ours to change. float64 is never rounded so.
        """
        device, narrow = self.tensors[0].device.type, self.problem.dtype.itemsize == 2
        trusted = narrow and device == "cpu" and torch.get_float32_matmul_precision() == "highest"
        return torch.float32 if device == "mps" or trusted else torch.float64

    def malformed(self, out: Any, lse: Any) -> str:
        """What is wrong with the form of an answer; "" where nothing is."""
        problem = self.problem
        lead = (problem.batch, problem.heads) if problem.layout == "BSHD" else self.lead
        shape: tuple[int, ...] = (*lead, problem.query_length, problem.value_dim)
        if problem.layout == "BSHD":
            shape = (shape[0], shape[2], shape[1], shape[3])
        elif problem.layout == "THD":
            shape, lead = (problem.query_length, problem.heads, problem.value_dim), (problem.heads,)
        if not isinstance(out, Tensor) or tuple(out.shape) != shape:
            return f"the output is {_form(out)}, not of shape {shape}"
        if lse is not None and (not isinstance(lse, Tensor) or tuple(lse.shape) != (*lead, problem.query_length)):
            return f"the LSE is {_form(lse)}, not of shape {(*lead, problem.query_length)}"
        return ""

    def of_rows(self, rows: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Visibility and bias of these queries, broadcastable to (B, H, R, K)."""
        mask, problem = self.mask, self.problem
        if mask is None or mask.noop:
            return None, None
        dense, bias = (None if t is None else self._sheets(rows_of(t.detach(), rows)) for t in (mask.dense, mask.bias))
        lengths = (problem.query_length, problem.key_length)
        seen = replace_part(mask, dense=None, bias=None).visible_rows(rows, *lengths, rows.device)
        seen = None if seen is None else of_rank_four(seen)
        seen = seen if dense is None else dense if seen is None else seen & dense
        if bias is not None:
            shown = bias > -math.inf
            seen = shown if seen is None else seen & shown
        return seen, bias

    def _sheets(self, tensor: Tensor) -> Tensor:
        """A mask's rows (…, R, K) with four dimensions."""
        if tensor.dim() <= 4 and len(self.lead) <= 2:
            return tensor[(None,) * (4 - tensor.dim())]
        tensor = tensor[(None,) * (len(self.lead) + 2 - tensor.dim())]
        while tensor.dim() > len(self.lead) + 2:
            tensor = tensor.squeeze(0)
        if all(size == 1 for size in tensor.shape[:-3]):
            return tensor.flatten(0, -4)
        return tensor.expand(*self.lead[:-1], *tensor.shape[-3:]).flatten(0, -4)

    def sheets(self, which: int, batches: slice, heads: slice) -> Tensor:
        """A part of query, key or value, in the dtype that is computed in."""
        tensor, places = self.tensors[which], self.places[which]
        tensor = tensor[batches] if places is None else tensor.index_select(0, places[batches])
        tensor = tensor if tensor.shape[1] == 1 else tensor[:, heads]
        return tensor.to(self.problem.dtype)

    def groups(self, rows: int) -> Iterator[tuple[slice, slice]]:
        """Batches and kv heads, as many at once as fit the bytes there are."""
        problem, heads = self.problem, max(1, self.kv_heads)
        columns = problem.head_dim + problem.value_dim + 5 * rows * (problem.heads // heads)
        fitting = max(1, _BYTES // max(1, problem.key_length * columns * 8))
        if fitting >= heads:
            for start in range(0, problem.batch, fitting // heads):
                yield slice(start, min(problem.batch, start + fitting // heads)), slice(0, heads)
            return
        for batch in range(problem.batch):
            for start in range(0, heads, fitting):
                yield slice(batch, batch + 1), slice(start, min(heads, start + fitting))


def _heads_first(tensor: Tensor, layout: str) -> Tensor:
    if layout == "THD":
        return tensor.transpose(0, 1)[None]
    return tensor.transpose(1, 2) if layout == "BSHD" else tensor


def _flattened(tensor: Tensor, outer: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """(…, heads, length, dim) as (sheets, heads, length, dim), and which sheet each of the broadcast ones is."""
    own = tuple(tensor.shape[:-3])
    flat = tensor.flatten(0, -4) if len(own) > 1 else tensor if own else tensor[None]
    if own == outer or math.prod(outer) == 1:
        return flat, None
    places = torch.arange(math.prod(own), device=tensor.device).view(own).expand(outer)
    return flat, places.reshape(-1)


def _form(given: Any) -> str:
    return f"of shape {tuple(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"


class _Judged(NamedTuple):
    """Of each row, (B, H, R) on the CPU. ``bad``: not finite where the formula is."""

    error: Tensor
    allowed: Tensor
    bad: Tensor
    empty: Tensor
    lse_error: Tensor
    lse_allowed: Tensor
    lse: Tensor
    distance: Tensor  # sum|out - ref|
    size: Tensor  # sum|ref|
    formula_fails: Tensor


def _judge(call: _Call, rows: Tensor, out: Tensor, lse: Tensor | None, wide: torch.dtype, *, careful: bool) -> _Judged:
    """All batches and heads, a few rows at a time; fetched from the device at once."""
    problem, made = call.problem, []
    most = max(16, _MASK // max(1, problem.batch * problem.heads * problem.key_length))
    out = _heads_first(out.detach(), problem.layout)
    out = out.reshape(problem.batch, problem.heads, problem.query_length, problem.value_dim)
    lse = lse if lse is None else lse.detach().reshape(problem.batch, problem.heads, problem.query_length)
    for part in rows.split(most):
        seen, bias = call.of_rows(part)
        found = []
        for batches, kv_heads in call.groups(len(part)):
            size = problem.heads // max(1, call.kv_heads)
            heads = slice(kv_heads.start * size, kv_heads.stop * size)
            limits = [_cut(tensor, batches, heads, size) for tensor in (seen, bias)]
            side = _Side(call, part, batches, heads, kv_heads, size, wide)
            want = _formula(side, limits[0], limits[1], careful)
            got = out[batches, heads].index_select(2, part).to(wide)
            got_lse = None if lse is None else lse[batches, heads].index_select(2, part).to(wide)
            found.append(_compare(want, got, got_lse, problem))
        made.append(_joined(found, problem))
    return _Judged(*torch.cat(made, -1).cpu().unbind(0))


def _joined(found: list[Tensor], problem: AttentionProblem) -> Tensor:
    """The groups (columns, b, h, R) put together to (columns, B, H, R)."""
    if len(found) == 1:
        return found[0]
    flat = torch.cat([columns.flatten(1, 2) for columns in found], 1)
    return flat.view(flat.shape[0], problem.batch, problem.heads, -1)


def _cut(tensor: Tensor | None, batches: slice, heads: slice, size: int) -> Tensor | None:
    """The part of a mask (B, H, R, K) for a group, as (b, n, G, R, K)."""
    if tensor is None:
        return None
    tensor = tensor if tensor.shape[0] == 1 else tensor[batches]
    return tensor[:, None] if tensor.shape[1] == 1 else tensor[:, heads].unflatten(1, (-1, size))


class _Side:
    """The tensors of a group: query (b, n, G, R, D), and key and value (b, n, K, …), as narrow as they are."""

    def __init__(
        self, call: _Call, rows: Tensor, batches: slice, heads: slice, kv_heads: slice, size: int, wide: torch.dtype
    ) -> None:
        count = kv_heads.stop - kv_heads.start
        query = call.sheets(0, batches, heads).index_select(2, rows)
        self.query = query.expand(-1, count * size, -1, -1).unflatten(1, (count, size))
        self.key, value = call.sheets(1, batches, kv_heads), call.sheets(2, batches, kv_heads)
        self.value = value if value.shape[-1] else value.new_zeros(*value.shape[:-1], 1)
        self.problem, self.wide = call.problem, wide


class _Want(NamedTuple):
    """The formula's answer (b, h, R, E) and (b, h, R), the naive one, and what roundings may do: see the module."""

    out: Tensor
    lse: Tensor
    naive: Tensor
    naive_lse: Tensor
    sigma: Tensor
    lse_sigma: Tensor


def _formula(side: _Side, seen: Tensor | None, bias: Tensor | None, careful: bool) -> _Want:
    problem, wide = side.problem, side.wide
    key, value = side.key.to(wide), side.value.to(wide)
    if bias is not None:
        bias = _as_cast(bias, problem).to(wide)
    lost = None
    if careful:
        broken = ~(key.isfinite().all(-1) & value.isfinite().all(-1))[:, :, None, None]
        lost = (broken if seen is None else broken & seen).any(-1)
        key, value = (tensor.nan_to_num(0.0, 0.0, 0.0) for tensor in (key, value))
    query = side.query.to(wide) * problem.effective_scale
    plain = _capped(_product(query, key.mT), problem.softcap)
    scores = plain if bias is None else plain + bias
    weights, lse = _softmax(_hidden(scores, seen))
    out = _product(weights, value)
    if lost is not None:
        out, lse = out.masked_fill(lost[..., None], math.nan), lse.masked_fill(lost, math.nan)
    naive, naive_lse = (out, lse) if wide == problem.dtype == torch.float32 else _naive(side, scores, value, seen, bias)

    peak = out.abs().amax(-1)
    if careful:
        sigmas = _roundings(side, query, plain, key, value, weights, peak, seen, bias)
    else:
        sigmas = (torch.zeros_like(peak),) * 2
    return _Want(*(t.flatten(1, 2) for t in (out, lse, naive, naive_lse, *sigmas)))


def _roundings(
    side: _Side,
    query: Tensor,
    scores: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    peak: Tensor,
    seen: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The sigmas of each row's output and LSE, see the module.

    A score is rounded as itself, as its bias, and as the sum of D products that were rounded and summed.
    """
    dtype = side.problem.dtype
    unit = torch.finfo(dtype).eps
    tall = torch.linalg.vector_norm(value, math.inf, -1)
    pairs = torch.stack([tall, torch.ones_like(tall)], -1)
    squares, pairs = weights * weights, pairs * pairs
    rounded = scores * scores + FLOOR[dtype] ** 2
    if bias is not None:
        rounded = rounded + torch.where(bias.isinf(), 0.0, bias) ** 2
    if seen is not None:
        rounded = rounded.masked_fill(~seen, 0.0)
    norms = torch.linalg.vector_norm(key, 2, -1).square()[..., None]
    step = unit / math.sqrt(side.problem.head_dim) + torch.finfo(_accumulated(dtype)).eps
    reach = (torch.linalg.vector_norm(query, 2, -1, keepdim=True) * step).square()
    both = _product(squares * rounded, pairs) * unit**2 + _product(squares, norms * pairs) * reach
    return (2.0 * (both[..., 0] + both[..., 1] * peak * peak)).sqrt(), both[..., 1].sqrt()


def _accumulated(dtype: torch.dtype) -> torch.dtype:
    """What kernels sum products of this dtype in."""
    return torch.float32 if dtype.itemsize == 2 else dtype


def _naive(
    side: _Side, scores: Tensor, value: Tensor, seen: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The formula as flash-attn's tests compute it, every intermediate in the dtype of the call (float64: in float32).

    In float32 it is computed so, under whatever precision the process allows to its matrix products, since kernels are
    under it too. Other dtypes are computed wide and rounded, because half precision is slow on CPUs.
    """
    problem = side.problem
    if problem.dtype == torch.float32:
        scores = _capped(_product(side.query, side.key.mT) * problem.effective_scale, problem.softcap)
        scores = scores if bias is None else scores + bias.float()
        weights, lse = _softmax(_hidden(scores, seen))
        return _product(weights, side.value), lse
    narrow = torch.float32 if problem.dtype == torch.float64 else problem.dtype
    bounds = torch.finfo(narrow)
    scores = scores.clamp(bounds.min, bounds.max)  # as heedful casts a bias of -1e9 to float16: finite stays finite
    weights, lse = _softmax(_hidden(scores.to(narrow).to(scores.dtype), seen))
    return _product(weights.to(narrow).to(scores.dtype), value).to(narrow), lse.float()


def _as_cast(bias: Tensor, problem: AttentionProblem) -> Tensor:
    """Autocast casts a bias first; finite values stay finite."""
    if not problem.autocast:
        return bias
    bounds = torch.finfo(problem.dtype)
    return torch.where(bias.isinf(), bias, bias.clamp(bounds.min, bounds.max)).to(problem.dtype)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """(b, n, G, R, x) @ (b, n, x, y): one batched product for all heads."""
    return (left.flatten(2, 3) @ right).view(*left.shape[:4], -1)


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _hidden(scores: Tensor, seen: Tensor | None) -> Tensor:
    return scores if seen is None else scores.masked_fill(~seen, -math.inf)


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and LSE; zeros and -inf where there is no score."""
    peak = scores.amax(-1, keepdim=True)
    peak = torch.where(peak == -math.inf, 0.0, peak)
    weights = torch.exp(scores - peak)
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total == 0, 1.0, total)
    return weights, (peak + torch.log(total)).squeeze(-1)


def _compare(want: _Want, got: Tensor, got_lse: Tensor | None, problem: AttentionProblem) -> Tensor:
    """The columns of ``_Judged``, (columns, b, h, R)."""
    dtype, factor = problem.dtype, 3.0
    terms = 1 if dtype.itemsize == 2 else 1 + problem.key_length // 64  # 16-bit kernels sum wider than they round
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    empty = want.lse == -math.inf
    known, here = want.out.isfinite(), got.isfinite()
    out = torch.where(known, want.out, 0.0)
    if got.shape[-1] == 0:
        got, here = torch.zeros_like(out), torch.ones_like(known)
    bad = (known & ~here & want.naive.isfinite()).any(-1)  # numbers that overflow the dtype are no kernel's fault
    apart = torch.where(known & here, got - out, 0.0).abs()
    naive = torch.where(known & want.naive.isfinite(), want.naive, out.to(want.naive.dtype))
    # In units of the head's own values: the rule's absolute terms then mean the same for small values and for large.
    unit = out.abs().amax((-2, -1), keepdim=True).clamp(min=tiny)
    naive = (naive.to(out.dtype) / unit).to(naive.dtype)
    limit = allowed_by_row(out / unit, naive, dtype, factor, terms) * unit[..., 0]
    limit = limit + _SIGMAS * want.sigma + 4 * tiny
    limit = torch.where(empty, 0.0, 2 * limit if dtype == torch.float64 else limit)  # the judge rounds as much, then
    lse_error, lse_limit = torch.zeros_like(limit), torch.zeros_like(limit)
    if got_lse is not None:
        lse_known = want.lse.isfinite()
        lse_error = torch.where(lse_known, (got_lse - want.lse).abs(), torch.where(got_lse == want.lse, 0.0, math.inf))
        lse_error = torch.where(want.lse.isnan() | (lse_known & ~want.naive_lse.isfinite()), 0.0, lse_error)
        luck = torch.where(lse_known, (want.naive_lse - want.lse).abs().nan_to_num(0.0, 0.0, 0.0), 0.0)
        unit32 = torch.finfo(torch.float32).eps
        luck = luck if dtype != torch.float64 else luck.clamp(max=8 * unit32)
        floor = 8 * unit32 * want.lse.abs().nan_to_num(0.0, 0.0, 0.0).clamp(min=1.0)
        lse_limit = factor * luck + floor + _SIGMAS * want.lse_sigma
    columns = (
        apart.amax(-1), limit, bad, empty, lse_error, lse_limit, want.lse, apart.sum(-1), out.abs().sum(-1),
        ~known.all(-1),
    )  # fmt: skip
    return torch.stack([column.to(out.dtype) for column in columns])


# The sentence


def _verdict(call: _Call, rows: list[int], judged: _Judged, max_error: float | None) -> RowsVerdict:
    bad = judged.bad.bool()
    if bad.any():
        bad = bad & ~_broken_keys(call)
    distance, size = judged.distance.sum().item(), judged.size.sum().item()
    relative = math.inf if bad.any() else distance / size if size else math.inf if distance else 0.0
    allowed = torch.where(judged.allowed.isnan(), math.inf, judged.allowed)
    error, beyond = torch.where(bad, math.inf, judged.error), _beyond(judged._replace(bad=bad), max_error is None)
    lse_allowed = judged.lse_allowed
    if max_error is not None:
        lse_allowed = torch.maximum(lse_allowed, _LSE * judged.lse.abs().clamp(min=1.0))
    lse_allowed = torch.where(judged.lse.isinf(), 0.0, lse_allowed)
    lse_bad = ~(judged.lse_error <= lse_allowed)
    lse_bad = lse_bad & ~(judged.lse_error.isinf() & _broken_keys(call)) if lse_bad.any() else lse_bad
    at = int(beyond.argmax() if max_error is None or (beyond > 1).any() else error.argmax())
    worst, limit = error.flatten()[at].item(), allowed.flatten()[at].item()
    fault = ""
    if bad.any():
        fault = f"the output is not finite in {_where(bad, rows)}"
    elif (beyond > 1).any():
        where = _where(beyond > 1, rows, at)
        if judged.empty.flatten()[at]:
            fault = f"the output of {where}, which sees no key, is up to {worst:.3g} and not zero"
        else:
            fault = f"the output is off by {worst:.3g} in {where}; at most {limit:.3g} is allowed"
    elif max_error is not None and relative > max_error:
        at = int(error.argmax())
        fault = (
            f"the output's relative error is {relative:.3g}; at most {max_error:.3g} is allowed "
            f"(largest: {worst:.3g} in {_where(error == worst, rows, at)})"
        )
    elif lse_bad.any():
        at = int(torch.where(lse_bad, judged.lse_error.nan_to_num(math.inf), -1.0).argmax())
        off, most = judged.lse_error.flatten()[at].item(), lse_allowed.flatten()[at].item()
        right = judged.lse.flatten()[at].item()
        where = _where(lse_bad, rows, at)
        fault = f"the LSE is off by {off:.3g} in {where}, where it is {right:.6g}; at most {most:.3g} is allowed"
    return RowsVerdict(tuple(rows), worst, limit, relative, fault)


def _trouble(judged: _Judged, exact: bool) -> bool:
    """Whether something is to be looked at again with more care."""
    wrong = judged.formula_fails.bool() | judged.bad.bool()
    if exact:
        wrong = wrong | (_beyond(judged, exact) > 1) | ~(judged.lse_error <= judged.lse_allowed)
    return bool(wrong.any())


def _beyond(judged: _Judged, exact: bool) -> Tensor:
    """How many times what is allowed each row's error is."""
    tiny = torch.finfo(judged.error.dtype).tiny
    times = torch.where(judged.error == 0, 0.0, judged.error / judged.allowed.nan_to_num(math.inf).clamp(min=tiny))
    times = times if exact else torch.where(judged.empty.bool(), times, 0.0)  # zeros are exact in any kernel
    return torch.where(judged.bad.bool(), math.inf, times)


def _broken_keys(call: _Call) -> Tensor:
    """Bool (B, H, 1): a key or value is not finite, so that a kernel may have let it through although it is hidden."""
    broken = []
    for batches, heads in call.groups(0):
        parts = [call.sheets(which, batches, heads) for which in (1, 2)]
        found = ~(parts[0].isfinite().flatten(2).all(-1) & parts[1].isfinite().flatten(2).all(-1))
        broken.append(found.expand(-1, heads.stop - heads.start).reshape(-1).cpu())
    problem = call.problem
    size = problem.heads // max(1, call.kv_heads)
    return torch.cat(broken).view(problem.batch, -1, 1).repeat_interleave(size, 1)


def _where(wrong: Tensor, rows: list[int], at: int | None = None) -> str:
    """``query 5 of batch 0, head 3 (and 12 of 640 rows)``."""
    at = int(wrong.flatten().float().argmax()) if at is None else at
    heads, count = wrong.shape[1:]
    text = f"query {rows[at % count]} of batch {at // (heads * count)}, head {at // count % heads}"
    total = int(wrong.sum())
    return text if total == 1 else f"{text} (one of {total} such rows of {wrong.numel()})"
