"""Batches of rows of different lengths: each row gets what it would get alone, cut to its own keys.

Also what stands in the keys that a mask hides: it never matters if it is finite, and NaN and inf do not matter either
where ``explain`` says so. (The contract suite has ±1e4, and NaN, for its own samples.)
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from stand_in_sites import installed, machine
from tiny_models import unet
from torch import Tensor

import heedful
from heedful import AttentionDispatcher, AttentionStrategyFactory, KeyPadding, Policy
from heedful.testing.parts import kept_places

BATCH, HEADS, QUERIES, KEYS, DIM = 3, 2, 6, 24, 16
MANY = 256  # queries, from which on native leaves padded keys out because it pays
SIDES = ("right", "left", "interior")
FORMS: dict[str, Callable[[Tensor, torch.dtype, int], Any]] = {  # of a padding (B, K): as an ``attn_mask``
    "KeyPadding": lambda keep, dtype, queries: KeyPadding(keep),
    "bool": lambda keep, dtype, queries: keep[:, None, None],
    "bool for each query and head": lambda keep, dtype, queries: keep[:, None, None].repeat(1, HEADS, queries, 1),
    "-10000": lambda keep, dtype, queries: (1 - keep.to(dtype))[:, None, None] * -10000.0,
    "lowest": lambda keep, dtype, queries: (1 - keep.to(dtype))[:, None, None] * torch.finfo(dtype).min,
    "-inf": lambda keep, dtype, queries: torch.zeros(keep.shape, dtype=dtype).masked_fill(~keep, -math.inf)[
        :, None, None
    ],
}
CASES = [  # backend, site, machine, dtype, the rewrite that leaves padded keys out
    ("native", "", "", torch.float32, "gather_keys"),
    ("flash", "flash_attn_2", "sm_80", torch.float16, "pack"),
    ("flash", "flash_attn_2", "sm_80", torch.bfloat16, "pack"),
    ("flash_varlen", "flash_attn_2", "sm_80", torch.float16, "pack"),
    ("xformers", "xformers_op", "sm_80", torch.float16, "pack"),
    ("xformers", "xformers_op", "sm_80", torch.float32, "pack"),
]
EVERYWHERE = [
    *((name, "", "") for name in ("native", "native_math", "native_flash", "flex", "reference")),
    *(("flash", "flash_attn_2", "sm_80"), ("flash_varlen", "flash_attn_2", "sm_80")),
    *(("flash_3", "flash_attn_3", "sm_90"), ("flash_4", "flash_attn_4", "sm_100"), ("aiter", "aiter", "gfx942")),
    *(("xformers", "xformers_op", "sm_80"), ("native_varlen", "torch_varlen", "sm_80")),
    *(("native_npu", "torch_npu", "npu"), ("native_xla", "torch_xla", "xla")),
    *(("sage", "sageattention_2", "sm_89"), ("sage_varlen", "sageattention_2", "sm_89")),
    ("sage_blackwell", "sage_blackwell", "sm_120"),
]


def there(site: str) -> contextlib.AbstractContextManager[None]:
    return installed(site) if site else contextlib.nullcontext()


def dispatcher(device: str) -> AttentionDispatcher:
    factory = AttentionStrategyFactory(plugins=False)
    return AttentionDispatcher(factory, facts=machine(device) if device else None, policy=Policy())


def tensors(dtype: torch.dtype, queries: int = QUERIES) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = ((BATCH, HEADS, queries, DIM), (BATCH, HEADS, KEYS, DIM), (BATCH, HEADS, KEYS, DIM))
    query, key, value = (torch.randn(shape, generator=draw).to(dtype) for shape in shapes)
    return query, key, value


def steps(plan: heedful.Plan) -> list[str]:
    assert plan.chosen is not None, str(plan)
    return [step.name for step in plan.chosen.steps]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("backend", "site", "device", "dtype", "rewrite"), CASES)
def test_each_row_is_as_if_it_were_alone(
    backend: str, site: str, device: str, dtype: torch.dtype, rewrite: str, side: str, form: str, naive_attention: Any
) -> None:
    keep, at = kept_places(side, BATCH, KEYS), dispatcher(device)
    assert len(set(keep.sum(1).tolist())) == BATCH, "rows of different lengths"
    queries = MANY if backend == "native" else QUERIES
    query, key, value = tensors(dtype, queries)
    call = {"attn_mask": FORMS[form](keep, dtype, queries), "backend": backend}
    with there(site):
        plan = at.explain(query, key, value, **call)
        assert rewrite in steps(plan)
        assert rewrite in str(plan)
        out = at.attention(query, key, value, **call)
        for row in range(BATCH):
            one = slice(row, row + 1)
            cut = query[one], key[one][:, :, keep[row]], value[one][:, :, keep[row]]
            alone = at.attention(*cut, backend=backend)
            torch.testing.assert_close(out[one], alone, atol=1e-5, rtol=0)
            if dtype == torch.float32:
                want, _ = naive_attention(*cut)
                torch.testing.assert_close(out[one].double(), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("hidden", ["KeyPadding", "bool", "-inf", "queries, too", "any mask", "packed"])
@pytest.mark.parametrize(("backend", "site", "device"), EVERYWHERE)
def test_what_stands_in_hidden_keys_does_not_matter(backend: str, site: str, device: str, hidden: str) -> None:
    at, keep = dispatcher(device), kept_places("interior", BATCH, KEYS)
    kind = at.facts.device(torch.device("cpu")).type
    dtype = at.factory.create_strategy(backend).limits_for(kind).dtypes[0]
    queries = MANY if backend == "native" else QUERIES
    query, key, value = tensors(dtype, queries)
    call: dict[str, Any] = {"backend": backend}
    unseen = ~keep
    if hidden == "packed":  # the last tokens belong to no sequence
        query, key, value = (t[:1].transpose(1, 2)[0] for t in (query, key, value))
        call |= {"layout": "THD", "attn_mask": heedful.Varlen(torch.tensor([0, 2, 6]), torch.tensor([0, 3, 9]))}
        unseen = torch.arange(KEYS) >= 9
    elif hidden == "any mask":
        seen = torch.rand(BATCH, 1, queries, KEYS, generator=torch.Generator().manual_seed(1)) < 0.6
        seen[..., 0] = True
        call["attn_mask"] = seen & keep[:, None, None]
    elif hidden == "queries, too":
        call["attn_mask"] = KeyPadding(keep, kept_places("right", BATCH, queries))
    else:
        call["attn_mask"] = FORMS[hidden](keep, dtype, queries)

    def spoilt(tensor: Tensor, garbage: float) -> Tensor:
        where = unseen[:, None, None] if hidden == "packed" else unseen[:, None, :, None]
        return tensor.masked_fill(where, garbage)

    with there(site):
        plan = at.explain(query, key, value, **call)
        if plan.refused:
            with pytest.raises(heedful.Refused):
                at.attention(query, key, value, **call)
            return
        want = at.attention(query, key, value, **call)
        harmless = "even NaN in them is harmless" in str(plan) or plan.chosen.lowered.layout == "THD"
        absurd = [math.nan, math.inf, -math.inf] if harmless else []
        for garbage in [1e4, -1e4, *absurd]:
            for at_key, at_value in ((garbage, garbage), (0.0, garbage), (garbage, 0.0)):
                out = at.attention(query, spoilt(key, at_key), spoilt(value, at_value), **call)
                torch.testing.assert_close(out, want, atol=1e-5, rtol=0)


# diffusers' own forms


@pytest.fixture
def seen_steps(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The rewrites of every call that a routed layer makes."""
    every: list[list[str]] = []
    attend = heedful.attention

    def recorded(query: Tensor, key: Tensor, value: Tensor, mask: Any, *rest: Any, **more: Any) -> Any:
        words = dict(zip(("dropout_p", "is_causal", "scale", "enable_gqa"), rest, strict=False))
        every.append(steps(heedful.explain(query, key, value, mask, **words, **more)))
        return attend(query, key, value, mask, *rest, **more)

    monkeypatch.setattr("heedful.routing.attention", recorded)
    return every


def prompts(side: str) -> tuple[Tensor, Tensor]:
    """Three prompts (B, K, 16), and which of their tokens are real: int64, as tokenizers give it."""
    text = torch.randn(BATCH, KEYS, 16, generator=torch.Generator().manual_seed(1))
    return text, kept_places(side, BATCH, KEYS).long()


def pixart() -> PixArtTransformer2DModel:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 16}
    return PixArtTransformer2DModel(**sizes, num_layers=2, sample_size=8, use_additional_conditions=False).eval()


@pytest.mark.parametrize("side", SIDES)
@torch.no_grad()
def test_a_unet_with_an_encoder_attention_mask(side: str, seen_steps: list[list[str]]) -> None:
    model, (text, keep) = unet(), prompts(side)
    sample = torch.randn(BATCH, 4, 32, 32, generator=torch.Generator().manual_seed(2))
    report = heedful.set_attention_backend(model, "native")
    out = model(sample, 3, text, encoder_attention_mask=keep).sample
    crossing = sum(layer.path.endswith("attn2") for layer in report)
    assert sum("gather_keys" in names for names in seen_steps) == crossing > 0
    assert "native" in str(heedful.attention_report(model))
    for row in range(BATCH):
        one = slice(row, row + 1)
        alone = model(sample[one], 3, text[one][:, keep[row].bool()]).sample
        torch.testing.assert_close(out[one], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", SIDES)
@torch.no_grad()
def test_pixart_with_an_encoder_attention_mask(side: str, seen_steps: list[list[str]]) -> None:
    model, (text, keep) = pixart(), prompts(side)
    sample = torch.randn(BATCH, 4, 32, 32, generator=torch.Generator().manual_seed(2))
    extra: dict[str, Any] = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    report = heedful.set_attention_backend(model, "native")
    out = model(sample, text, torch.full((BATCH,), 3), **extra, encoder_attention_mask=keep).sample
    crossing = sum(layer.path.endswith("attn2") for layer in report)
    assert sum("gather_keys" in names for names in seen_steps) == crossing == 2
    for row in range(BATCH):
        one = slice(row, row + 1)
        alone = model(sample[one], text[one][:, keep[row].bool()], torch.tensor([3]), **extra).sample
        torch.testing.assert_close(out[one], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", ["(B, 1, K)", "(B·H, 1, K)", "(B, H, 1, K)"])
def test_the_additive_masks_of_diffusers_are_read_as_padding(form: str) -> None:
    """``(1 - mask) * -10000``, unsqueezed, and repeated over the heads by ``prepare_attention_mask``."""
    keep = kept_places("right", BATCH, KEYS)
    query, key, value = tensors(torch.float32, MANY)
    bias = ((1 - keep.float()) * -10000.0)[:, None]
    shared = bias if form == "(B, 1, K)" else bias.repeat_interleave(HEADS, dim=0)
    mask = shared[:, None] if form == "(B, 1, K)" else shared.view(BATCH, HEADS, -1, KEYS)
    mask = mask if form != "(B, H, 1, K)" else bias[:, None].repeat_interleave(HEADS, dim=1)
    plan = heedful.explain(query, key, value, mask, backend="native")
    assert steps(plan) == ["gather_keys"]
    want = heedful.attention(query, key, value, KeyPadding(keep), backend="reference")
    out = heedful.attention(query, key, value, mask, backend="native")
    torch.testing.assert_close(out, want, atol=1e-5, rtol=0)
