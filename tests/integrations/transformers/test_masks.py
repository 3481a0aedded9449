"""Masks as values: the same elements as transformers' own dense mask has, whatever is done with them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import masking_utils as library

from heedful.integrations.transformers.masks import StructuredMask, attention_mask, band_of
from heedful.masks import Mask

CAUSAL = library.causal_mask_function
EVERY = library.bidirectional_mask_function
BANDS = {
    "causal": (CAUSAL, (None, 0)),
    "every": (EVERY, (None, None)),
    "window": (library.sliding_window_causal_mask_function(3), (2, 0)),
    "one": (library.sliding_window_causal_mask_function(1), (0, 0)),
    "both": (library.sliding_window_bidirectional_mask_function(2), (2, 2)),
}
PLACES = {  # queries, keys, offsets of both
    "whole": (6, 6, 0, 0),
    "continued": (3, 8, 5, 0),
    "trimmed": (3, 6, 9, 6),
    "cross": (4, 7, 0, 0),
}


def arguments(queries: int, keys: int, q_offset: int, kv_offset: int, **more: Any) -> dict[str, Any]:
    given = {"q_length": queries, "kv_length": keys, "q_offset": q_offset, "kv_offset": kv_offset}
    return {"batch_size": 2, **given, "device": torch.device("cpu"), "dtype": torch.float32, "config": None, **more}


def plain(call: dict[str, Any]) -> Tensor:
    made = library.sdpa_mask(**{**call, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    return made.expand(call["batch_size"], 1, call["q_length"], call["kv_length"])


@pytest.mark.parametrize("name", BANDS)
def test_bands_are_known(name: str) -> None:
    function, band = BANDS[name]
    assert band_of(function) == band


@pytest.mark.parametrize(
    "function",
    [
        library.chunked_causal_mask_function(3, torch.zeros(2, dtype=torch.long)),
        library.and_masks(CAUSAL, EVERY),
        library.and_masks(library.sliding_window_overlay(3), EVERY),
        library.and_masks(library.sliding_window_overlay(3), CAUSAL, CAUSAL),
        library.or_masks(library.sliding_window_overlay(3), CAUSAL),
        library.packed_sequence_mask_function(torch.zeros(2, 6)),
        lambda batch, head, query, key: key <= query,
    ],
)
def test_what_is_no_band_is_none(function: Any) -> None:
    assert band_of(function) is None


def test_a_window_whose_ends_are_others_than_meant_is_not_taken_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def overlay(sliding_window: int) -> Any:
        def inner_mask(batch_idx: int, head_idx: int, q_idx: int, kv_idx: int) -> bool:
            return kv_idx >= q_idx - sliding_window

        return inner_mask

    monkeypatch.setattr(library, "sliding_window_overlay", overlay)
    assert band_of(library.sliding_window_causal_mask_function(5)) is None


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("name", BANDS)
@pytest.mark.parametrize("padding", ["none", "left", "right", "short"])
def test_a_mask_has_the_elements_of_the_dense_one(name: str, places: str, padding: str) -> None:
    queries, keys, _, kv_offset = PLACES[places]
    total = keys + kv_offset
    keep = torch.ones(2, total - (padding == "short"), dtype=torch.bool)
    keep[1, slice(total - 2, None) if padding == "right" else slice(0, kv_offset + 2)] = False
    given = None if padding == "none" else keep
    call = arguments(*PLACES[places], mask_function=BANDS[name][0], attention_mask=given)
    got, want = attention_mask(**call), plain(call)
    assert isinstance(got, StructuredMask)
    assert (got.shape, got.dtype, got.device) == (want.shape, want.dtype, want.device)
    assert isinstance(got.simplest, Mask)
    seen = got.simplest.visible(queries, keys, got.device)
    assert torch.equal(torch.ones(()).bool().expand(want.shape) if seen is None else seen.expand(want.shape), want)
    assert torch.equal(got, want)


def test_a_place_that_no_alignment_says_is_dense() -> None:
    call = arguments(3, 8, 2, 0, mask_function=CAUSAL)
    got = attention_mask(**call)
    assert type(got) is Tensor
    assert torch.equal(got, plain(call))


def test_any_other_function_is_dense() -> None:
    function = library.and_masks(CAUSAL, library.packed_sequence_mask_function(torch.tensor([[0, 0, 1, 1]] * 2)))
    call = arguments(4, 4, 0, 0, mask_function=function)
    got = attention_mask(**call, allow_is_causal_skip=False)
    assert type(got) is Tensor
    assert torch.equal(got, plain(call))


@pytest.mark.parametrize(("queries", "keys"), list(itertools.product([1, 4], [4, 6])))
def test_a_static_cache_gets_a_tensor_and_none_only_where_every_reader_means_the_same(queries: int, keys: int) -> None:
    call = arguments(queries, keys, 0, 0, mask_function=CAUSAL) | {"q_offset": torch.tensor(0)}
    got = attention_mask(**call)
    if queries == 1 or queries == keys:
        assert got is None
    else:
        assert type(got) is Tensor
        assert torch.equal(got.expand(plain(call).shape), plain(call))


def test_no_padding_and_no_band_is_no_mask_where_that_is_allowed() -> None:
    call = arguments(4, 4, 0, 0, mask_function=EVERY)
    assert attention_mask(**call, allow_is_bidirectional_skip=True) is None
    assert attention_mask(**call).all()


def whole() -> tuple[StructuredMask, Tensor]:
    call = arguments(
        6, 6, 0, 0, mask_function=CAUSAL, attention_mask=torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    )
    made = attention_mask(**call)
    assert isinstance(made, StructuredMask)
    return made, plain(call)


def test_it_holds_no_elements_until_they_are_asked_for() -> None:
    mask, dense = whole()
    assert isinstance(mask.simplest, Mask)
    assert "causal" in repr(mask)
    assert torch.equal(mask[:, :, 2:, :3], dense[:, :, 2:, :3])
    assert torch.equal(mask.simplest, dense)


@pytest.mark.parametrize("write", ["slice", "in place", "out"])
def test_what_is_written_to_it_counts(write: str) -> None:
    mask, dense = whole()
    if write == "slice":
        mask[:, :, 0] = True
        dense = dense.clone()
        dense[:, :, 0] = True
    elif write == "in place":
        mask.logical_not_()
        dense = ~dense
    else:
        torch.logical_not(dense, out=mask)
        dense = ~dense
    assert torch.equal(mask.simplest, dense)


def test_operations_give_ordinary_tensors() -> None:
    mask, dense = whole()
    results = (mask & mask, ~mask, mask.to(torch.float32), torch.where(mask, 0.0, 1.0), torch.cat([mask, mask], 0))
    wants = (dense, ~dense, dense.float(), torch.where(dense, 0.0, 1.0), torch.cat([dense, dense], 0))
    for got, want in zip(results, wants, strict=True):
        assert type(got) is Tensor
        assert torch.equal(got, want)
