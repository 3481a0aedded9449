"""Masks are values: what may see what, said as structure instead of as a dense tensor.

``Causal() & KeyPadding(keep)`` is again a mask. A plain tensor passed as ``attn_mask`` has exactly the meaning of
PyTorch's SDPA (bool: True may attend; float: added to the scores) and is wrapped by ``as_mask``.

Shapes: B batch, H heads, Q query length, K key length, T packed tokens, N packed sequences.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from heedful.errors import InvalidArgument
from heedful.visibility import (
    EVERY,
    Rows,
    Window,
    band,
    cut,
    places_of,
    seen_by_blocks,
    sees_none,
    sequence_of,
    within,
)

Alignment = Literal["top_left", "bottom_right"]
Side = Literal["right", "left", "interior"]
_FAR = 1 << 40  # keys: farther than any, and places plus it still fit in 64 bits
ALIGNMENTS: tuple[Alignment, ...] = ("top_left", "bottom_right")


@dataclass(frozen=True)
class MaskFacts:
    """What is known of a mask without reading a tensor: hashable, part of every problem.

    ``dense``, ``bias``: which of B, H, Q, K the tensor really has (the others broadcast), such as ``"BK"``.
    ``rows_seen``: every query is known to see a key. The rest is known only once the contents were looked at (see
    ``analysis``): ``noop``, the tensor hides nothing and adds nothing; ``side`` on which keys are padding, ``right``,
    ``left`` or ``interior``; ``kept``, the eighths of the keys that are real, rounded up; ``queries_alike``, the
    padding of the queries is that of the keys; ``packing`` of a varlen mask, ``tidy`` where its sequences cover all
    tokens and each has keys, else ``loose``, or ``unknown``. ``packed_alike``: queries and keys are packed alike.
    """

    causal: Alignment | None = None
    window: Window | None = None
    key_padding: bool = False
    varlen: bool = False
    dense: str | None = None
    bias: str | None = None
    bias_dtype: torch.dtype | None = None
    bias_needs_grad: bool = False
    block: bool = False
    rows_seen: bool = False
    query_padding: bool = False
    noop: bool = False
    side: str | None = None
    kept: int | None = None
    queries_alike: bool = False
    packing: str = ""
    packed_alike: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        """The parts that are present, by the names that limits use."""
        present = {
            "causal": self.causal is not None,
            "window": self.window is not None,
            "key_padding": self.key_padding,
            "query_padding": self.query_padding,
            "varlen": self.varlen,
            "dense": self.dense is not None,
            "bias": self.bias is not None,
            "block": self.block,
        }
        return tuple(kind for kind, there in present.items() if there)

    def may_hide_rows(self, query_length: int, key_length: int) -> bool:
        """Whether a query may exist that sees no key at all."""
        if self.rows_seen or self.noop:
            return False
        if set(self.kinds) - ({"causal", "varlen"} if self.packing == "tidy" else {"causal"}):
            return True
        if self.varlen:
            return self.causal == "bottom_right" and not self.packed_alike
        return self.causal == "bottom_right" and query_length > key_length

    def __str__(self) -> str:
        words = [
            f"causal {self.causal}" if self.causal else "",
            f"window {self.window[0]}..{self.window[1]} {self.window[2]}" if self.window else "",
            f"key padding{self._contents()}" if self.key_padding else "",
            "query padding" if self.query_padding else "",
            "varlen" if self.varlen else "",
            f"dense bool [{self.dense or 'scalar'}]" if self.dense is not None else "",
            f"bias {self.bias_dtype} [{self.bias or 'scalar'}]".replace("torch.", "") if self.bias is not None else "",
            "block mask" if self.block else "",
        ]
        return " & ".join(filter(None, words)) + (" (hides nothing)" if self.noop else "") or "none"

    def _contents(self) -> str:
        return "" if self.side is None else f" ({self.side}, {self.kept}/8 kept)"


NO_MASK = MaskFacts()


@dataclass(frozen=True, eq=False)
class PaddingProfile:
    """The contents of a padding, in plain numbers: ``side`` of its batch rows, and how many keys each row keeps.

    ``side``: ``right`` where each row's kept keys are its first ones, ``left`` where its last, else ``interior``.
    ``queries``: how many queries each row uses, where that was given, else None; ``query_side`` likewise.
    """

    side: Side
    kept: tuple[int, ...]
    key_length: int
    queries: tuple[int, ...] | None = None
    query_side: Side = "right"

    @property
    def eighths(self) -> int:
        """The kept share of all keys in eighths, rounded up."""
        return -(-8 * sum(self.kept) // max(1, self.key_length * len(self.kept)))

    @property
    def facts(self) -> tuple[Any, ...]:
        """All that problems read of it: hashable."""
        return self.side, self.eighths, min(self.kept, default=0) > 0, self.queries is not None, self.alike

    @property
    def alike(self) -> bool:
        """Whether the padding of the queries is that of the keys."""
        return self.queries == self.kept and self.query_side == self.side != "interior"


@dataclass(frozen=True, eq=False)
class Mask:
    """A conjunction of parts: a key is seen where every part lets it be seen. Made by the classes below and ``&``.

    ``dense`` is bool, broadcastable to (B, H, Q, K). ``bias`` is float, added to the scores, broadcastable likewise.
    ``padding`` is bool (B, K); ``rows`` bool (B, Q), False for queries that are padding and see nothing. ``block`` is a
    FlexAttention ``BlockMask``. Analysis adds what it found: ``profile`` of padding and rows, and ``noop``, that dense
    or bias hides and adds nothing.
    """

    causal: Alignment | None = None
    window: Window | None = None
    padding: Tensor | None = None
    varlen: Varlen | None = None
    dense: Tensor | None = None
    bias: Tensor | None = None
    block: Any = None
    rows: Tensor | None = None
    profile: PaddingProfile | None = None
    noop: bool = False

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        if self.noop or other.noop:
            return other if self.noop else self
        return Mask(
            causal=_only(self.causal, other.causal, "causal alignments"),
            window=_narrower(self.window, other.window),
            padding=_both(self.padding, other.padding),
            varlen=_only(self.varlen, other.varlen, "packings (Varlen)"),
            dense=_both(self.dense, other.dense),
            bias=_sum(self.bias, other.bias),
            block=_only(self.block, other.block, "block masks"),
            rows=_both(self.rows, other.rows),
            profile=_lone_profile(self, other),
        )

    @property
    def key(self) -> tuple[Any, ...]:
        """All that validation and selection read of this mask: hashable."""
        if self.bias is None:
            return self._key
        return (self.bias.requires_grad and torch.is_grad_enabled(), *self._key)

    @functools.cached_property
    def _key(self) -> tuple[Any, ...]:
        parts = (_read(self.dense), _read(self.bias), _read(self.padding), _read(self.rows))
        packing = None if self.varlen is None else self.varlen.packing_key
        contents = (self.noop, None if self.profile is None else self.profile.facts)
        block = None if self.block is None else tuple(self.block.shape)
        return (self.causal, self.window, block, packing, *parts, *contents)

    @property
    def bands(self) -> list[Window]:
        """Causality, which is a window that ends at the query's place, and the window."""
        every: list[Window] = [] if self.causal is None else [(None, 0, self.causal)]
        return every if self.window is None else [*every, self.window]

    def visible(self, query_length: int, key_length: int, device: torch.device) -> Tensor | None:
        """What the boolean parts let see: bool, broadcastable to (B, H, Q, K); None where they hide nothing."""
        return self.visible_rows(EVERY, query_length, key_length, device)

    def visible_rows(
        self, rows: Rows, query_length: int, key_length: int, device: torch.device, keys: slice = EVERY
    ) -> Tensor | None:
        """The same of some queries, and of a run of keys: nothing of size Q * K is made.

        ``rows``: R of the queries, as a slice or as an int64 tensor of their indices, in any order; ``keys``: S of the
        keys. Bool, broadcastable to (B, H, R, S); None where the parts hide nothing.
        """
        at, key_at = places_of(rows, query_length, device), places_of(keys, key_length, device)
        parts = [] if self.dense is None else [cut(cut(self.dense, -2, rows), -1, keys)]
        for left, right, alignment in self.bands:
            if self.varlen is not None:
                parts.append(self.varlen.band(at, key_at, left, right, alignment))
            else:
                shift = key_length - query_length if alignment == "bottom_right" else 0
                parts.append(band(at, key_at, left, right, shift))
        if self.padding is not None:
            parts.append(cut(self.padding, -1, keys)[:, None, None, :])
        if self.rows is not None:
            parts.append(cut(self.rows, -1, rows)[:, None, :, None])
        if self.varlen is not None:
            parts.append(self.varlen.same_sequence(at, key_at))
        if self.block is not None:
            parts.append(seen_by_blocks(self.block, query_length, key_length, device, rows, keys))
        if not parts:
            return None
        seen = parts[0]
        for part in parts[1:]:
            seen = seen & part
        return seen


class Causal(Mask):
    """A query sees the keys up to its own place.

    ``top_left``: query i sees keys 0..i (torch SDPA). ``bottom_right``: the last query sees all keys (flash-attn).
    """

    def __init__(self, alignment: Alignment = "top_left") -> None:
        super().__init__(causal=as_alignment(alignment))


class SlidingWindow(Mask):
    """A query at place i sees keys from i - left to i + right, both included; None leaves a side open.

    The place of query i is i, or i + K - Q with the alignment ``bottom_right`` (flash-attn's convention).
    """

    def __init__(self, left: int | None, right: int | None, alignment: Alignment = "top_left") -> None:
        super().__init__(window=as_window((left, right), alignment))


class KeyPadding(Mask):
    """Keys that are padding are seen by no query: ``keep`` is bool (B, K), True for real keys.

    ``queries``, bool (B, Q), says likewise which queries are real: the others see nothing, and their output is zero.
    """

    def __init__(self, keep: Tensor, queries: Tensor | None = None) -> None:
        for name, given, sizes in (("keep", keep, "keys"), ("queries", queries, "queries")):
            if given is None and name == "queries":
                continue
            if _tensor(f"KeyPadding({name})", given).dim() != 2 or given.dtype != torch.bool:  # type: ignore[union-attr]
                came = f"{given.dtype} of shape {tuple(given.shape)}"  # type: ignore[union-attr]
                raise InvalidArgument(f"KeyPadding({name})", came, f"give a bool tensor (batch, {sizes})")
        super().__init__(padding=keep, rows=queries)

    @classmethod
    def from_lengths(cls, lengths: Tensor, key_length: int) -> KeyPadding:
        """The first ``lengths[b]`` of ``key_length`` keys are real: lengths is integer (B,)."""
        if _tensor("KeyPadding.from_lengths(lengths)", lengths).dim() != 1:
            raise InvalidArgument("lengths", f"shape {tuple(lengths.shape)}", "give one length for each row, (batch,)")
        return cls(torch.arange(key_length, device=lengths.device)[None, :] < lengths[:, None])


class Dense(Mask):
    """A bool tensor broadcastable to (B, H, Q, K); True may attend."""

    def __init__(self, keep: Tensor) -> None:
        if _tensor("Dense(keep)", keep).dtype != torch.bool:
            raise InvalidArgument("Dense(keep)", keep.dtype, "give a bool tensor, or use Bias for scores to add")
        super().__init__(dense=keep)


class Bias(Mask):
    """A float tensor broadcastable to (B, H, Q, K), added to the scaled scores; -inf hides.

    Two that are joined by ``&`` are added in their common dtype.
    """

    def __init__(self, bias: Tensor) -> None:
        if not _tensor("Bias(bias)", bias).is_floating_point():
            raise InvalidArgument("Bias(bias)", bias.dtype, "give a float tensor, or use Dense for a bool one")
        super().__init__(bias=bias)


class Varlen(Mask):
    """Sequences packed one behind the other; a query sees only the keys of its own sequence.

    ``cu_seqlens_q``, ``cu_seqlens_k``: integer (N + 1,), from 0 to T, as flash-attn takes them; keys default to the
    queries' packing. ``max_seqlen_q``, ``max_seqlen_k`` are kept for kernels that want them. Causality and windows
    beside it count within each sequence: ``top_left`` from its start, ``bottom_right`` from its end.
    """

    def __init__(
        self,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
    ) -> None:
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            if _tensor(name, cu).dim() != 1 or cu.dtype not in (torch.int32, torch.int64) or len(cu) < 1:
                raise InvalidArgument(
                    name,
                    f"{cu.dtype} of shape {tuple(cu.shape)}",
                    "give int32 or int64 (sequences + 1,), from 0 to the total",
                )
        if cu_seqlens_q.shape != cu_seqlens_k.shape:
            raise InvalidArgument(
                "cu_seqlens_k", tuple(cu_seqlens_k.shape), f"give as many as cu_seqlens_q, {tuple(cu_seqlens_q.shape)}"
            )
        super().__init__(varlen=self)
        for name, value in (
            ("cu_seqlens_q", cu_seqlens_q),
            ("cu_seqlens_k", cu_seqlens_k),
            ("max_seqlen_q", max_seqlen_q),
            ("max_seqlen_k", max_seqlen_k),
        ):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "lengths", None)

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    lengths: tuple[tuple[int, ...], tuple[int, ...]] | None
    """The sequences' lengths, of queries and of keys, once analysis has read them."""

    def with_lengths(self, queries: tuple[int, ...], keys: tuple[int, ...]) -> Varlen:
        """The same packing, its lengths known."""
        longest = max(queries, default=0), max(keys, default=0)
        keys_too = None if self.alike or queries == keys else self.cu_seqlens_k
        made = Varlen(self.cu_seqlens_q, keys_too, *longest)
        object.__setattr__(made, "lengths", (queries, keys))
        return made

    @property
    def alike(self) -> bool:
        """Whether queries and keys are packed alike, as far as that is known without reading."""
        return self.cu_seqlens_q is self.cu_seqlens_k

    def packing(self, query_length: int, key_length: int) -> str:
        """``tidy`` where the sequences cover all tokens and each has keys, else ``loose``; or ``unknown``."""
        if self.lengths is None:
            return "unknown"
        queries, keys = self.lengths
        covered = sum(queries) == query_length and sum(keys) == key_length
        return "tidy" if covered and all(queries) and all(keys) else "loose"

    @property
    def packing_key(self) -> tuple[Any, ...]:
        """All that validation and selection read of the packing: hashable."""
        sums = None if self.lengths is None else [(sum(one), all(one)) for one in self.lengths]
        return (_read(self.cu_seqlens_q), _read(self.cu_seqlens_k), self.alike, sums and (*sums,))

    def without_keys(self, query_length: int, bands: list[Window]) -> Tensor:
        """Bool (Q,): queries that see no key, in a tidy packing with bands."""
        starts_q, starts_k = self.cu_seqlens_q, self.cu_seqlens_k
        tokens = torch.arange(query_length, device=starts_q.device)
        owner = sequence_of(starts_q, tokens)
        place = tokens - starts_q[owner]
        lengths = starts_k.diff()[owner]
        return sees_none(place, starts_q.diff()[owner], lengths, bands)

    def same_sequence(self, query: Tensor, key: Tensor) -> Tensor:
        """Bool (1, 1, R, S), of token indices (R,) and (S,): True where both belong to one sequence.

        Tokens past the last belong to none.
        """
        query_of, key_of = sequence_of(self.cu_seqlens_q, query), sequence_of(self.cu_seqlens_k, key)
        inside = query_of < len(self.cu_seqlens_q) - 1
        return ((query_of[:, None] == key_of[None, :]) & inside[:, None])[None, None]

    def band(self, query: Tensor, key: Tensor, left: int | None, right: int | None, alignment: str) -> Tensor:
        """Bool (1, 1, R, S): the band that each sequence has by itself; what it says across sequences means nothing."""
        starts_q, starts_k = self.cu_seqlens_q, self.cu_seqlens_k
        owner = sequence_of(starts_q, query).clamp(max=max(0, len(starts_q) - 2))
        place = query - starts_q[owner]
        if alignment == "bottom_right":
            lengths = [starts.diff() if len(starts) > 1 else starts for starts in (starts_q, starts_k)]
            place = place + (lengths[1] - lengths[0])[owner]
        own_key = key[None, :] - starts_k[owner][:, None]
        return within(place[:, None], own_key, left, right)[None, None]


def as_mask(attn_mask: object) -> Mask | None:
    """A user's ``attn_mask`` as a mask: None, a tensor with SDPA's meaning, a mask value, or a ``BlockMask``."""
    if attn_mask is None or isinstance(attn_mask, Mask):
        return attn_mask
    if isinstance(attn_mask, Tensor):
        if attn_mask.dtype == torch.bool:
            return Mask(dense=attn_mask)
        if attn_mask.is_floating_point():
            return Mask(bias=attn_mask)
        raise InvalidArgument(
            "attn_mask", attn_mask.dtype, "give bool (True may attend) or float (added to the scores)"
        )
    if type(attn_mask).__name__ == "BlockMask" and type(attn_mask).__module__.startswith("torch."):
        return Mask(block=attn_mask)
    raise InvalidArgument(
        "attn_mask", type(attn_mask).__name__, "give a tensor, one of heedful's mask values, a BlockMask or None"
    )


def key_of(attn_mask: Tensor | Mask) -> tuple[Any, ...]:
    """All that validation and selection read of a user's mask: hashable. Raises TypeError for what is no such mask."""
    if isinstance(attn_mask, Tensor):
        wants_grad = attn_mask.requires_grad and torch.is_grad_enabled()
        return (attn_mask.dtype, attn_mask.shape, attn_mask.device, wants_grad)
    if isinstance(attn_mask, Mask):
        return attn_mask.key
    raise TypeError(f"no mask: {type(attn_mask).__name__}")


def as_window(window: tuple[int | None, int | None] | int, alignment: str) -> Window | None:
    """A window (left, right), both ends included, checked; one number is both sides, None or a negative one is open."""
    sides = window if isinstance(window, (tuple, list)) else (window, window)
    if len(sides) != 2 or not all(map(_is_side, sides)):
        raise InvalidArgument("window", window, "give (left, right) as numbers of keys, None for an open side")
    left, right = (None if side is None or not 0 <= side < _FAR else side for side in sides)
    return None if left is None and right is None else (left, right, as_alignment(alignment))


def _is_side(side: object) -> bool:
    return side is None or (isinstance(side, int) and not isinstance(side, bool))


def of_rank_four(tensor: Tensor) -> Tensor:
    """A mask's tensor with leading ones up to four dimensions: kernels take fewer only in part (CPU flash: 2 and 4)."""
    return tensor if tensor.dim() >= 4 else tensor[(None,) * (4 - tensor.dim())]


def savable(attn_mask: Any) -> Any:
    """The same mask with copies of the tensors made in inference mode, which autograd cannot save for a gradient."""
    if isinstance(attn_mask, Tensor):
        return attn_mask.clone() if attn_mask.is_inference() else attn_mask
    if not isinstance(attn_mask, Mask):
        return attn_mask
    tensors = {name: getattr(attn_mask, name) for name in ("dense", "bias", "padding", "rows")}
    if not any(tensor is not None and tensor.is_inference() for tensor in tensors.values()):
        return attn_mask
    return replace_part(attn_mask, **{name: savable(tensor) for name, tensor in tensors.items()})


def replace_part(mask: Mask, **parts: object) -> Mask:
    """A mask with some parts exchanged (``dataclasses.replace`` would call the subclass's own constructor)."""
    fields = ("causal", "window", "padding", "varlen", "dense", "bias", "block", "rows", "profile", "noop")
    return Mask(**{name: parts.get(name, getattr(mask, name)) for name in fields})  # type: ignore[arg-type]


def facts_of(mask: Mask | None, query_length: int = 0, key_length: int = 0) -> MaskFacts:
    """What can be known of a mask without reading its tensors; lengths are those of the queries and keys."""
    if mask is None:
        return NO_MASK
    packed = mask.varlen if isinstance(mask.varlen, Varlen) else None
    return MaskFacts(
        causal=mask.causal,
        window=mask.window,
        key_padding=mask.padding is not None,
        varlen=mask.varlen is not None,
        dense=None if mask.dense is None else _axes(mask.dense),
        bias=None if mask.bias is None else _axes(mask.bias),
        bias_dtype=None if mask.bias is None else mask.bias.dtype,
        bias_needs_grad=mask.bias is not None and mask.bias.requires_grad,
        block=mask.block is not None,
        query_padding=mask.rows is not None,
        noop=mask.noop,
        rows_seen=_rows_seen(mask),
        side=mask.profile.side if mask.profile else None,
        kept=mask.profile.eighths if mask.profile else None,
        queries_alike=mask.profile is not None and mask.profile.alike,
        packing="" if mask.varlen is None else packed.packing(query_length, key_length) if packed else "unknown",
        packed_alike=packed is not None and packed.alike,
    )


def _rows_seen(mask: Mask) -> bool:
    """Whether every query is known to see a key: each row keeps one, and nothing else can hide it."""
    if mask.profile is None or min(mask.profile.kept, default=0) == 0:
        return False
    beside = (mask.window, mask.varlen, mask.dense, mask.bias, mask.block, mask.rows)
    first_key_is_seen = mask.causal is None or (mask.causal == "top_left" and mask.profile.side == "right")
    return first_key_is_seen and all(part is None for part in beside)


def _read(tensor: Tensor | None) -> tuple[Any, ...] | None:
    return None if tensor is None else (tensor.dtype, tensor.shape, tensor.device)


def _tensor(name: str, given: object) -> Tensor:
    if not isinstance(given, Tensor):
        raise InvalidArgument(name, type(given).__name__, "give a torch.Tensor")
    return given


def _axes(tensor: Tensor) -> str:
    sizes = (1,) * (4 - tensor.dim()) + tuple(tensor.shape)
    present = (any(size != 1 for size in sizes[:-3]), *(size != 1 for size in sizes[-3:]))
    return "".join(axis for axis, there in zip("BHQK", present, strict=True) if there)


def as_alignment(alignment: str) -> Alignment:
    """The name of an alignment, checked."""
    for known in ALIGNMENTS:
        if alignment == known:
            return known
    raise InvalidArgument("causal_alignment", repr(alignment), f"give one of {', '.join(ALIGNMENTS)}")


def _only(one: Any, other: Any, what: str) -> Any:
    if one is None or other is None or one is other or (isinstance(one, str) and one == other):
        return other if one is None else one
    raise InvalidArgument("attn_mask", f"two different {what}", "combine them into one Dense mask")


def _lone_profile(one: Mask, other: Mask) -> PaddingProfile | None:
    """The profile of two masks' padding together: known where only one of them has any."""
    padded = [mask for mask in (one, other) if mask.padding is not None or mask.rows is not None]
    return padded[0].profile if len(padded) == 1 else None


def _both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return one & other if one is not None and other is not None else other if one is None else one


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return one + other if one is not None and other is not None else other if one is None else one


def _narrower(one: Window | None, other: Window | None) -> Window | None:
    if one is None or other is None:
        return other if one is None else one
    if one[2] != other[2]:
        raise InvalidArgument("attn_mask", "two windows of different alignment", "combine them into one Dense mask")
    left, right = (
        min((side for side in sides if side is not None), default=None)
        for sides in zip(one[:2], other[:2], strict=True)
    )
    return left, right, one[2]


def without_keys(mask: Mask, query_length: int, key_length: int, device: torch.device) -> Tensor:
    """Bool (Q,): queries that causality, a window and a tidy packing leave without any key."""
    if mask.varlen is not None:
        return mask.varlen.without_keys(query_length, mask.bands)
    return sees_none(torch.arange(query_length, device=device), query_length, key_length, mask.bands)
