"""A problem out of words: shapes, dtypes and masks as one types them, without any tensor of that size.

Masks are built as values over tensors of torch's meta device, and carry what analysis finds in real ones: the side
and the share of padding, and that a packing is tidy.

Shapes: B batch, H heads, Q query length, K key length, D head dim, E value dim, S length, T packed tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeVar, get_args

import torch
import typer

from heedful.cases import Case
from heedful.errors import InvalidArgument
from heedful.masks import Mask, PaddingProfile, Side, Varlen, as_window
from heedful.problem import LAYOUTS, Shape, sizes_of

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}
MASKS = (
    "none, causal, causal-bottom-right, padding, left-padding, interior-padding, window:L,R, window-bottom-right:L,R, "
    "dense[:BHQK], bias[:BHQK], varlen, block"
)
_ORDER = {"BHSD": "B,H,S,D", "BSHD": "B,S,H,D", "THD": "T,H,D"}
_EXAMPLE = {"BHSD": "2,10,4096,64", "BSHD": "2,4096,10,64", "THD": "8192,10,64"}
_HEADS = {"BHSD": -3, "BSHD": -2, "THD": -2}
_OPTION_OF = {
    "query": "--shape",
    "key": "--key-shape",
    "value": "--value-dim",
    "key, value": "--key-shape",
    "attn_mask": "--mask",
    "dropout_p": "--dropout",
    "window": "--mask",
}
_LARGEST = 1 << 62
R = TypeVar("R")


@dataclass(frozen=True)
class Shapes:
    """The three shapes in their layout, and whether key and value have fewer heads on purpose."""

    query: Shape
    key: Shape
    value: Shape
    layout: str
    enable_gqa: bool


def as_option(ask: Callable[[], R]) -> R:
    """What ``ask`` answers; what heedful finds wrong with an argument names the option that it came by."""
    try:
        return ask()
    except InvalidArgument as error:
        hint = _OPTION_OF.get(error.argument, f"--{error.argument}")
        raise typer.BadParameter(str(error), param_hint=hint) from error


def dtype_of(word: str) -> torch.dtype:
    """A dtype by its short name or torch's. Raises BadParameter."""
    dtype = getattr(torch, DTYPES.get(word, word.removeprefix("torch.")), None)
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    raise typer.BadParameter(f"got {word!r}; give one of {', '.join(DTYPES)}", param_hint="--dtype")


def layout_of(word: str) -> str:
    """A layout, whatever the case of its letters. Raises BadParameter."""
    if word.upper() in LAYOUTS:
        return word.upper()
    raise typer.BadParameter(f"got {word!r}; give one of {', '.join(LAYOUTS)}", param_hint="--layout")


def shapes_of(shape: str, key_shape: str | None, kv_heads: int | None, value_dim: int | None, layout: str) -> Shapes:
    """The three shapes; keys are like the query unless told otherwise. Raises BadParameter."""
    query = _sizes(shape, "--shape", layout)
    key, heads = query if key_shape is None else _sizes(key_shape, "--key-shape", layout), _HEADS[layout]
    grouped = len(query) >= -heads and len(key) >= -heads
    if kv_heads is not None:
        if not grouped:
            raise typer.BadParameter(
                f"got {kv_heads}, and shape {shape} has no heads; give {_ORDER[layout]}", param_hint="--kv-heads"
            )
        if key_shape is not None and key[heads] != kv_heads:
            remedy = f"--key-shape {key_shape} has {key[heads]} heads; give one of the two"
            raise typer.BadParameter(f"got {kv_heads}; {remedy}", param_hint="--kv-heads")
        key = (*key[:heads], kv_heads, *key[heads + 1 :])
    value = key if value_dim is None else (*key[:-1], value_dim)
    return Shapes(query, key, value, layout, grouped and query[heads] != key[heads])


def shapes_of_case(case: Case, layout: str) -> Shapes:
    """The shapes of a real model's call. Raises BadParameter."""
    if layout == "THD":
        raise typer.BadParameter("got 'THD'; cases are not packed: give BHSD or BSHD", param_hint="--layout")
    query, key, value = (
        (batch, length, heads, dim) if layout == "BSHD" else (batch, heads, length, dim)
        for batch, heads, length, dim in (case.query_shape, case.key_shape, case.value_shape)
    )
    return Shapes(query, key, value, layout, case.heads != case.kv_heads)


def words_of_case(case: Case) -> list[str]:
    """A case's mask, by this module's words."""
    return ["padding" if case.mask == "key_padding" else case.mask]


def mask_of(
    words: Iterable[str], kept: float | None, shapes: Shapes, dtype: torch.dtype, *, analysed: bool
) -> Mask | None:
    """The masks of these words, joined; with what analysis would find where ``analysed``. Raises BadParameter."""
    make = _Masks(kept, shapes, dtype, analysed)
    words, parts = tuple(words), dict[str, Any]()
    for word in words:
        for name, part in make.parts(word.strip().lower()).items():
            if name in parts:
                raise typer.BadParameter(f"got {word!r}, the second of its kind; give one", param_hint="--mask")
            parts[name] = part
    if kept is not None and not any("padding" in word.lower() for word in words):
        raise typer.BadParameter(f"got {kept}, and no padding; add --mask padding", param_hint="--kept")
    return Mask(**parts) if parts else None


class _Masks:
    """The parts of a Mask that a word stands for, at the sizes of a call."""

    def __init__(self, kept: float | None, shapes: Shapes, dtype: torch.dtype, analysed: bool) -> None:
        sizes, lead, _ = as_option(
            lambda: sizes_of(shapes.query, shapes.key, shapes.value, layout=shapes.layout, enable_gqa=shapes.enable_gqa)
        )
        self.lead, self.queries, self.keys = lead, sizes["query_length"], sizes["key_length"]
        self.kept, self.dtype, self.analysed = kept, dtype, analysed
        if math.prod(lead) * self.queries * self.keys > _LARGEST:
            came = f"{math.prod(lead)} x {self.queries} x {self.keys} scores"
            raise typer.BadParameter(f"got {came}; no machine has so many", param_hint="--shape")

    def parts(self, word: str) -> dict[str, Any]:
        """By the fields of Mask. Raises BadParameter."""
        name, _, more = word.partition(":")
        if name in {"dense", "bias"} and set(more) <= set("bhqk"):
            dtype = torch.bool if name == "dense" else self.dtype
            return {name: self._tensor(more or "qk", dtype)}
        if name in {"window", "window-bottom-right"}:
            return {"window": self._window(word, more, "top_left" if name == "window" else "bottom_right")}
        plain: dict[str, Callable[[], dict[str, Any]]] = {
            "none": dict,
            "causal": lambda: {"causal": "top_left"},
            "causal-bottom-right": lambda: {"causal": "bottom_right"},
            "varlen": lambda: {"varlen": self._varlen()},
            "block": lambda: {"block": SimpleNamespace(shape=(1, 1, self.queries, self.keys))},
        }
        if word in plain:
            return plain[word]()
        side = "right" if word == "padding" else word.removesuffix("-padding")
        for known in get_args(Side):
            if known == side and word.endswith("padding"):
                return self._padding(known)
        remedy = f"give one of {MASKS}; repeat --mask to join several"
        raise typer.BadParameter(f"got {word!r}; {remedy}", param_hint="--mask")

    def _tensor(self, axes: str, dtype: torch.dtype) -> torch.Tensor:
        """Of the full size along these axes, of size 1 along the others."""
        letters = "b" * len(self.lead[:-1]) + "h" * len(self.lead[-1:]) + "qk"
        sizes = (*self.lead, self.queries, self.keys)
        shape = [size if letter in axes else 1 for letter, size in zip(letters, sizes, strict=True)]
        return torch.empty(shape, dtype=dtype, device="meta")

    def _window(self, word: str, sides: str, alignment: str) -> Any:
        try:
            left, right = (None if side.strip() in {"", "none"} else int(side) for side in sides.split(","))
        except ValueError:
            remedy = "give two numbers of keys, such as window:128,0; leave one out for an open side: window:128,"
            raise typer.BadParameter(f"got {word!r}; {remedy}", param_hint="--mask") from None
        return as_window((left, right), alignment)

    def _padding(self, side: Side) -> dict[str, Any]:
        """Half of the keys unless told otherwise; some but not all of them for a share between 0 and 1."""
        share = 0.5 if self.kept is None else self.kept
        kept = round(share * self.keys)
        kept = min(max(kept, 1), self.keys - 1) if 0 < share < 1 else kept
        if kept == self.keys and self.analysed:
            return {}  # analysis finds that it hides nothing
        keep = torch.empty((1, self.keys), dtype=torch.bool, device="meta")
        return {"padding": keep, "profile": PaddingProfile(side, (max(kept, 0),), self.keys) if self.analysed else None}

    def _varlen(self) -> Varlen:
        """Two sequences of about the same length, or one where there are not two tokens."""
        parts = max(1, min(2, self.queries, self.keys))
        lengths = [(size // parts, size - size // parts)[-parts:] for size in (self.queries, self.keys)]
        ends = [torch.tensor([0, *one]).cumsum(0) for one in lengths]
        made = Varlen(ends[0], None if self.queries == self.keys else ends[1], max(lengths[0]), max(lengths[1]))
        return made.with_lengths(lengths[0], lengths[1]) if self.analysed else made


def _sizes(text: str, option: str, layout: str) -> Shape:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if sizes and all(0 <= size < 1 << 31 for size in sizes):
        return sizes
    remedy = f"give {_ORDER[layout]} as whole numbers with commas, such as {_EXAMPLE[layout]}"
    raise typer.BadParameter(f"got {text!r}; {remedy}", param_hint=option)
