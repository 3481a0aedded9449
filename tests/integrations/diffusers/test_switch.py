"""The switch "use flash attention": on, off, and what it says, with flash absent, broken, and as a stand-in."""

from __future__ import annotations

import copy
import gc
import json
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.attention_dispatch import AttentionBackendName
from stand_in_sites import installed, machine
from tiny_models import flux, sd_pipeline, text_encoder, unet, vae
from torch import Tensor, nn

import heedful
from heedful.errors import InvalidArgument, NothingCovered, Refused, UnknownBackend
from heedful.facts import DeviceFacts, Facts
from heedful.integrations.diffusers import enable_flash_attention, flash_status
from heedful.integrations.diffusers.switch_status import FIELDS_ZH, Cause
from heedful.problem import AttentionProblem
from heedful.refusal import Refusal

UNET_LAYERS, TEXT_LAYERS, VAE_LAYERS = 8, 2, 2
Dispatcher = heedful.AttentionDispatcher


@pytest.fixture
def unet_and_inputs() -> tuple[Any, tuple[Tensor, ...]]:
    model = unet().to(torch.bfloat16)
    draw = torch.Generator().manual_seed(0)
    sizes = ((1, 4, 8, 8), (1, 3, 16))
    image, text = (torch.randn(size, generator=draw).to(torch.bfloat16) for size in sizes)
    return model, (image, torch.tensor(3), text)


@pytest.fixture
def on_machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[Facts], None]:
    """``on_machine(facts)``: the switch, and the layers that it routes, are on that machine."""

    def use(facts: Facts) -> None:
        factory = heedful.AttentionStrategyFactory(plugins=False)
        dispatcher = Dispatcher(factory, facts, heedful.Policy(guard="off"))
        monkeypatch.setattr("heedful.routing.attention", dispatcher.attention)
        monkeypatch.setattr("heedful.integrations.diffusers.switch.default_dispatcher", dispatcher)

    return use


@pytest.fixture
def gpu_without_flash(on_machine: Callable[[Facts], None]) -> None:
    """The CPU passes for an sm_80 GPU, beside which no package is installed."""
    facts = machine("sm_80")
    on_machine(replace(facts, packages={}))


@pytest.fixture
def flash_calls(
    on_machine: Callable[[Facts], None], monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[tuple[int, ...]]]:
    """The CPU passes for an sm_80 GPU with a flash_attn, whose calls are listed by their query's shape."""
    calls: list[tuple[int, ...]] = []
    with installed("flash_attn_2"):
        import flash_attn.flash_attn_interface as package

        inner = package.flash_attn_func

        def listed(q: Tensor, *operands: Any, **words: Any) -> Any:
            calls.append(tuple(q.shape))
            return inner(q, *operands, **words)

        monkeypatch.setattr(package, "flash_attn_func", listed)
        on_machine(machine("sm_80"))
        yield calls


def run(model: Any, inputs: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(*inputs).sample
    return out


def held(model: Any) -> list[dict[str, Any]]:
    return [dict(vars(module)) for module in model.modules()]


# Absent


def test_flash_is_absent_and_the_status_says_so() -> None:
    pipeline = sd_pipeline()
    status = enable_flash_attention(pipeline, use_flash_attention=True)
    assert str(status) == (  # no remedy: to install it would not help on a CPU
        "requested=flash, active=native, reason=flash_attn is not installed; device is cpu, flash takes cuda, "
        "covered=8/12"
    )
    assert (status.covered, status.total) == (UNET_LAYERS, UNET_LAYERS + TEXT_LAYERS + VAE_LAYERS)
    assert not status.flash
    assert not status.ran


def test_on_a_gpu_the_reason_names_the_remedy(gpu_without_flash: None, unet_and_inputs: Any) -> None:
    status = enable_flash_attention(unet_and_inputs[0])
    assert str(status).startswith(
        "requested=flash, active=native, reason=flash_attn is not installed (pip install flash-attn"
    )
    assert status.translated("zh-CN").reason.startswith("未安装 flash_attn（pip install flash-attn")
    assert status.text.startswith("Flash attention (flash) will not be used: flash_attn is not installed")
    assert status.text.endswith("Instead: native 8 layers.")
    assert status.translated("zh").text.startswith("不会使用 Flash 注意力（flash）：未安装 flash_attn")


def test_absent_flash_computes_as_the_untouched_model_does(gpu_without_flash: None, unet_and_inputs: Any) -> None:
    model, inputs = unet_and_inputs
    want = run(model, inputs)
    status = enable_flash_attention(model)
    assert torch.equal(run(model, inputs), want)
    after = status.refreshed()
    assert (status.ran, after.ran, after.calls) == (False, True, UNET_LAYERS)
    assert after.active == "native"
    assert after.reason == status.reason
    assert after.text.startswith("Flash attention (flash) was not used: flash_attn is not installed")


def test_strict_raises_with_the_reason_and_leaves_the_model_alone(
    gpu_without_flash: None, unet_and_inputs: Any
) -> None:
    model, _ = unet_and_inputs
    before = held(model)
    with pytest.raises(Refused, match="flash refuses: package is flash-attn not installed"):
        enable_flash_attention(model, strict=True)
    assert held(model) == before
    enable_flash_attention(model)
    with pytest.raises(Refused):
        enable_flash_attention(model, strict=True)
    assert flash_status(model).requested == "flash"


def test_a_package_that_cannot_be_imported(
    on_machine: Callable[[Facts], None], unet_and_inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "flash_attn"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "flash_attn_interface.py").write_text("raise ImportError('undefined symbol: _ZN3c105Error')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    here = machine("sm_80")
    on_machine(replace(here, packages={"flash_attn.flash_attn_interface": "2.8.3", "flash-attn": "2.8.3"}))
    status = enable_flash_attention(unet_and_inputs[0])
    assert status.active == "native"
    assert "undefined symbol: _ZN3c105Error" in status.reason
    del sys.modules["flash_attn"]  # its __init__ was imported all the same


def test_a_package_that_is_too_old(on_machine: Callable[[Facts], None], unet_and_inputs: Any) -> None:
    packages = {"flash_attn.flash_attn_interface": "2.5.0", "flash-attn": "2.5.0"}
    on_machine(replace(machine("sm_80"), packages=packages))
    status = enable_flash_attention(unet_and_inputs[0])
    assert "flash-attn 2.5.0 is installed, flash takes flash-attn 2.6.3 or newer" in status.reason


# Present


def test_flash_is_really_called_from_the_layers_of_a_unet(flash_calls: list[Any], unet_and_inputs: Any) -> None:
    model, inputs = unet_and_inputs
    want = run(model, inputs)
    status = enable_flash_attention(model, True)
    assert (status.active, status.reason, status.flash) == ("flash", "", True)
    assert status.text == "Flash attention is on and will compute: flash 8 layers."
    flash_calls.clear()  # the trial
    out = run(model, inputs)
    assert len(flash_calls) == UNET_LAYERS
    assert {shape[1] for shape in flash_calls} == {16, 64}  # (B, Q, H, D) of its two resolutions
    torch.testing.assert_close(out, want, atol=0.05, rtol=0.05)
    after = status.refreshed()
    assert (after.active, after.calls, after.ran) == ("flash", UNET_LAYERS, True)
    assert after.text == "Flash attention is on and computed: flash 8 layers."
    assert after.translated("zh").text == "Flash 注意力已开启，实际计算：flash 8 层。"


def test_the_switch_is_turned_on_a_loaded_model(flash_calls: list[Any], unet_and_inputs: Any) -> None:
    model, inputs = unet_and_inputs
    before, want = held(model), run(model, inputs)
    for _ in range(2):
        enable_flash_attention(model, True)
        flash_calls.clear()
        run(model, inputs)
        assert len(flash_calls) == UNET_LAYERS
        status = enable_flash_attention(model, False)
        assert (status.requested, status.active, status.covered) == ("off", "its own", 0)
        assert held(model) == before
        assert torch.equal(run(model, inputs), want)
        assert len(flash_calls) == UNET_LAYERS


def test_switching_on_twice_changes_nothing_and_keeps_the_counts(flash_calls: list[Any], unet_and_inputs: Any) -> None:
    model, inputs = unet_and_inputs
    enable_flash_attention(model)
    run(model, inputs)
    set_so = held(model)
    assert enable_flash_attention(model).calls == UNET_LAYERS
    assert held(model) == set_so
    assert enable_flash_attention(model, strict=True).calls == 0


def test_a_part_of_the_layers(flash_calls: list[Any]) -> None:
    class Wide(nn.Module):
        heads, head_dim = 1, 512

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    class Narrow(Wide):
        head_dim = 64

    model = nn.ModuleList([Wide(), Narrow(), Narrow()])
    model.register_parameter("weight", nn.Parameter(torch.zeros(1, dtype=torch.float16)))
    status = enable_flash_attention(model)
    assert status.layers == (("flash", 2), ("native", 1))
    assert status.reason == "head dim is 512, flash takes at most 256"
    assert status.text == (
        "Flash attention is on for a part: flash 2 layers, native 1 layers. "
        "Reason: head dim is 512, flash takes at most 256."
    )
    assert status.translated("zh").reason == "头维度为 512，flash 只支持 at most 256"


def test_what_ran_may_differ_from_what_was_expected(flash_calls: list[Any], unet_and_inputs: Any) -> None:
    """A mask is seen at the call only."""
    model, (image, step, text) = unet_and_inputs
    status = enable_flash_attention(model)
    half = torch.tensor([[1, 0.5, 1]], dtype=torch.bfloat16)  # a bias, no padding
    with torch.no_grad():
        model(image, step, text)
        model(image, step, text, encoder_attention_mask=half)
    after = status.refreshed()
    assert dict(after.layers) == {"flash": UNET_LAYERS, "native": UNET_LAYERS // 2}
    assert "mask is bias, flash takes causal/varlen/window" in after.reason
    assert after.text.startswith("Flash attention computed a part: flash 8 layers, native 4 layers.")


def test_a_model_in_float32_is_told_its_dtype(flash_calls: list[Any]) -> None:
    status = enable_flash_attention(unet())
    assert status.active == "native"
    assert status.reason == "dtype is float32, flash takes float16/bfloat16 (cast the tensors)"


def test_several_kinds_of_flash_in_order(flash_calls: list[Any], unet_and_inputs: Any) -> None:
    status = enable_flash_attention(unet_and_inputs[0], backend=["_flash_3", AttentionBackendName.FLASH])
    assert (status.requested, status.active, status.reason) == ("flash_3 > flash", "flash", "")


def test_flux_too(flash_calls: list[Any]) -> None:
    status = enable_flash_attention(flux().to(torch.bfloat16))
    assert (status.active, status.covered, status.total) == ("flash", 3, 3)


# Of a pipeline


def test_neither_vae_nor_text_encoder_is_switched(flash_calls: list[Any]) -> None:
    pipeline = sd_pipeline().to(torch.bfloat16)
    before = held(pipeline.vae) + held(pipeline.text_encoder)
    status = enable_flash_attention(pipeline)
    assert {part.component: (part.active, part.covered, part.total) for part in status.components} == {
        "vae": ("its own", 0, VAE_LAYERS),
        "text_encoder": ("its own", 0, TEXT_LAYERS),
        "unet": ("flash", UNET_LAYERS, UNET_LAYERS),
    }
    assert not any("forward" in vars(one) for part in (pipeline.vae, pipeline.text_encoder) for one in part.modules())
    assert status.text.endswith("flash 8 layers. Left alone: vae 2, text_encoder 2 layers.")
    assert json.loads(json.dumps(status.to_dict()))["layers"] == {"flash": 8}
    enable_flash_attention(pipeline, False)
    assert held(pipeline.vae) + held(pipeline.text_encoder) == before


def test_components_by_name(flash_calls: list[Any]) -> None:
    pipeline = sd_pipeline().to(torch.bfloat16)
    status = enable_flash_attention(pipeline, components=["text_encoder"])
    assert [part.component for part in status.components if part.covered] == ["text_encoder"]
    for name in ("vae", "unett"):
        with pytest.raises(InvalidArgument, match=f"components: got '{name}'; give names out of"):
            enable_flash_attention(pipeline, components=[name])


def test_other_peoples_settings_stay(gpu_without_flash: None) -> None:
    pipeline = sd_pipeline()
    heedful.set_attention_backend(pipeline, None, rules={"vae*": "native", "text_encoder*": "reference"})
    enable_flash_attention(pipeline)
    report = heedful.attention_report(pipeline)
    assert report.covered == UNET_LAYERS + TEXT_LAYERS + VAE_LAYERS
    assert {row.reason for row in report if row.component == "unet"} == {"use_flash_attention: flash"}
    enable_flash_attention(pipeline, False)
    wishes = {(row.component, row.requested) for row in heedful.attention_report(pipeline)}
    assert wishes == {("unet", "keep"), ("vae", "native"), ("text_encoder", "reference")}


@pytest.mark.parametrize("duplicate", [lambda model: model, copy.deepcopy], ids=["itself", "a copy"])
def test_off_puts_back_what_the_switch_had_replaced(
    gpu_without_flash: None, unet_and_inputs: Any, duplicate: Any
) -> None:
    model, _ = unet_and_inputs
    untouched = held(model)
    heedful.set_attention_backend(model, "reference", rules={"cross": "native_math", "mid*": "keep"})
    wanted = [(row.path, row.requested, row.reason) for row in heedful.attention_report(model) if row.covered]
    enable_flash_attention(model)
    enable_flash_attention(model, backend=["flash_3", "flash"])
    with pytest.raises(Refused):
        enable_flash_attention(model, strict=True)
    assert flash_status(model).requested == "flash_3 > flash"
    other = duplicate(model)
    enable_flash_attention(other, False)
    after = heedful.attention_report(other)
    assert [(row.path, row.requested, row.reason) for row in after if row.covered] == wanted
    assert len(wanted) < UNET_LAYERS
    heedful.reset_attention_backend(model)
    assert held(model) == untouched


def test_off_does_not_undo_what_the_switch_did_not_do(unet_and_inputs: Any) -> None:
    model, _ = unet_and_inputs
    heedful.set_attention_backend(model, "reference")
    status = enable_flash_attention(model, False)
    assert (status.requested, status.active, status.covered) == ("off", "reference", UNET_LAYERS)
    assert status.text == ("Flash attention is off by this switch; set_attention_backend has set: reference 8 layers.")
    heedful.reset_attention_backend(model)
    assert flash_status(model).text == "Flash attention is off; every layer computes attention by its own code."


def test_a_copy_has_a_switch_of_its_own(flash_calls: list[Any], unet_and_inputs: Any) -> None:
    model, _ = unet_and_inputs
    enable_flash_attention(model)
    other = copy.deepcopy(model)
    assert enable_flash_attention(other, False).covered == 0
    assert flash_status(model).active == "flash"
    enable_flash_attention(model, False)


def test_nothing_is_kept_alive(unet_and_inputs: Any) -> None:
    model = unet()
    status = enable_flash_attention(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    with pytest.raises(InvalidArgument, match="pipeline: got one that is gone"):
        status.refreshed()


def test_weights_that_wait_on_the_cpu_are_asked_for_where_they_go(gpu_without_flash: None) -> None:
    """As model offloading has it: the pipeline knows the device."""
    facts = Facts("2.13", "3.11", "Linux", {"cpu": DeviceFacts("cpu", "cpu"), "meta": DeviceFacts.parse("sm_75")})
    pipeline = SimpleNamespace(components={"unet": unet()}, _execution_device=torch.device("meta"))
    import heedful.integrations.diffusers.switch as switch

    switch.default_dispatcher._facts = facts
    status = enable_flash_attention(pipeline)
    assert "compute capability is 7.5, flash takes at least 8.0" in status.reason
    with pytest.raises(InvalidArgument, match="flash_status"):
        status.refreshed()


# Errors


@pytest.mark.parametrize("value", [1, "true", None])
def test_a_value_that_is_no_bool_is_refused(value: Any) -> None:
    with pytest.raises(InvalidArgument, match="use_flash_attention: got"):
        enable_flash_attention(unet(), value)


def test_malformed_arguments_leave_the_model_as_it_was() -> None:
    model = unet()
    before = held(model)
    with pytest.raises(InvalidArgument, match="language: got 'fr'; give one of en, zh"):
        enable_flash_attention(model, language="fr")
    with pytest.raises(UnknownBackend, match="flush"):
        enable_flash_attention(model, backend="flush")
    with pytest.raises(NothingCovered, match="no attention layer of AutoencoderKL may be switched"):
        enable_flash_attention(vae())
    with pytest.raises(NothingCovered, match="found none"):
        enable_flash_attention(nn.Linear(2, 2))
    assert held(model) == before


def test_a_text_encoder_that_is_named_itself_is_switched() -> None:
    status = enable_flash_attention(text_encoder())
    assert (status.covered, status.total) == (TEXT_LAYERS, TEXT_LAYERS)


class Itself(nn.Module):
    """A model that is an attention layer, with another one inside."""

    def __init__(self, inside: nn.Module | None = None) -> None:
        super().__init__()
        self.text = inside

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.text is None else self.text(x)
        return nn.functional.scaled_dot_product_attention(y, y, y)


def test_a_model_that_is_a_layer_itself(flash_calls: list[Any]) -> None:
    model = Itself(Itself()).half()
    model.register_parameter("weight", nn.Parameter(torch.zeros(1, dtype=torch.float16)))
    before = held(model)
    heedful.set_attention_backend(model, None, rules={"tex?": "reference"})
    chosen = enable_flash_attention(model)
    assert (chosen.covered, chosen.total, chosen.active) == (2, 2, "flash")
    enable_flash_attention(model, False)
    assert [row.requested for row in heedful.attention_report(model)] == ["keep", "reference"]
    heedful.reset_attention_backend(model)
    assert held(model) == before
    only = SimpleNamespace(components={"text": Itself(), "vae": vae()})  # a path that is also a role's name
    assert enable_flash_attention(only).covered == 1


def test_off_for_what_has_no_attention() -> None:
    status = enable_flash_attention(SimpleNamespace(components={"scheduler": FlowMatchEulerDiscreteScheduler()}), False)
    assert (status.covered, status.total) == (0, 0)


# Languages


def test_every_field_of_a_refusal_of_flash_is_known_in_chinese(factory: heedful.AttentionStrategyFactory) -> None:
    sizes = {"batch": 1, "heads": 4, "kv_heads": 3, "query_length": 9, "key_length": 5, "head_dim": 300, "value_dim": 7}
    asked = {"dtype": torch.float32, "dropout_p": 0.5, "softcap": 2.0, "needs_grad": True, "deterministic": True}
    bias = heedful.masks.facts_of(heedful.Bias(torch.zeros(9, 5)), 9, 5)
    places = [{"device": "cpu"}, {"device": "cuda", "capability": (7, 5)}, {"device": "cuda", "capability": (12, 0)}]
    hard = [AttentionProblem(**sizes, **asked, **place, mask=bias) for place in places]
    family = [factory.create_strategy(name) for name in ("flash", "flash_3", "flash_4")]
    found = {refusal.field for strategy in family for problem in hard for refusal in strategy.refusals(problem)}
    assert {"device", "compute capability", "dtype", "head dim", "mask", "softcap"} <= found
    assert found <= set(FIELDS_ZH)


@pytest.mark.parametrize("field", ["package", "import", "probe", "guard", "download", "window"])
def test_both_languages_say_every_kind_of_reason(field: str) -> None:
    cause = Cause("flash", (Refusal(field, "seen", "wanted", "do this"),))
    english, chinese = cause.sentences("en")[0], cause.sentences("zh")[0]
    assert ("seen" in english) == ("seen" in chinese)
    assert ("do this" in english) == ("do this" in chinese) == (field in {"package", "import", "download"})


def test_many_reasons_stay_one_line() -> None:
    status = flash_status(nn.Linear(2, 2))
    refusals = tuple(Refusal(f"field {number}", "a", "b") for number in range(6))
    many = replace(status, causes=(Cause("flash", refusals),))
    assert many.reason.count("\n") == 0
    assert many.reason.endswith("; and 3 more reasons")
    assert len(many.causes[0].sentences("en")) == 6
