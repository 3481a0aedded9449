"""diffusers' own dispatcher routed through heedful and put back: real tiny models, threads, compiled code."""

from __future__ import annotations

import functools
import gc
import importlib
import inspect
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch as theirs
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from diffusers.models.modeling_utils import ModelMixin
from tiny_models import flux, flux_pipeline, text_encoder, unet
from torch import Tensor

import heedful
from heedful.errors import HeedfulError, InvalidArgument, NothingCovered, Refused, UnknownBackend
from heedful.integrations.diffusers import install, installation, is_installed, uninstall

UNET_LAYERS = 8
FLUX_LAYERS = 3
BEFORE = inspect.signature(dispatch_attention_fn)


class Counting(heedful.AttentionStrategy):
    """SDPA that counts its calls."""

    calls = 0
    limits = heedful.Limits(
        backward=True,
        compile=True,
        masks=frozenset({"causal", "dense", "bias"}),
        scale=True,
        options=frozenset({"tile"}),
    )

    def compute_attention(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        type(self).calls += 1
        kwargs.pop("tile", None)
        return F.scaled_dot_product_attention(query, key, value, **kwargs)


class Other(Counting):
    calls = 0


@pytest.fixture(autouse=True)
def strategies() -> Iterator[None]:
    Counting.calls = Other.calls = 0
    factory = heedful.AttentionStrategyFactory
    factory.register_strategy("counting", Counting)
    factory.register_strategy("other", Other)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    uninstall()
    factory.unregister_strategy("counting")
    factory.unregister_strategy("other")


@pytest.fixture(autouse=True)
def nothing_of_diffusers_is_left_changed() -> Iterator[None]:
    before = everything()
    yield
    assert everything() == before


@pytest.fixture
def installed() -> None:
    install()


def everything() -> dict[str, Any]:
    """What could have been changed: the modules' and classes' attributes by identity, the functions' insides."""
    found: dict[str, Any] = {}
    for holder in (theirs, _AttentionBackendRegistry, ModelMixin, AttentionModuleMixin):
        for name, value in vars(holder).items():
            found[f"{holder.__name__}.{name}"] = id(value)
            function = getattr(value, "__func__", getattr(value, "__wrapped__", value))
            if inspect.isfunction(function):
                inside = (function.__code__, function.__defaults__, function.__kwdefaults__)
                found[f"{holder.__name__}.{name} inside"] = tuple(map(id, inside))
    registry = _AttentionBackendRegistry
    for table in (registry._backends, registry._constraints, registry._supported_arg_names):
        found |= {f"{id(table)} {name}": id(value) for name, value in table.items()}
    return found


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


def run_flux(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**flux_inputs()).sample


def run_unet(model: Any) -> Tensor:
    seed = torch.Generator().manual_seed(1)
    sample, text = torch.randn(2, 4, 8, 8, generator=seed), torch.randn(2, 5, 16, generator=seed)
    with torch.no_grad():
        return model(sample, torch.tensor(3), text).sample


def picture(pipeline: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    sizes = {"height": 16, "width": 16, "max_sequence_length": 8, "num_inference_steps": 1}
    return pipeline("a b", generator=seed, output_type="pt", **sizes).images


def tensors(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = torch.randn(3, *(shape or (2, 5, 3, 8)), generator=torch.Generator().manual_seed(0))
    return query, key, value


# Installing


def test_a_pipeline_is_computed_by_heedful_and_bit_equal_before_meanwhile_and_after() -> None:
    pipeline = flux_pipeline()
    want = picture(pipeline)
    install()
    assert torch.equal(picture(pipeline), want)
    with heedful.attention_backend("counting"):
        assert torch.equal(picture(pipeline), want)
    assert Counting.calls == FLUX_LAYERS
    uninstall()
    assert torch.equal(picture(pipeline), want)
    with heedful.attention_backend("counting"):
        picture(pipeline)
    assert Counting.calls == FLUX_LAYERS


def test_installing_and_uninstalling_again_change_nothing() -> None:
    uninstall()
    install()
    inside = everything()
    install()
    assert is_installed()
    assert everything() == inside
    uninstall()
    uninstall()
    assert not is_installed()
    assert dispatch_attention_fn(*tensors(), backend="native").shape == (2, 5, 3, 8)


def test_whoever_holds_the_function_calls_heedful(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By value, in a partial, and in a module that is imported only now."""
    held = functools.partial(dispatch_attention_fn, backend="counting")
    held(*tensors())
    late = "diffusers.models.transformers.transformer_prx"
    monkeypatch.delitem(sys.modules, late, raising=False)
    module = importlib.import_module(late)
    module.dispatch_attention_fn(*tensors(), backend="counting")
    assert Counting.calls == 2


def test_the_signatures_stay(installed: None) -> None:
    assert inspect.signature(dispatch_attention_fn) == BEFORE
    assert list(inspect.signature(ModelMixin.set_attention_backend).parameters) == ["self", "backend"]


def test_replacements_use_nothing_of_the_module_they_stand_in() -> None:
    theirs_own = {"_AttentionBackendRegistry"}
    for _, replacement in installation._pairs():
        code = replacement.__code__
        imported = {name for name in code.co_names if name in vars(installation.routed) or "heedful" in name}
        assert code.co_freevars == ()
        assert set(code.co_names) - imported <= theirs_own | {"run_original", "reset_on_model", "__enter__", "__exit__"}


def test_a_diffusers_with_other_parameters_is_refused_and_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def dispatch_attention_fn(q: Any, k: Any, v: Any) -> None: ...

    monkeypatch.setattr(theirs, "dispatch_attention_fn", dispatch_attention_fn)
    with pytest.raises(HeedfulError, match=r"diffusers .*'q', 'k', 'v'"):
        install()
    assert not is_installed()


def test_a_diffusers_without_parallel_config_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    """As before diffusers 0.36."""

    def older(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False,
              attention_kwargs=None, *, backend=None):  # fmt: skip
        return "own"

    globals()["_AttentionBackendRegistry"] = _AttentionBackendRegistry  # whose globals the replacement sees
    monkeypatch.setattr(theirs, "dispatch_attention_fn", older)
    install()
    assert older(*tensors(), backend="counting").shape == (2, 5, 3, 8)
    uninstall()
    assert older(*tensors()) == "own"
    assert older.__kwdefaults__ == {"backend": None}


def test_threads_may_call_while_others_install_and_uninstall() -> None:
    query, key, value = tensors()
    want = F.scaled_dot_product_attention(*(one.transpose(1, 2) for one in (query, key, value))).transpose(1, 2)
    failures: list[BaseException] = []
    done = threading.Event()

    def calling() -> None:
        try:
            while not done.is_set():
                torch.testing.assert_close(dispatch_attention_fn(query, key, value, backend="native"), want)
        except BaseException as error:
            failures.append(error)

    def switching() -> None:
        try:
            for _ in range(200):
                install()
                uninstall()
        except BaseException as error:
            failures.append(error)

    callers = [threading.Thread(target=calling) for _ in range(2)]
    switchers = [threading.Thread(target=switching) for _ in range(2)]
    for thread in (*callers, *switchers):
        thread.start()
    for thread in switchers:
        thread.join()
    done.set()
    for thread in callers:
        thread.join()
    assert failures == []


# Whose wish counts


def test_a_processors_backend_comes_before_the_scope(installed: None) -> None:
    model = flux()
    model.transformer_blocks[0].attn.processor._attention_backend = "other"
    with heedful.attention_backend("counting"):
        run_flux(model)
    assert (Other.calls, Counting.calls) == (1, FLUX_LAYERS - 1)


def test_a_rule_of_heedful_comes_before_a_processors_backend(installed: None) -> None:
    model = flux()
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.attn.set_attention_backend("_native_math")
    report = heedful.set_attention_backend(model, "counting", rules={"transformer_blocks.*": "other"})
    with theirs.attention_backend("native"):
        run_flux(model)
    assert (Other.calls, Counting.calls) == (1, FLUX_LAYERS - 1)
    assert report.covered == FLUX_LAYERS
    assert [layer.calls for layer in heedful.attention_report(model)] == [1] * FLUX_LAYERS


def test_routes_set_before_installing_and_kept_after_uninstalling_hold() -> None:
    model = flux()
    want = run_flux(model)
    heedful.set_attention_backend(model, "counting")
    for change in (install, uninstall):
        change()
        Counting.calls = 0
        assert torch.equal(run_flux(model), want)
        assert Counting.calls == FLUX_LAYERS


def test_both_scopes_are_one_and_the_innermost_counts(installed: None) -> None:
    with heedful.attention_backend("other"), diffusers.attention_backend("_native_math"):
        assert _AttentionBackendRegistry.get_active_backend()[0] is AttentionBackendName._NATIVE_MATH
        with heedful.attention_backend("counting"):
            dispatch_attention_fn(*tensors())
    assert (Counting.calls, Other.calls) == (1, 0)
    assert _AttentionBackendRegistry.get_active_backend()[0] is AttentionBackendName.NATIVE


def test_diffusers_scope_is_this_threads_own_and_takes_heedfuls_names(installed: None) -> None:
    active = _AttentionBackendRegistry._active_backend
    with diffusers.attention_backend("counting"):
        thread = threading.Thread(target=dispatch_attention_fn, args=tensors())
        thread.start()
        thread.join()
        assert Counting.calls == 0
        dispatch_attention_fn(*tensors())
        assert _AttentionBackendRegistry._active_backend is active
    assert Counting.calls == 1
    with pytest.raises(UnknownBackend, match="nativ"), diffusers.attention_backend("nativ"):
        pass


def test_diffusers_process_wide_backend_comes_after_the_scopes(
    installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", "counting")
    dispatch_attention_fn(*tensors())
    assert Counting.calls == 1
    with heedful.attention_backend("other"):
        dispatch_attention_fn(*tensors())
    dispatch_attention_fn(*tensors(), backend="native")
    assert (Counting.calls, Other.calls) == (1, 1)


def test_no_package_is_checked_for_and_nothing_is_downloaded(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(theirs, "_check_attention_backend_requirements", never)
    monkeypatch.setattr(theirs, "_maybe_download_kernel_for_backend", never)
    for name in ("_native_cudnn", "_native_flash"):
        with diffusers.attention_backend(name):
            pass
        flux().set_attention_backend(name)


@pytest.mark.parametrize("name", [one.value for one in AttentionBackendName])
def test_every_name_of_diffusers_goes_to_heedful(installed: None, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName(name), never)
    query, key, value = tensors()
    want = F.scaled_dot_product_attention(*(one.transpose(1, 2) for one in (query, key, value))).transpose(1, 2)
    for backend in (name, AttentionBackendName(name)):
        try:
            out = dispatch_attention_fn(query, key, value, backend=backend)
        except Refused:  # no such GPU, no such package
            continue
        torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)


SHOW = """
import torch
from heedful.integrations.diffusers import install
install()
from diffusers.models.attention_dispatch import dispatch_attention_fn
import heedful, logging
logging.basicConfig(level=logging.INFO, format="%(message)s")
logging.getLogger("heedful").setLevel(logging.INFO)
query = torch.ones(1, 4, 3, 8)
dispatch_attention_fn(query, query, query)
dispatch_attention_fn(query, query, query)
try:
    dispatch_attention_fn(query, query, query, attention_kwargs={"typo": 1})
except heedful.Refused:
    print("refused")
"""


@pytest.mark.parametrize(
    ("environ", "texts"),
    [
        ({"DIFFUSERS_ATTN_BACKEND": "_native_math", "HEEDFUL_BACKEND": "native"}, ["native_math: forced by name"]),
        ({"HEEDFUL_BACKEND": "native_math"}, ["native_math: forced by name", "from HEEDFUL_BACKEND"]),
        ({"DIFFUSERS_ATTN_CHECKS": "0"}, []),
    ],
)
def test_diffusers_environment_variables_are_honoured(
    environ: dict[str, str], texts: list[str], fresh_python: Any
) -> None:
    done = fresh_python(SHOW, **{"DIFFUSERS_ATTN_CHECKS": "1", **environ})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["refused"]
    told = [line for line in done.stderr.splitlines() if line.startswith("heedful: diffusers:") and "typo" not in line]
    assert len(told) == (1 if texts else 0)
    assert all(text in told[0] for text in texts)


# Calls


def test_checks_are_always_on(installed: None) -> None:
    assert not _AttentionBackendRegistry._checks_enabled
    with pytest.raises(Refused, match="is_casual"):
        dispatch_attention_fn(*tensors(), attention_kwargs={"is_casual": True})
    with pytest.raises(InvalidArgument, match=r"attention_kwargs\['scale'\]"):
        dispatch_attention_fn(*tensors(), attention_kwargs={"scale": 2.0})
    with pytest.raises(InvalidArgument, match=r"attn_mask.*batch = queries"):
        dispatch_attention_fn(*tensors(4, 4, 3, 8), attn_mask=torch.ones(4, 4, dtype=torch.bool))
    dispatch_attention_fn(*tensors(), attention_kwargs={"tile": 1}, backend="counting")
    with pytest.raises(InvalidArgument, match="attention_kwargs"):
        dispatch_attention_fn(*tensors(), attention_kwargs=3)
    assert Counting.calls == 1


def test_context_parallelism_is_refused_with_the_remedy(installed: None) -> None:
    with pytest.raises(InvalidArgument, match=r"parallel_config.*uninstall\(\)"):
        dispatch_attention_fn(*tensors(), parallel_config=object())
    model = flux()
    model.transformer_blocks[0].attn.processor._parallel_config = object()
    with pytest.raises(InvalidArgument, match="parallel_config"):
        run_flux(model)
    with heedful.attention_backend("counting"), pytest.raises(InvalidArgument, match="parallel_config"):
        run_flux(model)


def test_two_dimensions_are_key_padding(installed: None) -> None:
    query, key, value = tensors()
    keep = torch.tensor([[True, False, True, True, False], [False, True, True, True, True]])
    out = dispatch_attention_fn(query, key, value, attn_mask=keep)
    swapped = (one.transpose(1, 2) for one in (query, key, value))
    want = F.scaled_dot_product_attention(*swapped, attn_mask=keep[:, None, None])
    torch.testing.assert_close(out, want.transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_gradients_flow(installed: None) -> None:
    model = flux()

    def gradient() -> Tensor:
        model.zero_grad()
        model(**flux_inputs()).sample.square().sum().backward()
        return torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])

    got = gradient()
    uninstall()
    assert torch.equal(got, gradient())


# Models


def test_models_are_set_by_heedful_and_the_process_is_not(installed: None) -> None:
    active = _AttentionBackendRegistry._active_backend
    for build, run, layers in ((flux, run_flux, FLUX_LAYERS), (unet, run_unet, UNET_LAYERS)):
        ours, other = build(), build()
        want = run(other)
        Counting.calls = 0
        assert ours.set_attention_backend("COUNTING") is None
        assert torch.equal(run(ours), want)
        assert Counting.calls == layers == heedful.attention_report(ours).covered
        assert torch.equal(run(other), want)
        ours.reset_attention_backend()
        assert torch.equal(run(ours), want)
        assert Counting.calls == layers
        assert _AttentionBackendRegistry._active_backend is active


def test_models_take_members_and_refuse_what_is_unknown(installed: None) -> None:
    model = unet()
    model.set_attention_backend(AttentionBackendName._NATIVE_MATH)
    run_unet(model)
    assert {layer.active for layer in heedful.attention_report(model)} == {"native_math"}
    with pytest.raises(ValueError, match="nativ"):
        model.set_attention_backend("nativ")


def test_a_model_without_layers_is_told_so(installed: None) -> None:
    with pytest.raises(NothingCovered):
        diffusers.models.AutoencoderTiny().set_attention_backend("counting")


def test_layers_that_are_not_reached_are_told(installed: None, caplog: pytest.LogCaptureFixture) -> None:
    model = unet()
    layer = model.mid_block.attentions[0].transformer_blocks[0].attn1
    layer.set_processor(diffusers.models.attention_processor.AttnProcessor())
    with caplog.at_level(logging.WARNING, "heedful"):
        model.set_attention_backend("counting")
    assert "attn1 of UNet2DConditionModel is not covered: AttnProcessor calls neither" in caplog.text


def test_resetting_clears_what_diffusers_had_set_before() -> None:
    model = flux()
    processor = model.transformer_blocks[0].attn.processor
    processor._attention_backend = "_native_math"
    install()
    model.set_attention_backend("counting")
    model.reset_attention_backend()
    assert model.transformer_blocks[0].attn.processor is processor
    assert processor._attention_backend is None


def test_uninstalling_puts_the_models_back() -> None:
    pictures = unet(), flux()
    want = [run_unet(pictures[0]), run_flux(pictures[1])]
    install()
    for model in pictures:
        model.set_attention_backend("counting")
    uninstall()
    assert torch.equal(run_unet(pictures[0]), want[0])
    assert torch.equal(run_flux(pictures[1]), want[1])
    assert Counting.calls == 0
    assert all(layer.reason == "not set" for model in pictures for layer in heedful.attention_report(model))


def test_models_are_not_kept_alive(installed: None) -> None:
    model = flux()
    model.set_attention_backend("counting")
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_transformers_models_are_left_alone(installed: None) -> None:
    text = text_encoder()
    with torch.no_grad(), heedful.attention_backend("counting"):
        text(torch.tensor([[0, 2, 3, 1]]))
    assert Counting.calls == 0


# Compiled code


def compiled(function: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)


def test_a_compiled_model_is_one_graph(installed: None) -> None:
    model = flux()
    want = run_flux(model)
    model_compiled = compiled(model)
    torch.testing.assert_close(run_flux(model_compiled), want, atol=1e-5, rtol=1e-5)
    with heedful.attention_backend("counting"):
        torch.testing.assert_close(run_flux(model_compiled), want, atol=1e-5, rtol=1e-5)
    assert Counting.calls > 0


def test_code_that_was_compiled_before_is_compiled_anew() -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return dispatch_attention_fn(query, key, value) * 2

    both = compiled(attend)
    want = both(*tensors())
    install()
    with heedful.attention_backend("counting"):
        torch.testing.assert_close(both(*tensors()), want)
        assert Counting.calls > 0
    uninstall()
    Counting.calls = 0
    torch.testing.assert_close(both(*tensors()), want)
    assert Counting.calls == 0


@pytest.mark.parametrize("backend", [None, "counting", AttentionBackendName._NATIVE_MATH])
def test_masks_and_options_are_traced(installed: None, backend: Any) -> None:
    options = {"window_size": (2, 1)}

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return dispatch_attention_fn(query, key, value, mask, attention_kwargs=options, backend=backend)

    both = compiled(attend)
    for length in (5, 6, 9):
        query, key, value = tensors(3, length, 2, 8)
        keep = torch.ones(3, length, dtype=torch.bool)
        keep[1, 1] = False
        args = (query, key, value, keep)
        torch.testing.assert_close(both(*args), attend(*args), atol=1e-5, rtol=1e-5)
