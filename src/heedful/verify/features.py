"""What a check is about, derived from its sample: the rows of the matrix, in order. A check may be about several."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from heedful.testing.contract import Check
from heedful.testing.parts import Band, Block, Bool, Float, Packed, Padding, Part, Structured
from heedful.testing.samples import Sample
from heedful.testing.table import PLAIN

WHOLE = "as a whole"


@dataclass(frozen=True)
class Feature:
    """A row: ``of`` says whether a sample, looked at in an aspect, is about it."""

    name: str
    of: Callable[[Sample, str], bool]


def _dtype(dtype: torch.dtype) -> Feature:
    def there(sample: Sample, _: str) -> bool:
        return sample.dtype == dtype and sample.autocast is None  # which computes in another one

    return Feature(str(dtype).removeprefix("torch."), there)


def _masked(name: str, of: Callable[[Part], bool], *arguments: str) -> Feature:
    """Of samples with such a part in their mask, or with one of these arguments."""

    def there(sample: Sample, _: str) -> bool:
        given = [sample.call.get(word) for word in arguments]
        return any(map(of, sample.mask)) or any(value is not None and value is not False for value in given)

    return Feature(name, there)


def _called(name: str, argument: str) -> Feature:
    return Feature(name, lambda sample, _: sample.call.get(argument) is not None)


def _looked_at(name: str, *aspects: str) -> Feature:
    return Feature(name, lambda sample, aspect: aspect in aspects or (aspect == "dropout" and _also(sample, aspects)))


def _also(sample: Sample, aspects: tuple[str, ...]) -> bool:
    return bool(set(aspects) & set(sample.aspects))


def _is(part: Part, *kinds: str) -> bool:
    return isinstance(part, Structured) and part.kind in kinds


def _is_causal(part: Part) -> bool:
    if isinstance(part, Packed) and part.band is not None:
        return part.band[:2] == (None, 0)
    return _is(part, "causal") or (isinstance(part, Band) and (part.left, part.right) == (None, 0))


def _is_window(part: Part) -> bool:
    banded = isinstance(part, Band) or (isinstance(part, Packed) and part.band is not None)
    return _is(part, "band") or (banded and not _is_causal(part))


def _is_bias(part: Part) -> bool:
    return isinstance(part, Float) or (isinstance(part, Structured) and part.lowest is not None)


def _hides_rows(part: Part) -> bool:
    if isinstance(part, Float):
        return part.full_row and part.lowest == -math.inf
    return bool(getattr(part, "empty_row", False)) or (isinstance(part, Padding) and part.kind == "row")


def _has_sizes(sample: Sample, *names: str) -> bool:
    """Whether it has sizes of its own, and some."""
    return not sample.is_empty and any(getattr(sample, name) != getattr(PLAIN, name) for name in names)


def _is_strided(sample: Sample) -> bool:
    return any(
        one != "contiguous" for one in (sample.strides, *(getattr(p, "strides", "contiguous") for p in sample.mask))
    )


FEATURES: tuple[Feature, ...] = (
    *(_dtype(dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)),
    Feature("head dims", lambda sample, _: _has_sizes(sample, "head_dim")),
    Feature("value dims", lambda sample, _: _has_sizes(sample, "value_dim")),
    Feature("lengths", lambda sample, _: _has_sizes(sample, "query_length", "key_length")),
    Feature("grouped heads", lambda sample, _: sample.kv_heads is not None),
    Feature(
        "ranks, broadcasting",
        lambda sample, _: len(sample.lead) != 2 or sample.key_lead is not None or sample.value_lead is not None,
    ),
    Feature("layout BSHD", lambda sample, _: sample.layout == "BSHD"),
    Feature("strides", lambda sample, _: _is_strided(sample)),
    _masked("causal", _is_causal, "is_causal"),
    _masked("window", _is_window, "window"),
    _masked("padding", lambda part: isinstance(part, Padding) or _is(part, "padding", "both")),
    _masked("packed sequences", lambda part: isinstance(part, Packed) or _is(part, "blocks")),
    _masked("bool mask", lambda part: isinstance(part, Bool)),
    _masked("bias", _is_bias),
    _masked("block mask", lambda part: isinstance(part, Block)),
    Feature(
        "queries without keys",
        lambda sample, _: sample.name.startswith("empty-row") or any(map(_hides_rows, sample.mask)),
    ),
    Feature("NaN and garbage hidden", lambda _, aspect: aspect == "garbage"),
    _called("scale", "scale"),
    _called("softcap", "softcap"),
    Feature("dropout", lambda _, aspect: aspect == "dropout"),
    _looked_at("LSE", "lse", "both"),
    _looked_at("gradient", "gradient", "both"),
    Feature("deterministic", lambda sample, _: sample.deterministic),
    Feature("autocast", lambda sample, _: sample.autocast is not None),
    Feature("inference mode", lambda sample, _: bool(sample.inference)),
    Feature("torch.compile", lambda _, aspect: aspect == "compile"),
    Feature("zero sizes", lambda sample, _: sample.is_empty),
    Feature("must be refused", lambda sample, _: bool(sample.must_refuse)),
)
NAMES = (*(feature.name for feature in FEATURES), WHOLE)


def features_of(check: Check) -> tuple[str, ...]:
    """The rows that a check belongs to: one at the least."""
    sample = check.sample
    if sample is None:
        return (WHOLE,)
    return tuple(feature.name for feature in FEATURES if feature.of(sample, check.aspect))
