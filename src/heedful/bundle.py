"""A failed call in one file, to be sent to whoever can mend it. ``replaying`` runs it again.

A ``.safetensors`` file: the call's tensors, and as JSON in its metadata the problem, the call's words, which backend
gave the answer after which rewrites, what was wrong with it, and on which machine. Nothing in it is executed; what is
read is checked, field by field, before it is used.

Strides matter to kernels, so they are kept: a tensor comes back with its own, and with its offset modulo 64 elements,
where its elements do not overlap and fill at least a quarter of the memory that they span; expanded sizes are stored
once.

Needs the package safetensors.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heedful import facts as machine_facts
from heedful.call import problem_of_call
from heedful.errors import HeedfulError, InvalidArgument
from heedful.masks import Mask, Varlen, as_alignment, as_mask, as_window
from heedful.problem import AttentionProblem

FORMAT = 1
MAX_BYTES = 2_000_000_000
WORDS = (
    "dropout_p", "is_causal", "scale", "enable_gqa", "layout", "causal_alignment", "window", "softcap", "max_error",
    "options", "return_lse",
)  # fmt: skip
_MASK_TENSORS = ("dense", "bias", "padding", "rows", "cu_seqlens_q", "cu_seqlens_k")
_SIZES = ("batch", "heads", "kv_heads", "query_length", "key_length", "head_dim", "value_dim", "dtype", "layout")
_LARGEST_DENSE = 1 << 26  # elements of a BlockMask's dense form
_OFFSETS = 64


@dataclass(frozen=True, eq=False)
class Bundle:
    """A call out of a file, and what was recorded of it. Tensors are on the CPU, in the layout of the call."""

    path: Path
    problem: AttentionProblem
    call: Mapping[str, Any]
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | Mask | None
    strategy: str
    version: str
    steps: tuple[str, ...]
    fault: str
    machine: Mapping[str, Any]
    time: str

    def on(self, device: torch.device) -> Bundle:
        """The same with its tensors on a device, in memory as they are here."""
        query, key, value = (_at(tensor, device) for tensor in (self.query, self.key, self.value))
        return replace(self, query=query, key=key, value=value, mask=_moved(self.mask, device))


# Writing


def write_bundle(
    folder_or_file: Path,
    *,
    problem: AttentionProblem,
    call: Mapping[str, Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    strategy: str,
    version: str,
    steps: tuple[str, ...],
    fault: str,
    machine: Mapping[str, Any],
    max_bytes: int = MAX_BYTES,
) -> Path:
    """Write a failed call to a new file, ``heedful-<strategy>-<time>-<n>.safetensors`` in a folder; give its path.

    Args:
        call: the arguments of ``heedful.attention`` that are no tensors, by their names.
        mask: the user's ``attn_mask``: a tensor, a mask value, a BlockMask (stored as a bool tensor), or None.
        steps: the names of the lowerings that the answer came through.

    Whole or not at all, and nothing is overwritten. Raises InvalidArgument for what cannot be stored, or is larger than
    ``max_bytes``; HeedfulError without safetensors; OSError where the folder cannot be written.
    """
    _need_safetensors()
    unknown = sorted(set(call) - set(WORDS))
    if unknown:
        raise InvalidArgument("call", ", ".join(unknown), f"give only {', '.join(WORDS)}")
    mask_words, mask_tensors = _described(mask, problem, query.device)
    tensors = {"query": query, "key": key, "value": value, **mask_tensors}
    stored = {name: _lean(tensor.detach()) for name, tensor in tensors.items()}
    size = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    if size > max_bytes:
        remedy = f"at most {max_bytes} are written; raise max_bytes, or find a smaller call that fails"
        raise InvalidArgument("bundle", f"{size} bytes", remedy)
    data = {
        "format": FORMAT,
        "problem": problem.to_dict(),
        "call": {name: value for name, value in call.items() if value is not None},
        "mask": mask_words,
        "tensors": {name: _placed(tensor) for name, tensor in tensors.items()},
        "strategy": strategy,
        "version": version,
        "steps": list(steps),
        "fault": fault,
        "machine": dict(machine),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    try:
        text = json.dumps(data)
    except (TypeError, ValueError) as error:
        raise InvalidArgument("call, machine", f"what JSON cannot hold ({error})", "give plain data") from error
    flat = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in stored.items()}
    return _written(Path(folder_or_file), strategy, flat, text)


def _written(target: Path, strategy: str, tensors: dict[str, Tensor], text: str) -> Path:
    """Reserve a name that is free, write beside it, and put the whole file in its place."""
    from safetensors.torch import save_file

    path = _reserved(target, strategy)
    try:
        with tempfile.TemporaryDirectory(prefix=".heedful-", dir=path.parent) as room:
            made = Path(room) / "bundle"
            save_file(tensors, made, {"heedful": text})
            os.replace(made, path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


def _reserved(target: Path, strategy: str) -> Path:
    if target.suffix == ".safetensors":
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            target.touch(exist_ok=False)
        except FileExistsError:
            raise InvalidArgument("bundle", f"{target}, which exists", "name a new file, or a folder") from None
        return target
    target.mkdir(parents=True, exist_ok=True)
    stem = f"heedful-{re.sub(r'[^A-Za-z0-9_.-]', '_', strategy)}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    number = 0
    while True:
        path = target / f"{stem}-{number}.safetensors"
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            number += 1
        else:
            return path


def _described(given: Any, problem: AttentionProblem, device: torch.device) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The words of a mask, and its tensors."""
    if isinstance(given, Tensor):
        return {"kind": "tensor"}, {"mask.tensor": given}
    mask = as_mask(given)
    if mask is None:
        return {"kind": "none"}, {}
    words: dict[str, Any] = {"kind": "value", "causal": mask.causal, "window": mask.window, "noop": mask.noop}
    parts = {name: getattr(mask, name) for name in ("bias", "padding", "rows")}
    parts["dense"] = mask.dense if mask.block is None else _as_dense(mask, problem, device)
    if mask.varlen is not None:
        parts |= {"cu_seqlens_q": mask.varlen.cu_seqlens_q}
        parts |= {} if mask.varlen.alike else {"cu_seqlens_k": mask.varlen.cu_seqlens_k}
        words["longest"] = [mask.varlen.max_seqlen_q, mask.varlen.max_seqlen_k]
    return words, {f"mask.{name}": tensor for name, tensor in parts.items() if tensor is not None}


def _as_dense(mask: Mask, problem: AttentionProblem, device: torch.device) -> Tensor:
    batch, heads = mask.block.kv_num_blocks.shape[:2]
    size = batch * heads * problem.query_length * problem.key_length
    if size > _LARGEST_DENSE:
        remedy = f"it is code, and can be stored as a bool tensor of at most {_LARGEST_DENSE} elements only"
        raise InvalidArgument("mask", f"a BlockMask of {size} elements", remedy)
    only = Mask(dense=mask.dense, block=mask.block)
    seen = only.visible(problem.query_length, problem.key_length, device)
    assert seen is not None
    return seen


def _lean(tensor: Tensor) -> Tensor:
    """Without the copies that an expanded size stands for."""
    for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        tensor = tensor.narrow(axis, 0, 1) if size > 1 and stride == 0 else tensor
    return tensor


def _placed(tensor: Tensor) -> dict[str, Any]:
    offset = tensor.storage_offset() % _OFFSETS
    return {"shape": list(tensor.shape), "stride": list(tensor.stride()), "offset": offset}


# Reading


def read_bundle(path: Path) -> Bundle:
    """A bundle out of a file that may come from anybody.

    Raises InvalidArgument with the path, what is wrong and the remedy; HeedfulError without safetensors.
    """
    _need_safetensors()
    reader = _Reader(Path(path))
    return reader.bundle()


def _need_safetensors() -> None:
    if machine_facts.probe().package("safetensors", "safetensors") is None:
        raise HeedfulError("bundles need the package safetensors: pip install 'heedful[bundle]'")


class _Reader:
    """A file, read and checked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data, self.tensors = self._opened()

    def wrong(self, what: str) -> InvalidArgument:
        remedy = "give a file that heedful wrote, whole and unchanged"
        return InvalidArgument("bundle", f"{self.path}: {what}", remedy)

    def _opened(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        from safetensors import SafetensorError, safe_open

        if not self.path.is_file():
            raise self.wrong("there is no such file")
        try:
            with safe_open(self.path, framework="pt") as file:
                text = (file.metadata() or {}).get("heedful")
                data = None if text is None else json.loads(text)
                names = set(file.keys())
                known = {"query", "key", "value", "mask.tensor", *(f"mask.{name}" for name in _MASK_TENSORS)}
                if not isinstance(data, dict):
                    raise self.wrong("it holds no call of heedful")
                if not {"query", "key", "value"} <= names <= known:
                    raise self.wrong(f"it holds the tensors {', '.join(sorted(names)) or 'none'}")
                if data.get("format") != FORMAT:
                    raise self.wrong(f"its format is {data.get('format')!r}, and this version reads {FORMAT}")
                return data, {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            if isinstance(error, InvalidArgument):
                raise
            raise self.wrong(f"it is no whole safetensors file ({error})") from None

    def field(self, name: str, kind: type, data: Mapping[str, Any] | None = None) -> Any:
        """A field of the JSON data, of the type that it must have."""
        found = (self.data if data is None else data).get(name)
        if not isinstance(found, kind) or (kind is not bool and isinstance(found, bool)):
            raise self.wrong(f"its {name} is {found!r:.80}, not of type {kind.__name__}")
        return found

    def bundle(self) -> Bundle:
        problem, call = self._problem(), self._call()
        placed = {name: self._placed(name, tensor) for name, tensor in self.tensors.items()}
        query, key, value = (placed[name] for name in ("query", "key", "value"))
        try:
            mask = self._mask(placed)
            with torch.autocast("cpu", problem.dtype, enabled=problem.autocast):
                found = problem_of_call(query, key, value, mask, **call)
        except (InvalidArgument, TypeError, RuntimeError) as error:
            raise self.wrong(f"its call is none ({error})") from None
        for name in _SIZES:
            if getattr(found, name) != getattr(problem, name):
                raise self.wrong(f"its {name} is {getattr(problem, name)!r}, and its tensors' {getattr(found, name)!r}")
        self._check_packing(mask, found)
        steps = self.field("steps", list)
        if not all(isinstance(step, str) for step in steps):
            raise self.wrong("its steps are no names")
        texts = {name: self.field(name, str) for name in ("strategy", "version", "fault", "time")}
        machine = self.field("machine", dict)
        return Bundle(self.path, problem, call, query, key, value, mask, steps=tuple(steps), machine=machine, **texts)

    def _problem(self) -> AttentionProblem:
        try:
            problem = AttentionProblem.from_dict(self.field("problem", dict))
            hash(problem)
            str(problem)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise self.wrong(f"its problem cannot be read ({error})") from None
        if not isinstance(problem.device, str) or not isinstance(problem.autocast, bool):
            raise self.wrong(f"its device is {problem.device!r:.80} and its autocast {problem.autocast!r:.80}")
        if problem.autocast and problem.dtype not in (torch.float16, torch.bfloat16):
            raise self.wrong(f"its autocast is to {problem.dtype}")
        return problem

    def _call(self) -> dict[str, Any]:
        call: dict[str, Any] = self.field("call", dict)
        unknown = sorted(set(call) - set(WORDS))
        if unknown:
            raise self.wrong(f"its call has the unknown words {', '.join(map(repr, unknown))}")
        window = call.get("window")
        return call | ({"window": tuple(window)} if isinstance(window, list) else {})

    def _placed(self, name: str, stored: Tensor) -> Tensor:
        """A tensor with its own strides again, as far as that is safe."""
        place = self.field(name, dict, self.field("tensors", dict))
        shape, stride = (self.field(word, list, place) for word in ("shape", "stride"))
        numbers = [*shape, *stride, place.get("offset")]
        if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers):
            raise self.wrong(f"the tensor {name} has shape {shape}, stride {stride}, offset {place.get('offset')}")
        lean = [1 if step == 0 and size > 1 else size for size, step in zip(shape, stride, strict=False)]
        if len(shape) != len(stride) or lean != list(stored.shape) or place["offset"] >= _OFFSETS:
            raise self.wrong(f"the tensor {name} is of shape {list(stored.shape)}, and was to be {shape}")
        return _strided(stored, stride, place["offset"]).expand(shape)

    def _mask(self, tensors: Mapping[str, Tensor]) -> Tensor | Mask | None:
        words = self.field("mask", dict)
        parts = {name.removeprefix("mask."): tensor for name, tensor in tensors.items() if name.startswith("mask.")}
        kind = words.get("kind")
        if kind in ("none", "tensor"):
            if set(parts) != ({"tensor"} if kind == "tensor" else set()):
                raise self.wrong(f"its mask is of kind {kind}, with {', '.join(parts) or 'no tensor'}")
            return parts.get("tensor")
        if kind != "value" or "tensor" in parts:
            raise self.wrong(f"its mask is of kind {kind!r:.80}")
        for name, tensor in parts.items():
            flags = name in ("dense", "padding", "rows")
            fits = tensor.dtype == torch.bool if flags else tensor.is_floating_point() or name != "bias"
            if not fits or (name in ("padding", "rows") and tensor.dim() != 2):
                raise self.wrong(f"its mask's {name} is {tensor.dtype} of shape {tuple(tensor.shape)}")
        window = words.get("window")
        window = None if window is None else self.field("window", list, words)
        if window is not None and len(window) != 3:
            raise self.wrong(f"its mask's window is {window}")
        ends = {name: parts.pop(name) for name in ("cu_seqlens_q", "cu_seqlens_k") if name in parts}
        longest = words.get("longest", [None, None])
        if not isinstance(longest, list) or len(longest) != 2:
            raise self.wrong(f"its mask's longest sequences are {longest!r:.80}")
        return Mask(
            causal=None if words.get("causal") is None else as_alignment(words["causal"]),
            window=None if window is None else as_window((window[0], window[1]), window[2]),
            varlen=Varlen(**ends, max_seqlen_q=longest[0], max_seqlen_k=longest[1]) if ends else None,
            noop=self.field("noop", bool, words),
            **parts,  # type: ignore[arg-type]
        )

    def _check_packing(self, mask: Tensor | Mask | None, problem: AttentionProblem) -> None:
        """Kernels read and write where these numbers say."""
        varlen = mask.varlen if isinstance(mask, Mask) else None
        if varlen is None:
            return
        lengths = (problem.query_length, problem.key_length)
        longest = (varlen.max_seqlen_q, varlen.max_seqlen_k)
        for ends, total, most in zip((varlen.cu_seqlens_q, varlen.cu_seqlens_k), lengths, longest, strict=True):
            if int(ends[0]) != 0 or bool((ends.diff() < 0).any()) or int(ends[-1]) > total:
                raise self.wrong(f"its sequences end at {ends.tolist()[:8]}…, of {total} tokens")
            if most is not None and (type(most) is not int or not 0 <= most <= total):
                raise self.wrong(f"its longest sequence is {most!r:.80}, of {total} tokens")


def _strided(stored: Tensor, stride: list[int], offset: int) -> Tensor:
    """The same numbers with these strides, where they overlap nowhere and leave no more than three in four unused."""
    axes = sorted((step, size) for step, size in zip(stride, stored.shape, strict=True) if size > 1)
    span, room = 1, 0
    for step, size in axes:
        if step < span:  # elements overlap
            return stored
        span, room = step * (size - 1) + span, step * size
    if not stored.numel() or max(span, room) > 4 * stored.numel() + _OFFSETS:
        return stored
    memory = torch.empty(offset + span, dtype=stored.dtype, device=stored.device)
    return memory.as_strided(stored.shape, stride, offset).copy_(stored)


def _at(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor there, in memory as it was here."""
    if tensor.device == device:
        return tensor
    there = _strided(_lean(tensor).to(device), list(tensor.stride()), int(tensor.storage_offset()) % _OFFSETS)
    return there.expand(tensor.shape)


def _moved(mask: Tensor | Mask | None, device: torch.device) -> Tensor | Mask | None:
    if not isinstance(mask, Mask):
        return None if mask is None else _at(mask, device)
    packed = mask.varlen
    if packed is not None:
        ends = packed.cu_seqlens_q.to(device), None if packed.alike else packed.cu_seqlens_k.to(device)
        packed = Varlen(*ends, packed.max_seqlen_q, packed.max_seqlen_k)
    tensors = {name: getattr(mask, name) for name in ("dense", "bias", "padding", "rows")}
    moved: dict[str, Any] = {name: None if tensor is None else _at(tensor, device) for name, tensor in tensors.items()}
    return Mask(causal=mask.causal, window=mask.window, varlen=packed, noop=mask.noop, **moved)
