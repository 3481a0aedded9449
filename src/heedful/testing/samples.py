"""A sample: one attention call, described without tensors; built, it has its tensors and knows what they mean.

Shapes: L leading sizes (…, H) of the answer, Q queries, K keys, D head dim, E value dim. *Logical* tensors are
(…, H, length, dim); the *given* ones are in the layout of the call.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from heedful.masks import Mask
from heedful.testing.oracle import Meaning, attend, band
from heedful.testing.parts import Made, Part, Room, strided

GARBAGE = 1e4  # what a finite but absurd key or value may hold where nothing sees it


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One call. ``lead`` is (…, H) of query and answer; key and value follow it unless they have their own.

    ``kv_heads`` makes it grouped-query attention. ``call`` holds further arguments of ``heedful.attention``.
    ``wants_grad``: which of query, key, value ask for a gradient where one is asked for. ``inference``: what is made in
    inference mode, "mask" or "call". ``aspects``: what is looked at. ``must_refuse``: the field every backend refuses.
    """

    name: str = "drawn"
    lead: tuple[int, ...] = (2, 2)
    key_lead: tuple[int, ...] | None = None
    value_lead: tuple[int, ...] | None = None
    kv_heads: int | None = None
    query_length: int = 9
    key_length: int = 12
    head_dim: int = 16
    value_dim: int | None = None
    dtype: torch.dtype = torch.float32
    layout: str = "BHSD"
    strides: str = "contiguous"
    mask: tuple[Part, ...] = ()
    call: dict[str, Any] = field(default_factory=dict, hash=False)
    autocast: torch.dtype | None = None
    deterministic: bool = False
    inference: str = ""
    wants_grad: tuple[str, ...] = ("query", "key", "value")
    aspects: tuple[str, ...] = ("forward", "lse", "gradient")
    must_refuse: str = ""

    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Logical shapes of query, key and value."""
        grouped = (*self.lead[:-1], self.kv_heads) if self.kv_heads is not None else self.lead
        key = grouped if self.key_lead is None else self.key_lead
        value = key if self.value_lead is None else self.value_lead
        value_dim = self.head_dim if self.value_dim is None else self.value_dim
        return (
            (*self.lead, self.query_length, self.head_dim),
            (*key, self.key_length, self.head_dim),
            (*value, self.key_length, value_dim),
        )

    @property
    def is_empty(self) -> bool:
        """Whether the answer has no element, or there is no key."""
        query, _, value = self.shapes()
        return 0 in (*query[:-1], *value)

    def build(self, device: str, *, needs_grad: bool = False, seed: int = 0) -> Built:
        """Draw the tensors of the call."""
        draw = torch.Generator().manual_seed(seed)
        at = torch.device(device)
        with torch.inference_mode(self.inference == "call"):
            tensors = [self._given(shape, draw, at) for shape in self.shapes()]
            for name, tensor in zip(("query", "key", "value"), tensors, strict=True):
                tensor.requires_grad_(needs_grad and name in self.wants_grad)
        lead = torch.broadcast_shapes(self.lead, *self._leads())
        dtype = self.dtype if self.autocast is None else self.autocast
        room = Room(tuple(lead), self.query_length, self.key_length, self.dtype, at, draw)
        with torch.inference_mode(bool(self.inference)):
            parts = [part.make(room) for part in self.mask]
        return Built(self, (tensors[0], tensors[1], tensors[2]), _argument(parts), tuple(parts), tuple(lead), dtype)

    def _leads(self) -> list[tuple[int, ...]]:
        return [] if self.kv_heads is not None else [shape[:-2] for shape in self.shapes()[1:]]

    def _given(self, shape: tuple[int, ...], draw: torch.Generator, device: torch.device) -> Tensor:
        logical = torch.randn(shape, generator=draw, dtype=torch.float64).to(self.dtype)
        return strided(given(logical, self.layout), self.strides, device)


@dataclass(frozen=True, eq=False)
class Built:
    """A sample with its tensors. ``lead`` is (…, H) of the answer; ``dtype`` the one computed in."""

    sample: Sample
    tensors: tuple[Tensor, Tensor, Tensor]
    attn_mask: Any
    parts: tuple[Made, ...]
    lead: tuple[int, ...]
    dtype: torch.dtype

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of the call, beside query, key and value."""
        more = {"attn_mask": self.attn_mask} if self.attn_mask is not None else {}
        more |= {"layout": self.sample.layout} if self.sample.layout != "BHSD" else {}
        return more | ({"enable_gqa": True} if self.sample.kv_heads is not None else {}) | self.sample.call

    @property
    def leaves(self) -> list[Tensor]:
        """All tensors of the call that ask for a gradient."""
        every = [*self.tensors, *(part.bias for part in self.parts)]
        return [tensor for tensor in every if tensor is not None and tensor.requires_grad]

    def summed_into(self, leaf: Tensor) -> int:
        """How many products are summed into each element of a leaf's gradient, at the least.

        A score's gradient is a difference of two sums over the value dim, which is zero where a query sees one key; a
        bias's gradient is the sum of those of all scores that share an element.
        """
        value_dim = self.sample.shapes()[2][-1]
        if not any(leaf is part.bias for part in self.parts) or not leaf.numel():
            return max(1, value_dim)
        scores = math.prod((*self.lead, self.sample.query_length, self.sample.key_length))
        return max(1, scores // leaf.numel() * value_dim)

    @property
    def seen(self) -> Tensor | None:
        """Bool, broadcastable to (…, H, Q, K): what mask and arguments let see, apart from biases."""
        call, lengths = self.sample.call, (self.sample.query_length, self.sample.key_length)
        alignment, device = call.get("causal_alignment", "top_left"), self.tensors[0].device
        every = [part.seen for part in self.parts if part.seen is not None]
        if call.get("is_causal"):
            every.append(band(*lengths, None, 0, alignment, device))
        window = call.get("window")
        if window is not None:
            sides = (window, window) if isinstance(window, int) else window
            left, right = (None if side is None or side < 0 else side for side in sides)
            every.append(band(*lengths, left, right, alignment, device))
        joined = every[0] if every else None
        for one in every[1:]:
            joined = one & joined if joined is not None else one
        return joined

    @property
    def meaning(self) -> Meaning:
        """The call, for the oracle."""
        call, sample = self.sample.call, self.sample
        scale = call.get("scale")
        return Meaning(
            scale=1.0 / math.sqrt(sample.head_dim) if scale is None else scale,
            seen=self.seen,
            softcap=call.get("softcap"),
            groups=1 if not sample.kv_heads else sample.lead[-1] // sample.kv_heads,
        )

    @contextlib.contextmanager
    def surroundings(self) -> Iterator[None]:
        """Autocast, deterministic or inference mode, where the sample wants them; restored afterwards."""
        before = torch.are_deterministic_algorithms_enabled()
        device, dtype = self.tensors[0].device.type, self.sample.autocast
        try:
            torch.use_deterministic_algorithms(self.sample.deterministic or before)
            autocast = torch.autocast(device, dtype) if dtype else contextlib.nullcontext()
            with autocast, torch.inference_mode(self.sample.inference == "call"):
                yield
        finally:
            torch.use_deterministic_algorithms(before)

    def answer(self, dtype: torch.dtype, drop: Tensor | None = None) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """The oracle's: out and LSE, both logical, and the leaves it started from, copies of ``leaves``.

        Inputs are cast to what the call computes in, then to ``dtype``; a bias is added as it is.
        """
        copies = {id(leaf): leaf.detach().clone().requires_grad_() for leaf in self.leaves}
        tensors = [copies.get(id(tensor), tensor.detach()).to(self.dtype).to(dtype) for tensor in self.tensors]
        with torch.inference_mode(False), torch.enable_grad():
            biases = [copies.get(id(one), one).clone() for one in self._biases()]
            if self.sample.autocast is not None:  # casts the bias as well, as SDPA does
                biases = [one.to(self.dtype) for one in biases]
            bias = sum(biases[1:], biases[0]).double() if biases else None  # as ``&`` adds them: in their own dtype
            seen = self.seen
            meaning = replace(self.meaning, drop=drop, seen=None if seen is None else seen.clone())
            query, key, value = (logical(tensor.clone(), self.sample.layout) for tensor in tensors)
            out, lse = attend(query, key, value, bias, meaning)
        return out, lse, tuple(copies.values())

    def poisoned(self, garbage: float) -> Built:
        """The same call with garbage in every key and value that no query sees; the answer must stay."""
        seen, lengths = self._seen_keys()
        tensors = list(self.tensors)
        for index in (1, 2):
            shape = logical(tensors[index], self.sample.layout).shape
            unseen = ~_reduced(seen.expand(*self.lead, lengths), shape[:-1])
            spoilt = logical(tensors[index], self.sample.layout).masked_fill(unseen[..., None], garbage)
            tensors[index] = given(spoilt, self.sample.layout)
        return replace(self, tensors=(tensors[0], tensors[1], tensors[2]))

    def _biases(self) -> list[Tensor]:
        return [part.bias for part in self.parts if part.bias is not None]

    def _seen_keys(self) -> tuple[Tensor, int]:
        """Bool (…, H, K): the keys that some query sees."""
        keys = self.sample.key_length
        full = torch.ones(*self.lead, self.sample.query_length, keys, dtype=torch.bool, device=self.tensors[0].device)
        for hides in (self.seen, *(bias > -math.inf for bias in self._biases())):
            if hides is not None:
                while hides.dim() > full.dim():
                    hides = hides.squeeze(0)
                full = full & hides
        return full.any(-2), keys


def given(logical_tensor: Tensor, layout: str) -> Tensor:
    """(B, H, S, D) to the layout of a call; a view."""
    if layout == "THD":
        return logical_tensor.squeeze(0).transpose(0, 1)
    return logical_tensor.transpose(1, 2) if layout == "BSHD" else logical_tensor


def logical(given_tensor: Tensor, layout: str) -> Tensor:
    """The inverse of ``given``."""
    if layout == "THD":
        return given_tensor.transpose(0, 1).unsqueeze(0)
    return given_tensor.transpose(1, 2) if layout == "BSHD" else given_tensor


def _argument(parts: list[Made]) -> Any:
    """One part as a user would give it; several joined as mask values."""
    if len(parts) <= 1:
        return parts[0].argument if parts else None
    joined: Mask = parts[0].mask
    for part in parts[1:]:
        joined = joined & part.mask
    return joined


def _reduced(seen: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Bool (…, H, K) to the sizes of a key: seen by any of the heads or batches that share it."""
    seen = seen.reshape(-1, *seen.shape[-len(shape) :]).any(0)
    for axis, size in enumerate(shape):
        if seen.shape[axis] != size:
            seen = seen.unflatten(axis, (size, -1)).any(axis + 1)
    return seen
