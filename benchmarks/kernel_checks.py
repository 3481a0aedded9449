"""Holds the answers and gradients of ``kernels.py``'s calls to the formula, before anything is timed.

Of an answer, some rows of every head, by ``heedful.rows``. Of the gradients, all rows and keys of two kv heads and
their query heads, by the formula in float64, which is made once for each call and goes through the queries in parts.

Shapes: B batch, H heads, N kv heads, G = H / N, Q query length, K key length, R rows, D head dim, E value dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from kernel_cases import Drawn
from torch import Tensor

from heedful.rows import check_rows
from heedful.strategy import AttentionStrategy
from heedful.testing.oracle import Meaning, attend
from heedful.testing.tolerance import ContractBroken, Tolerance, check_close, check_similar

ROWS = 32  # of each head's queries
SCORES = 1 << 25  # of the formula at once
NAMES = ("query", "key", "value")


@dataclass(frozen=True)
class Judgement:
    """What is wrong with an answer, "" if it is right; and how far it is from the formula, in units of what is allowed.

    ``units`` is None where there is no telling.
    """

    fault: str
    units: float | None = None


def judged(drawn: Drawn, answer: object, strategy: AttentionStrategy) -> Judgement:
    """Some rows of an answer; one of an approximate strategy is held to the error that it declares."""
    if not isinstance(answer, Tensor) or answer.dtype != drawn.query.dtype:
        return Judgement(f"it is {getattr(answer, 'dtype', type(answer).__name__)}, not {drawn.query.dtype}")
    most = None if strategy.exactness == "exact" else strategy.relative_error
    found = check_rows(drawn.problem, *drawn.tensors, drawn.mask, answer, count=ROWS, max_error=most, seed=0)
    if not bool(torch.isfinite(answer).all()):
        return Judgement("NaN or inf where numbers must be")
    far, limit = (found.error, found.allowed) if most is None else (found.relative, most)
    return Judgement(found.fault, far / limit if limit else None)


class Gradients:
    """The right gradients of a call of some heads, for one gradient of its output.

    Of each head they are made twice: in float64, which is what is right, and in the call's dtype, whose error says how
    far a kernel may be.
    """

    def __init__(self, drawn: Drawn, upstream: Tensor) -> None:
        self.drawn, self.upstream = drawn, upstream
        case = drawn.work.case
        self.group = case.heads // case.kv_heads
        batches = 1 if drawn.work.extra == "packed" else case.batch
        self.heads = sorted({(0, 0), (batches - 1, case.kv_heads - 1)})
        narrow = torch.float32 if drawn.query.dtype == torch.float64 else drawn.query.dtype
        self.want = [self._of_head(*place, torch.float64) for place in self.heads]
        self.naive = [self._of_head(*place, narrow) for place in self.heads]

    def judged(self, gradients: tuple[Tensor, ...], strategy: AttentionStrategy) -> Judgement:
        """Those of query, key and value."""
        units = 0.0
        for which, (name, got, leaf) in enumerate(zip(NAMES, gradients, self.drawn.tensors, strict=True)):
            what = f"the gradient of the {name}"
            if got.dtype != leaf.dtype or got.shape != leaf.shape:
                return Judgement(f"{what} is {got.dtype} of shape {tuple(got.shape)}")
            if not bool(torch.isfinite(got).all()):
                return Judgement(f"{what} has NaN or inf where numbers must be")
            try:
                for place, want, naive in zip(self.heads, self.want, self.naive, strict=True):
                    part = self._part(got, *place, is_query=which == 0).double()
                    units = max(units, self._units(what, part, want[which], naive[which], strategy))
            except ContractBroken as broken:
                return Judgement(str(broken), broken.deviation.units if broken.deviation else None)
        return Judgement("", units)

    def _units(self, what: str, got: Tensor, want: Tensor, naive: Tensor, strategy: AttentionStrategy) -> float:
        if strategy.exactness != "exact":
            return check_similar(what, got, want, Tolerance.of(strategy.relative_error)).units
        terms = self.drawn.work.case.value_dim  # of each score's gradient, as the contract counts
        return check_close(what, got, want, naive, self.drawn.query.dtype, terms=terms).units

    def _part(self, tensor: Tensor, batch: int, kv_head: int, *, is_query: bool) -> Tensor:
        """(G, Q, D) of the query heads, or (1, K, D) of the kv head."""
        tensor = tensor.detach()
        tensor = tensor.transpose(0, 1)[None] if self.drawn.work.extra == "packed" else tensor
        first, count = (kv_head * self.group, self.group) if is_query else (kv_head, 1)
        return tensor[batch, first : first + count]

    def _of_head(self, batch: int, kv_head: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value in a dtype; of all queries together, they are summed in float64."""
        query, upstream = (
            self._part(t, batch, kv_head, is_query=True).to(dtype) for t in (self.drawn.query, self.upstream)
        )
        key, value = (
            self._part(t, batch, kv_head, is_query=False).to(dtype).requires_grad_() for t in self.drawn.tensors[1:]
        )
        rows = max(1, SCORES // (self.group * key.shape[1]))
        parts, sums = [], [torch.zeros_like(t, dtype=torch.float64, requires_grad=False) for t in (key, value)]
        for start in range(0, query.shape[1], rows):
            some = slice(start, min(start + rows, query.shape[1]))
            seen, bias = self._limits(some, batch, kv_head, query.shape[1], key.shape[1])
            part = query[:, some].detach().requires_grad_()
            meaning = Meaning(query.shape[-1] ** -0.5, seen, groups=self.group)
            with torch.enable_grad():
                out, _ = attend(part, key, value, bias, meaning)
            found = torch.autograd.grad(out, (part, key, value), upstream[:, some])
            parts.append(found[0].double())
            sums = [total + one.double() for total, one in zip(sums, found[1:], strict=True)]
        return torch.cat(parts, 1).to(dtype), sums[0].to(dtype), sums[1].to(dtype)

    def _limits(
        self, rows: slice, batch: int, kv_head: int, queries: int, keys: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """What these queries see, and their bias; each (G or 1, R, K), or None."""
        mask = self.drawn.mask
        if mask is None:
            return None, None
        seen = mask.visible_rows(rows, queries, keys, self.drawn.query.device)
        bias = None if mask.bias is None else mask.bias.detach()[..., rows, :].double()
        return self._of_group(seen, batch, kv_head), self._of_group(bias, batch, kv_head)

    def _of_group(self, tensor: Tensor | None, batch: int, kv_head: int) -> Tensor | None:
        if tensor is None:
            return None
        tensor = tensor[(None,) * (4 - tensor.dim())]
        tensor = tensor[batch if tensor.shape[0] > 1 else 0]
        return tensor if tensor.shape[0] == 1 else tensor[kv_head * self.group : (kv_head + 1) * self.group]
