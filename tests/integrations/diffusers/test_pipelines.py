"""Seven tiny pipelines, whole: what is covered, the same numbers under every exact backend, rules, and reset."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import MultiControlNetModel
from tiny_models import PIPELINES, controlnet, image_encoder, picture, unet
from torch import Tensor, nn

import heedful
from heedful.integrations.transformers import register

# Gemma 2 has soft-capped scores, so transformers gives it no SDPA; the report says how it is reached.
OUT_OF_REACH = {"sana": {"text_encoder.layers.0.self_attn"}}
LINEAR = {"sana": 4}
ROLES = {
    "sd": {"vae", "text", "self", "cross"},
    "sdxl": {"vae", "text", "self", "cross"},
    "sd3": {"vae", "text", "self", "joint"},
    "flux": {"vae", "text", "self", "joint"},
    "pixart": {"vae", "text", "self", "cross"},
    "wan": {"vae", "text", "self", "cross"},
    "sana": {"vae", "text", "self", "cross"},
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These models are so small that threads wait for each other only."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=PIPELINES)
def untouched(request: pytest.FixtureRequest) -> tuple[str, Any, Tensor]:
    """A pipeline's name, the pipeline, and what it makes before anybody touches it."""
    pipeline = PIPELINES[request.param]()
    pipeline.set_progress_bar_config(disable=True)
    return request.param, pipeline, picture(pipeline)


def state(pipeline: Any) -> list[dict[str, int]]:
    """Every instance's attributes, and those of the processors, by identity; but for the caches of Wan's VAE."""
    modules = [one for part in parts(pipeline).values() for one in part.modules()]
    processors = [module.processor for module in modules if hasattr(module, "processor")]
    kept = [{name: id(value) for name, value in vars(one).items()} for one in (*modules, *processors)]
    return [{name: one for name, one in each.items() if not name.endswith(("feat_map", "conv_idx"))} for each in kept]


def parts(pipeline: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def test_every_layer_of_every_component_is_covered_or_named_with_its_reason(untouched: Any) -> None:
    name, pipeline, want = untouched
    before = state(pipeline)
    report = heedful.set_attention_backend(pipeline, "native")
    out_of_reach = {layer.path for layer in report if layer.counted and not layer.covered}
    assert out_of_reach == OUT_OF_REACH.get(name, set())
    assert report.covered == report.total - len(out_of_reach)
    assert set(report.components) == set(parts(pipeline))
    assert all(layer.reason != "backend" for layer in report if not layer.covered)
    linear = [layer for layer in report if not layer.counted]
    assert len(linear) == LINEAR.get(name, 0)
    assert all("linear attention has no softmax" in layer.reason for layer in linear)
    assert {layer.role for layer in report} == ROLES[name]
    assert torch.equal(picture(pipeline), want)
    ran = heedful.attention_report(pipeline)
    asleep = {layer.path for layer in ran if layer.covered and not layer.calls}
    assert all(path.startswith("vae.encoder.") for path in asleep)  # nothing is encoded from pictures
    assert not any("bypassed" in layer.reason for layer in ran)
    assert heedful.reset_attention_backend(pipeline) == len(report)
    assert state(pipeline) == before
    assert torch.equal(picture(pipeline), want)


def test_what_is_out_of_reach_is_reached_as_its_reason_says() -> None:
    pipeline = PIPELINES["sana"]()
    pipeline.set_progress_bar_config(disable=True)
    want = picture(pipeline)
    with heedful.set_attention_backend(pipeline, "auto") as report:
        (obstacle,) = {report[path].reason for path in OUT_OF_REACH["sana"]}
    assert "register() and model.set_attn_implementation('heedful')" in obstacle
    register()
    pipeline.text_encoder.set_attn_implementation("heedful")
    with heedful.set_attention_backend(pipeline, "auto") as report:
        assert report.covered == report.total == 3
        torch.testing.assert_close(picture(pipeline), want, atol=1e-4, rtol=0)
        assert all(layer.calls for layer in heedful.attention_report(pipeline) if layer.component == "text_encoder")


def test_every_exact_backend_makes_the_same_picture(untouched: Any) -> None:
    _, pipeline, want = untouched
    exact = [row.name for row in heedful.list_backends("cpu") if row.available and row.exactness == "exact"]
    assert {"native", "native_math", "reference", "flex"} <= set(exact)
    ran: set[str] = set()
    for name in exact:
        with heedful.set_attention_backend(pipeline, [name, "native"]):
            torch.testing.assert_close(picture(pipeline), want, atol=1e-4, rtol=0)
            ran |= {backend for layer in heedful.attention_report(pipeline) for backend, _ in layer.ran}
    assert {"native", "native_math", "reference"} <= ran
    assert torch.equal(picture(pipeline), want)


def test_roles_globs_and_regular_expressions_reach_components(untouched: Any) -> None:
    name, pipeline, _ = untouched
    rules = {"text": "reference", "re:attn[12]?$": "native_math"}
    report = heedful.set_attention_backend(pipeline, "native", rules, exclude=["vae"])
    try:
        for layer in report:
            if layer.role == "vae":
                assert (layer.requested, layer.reason) == ("keep", "exclude 'vae'")
            elif layer.role == "text":
                assert layer.requested == "reference"
            else:
                assert layer.requested == "native_math"
        if name != "sana":
            assert report.components["vae"] == (0, 2)
            assert "vae 0 of 2" in str(report).splitlines()[-1]
            assert report.to_dict()["components"]["vae"] == {"covered": 0, "total": 2}
    finally:
        heedful.reset_attention_backend(pipeline)


def test_image_encoders_and_controlnets_are_components_as_well() -> None:
    nets = MultiControlNetModel([controlnet(), controlnet()])
    pipeline = SimpleNamespace(components={"unet": unet(), "image_encoder": image_encoder(), "controlnet": nets})
    report = heedful.set_attention_backend(pipeline, "native", {"image": "reference", "controlnet.nets.1*": "auto"})
    assert report.covered == report.total
    wishes = {name: {one.requested for one in report if one.component == name} for name in report.components}
    assert wishes == {"unet": {"native"}, "image_encoder": {"reference"}, "controlnet": {"native", "auto"}}
    assert {layer.role for layer in report if layer.component == "image_encoder"} == {"image"}
    assert {layer.role for layer in report if layer.component == "controlnet"} == {"self", "cross"}
    assert "image_encoder 2 of 2, controlnet 8 of 8" in report.coverage()
