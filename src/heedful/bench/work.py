"""One thing to measure: a case under a mask in a dtype; its tensors, its useful flops, and the judge of answers to it.

The judge is the formula in float64 on some query rows, never another backend.

Shapes: B batch, H heads, K kv heads, Sq queries, Sk keys, D head size, Dv value head size; layout BHSD.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from heedful.cases import Case
from heedful.testing.oracle import Meaning, attend
from heedful.testing.tolerance import ContractBroken, Tolerance, check_similar
from heedful.tolerance import allowed, largest

MaskName = Literal["none", "causal", "padded", "dense"]
MASKS: tuple[MaskName, ...] = get_args(MaskName)
CHECKED_ROWS = 64  # of each head's queries
DENSE_SHARE = 0.5  # of the pairs that a dense mask lets see each other
PADDED_SHARE = 0.5  # of the keys kept where a case without padding is to be padded


@dataclass(frozen=True)
class Work:
    """A case under a mask in a dtype, not yet drawn."""

    case: Case
    mask: MaskName
    dtype: torch.dtype

    @classmethod
    def of(cls, case: Case, mask: MaskName | None, dtype: torch.dtype) -> Work:
        """Under the case's own mask for None; another one replaces it."""
        own: MaskName = "padded" if case.mask == "key_padding" else case.mask
        mask = own if mask is None else mask
        if mask == own:
            return cls(case, mask, dtype)
        if mask == "padded":
            return cls(replace(case, mask="key_padding", kept_keys=PADDED_SHARE), mask, dtype)
        return cls(replace(case, mask="causal" if mask == "causal" else "none", kept_keys=None), mask, dtype)

    @property
    def dense_flops(self) -> int:
        """Of both products over all pairs."""
        return replace(self.case, mask="none", kept_keys=None).flops

    @property
    def expected_flops(self) -> int:
        """Those of `Drawn.useful_flops`, as far as they are known before the mask is drawn."""
        case, flops = self.case, self.dense_flops
        if self.mask == "causal":
            seen = sum(min(place + 1, case.key_length) for place in range(case.query_length))
            return flops * seen // (case.query_length * case.key_length)
        return flops if case.kept_keys is None else round(flops * case.kept_keys)

    def drawn(self, device: torch.device) -> Drawn:
        """The tensors, N(0, 1), seeded."""
        case = self.case
        query, key, value, keep = case.tensors(self.dtype, device)
        mask = None if keep is None else keep[:, None, None, :]
        if self.mask == "dense":
            draw = torch.rand((case.query_length, case.key_length), generator=torch.Generator().manual_seed(1))
            draw[:, 0] = 0.0  # every query sees a key
            mask = (draw < DENSE_SHARE).to(device)[None, None]
        return Drawn(self, query, key, value, mask)

    def __str__(self) -> str:
        return f"{self.case.name}, mask {self.mask}, {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True, eq=False)
class Drawn:
    """A work's tensors. ``mask`` is bool, not expanded: (B, 1, 1, Sk) for padding, (1, 1, Sq, Sk) if dense."""

    work: Work
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None

    @property
    def causal(self) -> bool:
        """Whether causality is asked for, torch's: query i sees the keys up to i."""
        return self.work.mask == "causal"

    @property
    def arguments(self) -> dict[str, Any]:
        """Of torch's SDPA and of ``heedful.attention`` alike: only those that are not their default."""
        grouped = self.work.case.heads != self.work.case.kv_heads
        return {
            "query": self.query,
            "key": self.key,
            "value": self.value,
            **({"attn_mask": self.mask} if self.mask is not None else {}),
            **({"is_causal": True} if self.causal else {}),
            **({"enable_gqa": True} if grouped else {}),
        }

    def useful_flops(self) -> int:
        """Of the pairs that causality leaves and of kept keys; a dense mask saves none, for no exact kernel can."""
        if self.work.mask == "padded" and self.mask is not None:
            return self.work.dense_flops * int(self.mask.sum()) // self.mask.numel()
        return self.work.expected_flops


@dataclass(frozen=True)
class Judgement:
    """How far an answer is from the formula, how far it may be, and what is wrong with it; "" if it is right.

    ``error`` is the largest difference of any checked number, None where there is no telling.
    """

    error: float | None
    allowed: float
    fault: str


class Judge:
    """Holds answers to the formula in float64, on some query rows of every head: all of them up to 64, else the first,
    the last and 62 drawn ones. An exact backend may be as far from it as flash-attn's rule says.
    """

    def __init__(self, drawn: Drawn) -> None:
        case, self._dtype = drawn.work.case, drawn.work.dtype
        self._shape = (*case.query_shape[:3], case.value_dim)
        self.rows = _rows(case.query_length)
        at = torch.device("cpu") if drawn.query.device.type == "mps" else drawn.query.device  # MPS has no float64
        rows, seen = self.rows.to(at), None if drawn.mask is None else drawn.mask.to(at)
        if drawn.causal:
            seen = torch.arange(case.key_length, device=at) <= rows[:, None]
        elif seen is not None and seen.shape[-2] > 1:
            seen = seen[..., rows, :]
        tensors = (drawn.query.to(at)[..., rows, :], drawn.key.to(at), drawn.value.to(at))
        meaning = Meaning(case.head_dim**-0.5, seen, groups=case.heads // case.kv_heads)
        self._want = _formula(tensors, torch.float64, meaning)
        naive = _formula(tensors, torch.float32 if self._dtype == torch.float64 else self._dtype, meaning)
        self.allowed = allowed(self._want, naive, self._dtype)

    def __call__(self, answer: object, *, exact: bool = True) -> Judgement:
        """What to say of an answer; one of an approximate backend is held to a coarser rule."""
        if not isinstance(answer, Tensor):
            return self._wrong(None, f"it is a {type(answer).__name__}, no tensor")
        if tuple(answer.shape) != self._shape:
            return self._wrong(None, f"its shape is {tuple(answer.shape)}, not {self._shape}")
        if answer.dtype != self._dtype:
            return self._wrong(None, f"its dtype is {answer.dtype}, not {self._dtype}")
        rows = self.rows.to(answer.device)
        got = answer[..., rows, :].to(self._want.device).double()
        error = largest(got - self._want)
        if not math.isfinite(error) or not bool(torch.isfinite(answer).all()):
            return self._wrong(None, "NaN or inf where numbers must be")
        if exact:
            far = error > self.allowed
            return self._wrong(error, f"off by {error:.3g}, at most {self.allowed:.3g} is allowed" if far else "")
        try:
            check_similar("the answer", got, self._want, Tolerance())
        except ContractBroken as broken:
            return self._wrong(error, str(broken))
        return self._wrong(error, "")

    def _wrong(self, error: float | None, fault: str) -> Judgement:
        return Judgement(error, self.allowed, fault)


def _rows(length: int) -> Tensor:
    if length <= CHECKED_ROWS:
        return torch.arange(length)
    inner = torch.randperm(length - 2, generator=torch.Generator().manual_seed(2))[: CHECKED_ROWS - 2] + 1
    return torch.cat([torch.tensor([0, length - 1]), inner]).sort().values


def _formula(tensors: tuple[Tensor, ...], dtype: torch.dtype, meaning: Meaning) -> Tensor:
    query, key, value = (tensor.to(dtype) for tensor in tensors)
    return attend(query, key, value, None, meaning)[0]
