"""Wrong answers of other dispatchers, each a case of its own: here the fp64 answer, or a refusal that names the field.

The cases were reproduced in diffusers 0.40 to 0.42, ComfyUI and transformers, where no error is raised. Each goes
through heedful's drop-in and, once more, through diffusers' own dispatcher with heedful installed in it. Kernels that
cannot run here are played by faithful stand-ins.

Layout as in diffusers: query (B, Q, H, D), key (B, K, N, D).
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from stand_in_sites import installed, machine
from tiny_models import unet
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import heedful
from heedful import AttentionDispatcher, AttentionStrategyFactory, Policy
from heedful.errors import InvalidArgument, Refused
from heedful.integrations import diffusers as ours
from heedful.testing.parts import kept_places

BATCH, QUERIES, KEYS, HEADS, DIM = 2, 6, 10, 3, 16
HOMES = {
    "flash": ("flash_attn_2", "sm_80"),
    "flash_varlen": ("flash_attn_2", "sm_80"),
    "_flash_3": ("flash_attn_3", "sm_90"),
    "_flash_varlen_3": ("flash_attn_3", "sm_90"),
    "flash_4": ("flash_attn_4", "sm_100"),
    "xformers": ("xformers_op", "sm_80"),
    "aiter": ("aiter", "gfx942"),
    "native_varlen": ("torch_varlen", "sm_80"),
    "_native_npu": ("torch_npu", "npu"),
    "_native_xla": ("torch_xla", "xla"),
    "sage": ("sageattention_2", "sm_89"),
    "sage_varlen": ("sageattention_2", "sm_89"),
}
VARLEN = ["flash_varlen", "_flash_varlen_3", "native_varlen", "sage_varlen"]
Call = Callable[..., Any]


@pytest.fixture(params=["drop-in", "installed"])
def dispatch(request: pytest.FixtureRequest) -> Iterator[Call]:
    """heedful's function of diffusers' name, and diffusers' own with heedful installed."""
    if request.param == "drop-in":
        yield ours.dispatch_attention_fn
        return
    ours.install()
    yield dispatch_attention_fn
    ours.uninstall()


@pytest.fixture
def at_home(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], contextlib.AbstractContextManager[torch.dtype]]:
    """``with at_home(backend) as dtype``: on its machine, beside its stand-in; ``dtype`` is one that it takes."""

    @contextlib.contextmanager
    def home(backend: str) -> Iterator[torch.dtype]:
        if backend not in HOMES:
            yield torch.float32
            return
        site, device = HOMES[backend]
        dispatcher = AttentionDispatcher(AttentionStrategyFactory(plugins=False), machine(device), Policy())
        kind = dispatcher.facts.device(torch.device("cpu")).type
        with installed(site), monkeypatch.context() as patched:
            patched.setattr(heedful.dispatch, "attention", dispatcher.attention)
            patched.setattr(heedful.dispatch, "explain", dispatcher.explain)
            yield dispatcher.factory.create_strategy(backend).limits_for(kind).dtypes[0]

    return home


@pytest.fixture
def expected(naive_attention: Call) -> Call:
    """The formula in float64, in diffusers' layout; masks broadcast to (B, H, Q, K)."""

    def attention(query: Tensor, key: Tensor, value: Tensor, **masks: Any) -> Tensor:
        out, _ = naive_attention(*(tensor.transpose(1, 2) for tensor in (query, key, value)), **masks)
        return out.transpose(1, 2)

    return attention


def operands(dtype: torch.dtype = torch.float32, **sizes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key, value; ``sizes``: batch, queries, keys, heads, kv_heads, if they are others than the usual ones."""
    draw = torch.Generator().manual_seed(0)
    batch, heads = sizes.get("batch", BATCH), sizes.get("heads", HEADS)
    of_key = (batch, sizes.get("keys", KEYS), sizes.get("kv_heads", heads), DIM)
    shapes = ((batch, sizes.get("queries", QUERIES), heads, DIM), of_key, of_key)
    query, key, value = (torch.randn(shape, generator=draw).to(dtype) for shape in shapes)
    return query, key, value


def close(out: Tensor, want: Tensor, backend: str = "") -> None:
    if "sage" in backend:
        assert ((out.double() - want).norm() / want.norm()).item() < 0.1
        return
    limit = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[out.dtype]
    torch.testing.assert_close(out.double(), want, atol=limit, rtol=limit)


def causal(queries: int, keys: int, shift: int = 0) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).tril(shift)


def fields(refused: Refused) -> set[str]:
    return {one.field for reasons in refused.refusals.values() for one in reasons}


# 1 and 2: flex


def test_01_flex_is_causal(dispatch: Call, expected: Call) -> None:
    """diffusers: without a mask, flex takes the branch "no block mask" before it looks at is_causal: not causal."""
    query, key, value = operands()
    out = dispatch(query, key, value, is_causal=True, backend="flex")
    close(out, expected(query, key, value, seen=causal(QUERIES, KEYS)))


def test_01_flex_is_causal_beside_a_mask(dispatch: Call, expected: Call) -> None:
    """diffusers: with a mask, flex computes causality alone and drops the mask."""
    query, key, value = operands()
    keep = kept_places("right", BATCH, KEYS)[:, None, None]
    out = dispatch(query, key, value, keep, is_causal=True, backend="flex")
    close(out, expected(query, key, value, seen=causal(QUERIES, KEYS) & keep))


@pytest.mark.parametrize("queries", [QUERIES, KEYS])
@pytest.mark.parametrize("side", ["right", "left", "interior"])
def test_02_flex_two_dimensional_key_mask(side: str, queries: int, dispatch: Call, expected: Call) -> None:
    """diffusers: flex views a (B, K) mask as (B, 1, K, 1): with as many queries as keys it hides queries, not keys."""
    query, key, value = operands(queries=queries)
    keep = kept_places(side, BATCH, KEYS)
    want = expected(query, key, value, seen=keep[:, None, None])
    close(dispatch(query, key, value, keep, backend="flex"), want)
    bias = torch.zeros(BATCH, KEYS).masked_fill(~keep, -math.inf)
    close(dispatch(query, key, value, bias, backend="flex"), want)


# 3: xformers


@pytest.mark.parametrize("shape", [(BATCH, 1, 1, KEYS), (BATCH, HEADS, QUERIES, KEYS), (1, 1, QUERIES, KEYS)])
def test_03_xformers_four_dimensional_bool_mask(shape: Any, dispatch: Call, at_home: Call, expected: Call) -> None:
    """diffusers: xformers adds the bool mask to the scores as 0 and 1: what should be hidden is seen a little less."""
    seen = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.5
    seen[..., 0] = True
    with at_home("xformers") as dtype:
        query, key, value = operands(dtype)
        out = dispatch(query, key, value, seen, backend="xformers")
    close(out, expected(query, key, value, seen=seen))


# 4 and 5: varlen


@pytest.mark.parametrize("form", ["(B, K)", "(B, 1, 1, K)"])
@pytest.mark.parametrize("side", ["right", "left", "interior"])
@pytest.mark.parametrize("backend", VARLEN)
def test_04_varlen_with_padding_on_any_side(
    backend: str, side: str, form: str, dispatch: Call, at_home: Call, expected: Call
) -> None:
    """diffusers: packing takes the first keys of each row, as many as are real: right for padding on the right only."""
    keep = kept_places(side, BATCH, KEYS)
    with at_home(backend) as dtype:
        query, key, value = operands(dtype)
        out = dispatch(query, key, value, keep if form == "(B, K)" else keep[:, None, None], backend=backend)
    close(out, expected(query, key, value, seen=keep[:, None, None]), backend)


@pytest.mark.parametrize("kind", ["causal", "band", "any"])
@pytest.mark.parametrize("backend", VARLEN)
def test_05_varlen_with_a_structural_mask(
    backend: str, kind: str, dispatch: Call, at_home: Call, expected: Call
) -> None:
    """diffusers: ``mask.any(dim=1)`` keeps each key that any query sees, so a causal mask becomes full attention."""
    seen = {
        "causal": causal(KEYS, KEYS),
        "band": causal(KEYS, KEYS, 1) & ~causal(KEYS, KEYS, -3),
        "any": torch.rand(KEYS, KEYS, generator=torch.Generator().manual_seed(5)) < 0.5,
    }[kind]
    seen = seen[None, None].expand(BATCH, 1, KEYS, KEYS)
    with at_home(backend) as dtype:
        query, key, value = operands(dtype, queries=KEYS)
        if kind == "any" or (kind == "band" and "sage" in backend):
            with pytest.raises(Refused, match="mask is") as caught:
                dispatch(query, key, value, seen, backend=backend)
            assert "mask" in fields(caught.value)
            return
        out = dispatch(query, key, value, seen, backend=backend)
    close(out, expected(query, key, value, seen=seen), backend)


# 6: ranks


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_06_native_three_dimensions_where_batch_equals_heads(
    dtype: torch.dtype, dispatch: Call, expected: Call
) -> None:
    """diffusers: (B, Q, K) goes to SDPA as it is, which reads B as the heads: no error where the two are equal."""
    query, key, value = operands(batch=HEADS)
    mask = (torch.rand(HEADS, QUERIES, KEYS, generator=torch.Generator().manual_seed(6)) < 0.7).to(dtype)
    word = "seen" if dtype == torch.bool else "bias"
    with pytest.raises(InvalidArgument, match="batch = heads") as caught:
        dispatch(query, key, value, mask, backend="native")
    assert caught.value.argument == "attn_mask"
    for clear in (mask[:, None], mask[None]):
        close(dispatch(query, key, value, clear, backend="native"), expected(query, key, value, **{word: clear}))
    query, key, value = operands()  # B differs from H: it has one meaning, which SDPA would not have found
    mask = mask[:BATCH]
    close(dispatch(query, key, value, mask, backend="native"), expected(query, key, value, **{word: mask[:, None]}))


def test_06_native_two_dimensions_where_batch_equals_queries(dispatch: Call, expected: Call) -> None:
    """diffusers: a (Q, K) mask is read as (B, K) key padding where B equals Q."""
    query, key, value = operands(batch=4, queries=4)
    mask = causal(4, KEYS, 2)
    with pytest.raises(InvalidArgument, match="batch = queries") as caught:
        dispatch(query, key, value, mask, backend="native")
    assert caught.value.argument == "attn_mask"
    for clear in (mask[None, None], mask[:, None, None]):
        close(dispatch(query, key, value, clear, backend="native"), expected(query, key, value, seen=clear))


# 7: keywords that a backend's function lacks


@pytest.mark.parametrize("backend", ["_flash_3", "flash_4", "sage", "flex", "_native_xla"])
def test_07_dropout(backend: str, dispatch: Call, at_home: Call) -> None:
    """diffusers: these functions have no dropout_p, and the dispatcher filters it out: nothing is dropped."""
    with at_home(backend) as dtype:
        query, key, value = operands(dtype)
        with pytest.raises(Refused, match=r"dropout_p is 0\.5") as caught:
            dispatch(query, key, value, dropout_p=0.5, backend=backend)
        assert "dropout_p" in fields(caught.value)


@pytest.mark.parametrize("backend", ["flash", "flash_varlen", "_flash_3", "_flash_varlen_3", "flash_4", "sage",
                                     "sage_varlen", "aiter", "xformers", "_native_npu", "_native_xla"])  # fmt: skip
def test_07_enable_gqa(backend: str, dispatch: Call, at_home: Call, expected: Call) -> None:
    """diffusers: none of the flash and sage functions has enable_gqa; heads that differ are left to the kernel."""
    with at_home(backend) as dtype:
        query, key, value = operands(dtype, heads=4, kv_heads=2)
        out = dispatch(query, key, value, enable_gqa=True, backend=backend)
        with pytest.raises(InvalidArgument, match="enable_gqa=True"):
            dispatch(query, key, value, backend=backend)
    close(out, expected(query, key, value), backend)


@pytest.mark.parametrize("queries", [QUERIES, KEYS])
def test_07_is_causal_on_an_npu(queries: int, dispatch: Call, at_home: Call, expected: Call) -> None:
    """diffusers: the NPU's function has no is_causal: full attention."""
    with at_home("_native_npu") as dtype:
        query, key, value = operands(dtype, queries=queries)
        out = dispatch(query, key, value, is_causal=True, backend="_native_npu")
    close(out, expected(query, key, value, seen=causal(queries, KEYS)))


@pytest.mark.parametrize("scale", [None, 0.3, -0.2, 0.0])
def test_07_scale_on_xla(scale: float | None, dispatch: Call, at_home: Call, expected: Call) -> None:
    """diffusers: the XLA function has no scale, and divides the query by sqrt(D) whatever was asked for."""
    with at_home("_native_xla") as dtype:
        query, key, value = operands(dtype)
        out = dispatch(query, key, value, scale=scale, backend="_native_xla")
    close(out, expected(query, key, value, scale=scale))


@pytest.mark.parametrize("backend", ["native", "flex", "reference", "flash", "sage", "xformers", "_native_npu"])
def test_07_typos(backend: str, dispatch: Call, at_home: Call) -> None:
    """diffusers: what no function has is filtered out as well, so a typo changes nothing."""
    with at_home(backend) as dtype:
        query, key, value = operands(dtype)
        with pytest.raises(Refused, match="is_casual") as caught:
            dispatch(query, key, value, attention_kwargs={"is_casual": True}, backend=backend)
        assert fields(caught.value) == {"options"}


# 8: whose backend is it


def sd3() -> SD3Transformer2DModel:
    torch.manual_seed(0)
    sizes = {"attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 16, "num_layers": 1}
    more = {"caption_projection_dim": 16, "pooled_projection_dim": 16, "pos_embed_max_size": 8}
    return SD3Transformer2DModel(sample_size=8, in_channels=4, out_channels=4, **sizes, **more).eval()


def pixart() -> PixArtTransformer2DModel:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 16}
    return PixArtTransformer2DModel(**sizes, num_layers=1, sample_size=8, use_additional_conditions=False).eval()


def run(model: Any) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    sample, text = torch.randn(1, 4, 8, 8, generator=draw), torch.randn(1, 5, 16, generator=draw)
    more: dict[str, Any] = {"encoder_hidden_states": text, "timestep": torch.tensor([3])}
    if isinstance(model, SD3Transformer2DModel):
        more["pooled_projections"] = torch.randn(1, 16, generator=draw)
    if isinstance(model, PixArtTransformer2DModel):
        more["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    with torch.no_grad():
        return model(sample, **more).sample


@pytest.fixture
def routed() -> Iterator[None]:
    ours.install()
    yield
    ours.uninstall()


def in_a_thread(ask: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(ask()))
    thread.start()
    thread.join()
    return found[0]


def active() -> Any:
    return _AttentionBackendRegistry.get_active_backend()[0]


@pytest.mark.usefixtures("routed")
@pytest.mark.parametrize("make", [unet, sd3, pixart])
def test_08_a_models_backend_is_the_models(make: Callable[[], Any]) -> None:
    """diffusers: on these models set_attention_backend changes no layer, but the backend of the whole process; reset
    does not put that back."""
    model, other = make(), make()
    before, want = active(), run(model)
    assert heedful.attention_report(model).covered == 0
    model.set_attention_backend("_native_math")
    assert active() is before
    assert _AttentionBackendRegistry._active_backend is before
    out = run(model)
    report = heedful.attention_report(model)
    assert report.covered == report.total > 0
    assert all(dict(layer.ran) == {"native_math": layer.calls} for layer in report)
    assert all(layer.calls for layer in report)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    assert heedful.attention_report(other).covered == 0
    model.reset_attention_backend()
    assert heedful.attention_report(model).covered == 0
    assert active() is before
    assert torch.equal(run(model), want)


@pytest.mark.usefixtures("routed")
def test_08_another_thread_sees_nothing_of_a_context() -> None:
    """diffusers: attention_backend(...) sets a class attribute, so every other thread computes with it meanwhile."""
    from diffusers import attention_backend

    before = active()
    with attention_backend("_native_math"):
        assert active() is AttentionBackendName._NATIVE_MATH
        assert in_a_thread(active) is before
        with attention_backend("flex"):
            assert active() is AttentionBackendName.FLEX
        assert active() is AttentionBackendName._NATIVE_MATH
    assert active() is before
    with ours.attention_backend("_native_math"):
        assert in_a_thread(lambda: ours._AttentionBackendRegistry.get_active_backend()[0]) == "auto"


# 9: context parallelism


@pytest.mark.parametrize("backend", ["native", "flex", "flash", "sage", "xformers", "_native_npu", "_native_xla"])
def test_09_parallel_config(backend: str, dispatch: Call, at_home: Call) -> None:
    """diffusers: a backend without context parallelism ignores parallel_config: each rank attends to its own keys."""
    with at_home(backend) as dtype:
        query, key, value = operands(dtype)
        with pytest.raises(InvalidArgument, match="parallel_config") as caught:
            dispatch(query, key, value, backend=backend, parallel_config=object())
    assert caught.value.argument == "parallel_config"


# 10: sage


def test_10_sage_and_masks(dispatch: Call, at_home: Call, expected: Call) -> None:
    """diffusers: sageattn(attn_mask=…) swallows the mask in its **kwargs: full attention. Here padded keys are left
    out, a causal mask is causal, and any other one is refused."""
    keep, free = kept_places("interior", BATCH, KEYS), torch.rand(BATCH, 1, KEYS, KEYS) < 0.5
    with at_home("sage") as dtype:
        query, key, value = operands(dtype, queries=KEYS)
        for seen in (keep[:, None, None], causal(KEYS, KEYS)[None, None]):
            out = dispatch(query, key, value, seen, backend="sage")
            close(out, expected(query, key, value, seen=seen), "sage")
        with pytest.raises(Refused, match="mask is dense") as caught:
            dispatch(query, key, value, free, backend="sage")
        assert "mask" in fields(caught.value)


@pytest.mark.parametrize("scale", [0.05, 0.4, -0.25, 0.0])
def test_10_sage_and_scale(scale: float, dispatch: Call, at_home: Call, expected: Call) -> None:
    """ComfyUI: its sage function takes ``scale`` among its keywords and never hands it on: always 1/sqrt(D)."""
    with at_home("sage") as dtype:
        query, key, value = operands(dtype)
        out = dispatch(query, key, value, scale=scale, backend="sage")
    close(out, expected(query, key, value, scale=scale), "sage")


# 11: transformers


@pytest.mark.parametrize("backend", ["native", "native_math", "flex", "reference"])
@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_11_transformers_keeps_the_padding_mask(side: str, backend: str) -> None:
    """transformers: an attention registered by name, without a mask function, gets no mask at all: a padded batch
    differs by up to 2.45 on a tiny model."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 32}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager")
    model = LlamaForCausalLM(config).eval()
    tokens = torch.randint(3, 32, (3, 8), generator=torch.Generator().manual_seed(1))
    keep = kept_places(side, 3, 8)
    want = model(tokens, attention_mask=keep.long()).logits
    unmasked = model(tokens).logits
    model.set_attn_implementation("sdpa")
    report = heedful.set_attention_backend(model, backend)
    out = model(tokens, attention_mask=keep.long()).logits
    assert report.covered == report.total == 2
    assert all(dict(layer.ran) == {backend: 1} for layer in heedful.attention_report(model))
    assert (out - want)[keep].abs().max() < 1e-5
    if side == "left":
        assert (unmasked - want)[keep].abs().max() > 0.01, "the mask matters"


# 12: windows


def window_convention(queries: int, keys: int, left: int, right: int) -> Tensor:
    """flash-attn's: the query at place i + K - Q sees keys from ``left`` before it to ``right`` after it, both in."""
    place = torch.arange(queries)[:, None] + keys - queries
    distance = torch.arange(keys)[None] - place
    return (distance >= -(left if left >= 0 else keys)) & (distance <= (right if right >= 0 else keys))


WINDOWED = ["flash", "flash_varlen", "_flash_3", "flash_4", "aiter", "xformers", "native_varlen", "_native_npu"]


@pytest.mark.parametrize("backend", [*WINDOWED, "native", "flex", "reference"])
def test_12_windows_mean_the_same_everywhere(backend: str, dispatch: Call, at_home: Call, expected: Call) -> None:
    """Libraries differ by one: "a window of w" is w keys in some (mask builders of transformers), w to each side and
    the own key in flash-attn, where (left, right) are both included and (-1, -1) is open. Here it is flash-attn's."""
    for queries in (QUERIES, KEYS):
        for left, right in itertools.product((-1, 0, 1, 2), repeat=2):
            with at_home(backend) as dtype:
                query, key, value = operands(dtype, queries=queries)
                sides = {"attention_kwargs": {"window_size": (left, right)}, "backend": backend}
                if backend == "aiter" and max(left, right) == 0:  # which its kernels may ignore
                    with pytest.raises(Refused, match="window is"):
                        dispatch(query, key, value, **sides)
                    continue
                out = dispatch(query, key, value, **sides)
            seen = window_convention(queries, KEYS, left, right)
            close(out, expected(query, key, value, seen=seen))
            if left >= 0:
                wider = expected(query, key, value, seen=window_convention(queries, KEYS, left + 1, right))
                assert (out.double() - wider).abs().max() > 0.05


@pytest.mark.parametrize(("backend", "module", "opened"), [
    ("flash", "flash_attn.flash_attn_interface", (-1, -1)),
    ("_flash_3", "flash_attn_interface", (-1, -1)),
    ("flash_4", "flash_attn.cute.interface", (None, None)),
])  # fmt: skip
def test_12_it_is_the_convention_of_flash_attns_own_signature(
    backend: str, module: str, opened: Any, at_home: Call, expected: Call
) -> None:
    """flash-attn's functions called directly: ``window_size`` is (left, right), both included, open by default."""
    import importlib

    with at_home(backend) as dtype:
        function = importlib.import_module(module).flash_attn_func
        assert inspect.signature(function).parameters["window_size"].default == opened
        query, key, value = operands(dtype)
        for sides in ((2, 0), (0, 0), (1, 2)):
            out = function(query, key, value, window_size=sides)
            out = out[0] if isinstance(out, tuple) else out
            close(out, expected(query, key, value, seen=window_convention(QUERIES, KEYS, *sides)))
            mine = heedful.dispatch.attention(
                query, key, value, window=sides, causal_alignment="bottom_right", layout="BSHD", backend=backend
            )
            close(mine, out.double())


# 13: alignment


@pytest.mark.parametrize("queries", [QUERIES, KEYS + 4])
@pytest.mark.parametrize("backend", ["native", "native_math", "flex", "reference", "flash", "flash_varlen", "_flash_3",
                                     "flash_4", "aiter", "xformers", "native_varlen", "_native_npu", "_native_xla",
                                     "sage"])  # fmt: skip
def test_13_causality_of_unequal_lengths(
    backend: str, queries: int, dispatch: Call, at_home: Call, expected: Call
) -> None:
    """diffusers: is_causal goes to the kernel as it is, so flash-attn aligns it to the end of the keys and torch to
    their start: another answer by each backend. Here it is torch's, and the other one has a name."""
    with at_home(backend) as dtype:
        query, key, value = operands(dtype, queries=queries)
        ends = heedful.Causal("bottom_right")
        for how, shift in (({"is_causal": True}, 0), ({"attn_mask": ends}, KEYS - queries)):
            if backend == "sage" and (queries < KEYS or not shift):  # else queries without keys are left out
                with pytest.raises(Refused, match="causality is with"):
                    dispatch(query, key, value, backend=backend, **how)
                continue
            out = dispatch(query, key, value, backend=backend, **how)
            close(out, expected(query, key, value, seen=causal(queries, KEYS, shift)), backend)


def test_13_flash_attns_own_causality_is_the_one_called_bottom_right(at_home: Call, expected: Call) -> None:
    """flash-attn's function called directly: with fewer queries than keys the last query sees all keys."""
    with at_home("flash") as dtype:
        from flash_attn.flash_attn_interface import flash_attn_func

        query, key, value = operands(dtype)
        close(flash_attn_func(query, key, value, causal=True),
              expected(query, key, value, seen=causal(QUERIES, KEYS, KEYS - QUERIES)))  # fmt: skip
