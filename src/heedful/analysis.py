"""What a mask's tensor says, once a tensor: the simplest mask value that means the same.

``analyse`` looks at contents; ``MaskCache`` remembers what was found for as long as the tensor's storage lives. Nothing
is ever guessed: a structure is named only where every element was checked to follow it. What is not looked at at all:
tensors that require grad (and views of them: fused optimisers write without counting), tensors made in inference mode
(which count no writes), subclasses, meta, nested and sparse tensors, more than four dimensions; and nothing while a
compiler, functorch, forward-mode AD, a dispatch mode or a CUDA graph capture listens. Writes that PyTorch does not
count (``.data``, NumPy, DLPack) are not noticed: a mask written that way after its first use is misread.

A tensor (Q, K) is taken to be of just these lengths: whoever uses the answer checks the shape of the original.

Shapes: B batch, H heads, Q query length, K key length, N packed sequences. Lower case: sizes without what is expanded.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack as listeners
from torch._C._functorch import maybe_current_level as transforms
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.multiprocessing.reductions import StorageWeakRef

from heedful.errors import InvalidArgument
from heedful.masks import Mask, PaddingProfile, Varlen, as_mask, key_of, replace_part
from heedful.survey import band_of, blocks_of, reduced, side_of, sides_of, stacked, survey_of, truths

DEVICES = ("cpu", "cuda")
BIASES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
READABLE = (torch.bool, *BIASES, torch.int32, torch.int64)
SAMPLED_ROWS = 16
MAX_BYTES = 64 << 20
MAX_ENTRIES = 256
MAX_OBJECTS = 1024


def analyse(mask: Mask, batch: int | None = None) -> Mask:
    """The simplest mask that means the same; the same object where nothing simpler is found. Nothing is kept.

    With ``batch`` 1 a block-diagonal tensor becomes a ``Varlen``, which no larger batch takes.
    """
    if not _may_look() or not all(map(_is_open, _parts(mask))):
        return mask
    found = _analysed(mask)
    return (found.single if batch == 1 else found.wide) or mask


class MaskCache:
    """Analysed masks by the storage, geometry and version of their tensors. Safe for threads: a race looks twice.

    ``max_bytes`` bounds the tensors that it holds; beyond that, the masks used longest ago are forgotten.
    """

    def __init__(self, max_bytes: int = MAX_BYTES, max_entries: int = MAX_ENTRIES) -> None:
        self.max_bytes, self.max_entries = max_bytes, max_entries
        self._objects: dict[int, _Recalled] = {}
        self._entries: OrderedDict[tuple[Any, ...], _Entry] = OrderedDict()
        self._lock = threading.RLock()  # the garbage collector may come back here while it is held

    def simplest(self, attn_mask: Any, batch: int | None = None, alone: bool = True) -> Any:
        """The analysed mask of a tensor or a mask value, each time the same object; ``attn_mask`` if none is simpler.

        ``batch`` is that of the queries, where it is known: the answer fits it. ``alone`` False says that the call
        hides more than this mask (``is_causal``, a window): then finite values of a bias do not count as hiding.
        """
        if attn_mask is None or is_compiling():
            return attn_mask
        known = self._recalled(attn_mask)
        entry = self._entry(attn_mask) if known is None else known.entry
        return attn_mask if entry is None else entry.answers.fitting(batch, alone, attn_mask)

    def keyed(self, attn_mask: Any, batch: int | None, alone: bool) -> tuple[Any, tuple[Any, ...]]:
        """``simplest`` of what is no None, and all that validation and selection read of it and of ``attn_mask``.

        The second is hashable, and remembered with the first. Nothing may be compiling. Raises TypeError for what is
        neither a tensor nor a mask value.
        """
        known = self._recalled(attn_mask)
        if known is not None:
            found = known.keys.get((batch, alone))
            if found is not None:
                seen, key = found
                return (attn_mask if seen is None else seen), key
        seen = self.simplest(attn_mask, batch, alone)
        key = key_of(attn_mask)
        if seen is not attn_mask:
            key = (key, seen.key)
        known = self._recalled(attn_mask)
        if known is not None:
            known.keys[batch, alone] = (None if seen is attn_mask else seen), key
        return seen, key

    def _recalled(self, attn_mask: Any) -> _Recalled | None:
        """What is remembered of this very object, where its contents are what they were and nobody listens."""
        known = self._objects.get(id(attn_mask))
        if known is None:
            return None
        reference, held, version, entry, on_cuda, _ = known
        given: Any = reference()
        if given is not attn_mask or not entry.live or listeners() or transforms() is not None:
            return None
        if held is None:
            if given._version != version or given.requires_grad:
                return None
        elif [(part._version, part.requires_grad) for part in held] != version:
            return None
        return None if on_cuda and torch.cuda.is_current_stream_capturing() else known

    def derive(self, made: Tensor, source: Any) -> None:
        """Say that ``made``, a fresh tensor, means what ``source`` means: it is not looked at. The caller's promise.

        For models that expand a mask anew in each layer. Nothing is remembered where one of the two stays opaque.
        """
        if not is_compiling() and isinstance(made, Tensor) and _is_open(made):
            entry = self._entry(source)
            if entry is not None and not entry.borrows:
                version = made._version
                self._remember(made, None, version, self._keep(_key_of((made,)), _Entry((made,), entry.answers)))

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            while self._entries:
                self._drop(next(iter(self._entries)))
            self._objects.clear()

    @property
    def nbytes(self) -> int:
        """The bytes of the tensors that are held for masks that live."""
        with self._lock:
            self._sweep()
            return sum(entry.nbytes for entry in self._entries.values())

    def __len__(self) -> int:
        with self._lock:
            self._sweep()
            return len(self._entries)

    def _entry(self, attn_mask: Any) -> _Entry | None:
        """By storage, analysed if need be; None where it must stay opaque."""
        if not isinstance(attn_mask, (Tensor, Mask)) or not _may_look():
            return None
        parts = _parts(attn_mask) if isinstance(attn_mask, Mask) else (attn_mask,)
        if not parts or not all(map(_is_open, parts)):
            return None
        structure = (attn_mask.causal, attn_mask.window, *_names(attn_mask)) if isinstance(attn_mask, Mask) else ()
        versions = [(part._version, False) for part in parts]  # before the contents: a write in between is a miss
        key = (*structure, *_key_of(parts))
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and not entry.counts_writes_with(parts):
                self._drop(key)
                entry = None
            if entry is not None:
                self._entries.move_to_end(key)
        if entry is None:
            mask = as_mask(attn_mask)
            assert mask is not None
            entry = _Entry(parts, _analysed(mask))
            if not entry.borrows:
                entry = self._keep(key, entry)
        if isinstance(attn_mask, Mask):
            self._remember(attn_mask, parts, versions, entry)
        else:
            self._remember(attn_mask, None, versions[0][0], entry)
        return entry

    def _keep(self, key: tuple[Any, ...], entry: _Entry) -> _Entry:
        """Hold an entry by its key, or give the one that another thread was quicker to make."""
        if entry.nbytes > self.max_bytes:
            entry.answers, entry.nbytes = _Answers(), 0
        with self._lock:
            entry = self._entries.setdefault(key, entry)
            self._sweep()
            held = sum(each.nbytes for each in self._entries.values())
            while held > self.max_bytes or len(self._entries) > self.max_entries:
                held -= self._drop(next(iter(self._entries)))
        return entry

    def _remember(self, given: Any, held: tuple[Tensor, ...] | None, version: Any, entry: _Entry) -> None:
        """The quick way back to an entry, for this very object. A mask value owns ``held``, so it goes with it."""
        objects, place = self._objects, id(given)
        with self._lock:
            while len(objects) >= MAX_OBJECTS:
                objects.pop(next(iter(objects)), None)
            reference = weakref.ref(given, lambda _: objects.pop(place, None))
            on_cuda = (given if held is None else held[0]).is_cuda
            objects[place] = _Recalled(reference, held, version, entry, on_cuda, {})

    def _sweep(self) -> None:
        for key in [key for key, entry in self._entries.items() if any(ref.expired() for ref in entry.storages)]:
            self._drop(key)

    def _drop(self, key: tuple[Any, ...]) -> int:
        entry = self._entries.pop(key)
        entry.live, entry.answers = False, _Answers()
        return entry.nbytes


@dataclass(frozen=True)
class _Answers:
    """``wide`` fits every batch, ``single`` batch 1; None: nothing simpler than the original.

    ``joins``: ``wide`` may be used beside other parts that hide keys, such as a call's ``is_causal``.
    """

    wide: Mask | None = None
    single: Mask | None = None
    joins: bool = True
    batch: int = 1

    def fitting(self, batch: int | None, alone: bool, original: Any) -> Any:
        """The answer for a batch; the original where the tensor's rows are not the batch's (five dimensions)."""
        if not (alone or self.joins) or (self.batch != 1 and batch is not None and batch != self.batch):
            return original
        answer = self.single if batch == 1 and alone else self.wide
        return original if answer is None else answer


class _Recalled(NamedTuple):
    """The quick way from one object to an entry: tensors ``held`` by a mask value, None for a tensor, and ``version``s.

    ``keys``: by batch, and by whether the mask is alone, the answer, None for the object itself, and what is read.
    """

    reference: weakref.ref[Any]
    held: tuple[Tensor, ...] | None
    version: Any
    entry: _Entry
    on_cuda: bool
    keys: dict[tuple[int | None, bool], tuple[Mask | None, tuple[Any, ...]]]


class _Entry:
    """Answers, and what they hold. ``borrows``: parts of the original itself, which then must not outlive it.

    The weak references keep the storages' addresses from being given to others, so a key can never name another one.
    ``roots``: the tensors whose counters of writes the parts share, their own or that of which they are views.
    """

    __slots__ = ("answers", "borrows", "live", "nbytes", "roots", "storages")

    def __init__(self, parts: tuple[Tensor, ...], answers: _Answers) -> None:
        self.roots = tuple(weakref.ref(_root(part)) for part in parts)
        self.storages = tuple(StorageWeakRef(part.untyped_storage()) for part in parts)
        self.answers, self.live = answers, True
        held = [tensor for mask in (answers.wide, answers.single) if mask for tensor in _tensors(mask)]
        made = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in held}
        self.borrows = any(ref.cdata in made for ref in self.storages)
        self.nbytes = sum(made.values())

    def counts_writes_with(self, parts: tuple[Tensor, ...]) -> bool:
        """Whether equal versions mean equal contents: ``.data`` and ``detach`` give new tensors that may count anew."""
        return all(ref() is _root(part) for ref, part in zip(self.roots, parts, strict=True))


def _root(tensor: Tensor) -> Tensor:
    base = tensor._base if tensor._is_view() else None
    return tensor if base is None else base


def _parts(mask: Mask) -> tuple[Tensor, ...]:
    """The tensors to look at; none where the mask is analysed already, or is one that would not become simpler."""
    if mask.block is not None or mask.profile is not None or mask.noop:
        return ()
    if mask.varlen is not None:
        known = mask.varlen.lengths is not None or any(
            part is not None for part in (mask.padding, mask.rows, mask.dense, mask.bias)
        )
        ends = (mask.varlen.cu_seqlens_q, mask.varlen.cu_seqlens_k)
        return () if known else ends[:1] if mask.varlen.alike else ends
    return tuple(t for t in (mask.padding, mask.rows, mask.dense, mask.bias) if t is not None)


def _names(mask: Mask) -> tuple[bool, ...]:
    return tuple(t is not None for t in (mask.padding, mask.rows, mask.dense, mask.bias))


def _tensors(mask: Mask) -> list[Tensor]:
    packing = () if mask.varlen is None else (mask.varlen.cu_seqlens_q, mask.varlen.cu_seqlens_k)
    return [t for t in (mask.padding, mask.rows, mask.dense, mask.bias, *packing) if t is not None]


def _key_of(parts: tuple[Tensor, ...]) -> tuple[Any, ...]:
    return tuple(
        (t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride(), t.dtype, t._version) for t in parts
    )


def _may_look() -> bool:
    """Whether nobody listens to what is computed here."""
    return not (
        is_compiling()
        or listeners()
        or transforms() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def _is_open(tensor: Tensor) -> bool:
    """Whether a tensor may be looked at, and counts the writes that would change it."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.requires_grad or tensor.is_inference():
        return False
    if tensor.layout != torch.strided or tensor.is_nested or tensor.dim() > 4 or tensor.is_neg():
        return False
    if tensor.device.type not in DEVICES:
        return False
    if tensor.dtype not in READABLE or (tensor.is_floating_point() and _of_a_leaf(tensor)):
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _of_a_leaf(tensor: Tensor) -> bool:
    """Whether it is a view of something that is learned."""
    return tensor._is_view() and tensor._base is not None and tensor._base.requires_grad


# Reading: every number is computed on the tensor's device, then all of them are fetched at once


class _Reading(NamedTuple):
    """Integers (n,) on the device, and what to make of them on the host."""

    numbers: Tensor
    decode: Callable[[list[int]], Any]


def _analysed(mask: Mask) -> _Answers:
    """The simplest equal masks, for every batch and for batch 1."""
    if not _parts(mask):
        return _Answers()
    if mask.varlen is not None:
        packed = replace_part(mask, varlen=_read_packing(mask.varlen))
        return _Answers(packed, packed)
    with torch.inference_mode(False), torch.no_grad():
        readings = {
            "padding": None if mask.padding is None else _read_padding(mask.padding, mask.rows),
            "dense": None if mask.dense is None else _read_tensor(mask.dense),
            "bias": None if mask.bias is None else _read_tensor(mask.bias),
        }
        found = _fetch({name: reading for name, reading in readings.items() if reading is not None})
        wide, single = (_joined(mask, found, batch_is_one=one) for one in (False, True))
    exact = not any(found[name].soft for name in ("dense", "bias") if name in found)
    joins = exact and (wide is None or (wide.causal, wide.window) == (mask.causal, mask.window))
    padding = [part for part in (wide.padding, wide.rows) if part is not None] if wide else []
    return _Answers(wide, single, joins, max(map(len, padding), default=1))


def _fetch(readings: dict[str, _Reading]) -> dict[str, Any]:
    """The one synchronisation with the device."""
    if not readings:
        return {}
    numbers = [reading.numbers for reading in readings.values()]
    values = (numbers[0] if len(numbers) == 1 else torch.cat(numbers)).tolist()
    found, start = {}, 0
    for name, reading in readings.items():
        end = start + len(reading.numbers)
        found[name] = reading.decode(values[start:end])
        start = end
    return found


@dataclass(frozen=True)
class _Found:
    """What one tensor turned out to be: ``mask``, or ``packed`` where the batch is 1; ``any_alignment``: Q is K.

    ``soft``: finite values were taken to hide, which holds only where nothing else hides the row's zeros.
    """

    mask: Mask | None = None
    packed: Mask | None = None
    any_alignment: bool = False
    soft: bool = False


def _joined(mask: Mask, found: dict[str, Any], *, batch_is_one: bool) -> Mask | None:
    """The mask with its tensors replaced by what was found; None where nothing is simpler."""
    alone = len(_parts(mask)) == 1 and not mask.causal and not mask.window
    result = Mask(mask.causal, mask.window, mask.padding, rows=mask.rows)
    if "padding" in found:
        padding, rows, profile = found["padding"]
        result = replace_part(result, padding=padding, rows=rows, profile=profile)
    changed = "padding" in found
    for name in ("dense", "bias"):
        tensor, one = getattr(mask, name), found.get(name, _Found())
        simple = one.packed if one.packed is not None and batch_is_one and alone else one.mask
        if alone and isinstance(simple, Mask):
            return simple
        joint = None if simple is None or one.soft else _both(result, simple, one.any_alignment)
        if joint is not None:
            result, changed = joint, True
        elif tensor is not None:
            result = replace_part(result, **{name: tensor})
    return result if changed else None


def _both(one: Mask, other: Mask, any_alignment: bool) -> Mask | None:
    """``one & other`` where ``other`` was read from a tensor; None where the two cannot be said in one mask."""
    if other.noop:
        return one
    if one.causal and other.causal and one.causal != other.causal:
        if not any_alignment:
            return None
        other = replace_part(other, causal=one.causal)
    if one.window and other.window and one.window[2] != other.window[2]:
        if not any_alignment:
            return None
        other = replace_part(other, window=(*other.window[:2], one.window[2]))
    profiles = [each for each in (one, other) if each.padding is not None or each.rows is not None]
    return replace_part(one & other, profile=profiles[0].profile if len(profiles) == 1 else None)


def _read_padding(keep: Tensor, rows: Tensor | None) -> _Reading | None:
    """Padding given as (B, K), and (B, Q): decodes to copies of both and their profile."""
    given = [keep] if rows is None else [keep, rows]
    if not all(part.numel() for part in given):
        return None
    parts = [truths(part[:1] if part.stride(0) == 0 else part) for part in given]
    sides = [sides_of(part) for part in parts]

    def decode(values: list[int]) -> tuple[Tensor, Tensor | None, PaddingProfile]:
        side, kept = side_of(values[: len(sides[0])])
        if rows is None:
            return parts[0], None, PaddingProfile(side, kept, keep.shape[1])
        query_side, used = side_of(values[len(sides[0]) :])
        most = max(len(kept), len(used))
        kept, used = (each * (most // len(each)) for each in (kept, used))
        return parts[0], parts[1], PaddingProfile(side, kept, keep.shape[1], used, query_side)

    return _Reading(torch.cat(sides), decode)


def _read_packing(varlen: Varlen) -> Varlen:
    """The packing with its lengths known. Raises InvalidArgument where its ends do not rise from 0."""
    ends = _parts(varlen)
    read = _fetch({str(place): _Reading(one.long(), lambda values: values) for place, one in enumerate(ends)})
    for name, values in zip(("cu_seqlens_q", "cu_seqlens_k"), read.values(), strict=False):
        if values[0] != 0 or any(end < start for start, end in pairwise(values)):
            raise InvalidArgument(name, values, "give ends that rise from 0 to the total")
    lengths = [tuple(end - start for start, end in pairwise(values)) for values in read.values()]
    return varlen.with_lengths(lengths[0], lengths[-1])


def _read_tensor(tensor: Tensor) -> _Reading | None:
    """A dense mask or a bias: decodes to what was ``_Found``. None where it is known at once to be nothing simpler."""
    if tensor.numel() == 0:
        return None
    small = reduced(tensor)
    queries, keys = (1, 1, *tensor.shape)[-2:]
    sampled = torch.linspace(0, small.shape[2] - 1, SAMPLED_ROWS, device=tensor.device).long()
    if tensor.device.type == "cpu" and small.shape[2] > 2 * SAMPLED_ROWS and not _could_be(small, sampled):
        return None
    survey = survey_of(small)
    blocks = blocks_of(survey) if len(small) == 1 and min(small.shape[2:]) > 1 else None
    flags = survey.flags() | (blocks.flags if blocks else {})
    sides, row_sides = sides_of(survey.column), sides_of(survey.some)
    hides = tensor.dtype == torch.bool
    nothing = tensor.new_full(tensor.shape[-1:], int(hides)).expand(tensor.shape)  # as large as one row

    def decode(values: list[int]) -> _Found:
        told = dict(zip(flags, values[: len(flags)], strict=True))
        if told["other"] or told["heads"] or (told["low"] and not told["rows"]):
            return _Found()
        if told["all"]:
            return _Found(Mask(dense=nothing, noop=True) if hides else Mask(bias=nothing, noop=True))
        if keys == 1:
            return _Found()  # of one key, or broadcast over any number of them
        same, soft = queries == keys, told["low"] > 0
        side, kept = side_of(values[len(flags) :][: len(sides)])
        if told["product"]:
            column, kept = survey.column.expand(-1, keys), tuple(count * (keys // small.shape[3]) for count in kept)
            if told["padding"] or queries == 1:
                return _Found(Mask(padding=column, profile=PaddingProfile(side, kept, keys)), None, same, soft)
            query_side, used = side_of(values[len(flags) + len(sides) :])
            profile = PaddingProfile(side, kept, keys, used, query_side)
            return _Found(Mask(padding=column, rows=survey.some, profile=profile), None, same, soft)
        band, whole = band_of(told, queries, keys)
        if band is not None:
            padding = {} if whole else {"padding": survey.column, "profile": PaddingProfile(side, kept, keys)}
            return _Found(replace_part(band, **padding), None, same, soft)
        return _Found(packed=blocks.decode(told) if blocks else None, soft=soft)

    return _Reading(torch.cat([stacked(flags), sides, row_sides]), decode)


def _could_be(small: Tensor, sampled: Tensor) -> bool:
    """Whether some rows follow a structure that all could follow: most arbitrary masks end here."""
    flags = survey_of(small[:, :, sampled], sampled, small.shape[2]).flags()
    told = dict(zip(flags, stacked(flags).tolist(), strict=True))
    structured = any(told.get(name) for name in ("product", "causal", "aligned", "window", "runs"))
    return bool(structured and not told["other"] and not told["heads"])
