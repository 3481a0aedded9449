"""The override for ComfyUI, against stubs that were written from its contract."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import comfyui_contract
import pytest
import torch
from comfyui_contract import KEY, Model, own_attention, own_calls
from stand_in_sites import installed, machine
from torch import Tensor

import heedful
from heedful.errors import InvalidArgument, Refused, UnknownBackend, WrongAnswer
from heedful.integrations import comfyui
from heedful.integrations.comfyui import (
    AttentionOverride,
    Rule,
    override_of,
    override_report,
    parsed_rules,
    with_override,
)

B, H, Q, K, D = 2, 3, 5, 7, 8
COUNTING = "counting_for_comfyui"
OPTIONS = "transformer_options"


class Counting(heedful.AttentionStrategy):
    """The formula; takes no masks but those of keys that are hidden, and float32 only."""

    calls = 0
    limits = heedful.Limits(dtypes=(torch.float32,), masks=frozenset({"dense"}), scale=True, gqa=True)

    def compute_attention(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        Counting.calls += 1
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, **kwargs)


@pytest.fixture(autouse=True)
def counting() -> Iterator[None]:
    Counting.calls = 0
    own_calls.clear()
    heedful.AttentionStrategyFactory.register_strategy(COUNTING, Counting)
    yield
    heedful.AttentionStrategyFactory.unregister_strategy(COUNTING)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def operands(skip_reshape: bool = False, kv_heads: int = H) -> tuple[Tensor, Tensor, Tensor]:
    if skip_reshape:
        return drawn(B, H, Q, D), drawn(B, kv_heads, K, D), drawn(B, kv_heads, K, D)
    return drawn(B, Q, H * D), drawn(B, K, H * D), drawn(B, K, H * D)


def masks() -> dict[str, Tensor | None]:
    keep = torch.ones(B, 1, K, dtype=torch.bool)
    keep[1, :, 4:] = False
    return {
        "none": None,
        "bool (Q, K)": torch.tril(torch.ones(Q, K, dtype=torch.bool)),
        "bool (B, 1, K)": keep,
        "float (1, K)": drawn(1, K),
        "float (B, Q, K)": drawn(B, Q, K),
        "float (B, H, Q, K)": drawn(B, H, Q, K),
        "float (1, 1, Q, K)": drawn(1, 1, Q, K),
    }


@pytest.mark.parametrize("positional", [True, False])
@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize(("skip_reshape", "skip_output"), [*itertools.product([False, True], repeat=2)])
def test_every_form_of_call_gives_what_comfyui_gives(
    skip_reshape: bool, skip_output: bool, mask: str, positional: bool
) -> None:
    q, k, v = operands(skip_reshape)
    words = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output}
    given = masks()[mask]
    want = own_attention(q, k, v, H, given, **words)
    own_calls.clear()
    override = AttentionOverride("native", "strict")
    args = (q, k, v, H, given) if positional else (q, k, v, H)
    out = override(own_attention, *args, **words, **({} if positional else {"mask": given}))
    assert own_calls == []
    assert out.shape == want.shape
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)


def test_all_eight_arguments_by_place_and_all_by_name() -> None:
    q, k, v = operands(True)
    override = AttentionOverride(COUNTING, "strict")
    by_place = override(own_attention, q, k, v, H, None, None, True, True)
    by_name = override(own_attention, q=q, k=k, v=v, heads=H, skip_reshape=True, skip_output_reshape=True)
    assert torch.equal(by_place, by_name)
    assert (Counting.calls, own_calls) == (2, [])


def test_scale_and_grouped_heads_arrive() -> None:
    q, k, v = operands(True, kv_heads=1)
    words = {"skip_reshape": True, "scale": 0.5, "enable_gqa": True}
    out = AttentionOverride(COUNTING, "strict")(own_attention, q, k, v, H, **words)
    torch.testing.assert_close(out, own_attention(q, k, v, H, **words), atol=1e-5, rtol=1e-5)


NOT_UNDERSTOOD: dict[str, Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "an unknown keyword": lambda: ((*operands(), H), {"new_thing": None}),
    "a mask (B*H, Q, K)": lambda: ((*operands(), H, torch.zeros(B * H, Q, K)), {}),
    "a mask (B, K)": lambda: ((*operands(), H, torch.ones(B, K, dtype=torch.bool)), {}),
    "a mask of rank 1": lambda: ((*operands(), H, torch.zeros(K)), {}),
    "an argument twice": lambda: ((*operands(), H, None), {"mask": None}),
    "nine by place": lambda: ((*operands(), H, None, None, False, False, 1), {}),
    "heads that do not divide": lambda: ((*operands(), 5), {}),
    "other heads than said": lambda: ((*operands(True), 2), {"skip_reshape": True}),
    "no heads": lambda: (operands(), {}),
    "zero heads": lambda: ((*operands(), 0), {}),
    "three dims with skip_reshape": lambda: ((*operands(), H), {"skip_reshape": True}),
    "no tensor": lambda: ((None, *operands()[1:], H), {}),
    "batches that differ": lambda: ((drawn(3, Q, H * D), *operands()[1:], H), {}),
}


@pytest.mark.parametrize("what", NOT_UNDERSTOOD)
def test_what_is_not_understood_goes_by_the_fallback(what: str, caplog: pytest.LogCaptureFixture) -> None:
    args, kwargs = NOT_UNDERSTOOD[what]()
    seen: list[Any] = []

    def func(*given: Any, **words: Any) -> str:
        seen.append((given, words))
        return "ComfyUI's"

    with caplog.at_level(logging.WARNING, "heedful"):
        override = AttentionOverride("native", "warn")
        assert [override(func, *args, **kwargs) for _ in range(2)] == ["ComfyUI's"] * 2
        assert len(caplog.records) == 1
        assert AttentionOverride("native", "silent")(func, *args, **kwargs) == "ComfyUI's"
        assert len(caplog.records) == 1
    assert all(one is other for given, _ in seen for one, other in zip(given, args, strict=True))
    assert [words for _, words in seen] == [kwargs] * 3
    assert "ComfyUI" in override.report()
    with pytest.raises(InvalidArgument):
        AttentionOverride("native", "strict")(func, *args, **kwargs)
    assert len(seen) == 3


def test_a_refusal_goes_by_the_fallback_and_stands_in_the_report() -> None:
    q, k, v = (each.double() for each in operands())
    override = AttentionOverride(COUNTING, "silent")
    override(own_attention, q, k, v, H)
    assert (Counting.calls, len(own_calls)) == (0, 1)
    assert "dtype is float64, it takes float32" in override.report()
    with pytest.raises(Refused, match="dtype is float64"):
        AttentionOverride(COUNTING, "strict")(own_attention, q, k, v, H)
    listed = AttentionOverride([COUNTING, "native"], "strict")
    listed(own_attention, q, k, v, H)
    assert list(listed.ran.values()) == [1]
    assert next(iter(listed.ran))[1] == "native"


@pytest.mark.parametrize("fallback", ["strict", "warn", "silent"])
def test_other_errors_are_never_hidden(fallback: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(Counting, "compute_attention", broken)
    with pytest.raises(torch.OutOfMemoryError):
        AttentionOverride(COUNTING, fallback)(own_attention, *operands(), H)
    assert own_calls == []


def test_a_wrong_answer_goes_by_the_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Counting, "compute_attention", lambda self, query, key, value, **_: value.new_zeros(query.shape)
    )
    dispatcher = heedful.AttentionDispatcher(policy=heedful.Policy(guard="replace"))
    monkeypatch.setattr(comfyui, "attention", dispatcher.attention)
    override, q = AttentionOverride(COUNTING, "silent"), operands()
    assert torch.equal(override(own_attention, *q, H), own_attention(*q, H))
    assert "gave a wrong answer" in override.report()
    with pytest.raises(WrongAnswer):
        AttentionOverride(COUNTING, "strict")(own_attention, *q, H)


@pytest.mark.parametrize("words", [{"attn_precision": torch.float32}, {"low_precision_attention": False}])
def test_a_model_that_asks_for_precision_gets_no_approximate_backend(words: dict[str, Any]) -> None:
    override = AttentionOverride("sage", "silent")
    override(own_attention, *operands(), H, **words)
    assert f"{next(iter(words))}: got" in override.report()
    assert "sage is approximate: use an exact backend" in override.report()
    AttentionOverride(COUNTING, "strict")(own_attention, *operands(), H, **words)
    assert Counting.calls == 1
    listed = AttentionOverride(["sage", COUNTING], "strict")
    listed(own_attention, *operands(), H, **words)
    assert set(listed.ran) == {("model.cross", COUNTING)}


def test_who_calls_is_no_unknown_argument() -> None:
    words = {OPTIONS: {"block": ("input", 4), "cond_or_uncond": [0]}, "_inside_attn_wrapper": True}
    AttentionOverride(COUNTING, "strict")(own_attention, *operands(), H, **words)
    assert Counting.calls == 1


# What ran


def test_the_report_says_what_ran_where() -> None:
    model, _ = with_override(Model(), COUNTING, "warn", "*.cross = native\nmodel.output.* = keep\n*.nowhere = flex")
    x = drawn(B, Q, H * D)
    for place in range(3):
        model.attend(x, x, x, H, transformer_options={"block": ("input", place), "block_index": 0})
        model.attend(*operands(), H, transformer_options={"block": ("input", place), "block_index": 0})
    model.attend(x, x, x, H, transformer_options={"block": ("output", 1)})
    rows = [line.split() for line in override_report(model).splitlines()]
    assert ["3", "model.input.*.*.self", COUNTING] in rows
    assert ["3", "model.input.*.*.cross", "native"] in rows
    assert ["1", "model.output.*.self", "ComfyUI", "kept,", "by", "a", "rule"] in rows
    assert "no call matched the rule '*.nowhere'" in override_report(model)
    assert "CLIP and VAE are not covered" in override_report(model)


def test_auto_tells_the_backend_that_ran() -> None:
    override = AttentionOverride("auto", "strict")
    override(own_attention, *operands(), H)
    ((_, backend),) = override.ran
    assert backend in {"native", "native_flash"}
    assert heedful.explain(*(each.unflatten(-1, (H, -1)).transpose(1, 2) for each in operands())).backend == backend


def test_before_the_first_call_and_without_the_node() -> None:
    model, _ = with_override(Model(), "native")
    assert "no attention call yet: run the sampler first" in override_report(model)
    assert "attention override is none; put the node Attention Backend" in override_report(Model())
    assert "is not heedful's but own_attention" in override_report(Model({OPTIONS: {KEY: own_attention}}))


def test_the_models_own_layers_count_apart() -> None:
    """An override that runs inside of a routed layer is not counted as that layer's."""

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = override(own_attention, x, x, x, H)
            return torch.nn.functional.scaled_dot_product_attention(y, y, y)

    override = AttentionOverride(COUNTING, "strict")
    layer = Layer()
    heedful.set_attention_backend(layer, "reference")
    layer(drawn(B, Q, H * D)[:, None].squeeze(1))
    assert [one.ran for one in heedful.attention_report(layer)] == [(("reference", 1),)]
    assert sum(override.ran.values()) == 1


def test_calls_of_several_threads_are_all_counted() -> None:
    override, q = AttentionOverride(COUNTING, "strict"), operands()
    threads = [threading.Thread(target=lambda: [override(own_attention, *q, H) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(override.ran.values()) == 200


# Clones and chains


@pytest.mark.parametrize("copies", ["all", "dicts", "nothing"])
def test_a_clone_is_changed_and_the_model_is_not(copies: str) -> None:
    model = Model({OPTIONS: {"patches": {}}, "other": 1}, copies)
    made, report = with_override(model, COUNTING, "strict")
    assert model.model_options == {OPTIONS: {"patches": {}}, "other": 1}
    assert made is not model
    assert made.model_options["other"] == 1
    made.clone().attend(*operands(), H)
    assert Counting.calls == 1
    assert sum(override_of(made).ran.values()) == 1  # type: ignore[union-attr] # a sampler's clone counts here
    model.attend(*operands(), H)
    assert Counting.calls == 1
    assert report.startswith(f"heedful: backend {COUNTING}, fallback strict\na plain call under {COUNTING}: ")


def foreign(log: list[str]) -> Callable[..., Any]:
    def override(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        log.append("foreign")
        return func(*args, **kwargs)

    return override


def test_an_override_that_is_there_is_asked_where_heedful_does_not_compute() -> None:
    log: list[str] = []
    first = foreign(log)
    model, _ = with_override(Model({OPTIONS: {KEY: first}}), COUNTING, "silent", "*.cross = keep")
    x = drawn(B, Q, H * D)
    model.attend(x, x, x, H)
    assert (Counting.calls, log) == (1, [])
    model.attend(*operands(), H)  # kept
    model.attend(x.double(), x.double(), x.double(), H)  # refused
    assert (Counting.calls, log, len(own_calls)) == (1, ["foreign"] * 2, 2)
    assert "the override before" in override_report(model)
    off, text = with_override(model, "disabled")
    assert off.model_options == {OPTIONS: {KEY: first}}
    assert text == "heedful: disabled; attention is computed by the override that was there before"


def test_a_second_node_replaces_the_first() -> None:
    once, _ = with_override(Model(), "reference")
    twice, _ = with_override(once, COUNTING)
    assert override_of(twice).before is None  # type: ignore[union-attr]
    twice.attend(*operands(), H)
    assert Counting.calls == 1
    assert with_override(twice, "disabled")[0].model_options == {OPTIONS: {}}
    assert override_of(once) is not None


def test_disabled_under_a_foreign_override_is_off_in_that_clone_only() -> None:
    log: list[str] = []
    ours, _ = with_override(Model(), COUNTING)
    inner = ours.model_options[OPTIONS][KEY]

    def over(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        log.append("foreign")
        return inner(func, *args, **kwargs)

    both = Model({OPTIONS: {KEY: over}})
    off, _ = with_override(both, "disabled")
    off.attend(*operands(), H)
    assert (Counting.calls, log, len(own_calls)) == (0, ["foreign"], 1)
    both.attend(*operands(), H)
    assert Counting.calls == 1
    on, _ = with_override(off, COUNTING)
    on.attend(*operands(), H)
    assert Counting.calls == 2


def test_disabled_where_nothing_is() -> None:
    made, text = with_override(Model(), "disabled")
    assert made.model_options == {OPTIONS: {}}
    assert text == "heedful: disabled; attention is computed by ComfyUI"


# Words


def test_rules_are_read() -> None:
    text = "# all cross\n*.cross = native   # quick\n\n model.input.* = flash , native\nmodel.* = keep\n"
    assert parsed_rules(text) == (
        Rule("*.cross", "native"),
        Rule("model.input.*", ("flash", "native")),
        Rule("model.*", None),
    )


@pytest.mark.parametrize(
    ("rules", "error", "text"),
    [
        ("*.cross", InvalidArgument, r"rules: got '\*.cross' in line 1; write pattern = backend"),
        ("\n= native", InvalidArgument, "in line 2"),
        ("* = nativ", UnknownBackend, "rules, line 1: no backend is called 'nativ'; did you mean 'native'"),
        ("* = native,,flash", InvalidArgument, "rules, line 1: got"),
    ],
)
def test_malformed_rules_name_their_line(rules: str, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        with_override(Model(), "native", "warn", rules)


def test_malformed_words() -> None:
    with pytest.raises(InvalidArgument, match="fallback: got 'maybe'; give one of strict, warn, silent"):
        with_override(Model(), "native", "maybe")
    with pytest.raises(UnknownBackend, match="backend: no backend is called 'flush'"):
        with_override(Model(), "flush")
    for backend in ("", [], 3):
        with pytest.raises(InvalidArgument, match="backend: got"):
            AttentionOverride(backend)


def test_the_report_of_a_backend_that_is_not_there_says_so() -> None:
    _, report = with_override(Model(), "flash", "warn")
    assert "a plain call under flash: the call is passed on (flash refuses: device is cpu" in report
    assert "flash-attn not installed" in report
    _, strict = with_override(Model(), "flash", "strict")
    assert "a plain call under flash: the call raises (flash refuses" in strict


def test_the_list_of_backends() -> None:
    names = comfyui.backend_names()
    assert names[0] == "auto"
    assert names[-2:] == ["keep", "disabled"]
    assert {"native", "flash", "sage", COUNTING} <= set(names)


def test_flash_attn_is_really_called(monkeypatch: pytest.MonkeyPatch) -> None:
    factory = heedful.AttentionStrategyFactory(plugins=False)
    dispatcher = heedful.AttentionDispatcher(factory, machine("sm_80"), heedful.Policy(guard="off"))
    monkeypatch.setattr(comfyui, "attention", dispatcher.attention)
    q, k, v = (each.half() for each in operands())
    with installed("flash_attn_2"):
        override = AttentionOverride("flash", "strict")
        out = override(own_attention, q, k, v, H)
        assert dict(override.ran) == {("model.cross", "flash"): 1}
    torch.testing.assert_close(out, own_attention(q, k, v, H), atol=2e-3, rtol=2e-3)
    assert comfyui_contract.own_calls == [{}]


def test_compiled_code_computes_by_the_backend_too() -> None:
    override = AttentionOverride("native", "strict")
    q = operands()
    compiled = torch.compile(lambda *each: override(own_attention, *each, H), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*q), own_attention(*q, H), atol=1e-5, rtol=1e-5)
    assert "compiled code does not count its calls" in override.report()


def test_a_refusal_in_compiled_code_goes_by_the_fallback() -> None:
    """With a break in the graph; under fullgraph=True it is raised."""
    override, q = AttentionOverride("flash", "silent"), operands()
    compiled = torch.compile(lambda *each: override(own_attention, *each, H), backend="eager")
    torch.testing.assert_close(compiled(*q), own_attention(*q, H), atol=1e-5, rtol=1e-5)
    torch.compiler.reset()
    strict = torch.compile(lambda *each: override(own_attention, *each, H), backend="eager", fullgraph=True)
    with pytest.raises(Refused, match="flash refuses: device is cpu"):
        strict(*q)
