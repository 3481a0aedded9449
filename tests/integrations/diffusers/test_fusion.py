"""LoRA adapters by PEFT: switching changes nothing, and fusing minds them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnAddedKVProcessor2_0, AttnProcessor, IPAdapterAttnProcessor2_0
from peft import LoraConfig, get_peft_model
from tiny_models import flux, sd_pipeline, unet, vae, wan
from torch import Tensor, nn

import heedful
from heedful.integrations.diffusers import fuse_qkv_projections, unfuse_qkv_projections

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
UNET_LAYERS = 8


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These models are so small that threads wait for each other only."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def adapted(model: Any, name: str = "style", **more: Any) -> Any:
    """The model with a LoRA of random weights, active and strong enough to be seen."""
    model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS, init_lora_weights=False, **more), name)
    return model.eval()


def run(model: Any) -> Tensor:
    seed = torch.Generator().manual_seed(1)
    return model(torch.randn(2, 4, 8, 8, generator=seed), 3, torch.randn(2, 5, 16, generator=seed)).sample


def run_wan(model: Any) -> Tensor:
    seed = torch.Generator().manual_seed(1)
    text = torch.randn(1, 5, 16, generator=seed)
    return model(torch.randn(1, 4, 1, 8, 8, generator=seed), torch.tensor([3]), text).sample


def run_flux(model: Any) -> Tensor:
    seed = torch.Generator().manual_seed(1)
    more = {"timestep": torch.tensor([0.5]), "img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3)}
    shapes = {"hidden_states": (1, 4, 16), "encoder_hidden_states": (1, 3, 16), "pooled_projections": (1, 16)}
    return model(**{name: torch.randn(shape, generator=seed) for name, shape in shapes.items()}, **more).sample


def state(model: nn.Module) -> Any:
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    processors = [module.processor for module in model.modules() if hasattr(module, "processor")]
    return weights, processors, [{name: id(value) for name, value in vars(one).items()} for one in model.modules()]


def assert_state(model: nn.Module, want: Any) -> None:
    weights, processors, attributes = state(model)
    assert weights.keys() == want[0].keys()
    assert all(torch.equal(value, want[0][name]) for name, value in weights.items())
    assert all(one is other for one, other in zip(processors, want[1], strict=True))
    assert attributes == want[2]


@torch.no_grad()
@pytest.mark.parametrize("backend", ["native", "reference", "native_math"])
def test_switching_with_an_active_adapter_changes_nothing(backend: str) -> None:
    model = adapted(unet())
    plain, want = run(unet()), run(model)
    assert (want - plain).abs().max() > 1e-2
    before = state(model)
    report = heedful.set_attention_backend(model, backend)
    assert report.covered == report.total == UNET_LAYERS
    assert not report.conflicts
    out = run(model)
    assert torch.equal(out, want) if backend == "native" else torch.allclose(out, want, atol=1e-4, rtol=0)
    model.disable_adapters()
    torch.testing.assert_close(run(model), plain, atol=1e-4, rtol=0)
    model.enable_adapters()
    heedful.reset_attention_backend(model)
    assert_state(model, before)
    assert torch.equal(run(model), want)


@torch.no_grad()
def test_a_model_that_peft_wraps_is_covered_whole() -> None:
    config = LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS, init_lora_weights=False)
    model = get_peft_model(unet(), config).eval()
    want = run(model)
    report = heedful.set_attention_backend(model, "native", {"cross": "reference"})
    assert report.covered == report.total == UNET_LAYERS
    torch.testing.assert_close(run(model), want, atol=1e-4, rtol=0)
    assert fused_after_reset(model) == UNET_LAYERS
    torch.testing.assert_close(run(model), want, atol=1e-5, rtol=1e-5)
    heedful.reset_attention_backend(model)
    assert torch.equal(run(model), want)


def fused_after_reset(model: nn.Module) -> int:
    heedful.reset_attention_backend(model)
    return fuse_qkv_projections(model, adapters="merge")


def test_gradients_of_the_adapter_are_the_same_when_routed() -> None:
    def gradients(routed: bool) -> Tensor:
        model = adapted(unet())
        with torch.random.fork_rng():
            torch.manual_seed(5)
            for one in model.parameters():
                if one.requires_grad:
                    nn.init.normal_(one, std=0.1)
        if routed:
            heedful.set_attention_backend(model, "native")
        run(model).square().sum().backward()
        return torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])

    assert torch.equal(gradients(True), gradients(False))


@torch.no_grad()
@pytest.mark.parametrize(("build", "run"), [(unet, run), (wan, run_wan), (flux, run_flux)], ids=["unet", "wan", "flux"])
def test_fusing_is_refused_with_an_active_adapter_and_merges_it_on_request(build: Any, run: Any) -> None:
    model = adapted(build())
    want, before = run(model), state(model)
    with pytest.raises(heedful.InvalidArgument, match=r"the adapters 'style' are active on .* give adapters='merge'"):
        fuse_qkv_projections(model)
    assert_state(model, before)
    naive = copy.deepcopy(model)
    naive.fuse_qkv_projections()
    assert (run(naive) - want).abs().max() > 1e-3, "diffusers' own fusion no longer leaves the adapter out"
    assert fuse_qkv_projections(model, adapters="merge") > 0
    torch.testing.assert_close(run(model), want, atol=1e-5, rtol=1e-5)
    assert not heedful.attention_report(model).conflicts
    report = heedful.set_attention_backend(model, "native")
    assert report.covered == report.total
    torch.testing.assert_close(run(model), want, atol=1e-5, rtol=1e-5)
    heedful.reset_attention_backend(model)
    assert_state(model, before)
    assert torch.equal(run(model), want)


@torch.no_grad()
def test_fused_layers_that_leave_an_adapter_out_are_a_conflict(caplog: Any) -> None:
    model = adapted(unet())
    fuse_qkv_projections(model, "merge")
    model.set_adapters("style", 0.5)
    report = heedful.attention_report(model)
    assert len(report.conflicts) == UNET_LAYERS
    assert "do not compute what the active adapters ('style') add" in report.conflicts[0].reason
    unfuse_qkv_projections(model)
    assert not heedful.attention_report(model).conflicts
    model.fuse_qkv_projections()
    heedful.set_attention_backend(model, "native")
    assert "do not compute what the active adapters ('style') add" in caplog.text
    model.disable_adapters()
    assert not heedful.attention_report(model).conflicts


@torch.no_grad()
@pytest.mark.parametrize("gone", ["disable_adapters", "delete_adapters", "unload_lora"])
def test_an_adapter_that_is_gone_but_still_fused_in_is_a_conflict(gone: str) -> None:
    model = adapted(unet())
    fuse_qkv_projections(model, "merge")
    heedful.set_attention_backend(model, "native")
    getattr(model, gone)(*(["style"] if gone == "delete_adapters" else []))
    assert (run(model) - run(unet())).abs().max() > 1e-2
    report = heedful.attention_report(model)
    assert len(report.conflicts) == UNET_LAYERS
    assert "still compute what adapters ('style') add that are no longer active" in report.conflicts[0].reason
    heedful.reset_attention_backend(model)
    assert not heedful.attention_report(model).conflicts


@torch.no_grad()
def test_an_adapter_in_the_weights_counts_as_much_as_one_beside_them() -> None:
    model = adapted(unet())
    want = run(model)
    fuse_qkv_projections(model, "merge")
    model.fuse_lora()
    assert not heedful.attention_report(model).conflicts
    unfuse_qkv_projections(model)
    fuse_qkv_projections(model)  # nothing is active beside the weights
    for act in (model.unfuse_lora, model.fuse_lora, model.unload_lora):
        act()
        assert not heedful.attention_report(model).conflicts
        torch.testing.assert_close(run(model), want, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_pipeline_is_fused_and_unfused_exactly() -> None:
    pipeline = sd_pipeline()
    parts = [pipeline.unet, pipeline.vae]
    want, before = run(pipeline.unet), [state(part) for part in parts]
    assert fuse_qkv_projections(pipeline) == UNET_LAYERS + 2
    assert "Fused" in type(pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor).__name__
    torch.testing.assert_close(run(pipeline.unet), want, atol=1e-5, rtol=1e-5)
    with heedful.set_attention_backend(pipeline, "native"):
        for act in (fuse_qkv_projections, unfuse_qkv_projections):
            with pytest.raises(heedful.InvalidArgument, match=r"fused already|it has a backend set"):
                act(pipeline)
    assert unfuse_qkv_projections(pipeline) == 2
    assert unfuse_qkv_projections(pipeline) == 0
    for part, was in zip(parts, before, strict=True):
        assert_state(part, was)
    assert torch.equal(run(pipeline.unet), want)


@torch.no_grad()
def test_a_copy_of_a_fused_model_is_unfused_by_itself() -> None:
    model = unet()
    want = run(model)
    fuse_qkv_projections(model)
    twin = copy.deepcopy(model)
    heedful.reset_attention_backend(twin)
    assert torch.equal(run(twin), want)
    assert not any(name.endswith(("to_qkv", "to_kv")) for name, _ in twin.named_modules())
    assert any(name.endswith("to_qkv") for name, _ in model.named_modules())


def with_processor(processor: Any) -> Any:
    model = unet()
    model.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(processor)
    return model


@pytest.mark.parametrize(
    ("model", "arguments", "text"),
    [
        (lambda: with_processor(IPAdapterAttnProcessor2_0(32, 16)), (), "fusing would replace IPAdapterAttnProcessor2"),
        (lambda: with_processor(AttnAddedKVProcessor2_0()), (), "fusing would replace AttnAddedKVProcessor2_0"),
        (lambda: with_processor(AttnProcessor()), (), "fusing would replace AttnProcessor,"),
        (vae, ("other",), "adapters: got 'other'; give 'refuse' or 'merge'"),
        (lambda: nn.Linear(2, 2), (), "give a model of diffusers that has fuse_qkv_projections"),
    ],
)
def test_what_fusing_would_harm_is_refused_and_left_alone(model: Any, arguments: Any, text: str) -> None:
    made = model()
    before = state(made)
    with pytest.raises(heedful.InvalidArgument, match=text):
        fuse_qkv_projections(made, *arguments)
    assert_state(made, before)
