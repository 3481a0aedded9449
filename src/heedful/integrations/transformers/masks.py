"""The mask function that transformers calls once a forward, before its layers: structure is kept as a value.

A mask of known structure (causal, a window, padding of keys, and these together) comes as a ``StructuredMask``: a bool
tensor (B, 1, Q, K) that holds no elements, until somebody computes with it. Everything else, and everything while a
compiler traces, comes as the dense tensor that transformers makes for "sdpa".

None, which leaves causality to the attention function, is given only where that is the same for all of the mask's
readers: for one query, or as many queries as keys.

Shapes: B batch, Q query length, K key length.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from heedful.masks import Alignment, Causal, KeyPadding, Mask, SlidingWindow

Band = tuple[int | None, int | None]  # keys before and after a query's place that it sees; None is open
_CAUSAL: Band = (None, 0)
_EVERY: Band = (None, None)


def attention_mask(**call: Any) -> Tensor | None:
    """The mask of one forward, from the arguments of transformers' own mask functions.

    Returns a bool tensor, broadcastable to (B, 1, Q, K), True where a query sees a key; or None.
    """
    structured = None if _is_traced(call) else _structured(**call)
    return _dense(call) if structured is None else structured


class StructuredMask(Tensor):
    """A bool tensor (B, 1, Q, K) that knows its structure. Reading, slicing or writing it makes it an ordinary one."""

    _mask: Mask
    _made: Tensor | None

    @staticmethod
    def __new__(cls, mask: Mask, sizes: tuple[int, int, int], device: torch.device) -> StructuredMask:
        """``sizes``: batch, query length and key length."""
        made: StructuredMask = Tensor._make_wrapper_subclass(
            cls, (sizes[0], 1, *sizes[1:]), dtype=torch.bool, device=device
        )
        made._mask, made._made = mask, None
        return made

    @property
    def simplest(self) -> Mask | Tensor:
        """The mask as a value; or the dense tensor, once somebody asked for it: it may have been written to since."""
        return self._mask if self._made is None else self._made

    def dense(self) -> Tensor:
        """The ordinary tensor, made at the first call."""
        if self._made is None:
            seen = self._mask.visible(self.shape[2], self.shape[3], self.device)
            every = torch.ones((), dtype=torch.bool, device=self.device)
            self._made = (every if seen is None else seen).expand(self.shape).contiguous()
        return self._made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"StructuredMask({tuple(self.shape)}, {self._mask})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Every operation is one on the dense tensor."""
        args, kwargs = tree_map_only(StructuredMask, StructuredMask.dense, (args, kwargs or {}))
        return func(*args, **kwargs)


def _is_traced(call: dict[str, Any]) -> bool:
    """Whether a compiler watches, or will take the mask as an input, as it does with static caches."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or isinstance(call.get("q_offset"), Tensor)
    )


def _dense(call: dict[str, Any]) -> Tensor | None:
    from transformers.masking_utils import sdpa_mask

    queries, keys = call.get("q_length"), call.get("kv_length")
    if queries is not None and queries != 1 and queries != keys:
        call = {**call, "allow_is_causal_skip": False}
    made: Tensor | None = sdpa_mask(**call)
    return made


def _structured(
    *,
    batch_size: int = 0,
    q_length: int = 1,
    kv_length: int = 0,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    device: Any = "cpu",
    **_of_no_weight: Any,
) -> Tensor | None:
    """The mask by its structure; None where that is not known, or where there is too little to gain: for one query."""
    band = None if q_length == 1 or mask_function is None else band_of(mask_function)
    if band is None or (attention_mask is not None and attention_mask.dim() != 2):
        return None
    if band == _EVERY and attention_mask is None and allow_is_bidirectional_skip:
        return None
    mask = _banded(band, q_length, kv_length, q_offset - kv_offset)
    if mask is None:
        return None
    if attention_mask is not None:
        mask = mask & KeyPadding(_kept(attention_mask.bool(), kv_length, kv_offset))
    return StructuredMask(mask, (batch_size, q_length, kv_length), torch.device(device))


def _banded(band: Band, queries: int, keys: int, shift: int) -> Mask | None:
    """The band as a mask, where query i stands at the place of key i + shift; None where no alignment says that."""
    farthest = (queries - 1 + shift, keys - 1 - shift)
    left, right = (None if side is None or side >= most else side for side, most in zip(band, farthest, strict=True))
    if left is right is None:
        return Mask()
    if shift not in (0, keys - queries):
        return None
    alignment: Alignment = "bottom_right" if shift else "top_left"
    return Causal(alignment) if (left, right) == _CAUSAL else SlidingWindow(left, right, alignment)


def _kept(padding: Tensor, keys: int, offset: int) -> Tensor:
    """Bool (B, K): which of the cache's keys are real; those past the last token are not."""
    lacking = keys + offset - padding.shape[-1]
    return torch.nn.functional.pad(padding, (0, lacking))[:, offset:] if lacking > 0 else padding[:, offset:][:, :keys]


def band_of(mask_function: Callable[..., Any]) -> Band | None:
    """The band that one of transformers' mask functions means; None for any other function."""
    from transformers import masking_utils as library

    if mask_function is library.causal_mask_function:
        return _CAUSAL
    if mask_function is library.bidirectional_mask_function:
        return _EVERY
    overlay, base = _captured(mask_function, library.and_masks(library.causal_mask_function)) or (None, None)
    for factory, around, after in (
        (library.sliding_window_overlay, library.causal_mask_function, False),
        (library.sliding_window_bidirectional_overlay, library.bidirectional_mask_function, True),
    ):
        (width,) = (_captured(overlay, factory(1)) if base is around else None) or (None,)
        if width is not None:
            band = (width, width) if after else (width - 1, 0)
            return band if _agrees(factory, width, band) else None
    return None


def _captured(function: Any, like: Any) -> tuple[Any, ...] | None:
    """What a function was made of, where it is of the same making as ``like``: a number, or two functions joined."""
    if getattr(function, "__code__", None) is not like.__code__:
        return None
    held = function.__closure__[0].cell_contents
    if not isinstance(held, tuple):
        return (held,)
    return held if len(held) == 2 else None


@functools.lru_cache(maxsize=64)
def _agrees(factory: Callable[[int], Callable[..., Any]], width: int, band: Band) -> bool:
    """Whether the library's window still has the ends that are meant here: asked of it, key by key, at its borders."""
    query = torch.tensor(4 * width + 8)
    near = torch.arange(-2, 3)
    keys = torch.cat([query + end + near for end in (-width, 0, width)])
    zero = torch.zeros((), dtype=torch.long)
    seen = factory(width)(zero, zero, query, keys)
    if band[1] == 0:
        seen = seen & (keys <= query)
    left, right = band
    return bool(torch.equal(seen, (keys >= query - (left or 0)) & (keys <= query + (right or 0))))
