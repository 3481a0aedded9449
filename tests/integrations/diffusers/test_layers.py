"""Tiny pipelines from configs: Stable Diffusion (processors that call SDPA) and Flux (diffusers' own dispatcher)."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLWan,
    StableDiffusionPipeline,
    attention_backend,
)
from diffusers.models import attention as attention_module
from diffusers.models import attention_processor
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import (
    Attention,
    AttnAddedKVProcessor2_0,
    AttnProcessor,
    AttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
)
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock
from diffusers.models.autoencoders.autoencoder_mmaudio import MMAudioAttnProcessor
from diffusers.models.transformers.transformer_anyflow_far import AnyFlowCausalAttnProcessor
from diffusers.models.transformers.transformer_flux import FluxAttention
from tiny_models import flux, flux_pipeline, picture, sd_pipeline, text_encoder, unet, vae
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import heedful
from heedful import routing
from heedful.demo.digits import encode, load_pipeline
from heedful.routing import KEEP_FLOAT32_SCORES

COUNTING = "counting"
UNET_LAYERS = 8
FLUX_LAYERS = 3


class Counting(heedful.AttentionStrategy):
    """SDPA that counts its calls."""

    calls = 0
    dtypes: ClassVar[set[torch.dtype]] = set()
    limits = heedful.Limits(backward=True, compile=True, masks=frozenset({"causal", "dense", "bias"}), scale=True)

    def compute_attention(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        Counting.calls += 1
        Counting.dtypes.add(query.dtype)
        return F.scaled_dot_product_attention(query, key, value, **kwargs)


class HalfOnly(Counting):
    limits = heedful.Limits(dtypes=(torch.float16,))


class SmallHeads(Counting):
    limits = heedful.Limits(max_head_dim=256)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These models are so small that threads wait for each other only."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def strategies() -> Iterator[None]:
    Counting.calls = 0
    Counting.dtypes.clear()
    factory = heedful.AttentionStrategyFactory
    ours = {COUNTING: Counting, "half_only": HalfOnly, "small_heads": SmallHeads}
    for name, strategy in ours.items():
        factory.register_strategy(name, strategy)
    yield
    for name in ours:
        factory.unregister_strategy(name)


@pytest.fixture(autouse=True)
def diffusers_own_backend_is_left_alone() -> Iterator[None]:
    before = _AttentionBackendRegistry._active_backend
    yield
    assert _AttentionBackendRegistry._active_backend is before


@pytest.fixture(params=[sd_pipeline, flux_pipeline], ids=["sd", "flux"])
def pipeline(request: pytest.FixtureRequest) -> Any:
    pipeline = request.param()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def unet_inputs(grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    seed = torch.Generator().manual_seed(1)
    sample = torch.randn(2, 4, 8, 8, generator=seed).requires_grad_(grad)
    return sample, torch.tensor(3), torch.randn(2, 5, 16, generator=seed)


def flux_inputs() -> dict[str, Tensor]:
    seed = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(1, 4, 16, generator=seed),
        "encoder_hidden_states": torch.randn(1, 3, 16, generator=seed),
        "pooled_projections": torch.randn(1, 16, generator=seed),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(3, 3),
    }


def run_unet(model: Any) -> Tensor:
    return model(*unet_inputs()).sample


def run_flux(model: Any) -> Tensor:
    return model(**flux_inputs()).sample


MODELS = pytest.mark.parametrize(
    ("build", "run", "layers"),
    [(unet, run_unet, UNET_LAYERS), (flux, run_flux, FLUX_LAYERS)],
    ids=["unet", "flux"],
)


def state(model: nn.Module) -> list[dict[str, Any]]:
    """Every instance's attributes, and those of the processors, by identity."""
    processors = [module.processor for module in model.modules() if hasattr(module, "processor")]
    return [{name: id(value) for name, value in vars(one).items()} for one in (*model.modules(), *processors)]


@torch.no_grad()
def test_a_pipeline_is_covered_whole_and_reset_to_the_bit(pipeline: Any) -> None:
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    want = picture(pipeline)
    before = [state(part) for part in parts]
    report = heedful.set_attention_backend(pipeline, COUNTING)
    assert report.covered == report.total
    assert {layer.component for layer in report} == {
        name for name, part in pipeline.components.items() if isinstance(part, nn.Module)
    }
    assert torch.equal(picture(pipeline), want)
    ran = heedful.attention_report(pipeline)
    asleep = [layer.path for layer in ran if not layer.calls]
    assert asleep == ["vae.encoder.mid_block.attentions.0"]  # text to image does not encode
    assert {layer.calls for layer in ran} == {0, 1}
    assert Counting.calls == ran.covered - 1
    assert str(ran).splitlines()[-1].startswith(f"covered {ran.total} of {ran.total}: vae 2 of 2, ")
    assert heedful.reset_attention_backend(pipeline) == ran.total
    assert [state(part) for part in parts] == before
    assert torch.equal(picture(pipeline), want)


@torch.no_grad()
def test_rules_reach_components_and_layers(pipeline: Any) -> None:
    first = "unet" if isinstance(pipeline, StableDiffusionPipeline) else "transformer"
    report = heedful.set_attention_backend(pipeline, "native", {f"{first}.*": COUNTING, "vae*": "keep"})
    picture(pipeline)
    assert Counting.calls == sum(layer.component == first for layer in report)
    assert [layer.active for layer in report if layer.component == "vae"] == ["its own", "its own"]
    assert report.covered == report.total - 2
    assert "forward" not in vars(pipeline.vae.decoder.mid_block.attentions[0])
    heedful.set_attention_backend(pipeline, COUNTING)
    heedful.reset_attention_backend(pipeline.text_encoder)
    assert "forward" not in vars(pipeline.text_encoder.encoder.layers[0].self_attn)
    Counting.calls = 0
    picture(pipeline)
    assert Counting.calls == report.total - 1 - 2


@torch.no_grad()
@MODELS
def test_every_available_exact_backend_gives_the_same_result(build: Any, run: Any, layers: int) -> None:
    model = build()
    want = run(model)
    exact = [row.name for row in heedful.list_backends("cpu") if row.available and row.exactness == "exact"]
    assert {"native", "native_math", "reference"} <= set(exact)
    for name in exact:
        heedful.set_attention_backend(model, [name, "native"])
        torch.testing.assert_close(run(model), want, atol=1e-4, rtol=0)


@torch.no_grad()
@MODELS
def test_a_refusal_comes_out_of_the_model_with_its_reasons(build: Any, run: Any, layers: int) -> None:
    model = build()
    heedful.set_attention_backend(model, "half_only")
    with pytest.raises(heedful.Refused, match="half_only refuses: dtype"):
        run(model)
    heedful.reset_attention_backend(model)
    run(model)


@torch.no_grad()
@MODELS
def test_another_model_and_another_thread_are_left_alone(build: Any, run: Any, layers: int) -> None:
    ours, other = build(), build()
    before, want, done = state(other), run(other), []
    heedful.set_attention_backend(ours, COUNTING)

    def elsewhere() -> None:
        with torch.no_grad():
            done.append(run(other))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    run(ours)
    thread.join()
    assert torch.equal(done[0], want)
    assert torch.equal(run(other), want)
    assert (state(other), Counting.calls) == (before, layers)


@torch.no_grad()
@MODELS
def test_a_copied_and_a_saved_model_are_routed_by_themselves(build: Any, run: Any, layers: int) -> None:
    model = build()
    want = run(model)
    heedful.set_attention_backend(model, COUNTING)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        Counting.calls = 0
        assert torch.equal(run(twin), want)
        assert Counting.calls == layers
        assert not heedful.attention_report(twin).conflicts
        heedful.reset_attention_backend(twin)
        run(twin)
        assert Counting.calls == layers
    run(model)
    assert Counting.calls == 2 * layers


@torch.no_grad()
def test_a_processor_that_two_models_share_is_pinned_for_one_of_them_only() -> None:
    ours, other = flux(), flux()
    ours.transformer_blocks[0].attn.processor = shared = other.transformer_blocks[0].attn.processor
    heedful.set_attention_backend(ours, COUNTING)
    with attention_backend("_native_math"):
        run_flux(ours)
        assert ours.transformer_blocks[0].attn.processor._attention_backend is AttentionBackendName.NATIVE
        assert other.transformer_blocks[0].attn.processor._attention_backend is None
    assert Counting.calls == FLUX_LAYERS
    heedful.reset_attention_backend(ours)
    assert ours.transformer_blocks[0].attn.processor is shared


@torch.no_grad()
def test_a_backend_that_diffusers_was_given_is_put_back() -> None:
    model = flux()
    for layer in model.modules():
        if isinstance(layer, FluxAttention):
            layer.set_attention_backend("_native_math")
    before = state(model)
    heedful.set_attention_backend(model, COUNTING)
    run_flux(model)
    assert Counting.calls == FLUX_LAYERS
    heedful.reset_attention_backend(model)
    assert state(model) == before
    assert model.transformer_blocks[0].attn.processor._attention_backend is AttentionBackendName("_native_math")


@torch.no_grad()
def test_a_processor_that_is_set_later_is_a_conflict_and_reset_puts_the_old_one_back(caplog: Any) -> None:
    model = unet()
    before = state(model)
    heedful.set_attention_backend(model, COUNTING)
    model.set_attn_processor(new := AttnProcessor2_0())
    run_unet(model)
    assert Counting.calls == UNET_LAYERS
    report = heedful.attention_report(model)
    assert len(report.conflicts) == report.covered == UNET_LAYERS
    assert {layer.reason for layer in report} == {
        "conflict: its processor was replaced by AttnProcessor2_0 since it was set, heedful still computes it (backend)"
    }
    heedful.reset_attention_backend(model, replaced="keep")
    assert all(processor is new for processor in model.attn_processors.values())
    told = "8 layers had been changed since they were set: its processor was replaced by AttnProcessor2_0; reset left"
    assert told in caplog.text
    model = unet()
    before, olds = state(model), model.attn_processors
    heedful.set_attention_backend(model, COUNTING)
    model.set_attn_processor(new)
    heedful.reset_attention_backend(model)
    assert state(model) == before
    assert all(model.attn_processors[name] is old for name, old in olds.items())
    assert "reset put back what was there before" in caplog.text
    with pytest.raises(heedful.InvalidArgument, match="replaced: got 'all'; give 'restore' or 'keep'"):
        heedful.reset_attention_backend(model, "all")  # type: ignore[arg-type]


class OnCpu(TorchFunctionMode):
    """What diffusers tries on a GPU before it sets xformers' processors, on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **({**kwargs, "device": "cpu"} if func is torch.randn else kwargs))


def by_products(query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, op: Any = None, scale: Any = 1.0):
    return torch.softmax(query @ key.mT * (scale or 1), -1) @ value


@pytest.fixture
def xformers_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (attention_processor, attention_module):
        monkeypatch.setattr(module, "is_xformers_available", lambda: True)
    fake = SimpleNamespace(ops=SimpleNamespace(memory_efficient_attention=by_products))
    monkeypatch.setattr(attention_processor, "xformers", fake)
    monkeypatch.setattr(attention_module, "xops", fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@torch.no_grad()
@pytest.mark.usefixtures("xformers_of_a_gpu")
def test_enabling_xformers_beside_ours_is_a_conflict_and_is_undone_by_reset(caplog: Any) -> None:
    model = unet()
    before, want = state(model), run_unet(model)
    heedful.set_attention_backend(model, COUNTING)
    with OnCpu():
        model.enable_xformers_memory_efficient_attention()
    run_unet(model)
    assert Counting.calls == 0
    report = heedful.attention_report(model)
    assert (report.covered, report.total, len(report.conflicts)) == (0, UNET_LAYERS, UNET_LAYERS)
    assert {layer.active for layer in report} == {"its own"}
    assert "replaced by XFormersAttnProcessor since it was set, so heedful does not compute it" in str(report)
    heedful.reset_attention_backend(model)
    assert state(model) == before
    assert torch.equal(run_unet(model), want)
    assert "replaced by XFormersAttnProcessor; reset put back what was there before" in caplog.text


@torch.no_grad()
@pytest.mark.usefixtures("xformers_of_a_gpu")
def test_a_backend_that_diffusers_is_given_beside_ours_is_a_conflict_too() -> None:
    model = flux()
    before = state(model)
    heedful.set_attention_backend(model, COUNTING)
    with OnCpu():
        model.enable_xformers_memory_efficient_attention()
    report = heedful.attention_report(model)
    assert report.covered == 0
    text = "its _attention_backend was set to 'xformers' since it was set, so heedful does not compute it"
    assert all(text in layer.conflict for layer in report)
    heedful.reset_attention_backend(model)
    assert state(model) == before


@torch.no_grad()
def test_setting_again_takes_what_others_set_since_as_it_is() -> None:
    model = unet()
    heedful.set_attention_backend(model, COUNTING)
    model.set_attn_processor(new := AttnProcessor2_0())
    with pytest.raises(heedful.InvalidArgument):
        heedful.set_attention_backend(model, COUNTING, {"nowhere": "native"})
    assert all(processor is new for processor in model.attn_processors.values())
    assert len(heedful.attention_report(model).conflicts) == UNET_LAYERS
    assert not heedful.set_attention_backend(model, COUNTING).conflicts
    heedful.reset_attention_backend(model)
    assert all(processor is new for processor in model.attn_processors.values())


def ip_adapted(model: Any) -> Any:
    """A UNet with an IP-Adapter's processors, as diffusers loads them, and none of its projection."""
    processors = {}
    for name, old in model.attn_processors.items():
        size = model.get_submodule(name.removesuffix(".processor")).to_q.in_features
        processors[name] = old if "attn1" in name else IPAdapterAttnProcessor2_0(size, 16, num_tokens=(2,))
    model.set_attn_processor(processors)
    return model


def run_ip_adapted(model: Any) -> Tensor:
    text = unet_inputs()[2]
    images = torch.randn(2, 1, 2, 16, generator=torch.Generator().manual_seed(2)).flatten(1, 2)
    layer = model.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    hidden = torch.randn(2, 64, layer.to_q.in_features, generator=torch.Generator().manual_seed(3))
    return layer(hidden, encoder_hidden_states=(text, [images]))


@torch.no_grad()
def test_an_ip_adapter_keeps_its_processors_and_both_of_its_calls_are_routed() -> None:
    model = ip_adapted(unet())
    before, want = state(model), run_ip_adapted(model)
    kinds = {name: type(processor) for name, processor in model.attn_processors.items()}
    assert heedful.set_attention_backend(model, COUNTING).covered == UNET_LAYERS
    assert {name: type(processor) for name, processor in model.attn_processors.items()} == kinds
    assert torch.equal(run_ip_adapted(model), want)
    assert Counting.calls == 2
    heedful.reset_attention_backend(model)
    assert state(model) == before


@torch.no_grad()
def test_an_ip_adapter_that_is_loaded_or_unloaded_since_is_left_as_it_is(caplog: Any) -> None:
    model = unet()
    heedful.set_attention_backend(model, COUNTING)
    ip_adapted(model)
    report = heedful.attention_report(model)
    assert {layer.role for layer in report.conflicts} == {"cross"}
    assert report.covered == UNET_LAYERS
    heedful.reset_attention_backend(model)
    loaded = model.attn_processors
    assert sum(isinstance(one, IPAdapterAttnProcessor2_0) for one in loaded.values()) == UNET_LAYERS // 2
    assert "replaced by IPAdapterAttnProcessor2_0; reset left that as it is" in caplog.text
    heedful.set_attention_backend(model, COUNTING)
    model.set_attn_processor(new := AttnProcessor2_0())
    heedful.reset_attention_backend(model)
    assert all(one is new for name, one in model.attn_processors.items() if "attn2" in name)
    assert "processor" not in model.mid_block.attentions[0].transformer_blocks[0].attn2._modules


@torch.no_grad()
def test_added_keys_and_custom_processors_keep_their_class() -> None:
    class Custom(AttnProcessor2_0):
        pass

    attention = Attention(8, heads=2, dim_head=4, added_kv_proj_dim=6, norm_num_groups=2, bias=True)
    attention.set_processor(AttnAddedKVProcessor2_0())
    only = Attention(8, heads=2, dim_head=4, added_kv_proj_dim=6, norm_num_groups=2, only_cross_attention=True)
    only.set_processor(AttnAddedKVProcessor2_0())
    model = nn.ModuleList([attention, only, Attention(8, heads=2, dim_head=4, processor=Custom())])
    hidden, text = torch.randn(1, 8, 3), torch.randn(1, 5, 6)
    want = attention(hidden, encoder_hidden_states=text)
    report = heedful.set_attention_backend(model, COUNTING)
    assert [layer.role for layer in report] == ["joint", "cross", "self"]
    assert [type(layer.processor) for layer in model] == [AttnAddedKVProcessor2_0, AttnAddedKVProcessor2_0, Custom]
    assert torch.equal(attention(hidden, encoder_hidden_states=text), want)
    assert Counting.calls == 1


@torch.no_grad()
def test_every_exact_backend_keeps_scores_in_float32_where_the_module_asks_for_it(monkeypatch: Any) -> None:
    """Scores beyond float16's range, as of SD 2: they are what diffusers' own upcasting processor makes of them."""
    layer = Attention(16, heads=1, dim_head=16, upcast_attention=True, bias=False).eval().half()
    with torch.no_grad():
        for one in (layer.to_q, layer.to_k):
            one.weight.copy_(torch.eye(16) * 40)
    hidden = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(0)).half() * 8
    scores = layer.to_q(hidden) @ layer.to_k(hidden).mT
    assert scores.isinf().any()
    layer.set_processor(AttnProcessor())
    want = layer(hidden)
    layer.upcast_attention = False
    assert not layer(hidden).isfinite().all()
    layer.upcast_attention = True
    layer.set_processor(AttnProcessor2_0())
    exact = [row.name for row in heedful.list_backends("cpu") if row.available and row.exactness == "exact"]
    for keeps in (KEEP_FLOAT32_SCORES, frozenset()):
        monkeypatch.setattr(routing, "KEEP_FLOAT32_SCORES", keeps)
        for name in exact:
            heedful.set_attention_backend(layer, [name, "reference"])
            out = layer(hidden)
            assert out.dtype is torch.float16, name
            torch.testing.assert_close(out, want, atol=1e-2, rtol=1e-2, msg=lambda text, name=name: f"{name}: {text}")
    Counting.dtypes.clear()
    heedful.set_attention_backend(layer, COUNTING)
    layer(hidden)
    assert Counting.dtypes == {torch.float32}


@torch.no_grad()
def test_compiled_code_keeps_scores_in_float32_too(monkeypatch: Any) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(routing, "KEEP_FLOAT32_SCORES", frozenset())
    layer = Attention(16, heads=2, dim_head=8, upcast_attention=True).eval().half()
    want = layer(hidden := torch.randn(1, 6, 16).half())
    heedful.set_attention_backend(layer, COUNTING)
    out = torch.compile(layer, backend="eager", fullgraph=True)(hidden)
    torch.testing.assert_close(out, want, atol=1e-2, rtol=1e-2)
    assert Counting.dtypes == {torch.float32}


def test_an_inexact_backend_is_not_used_where_scores_are_to_be_float32() -> None:
    asks = Attention(16, heads=2, dim_head=8, upcast_attention=True)
    model = nn.ModuleList([asks, Attention(16, heads=2, dim_head=8)])
    report = heedful.set_attention_backend(model, "sage")
    assert [layer.covered for layer in report] == [False, True]
    assert "sage does not keep scores in float32, as its upcast_attention asks" in report["0"].reason
    report = heedful.set_attention_backend(model, ["sage", "native"])
    assert [layer.requested for layer in report] == ["native", "sage > native"]


@torch.no_grad()
def test_a_vae_falls_back_to_native_with_one_line_and_a_rule_for_it_is_obeyed(caplog: Any) -> None:
    model = vae(width=512)
    pipeline = SimpleNamespace(components={"vae": model, "unet": unet()})
    layer = model.decoder.mid_block.attentions[0]
    want = layer(hidden := torch.randn(1, 512, 2, 2))
    report = heedful.set_attention_backend(pipeline, "small_heads")
    assert [(one.requested, one.role) for one in report if one.component == "vae"] == [
        ("small_heads > native", "vae")
    ] * 2
    for _ in range(3):
        assert torch.equal(layer(hidden), want)
    assert caplog.text.count("head dim is 512") == 1
    row = heedful.attention_report(pipeline)["vae.decoder.mid_block.attentions.0"]
    assert (row.active, row.calls) == ("native", 3)
    assert row.reason.startswith("backend; small_heads refuses: head dim is 512")
    heedful.set_attention_backend(pipeline, "native", {"vae": "small_heads"})
    with pytest.raises(heedful.Refused, match="small_heads refuses: head dim is 512"):
        layer(hidden)


def test_what_cannot_be_reached_is_reported_with_the_reason() -> None:
    model = unet()
    model.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(AttnProcessor())
    report = heedful.set_attention_backend(model, COUNTING)
    (row,) = (layer for layer in report if not layer.covered)
    assert row.path == "mid_block.attentions.0.transformer_blocks.0.attn1"
    assert (row.requested, row.active) == (COUNTING, "its own")
    assert "AttnProcessor calls neither SDPA nor diffusers' dispatcher" in row.reason
    assert str(report).endswith(f"covered {UNET_LAYERS - 1} of {UNET_LAYERS}")
    text = text_encoder()
    text.set_attn_implementation("eager")
    with pytest.raises(heedful.NothingCovered, match=r"'eager'.*set_attn_implementation"):
        heedful.set_attention_backend(text, COUNTING)


@pytest.mark.parametrize(
    ("processor", "text"),
    [
        (MMAudioAttnProcessor, "obeys diffusers' process-wide backend only"),
        (AnyFlowCausalAttnProcessor, "'flex' kernel"),
    ],
)
def test_processors_that_do_not_let_themselves_be_pinned(processor: Any, text: str) -> None:
    model = flux()
    model.transformer_blocks[0].attn.processor = object.__new__(processor)
    with attention_backend("_native_math"):
        report = heedful.set_attention_backend(model, COUNTING)
    assert (report.covered, report.total) == (FLUX_LAYERS - 1, FLUX_LAYERS)
    assert text in report["transformer_blocks.0.attn"].reason


@torch.no_grad()
def test_a_module_without_processor_that_calls_sdpa_is_a_layer() -> None:
    model = nn.Sequential(WanAttentionBlock(8))
    want = model(start := torch.randn(1, 8, 1, 4, 4))
    assert heedful.set_attention_backend(model, COUNTING)["0"].module == "WanAttentionBlock"
    assert torch.equal(model(start), want)
    assert Counting.calls == 1
    small = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [False]}
    report = heedful.set_attention_backend(AutoencoderKLWan(**small), COUNTING)
    assert [layer.path for layer in report] == ["encoder.mid_block.attentions.0", "decoder.mid_block.attentions.0"]


@torch.no_grad()
def test_a_key_padding_mask_goes_through() -> None:
    model = load_pipeline().unet
    features, mask = encode(["one", "three"])
    want = model(sample := torch.randn(2, 1, 8, 8), 5, features, encoder_attention_mask=mask).sample
    report = heedful.set_attention_backend(model, COUNTING, rules={"*.attn2": "reference"})
    out = model(sample, 5, features, encoder_attention_mask=mask).sample
    torch.testing.assert_close(out, want, atol=1e-4, rtol=0)
    assert Counting.calls == report.total // 2


def test_layers_share_one_expanded_mask_which_is_read_once_and_left_out_of_the_kernel() -> None:
    model = unet()
    keep = torch.arange(8) < torch.tensor([[8], [3]])
    bias = ((1 - keep.float()) * -10000.0)[:, None]  # as a UNet hands it to its layers
    first, second = [module for name, module in model.named_modules() if name.endswith("attn2")][:2]
    heedful.set_attention_backend(model, "native")
    expanded = first.prepare_attention_mask(bias, 8, 2)
    assert second.heads == first.heads
    assert second.prepare_attention_mask(bias, 8, 2) is expanded
    query, key = torch.randn(2, first.heads, 1024, 8), torch.randn(2, first.heads, 8, 8)
    plan = heedful.explain(query, key, key, expanded.view(2, first.heads, -1, 8), backend="native")
    assert [step.name for step in plan.chosen.steps] == ["gather_keys"]
    bias.zero_()
    assert not first.prepare_attention_mask(bias, 8, 2).any()
    heedful.reset_attention_backend(model)
    assert "prepare_attention_mask" not in vars(first)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_equal_under_gradient_checkpointing(reentrant: bool) -> None:
    def gradient() -> Tensor:
        model.zero_grad()
        model(*unet_inputs(grad=True)).sample.square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    model = unet().train()
    model.enable_gradient_checkpointing(checkpointing(reentrant))
    want = gradient()
    heedful.set_attention_backend(model, COUNTING)
    assert torch.equal(gradient(), want)
    assert Counting.calls == 2 * UNET_LAYERS


def checkpointing(reentrant: bool) -> Callable[..., Any]:
    def checkpoint(module: nn.Module, *args: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(module.__call__, *args, use_reentrant=reentrant)

    return checkpoint


@torch.no_grad()
@MODELS
def test_a_compiled_model_is_routed_in_one_graph(build: Any, run: Any, layers: int) -> None:
    torch._dynamo.reset()
    model = build()
    want = run(model)
    heedful.set_attention_backend(model, COUNTING)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(compiled), want, atol=1e-5, rtol=1e-5)
    assert all("compiled" in layer.reason for layer in heedful.attention_report(compiled))
