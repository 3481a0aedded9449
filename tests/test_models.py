"""Models of plain torch modules: rules, report, undo, copies, threads and compilation."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import json
import pickle
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

import heedful
from heedful.routing import route_of

DOUBLES = "doubles"


class Doubled(heedful.AttentionStrategy):
    """SDPA times two, so that a test sees who computed; takes float32 only."""

    calls = 0
    limits = heedful.Limits(
        dtypes=(torch.float32,), masks=frozenset({"causal", "dense", "bias"}), backward=True, compile=True
    )

    def compute_attention(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        Doubled.calls += 1
        return 2 * F.scaled_dot_product_attention(query, key, value, **kwargs)


@pytest.fixture(autouse=True)
def doubles() -> Iterator[type[Doubled]]:
    Doubled.calls = 0
    heedful.AttentionStrategyFactory.register_strategy(DOUBLES, Doubled)
    yield Doubled
    heedful.AttentionStrategyFactory.unregister_strategy(DOUBLES)


class Layer(nn.Module):
    """Attention by SDPA, reached by a helper method."""

    def __init__(self, inside: nn.Module | None = None) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.inside is None else self.inside(x)
        return self._mix(self.project(y))

    def _mix(self, y: Tensor) -> Tensor:
        heads = y.unflatten(-1, (2, 4)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)


class Direct(Layer):
    """Attention by heedful itself, for which the rule is a scope."""

    def _mix(self, y: Tensor) -> Tensor:
        heads = y.unflatten(-1, (2, 4)).transpose(1, 2)
        return heedful.attention(heads, heads, heads).transpose(1, 2).flatten(2)


class Forced(Layer):
    """Attention by heedful with a backend of its own, which is before every rule."""

    def _mix(self, y: Tensor) -> Tensor:
        heads = y.unflatten(-1, (2, 4)).transpose(1, 2)
        return heedful.attention(heads, heads, heads, backend="native").transpose(1, 2).flatten(2)


class Failing(Layer):
    def _mix(self, y: Tensor) -> Tensor:
        super()._mix(y)
        raise LookupError("inside the layer")


class Idle(Layer):
    """Looks like attention and, today, does without."""

    def forward(self, x: Tensor) -> Tensor:
        return self._mix(x) if x.numel() == 0 else x


def stack(*kinds: type[Layer]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(kind() for kind in kinds or (Layer, Layer, Layer))).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


def state(model: nn.Module) -> list[dict[str, Any]]:
    return [dict(vars(module)) for module in model.modules()]


@torch.no_grad()
def test_every_layer_calls_the_backend_once_and_reset_is_exact(x: Tensor) -> None:
    model = stack()
    before, want = state(model), model(x)
    report = heedful.set_attention_backend(model, DOUBLES)
    assert (report.covered, report.total) == (3, 3)
    assert not torch.equal(model(x), want)
    assert Doubled.calls == 3
    assert [layer.ran for layer in heedful.attention_report(model)] == [((DOUBLES, 1),)] * 3
    assert heedful.reset_attention_backend(model) == 3
    assert state(model) == before
    assert torch.equal(model(x), want)
    assert heedful.reset_attention_backend(model) == 0


@torch.no_grad()
def test_the_first_matching_rule_decides_and_keep_leaves_a_layer_alone(x: Tensor) -> None:
    model = stack()
    report = heedful.set_attention_backend(model, "native", {"2": None, "[12]": DOUBLES})
    assert [layer.requested for layer in report] == ["native", DOUBLES, "keep"]
    assert [layer.active for layer in report] == ["native", DOUBLES, "its own"]
    assert [layer.reason for layer in report] == ["backend", "rule '[12]'", "rule '2'"]
    assert report.covered == 2
    assert "forward" not in vars(model[2])
    model(x)
    assert Doubled.calls == 1
    only = heedful.set_attention_backend(model, "keep", rules={"0": ["flex", "native"]})
    assert (only.covered, only["0"].requested, only["0"].active) == (1, "flex > native", "flex > native")


@pytest.mark.parametrize(
    ("backend", "rules", "error", "text"),
    [
        ("nativ", {}, heedful.UnknownBackend, "backend: no backend is called 'nativ'; did you mean 'native'"),
        ("native", {"0": "flesh"}, heedful.UnknownBackend, r"rules\['0'\]: no backend is called 'flesh'"),
        ("native", {"0": 3}, heedful.InvalidArgument, r"rules\['0'\]: got 3"),
        ("native", ["*"], heedful.InvalidArgument, r"rules: got \['\*'\]; give a mapping"),
        ("native", {1: "native"}, heedful.InvalidArgument, "rules: got {1: 'native'}; give a mapping"),
        (["native", "nope"], {}, heedful.UnknownBackend, "'nope'"),
        ([], {}, heedful.InvalidArgument, "backend"),
        ("native", {"*.attn2": "native"}, heedful.InvalidArgument, r"'\*.attn2'; it matches none of 3 layers"),
        ("native", {"*": "native", "1": "auto"}, heedful.InvalidArgument, "an earlier rule decides about"),
        (None, {}, heedful.NothingCovered, "none of the 3 attention layers.* 3 layers: kept, by backend"),
    ],
)
@torch.no_grad()
def test_a_set_that_fails_changes_nothing(x: Tensor, backend: Any, rules: Any, error: Any, text: str) -> None:
    model = stack()
    heedful.set_attention_backend(model, DOUBLES)
    before, want = state(model), model(x)
    with pytest.raises(error, match=text):
        heedful.set_attention_backend(model, backend, rules)
    assert state(model) == before
    assert torch.equal(model(x), want)
    assert Doubled.calls == 6


@torch.no_grad()
def test_excluded_layers_are_left_alone_before_all_rules(x: Tensor) -> None:
    model = stack()
    report = heedful.set_attention_backend(model, DOUBLES, {"[12]": "native"}, exclude="re:[01]")
    assert [layer.requested for layer in report] == ["keep", "keep", "native"]
    assert report["0"].reason == "exclude 're:[01]'"
    assert "forward" not in vars(model[0])
    for wrong in ({"a": 1}, 3):
        with pytest.raises(heedful.InvalidArgument, match=r"exclude: got .*; give patterns or roles in a list"):
            heedful.set_attention_backend(model, DOUBLES, exclude=wrong)  # type: ignore[arg-type]
    with pytest.raises(heedful.InvalidArgument, match="exclude: got 'nowhere'; it matches none of 3 layers"):
        heedful.set_attention_backend(model, DOUBLES, exclude=["0", "nowhere"])
    with pytest.raises(heedful.InvalidArgument, match="write a regular expression as 're:0'"):
        heedful.set_attention_backend(model, DOUBLES, {re.compile("0"): "native"})  # type: ignore[dict-item]


@torch.no_grad()
def test_the_report_is_a_context_manager_that_undoes_its_call_and_no_other(x: Tensor) -> None:
    model = stack()
    before, want = state(model), model(x)
    with heedful.set_attention_backend(model, DOUBLES) as report:
        assert report.covered == 3
        doubled, routed = model(x), state(model)
        with heedful.set_attention_backend(model, "native"):
            assert torch.equal(model(x), want)
        assert state(model) == routed
        assert torch.equal(model(x), doubled)
        with pytest.raises(LookupError), heedful.set_attention_backend(model, "native"):
            raise LookupError
        assert state(model) == routed
        with heedful.set_attention_backend(model, "native"):
            heedful.reset_attention_backend(model)
        assert torch.equal(model(x), doubled)
    assert state(model) == before
    assert torch.equal(model(x), want)
    with pytest.raises(heedful.HeedfulError, match="only the report that set_attention_backend returns"):
        heedful.attention_report(model).__enter__()


@torch.no_grad()
@pytest.mark.parametrize("set_before", [False, True])
@pytest.mark.parametrize("part", [False, True], ids=["one model", "a part of it"])
def test_blocks_that_overlap_leave_nothing_behind(x: Tensor, set_before: bool, part: bool) -> None:
    model = stack()
    if set_before:
        heedful.set_attention_backend(model, "native_math")
    before = state(model)
    first = heedful.set_attention_backend(model, "native")
    first.__enter__()
    second = heedful.set_attention_backend(model[0] if part else model, DOUBLES)
    second.__enter__()
    third = heedful.set_attention_backend(model, ["native", "auto"])
    third.__enter__()
    second.__exit__()
    assert {layer.requested for layer in heedful.attention_report(model)} == {"native > auto"}
    first.__exit__()
    assert {layer.requested for layer in heedful.attention_report(model)} == {"native > auto"}
    model(x)
    third.__exit__()
    assert state(model) == before
    assert Doubled.calls == 0


@torch.no_grad()
def test_a_block_of_a_part_outlives_that_of_the_whole(x: Tensor) -> None:
    model = stack()
    before = state(model)
    with contextlib.ExitStack() as part:
        with heedful.set_attention_backend(model, "native"):
            part.enter_context(heedful.set_attention_backend(model[0], DOUBLES))
        assert [layer.requested for layer in heedful.attention_report(model)] == [DOUBLES, "keep", "keep"]
        model(x)
        assert Doubled.calls == 1
    assert state(model) == before


def test_a_report_keeps_no_model_alive() -> None:
    model = stack()
    gone = weakref.ref(model)
    report = heedful.set_attention_backend(model, "native")
    del model
    gc.collect()
    assert gone() is None
    with report:
        assert report.covered == 3


@torch.no_grad()
def test_the_reason_says_why_the_first_wish_of_a_list_did_not_compute(x: Tensor) -> None:
    model = stack(Layer).double()
    heedful.set_attention_backend(model, [DOUBLES, "native"])
    model(x.double())
    reason = heedful.attention_report(model)["0"].reason
    assert reason.startswith("backend; doubles refuses: dtype is float64")


def test_what_has_no_attention_layer_is_an_error() -> None:
    with pytest.raises(heedful.NothingCovered, match="Linear has no attention layer: none of its 1 modules"):
        heedful.set_attention_backend(nn.Linear(2, 2), "native")
    with pytest.raises(heedful.InvalidArgument, match=r"model_or_pipeline: got int"):
        heedful.set_attention_backend(3, "native")


def test_multihead_attention_is_out_of_reach_and_says_so() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2), Layer())
    report = heedful.set_attention_backend(model, "native")
    assert (report.covered, report.total) == (1, 2)
    assert "multi_head_attention_forward" in report["0"].reason
    assert report["0"].active == "its own"


@torch.no_grad()
def test_setting_twice_replaces_and_resets_to_the_original(x: Tensor) -> None:
    model = stack()
    before = state(model)
    heedful.set_attention_backend(model, DOUBLES)
    heedful.set_attention_backend(model, "native_math", rules={"0": "keep"})
    model(x)
    assert Doubled.calls == 0
    heedful.reset_attention_backend(model)
    assert state(model) == before


@torch.no_grad()
def test_a_pipeline_names_its_components_and_shared_modules_count_once(x: Tensor) -> None:
    shared = stack(Layer)
    pipeline = SimpleNamespace(components={"unet": shared, "again": shared, "none": None, "controlnet": [stack(Layer)]})
    report = heedful.set_attention_backend(pipeline, "native", rules={"controlnet*": DOUBLES})
    assert [(layer.path, layer.component) for layer in report] == [
        ("unet.0", "unet"),
        ("controlnet.0.0", "controlnet.0"),
    ]
    assert heedful.reset_attention_backend(pipeline) == 2


@torch.no_grad()
def test_a_call_of_heedful_in_a_layer_obeys_the_rule_unless_it_names_a_backend(x: Tensor) -> None:
    model = stack(Direct, Forced)
    want = model(x)
    assert heedful.set_attention_backend(model, DOUBLES).covered == 2
    with heedful.attention_backend("native_math"):
        model(x)
    assert Doubled.calls == 1
    assert [layer.active for layer in heedful.attention_report(model)] == [DOUBLES, "native"]
    heedful.set_attention_backend(model, ["native", "auto"])
    assert torch.equal(model(x), want)
    assert heedful.attention_report(model)["0"].ran == (("native", 1),)


@torch.no_grad()
def test_the_innermost_rule_wins_and_a_kept_layer_inside_is_shielded(x: Tensor) -> None:
    torch.manual_seed(0)
    model = Layer(Layer()).eval()
    heedful.set_attention_backend(model, DOUBLES, rules={"inside": "native"})
    model(x)
    assert Doubled.calls == 1
    assert heedful.attention_report(model)["inside"].ran == (("native", 1),)
    before = heedful.set_attention_backend(model, DOUBLES, rules={"inside": "keep"})
    model(x)
    assert Doubled.calls == 2
    assert (before["inside"].covered, before[""].covered) == (False, True)
    heedful.reset_attention_backend(model)
    assert not any("forward" in vars(module) for module in model.modules())


@torch.no_grad()
def test_an_exception_leaves_no_route_behind(x: Tensor) -> None:
    model = stack(Failing)
    heedful.set_attention_backend(model, DOUBLES)
    with pytest.raises(LookupError):
        model(x)
    assert torch._C._len_torch_function_stack() == 0
    stack()(x)
    assert Doubled.calls == 1


@torch.no_grad()
def test_a_refusal_comes_out_with_its_reasons(x: Tensor) -> None:
    model = stack(Layer).double()
    heedful.set_attention_backend(model, DOUBLES)
    with pytest.raises(heedful.Refused, match="doubles refuses: dtype"):
        model(x.double())
    heedful.set_attention_backend(model, [DOUBLES, "native"])
    model(x.double())
    assert heedful.attention_report(model)["0"].active == "native"


@torch.no_grad()
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_routed_by_itself(x: Tensor, duplicate: Any) -> None:
    model = stack()
    heedful.set_attention_backend(model, DOUBLES)
    twin = duplicate(model)
    assert all(route_of(layer).module is layer for layer in twin)  # type: ignore[union-attr]
    with torch.no_grad():
        twin[0].project.weight.zero_()
    assert not torch.equal(twin(x), model(x))
    assert Doubled.calls == 6
    heedful.reset_attention_backend(model)
    twin(x)
    assert Doubled.calls == 9
    heedful.reset_attention_backend(twin)
    assert not any("forward" in vars(module) for module in twin.modules())


@torch.no_grad()
def test_a_forward_that_was_put_on_the_instance_before_is_kept_and_restored(x: Tensor) -> None:
    model, seen = stack(Layer), []
    inner = model[0].forward

    def hooked(*args: Any) -> Tensor:
        seen.append(len(args))
        return inner(*args)

    model[0].forward = functools.update_wrapper(hooked, inner)
    heedful.set_attention_backend(model, DOUBLES)
    model(x)
    assert (seen, Doubled.calls) == ([1], 1)
    heedful.reset_attention_backend(model)
    assert model[0].forward is hooked


@torch.no_grad()
def test_a_wrapper_put_over_the_route_keeps_working_after_reset(x: Tensor) -> None:
    model = stack(Layer)
    want = model(x)
    heedful.set_attention_backend(model, DOUBLES)
    route = model[0].forward
    model[0].forward = lambda *args: route(*args)
    heedful.reset_attention_backend(model)
    assert torch.equal(model(x), want)
    assert Doubled.calls == 0
    assert heedful.set_attention_backend(model, DOUBLES).covered == 1
    model(x)
    assert Doubled.calls == 1


@torch.no_grad()
@pytest.mark.parametrize("again", [False, True], ids=["hook, set", "set, hook, reset, set"])
def test_a_route_that_is_lost_with_a_hook_is_a_conflict_and_not_covered(x: Tensor, again: bool) -> None:
    model = stack(Layer, Layer)
    if again:
        heedful.set_attention_backend(model, "native")
    add_hook_to_module(model[0], ModelHook())
    if again:
        heedful.reset_attention_backend(model)
    assert not heedful.set_attention_backend(model, DOUBLES).conflicts
    add_hook_to_module(model[1], ModelHook())
    model(x)
    assert Doubled.calls == 2
    assert heedful.attention_report(model).covered == 2
    remove_hook_from_module(model, recurse=True)
    model(x)
    assert Doubled.calls == 3
    report = heedful.attention_report(model)
    assert (report.covered, report["0"].active, report["1"].conflict) == (1, "its own", "")
    assert report["0"].conflict.startswith("its forward was replaced since it was set, so heedful does not compute it")
    assert not heedful.set_attention_backend(model, DOUBLES).conflicts
    model(x)
    assert Doubled.calls == 5


@torch.no_grad()
def test_two_threads_with_two_backends_do_not_meet(x: Tensor) -> None:
    ours, theirs = stack(), stack()
    plain = ours(x)
    heedful.set_attention_backend(ours, "native")
    heedful.set_attention_backend(theirs, DOUBLES)
    doubled = theirs(x)
    together, wrong = threading.Barrier(2), []

    def work(model: nn.Module, want: Tensor) -> None:
        together.wait()
        for _ in range(50):
            with torch.no_grad():
                wrong.extend([] if torch.equal(model(x), want) else [model])

    threads = [threading.Thread(target=work, args=args) for args in ((ours, plain), (theirs, doubled))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
def test_another_thread_and_model_see_nothing_while_a_layer_runs(x: Tensor) -> None:
    other, results = stack(), []
    want = other(x)

    class Meanwhile(Layer):
        def _mix(self, y: Tensor) -> Tensor:
            def elsewhere() -> None:
                with torch.no_grad():
                    results.append(other(x))

            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            return super()._mix(y)

    model = nn.Sequential(Meanwhile())
    heedful.set_attention_backend(model, DOUBLES)
    model(x)
    assert torch.equal(results[0], want)
    assert Doubled.calls == 1


@torch.no_grad()
def test_the_report_says_what_ran_and_what_was_bypassed(x: Tensor) -> None:
    model = stack(Layer, Layer, Idle)
    heedful.set_attention_backend(model, "auto", rules={"1": DOUBLES})
    model(x)
    report = heedful.attention_report(model)
    assert [layer.active for layer in report] == ["native", DOUBLES, "its own"]
    assert report["2"].reason == "bypassed: it ran 1 times and never called SDPA"
    assert ([layer.covered for layer in report], report.covered) == ([True, True, False], 2)
    assert [layer.calls for layer in report] == [1, 1, 0]
    assert json.loads(json.dumps(report.to_dict()))["layers"][1]["ran"] == {DOUBLES: 1}
    with pytest.raises(KeyError):
        report["nowhere"]


@torch.no_grad()
def test_neither_a_copy_nor_a_layer_that_raised_has_been_bypassed(x: Tensor) -> None:
    model = stack()
    heedful.set_attention_backend(model, DOUBLES)
    with pytest.raises(heedful.Refused):
        model.double()(x.double())
    assert heedful.attention_report(model).covered == 3
    model.float()(x)
    assert heedful.attention_report(copy.deepcopy(model)).covered == 3


@torch.no_grad()
def test_the_report_is_a_table_that_groups_layers_which_differ_by_number_only(x: Tensor) -> None:
    model = nn.ModuleDict({"block": stack(), "other": stack(Layer)})
    heedful.set_attention_backend(model, "native", rules={"other*": "keep"})
    model["block"](x)
    assert str(heedful.attention_report(model)).splitlines() == [
        "layers  path     module  requested  active   calls  guard        reason",
        "3       block.*  Layer   native     native   1      not checked  backend",
        "1       other.0  Layer   keep       its own  0                   rule 'other*'",
        "covered 3 of 4",
    ]


def test_gradients_are_equal_under_checkpointing(x: Tensor) -> None:
    def gradient(model: nn.Module, reentrant: bool | None) -> Tensor:
        model.zero_grad()
        start = x.clone().requires_grad_()
        out = (
            model(start)
            if reentrant is None
            else torch.utils.checkpoint.checkpoint(model, start, use_reentrant=reentrant)
        )
        out.square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    model = stack()
    heedful.set_attention_backend(model, DOUBLES)
    want = gradient(model, None)
    assert torch.equal(gradient(model, False), want)
    assert torch.equal(gradient(model, True), want)
    assert Doubled.calls == 3 + 6 + 6


@torch.no_grad()
@pytest.mark.parametrize("kinds", [(Layer, Layer), (Direct, Forced)], ids=["sdpa", "heedful"])
def test_compiled_code_is_routed_in_one_graph(x: Tensor, kinds: tuple[type[Layer], ...]) -> None:
    torch._dynamo.reset()
    model = stack(*kinds)
    plain = model(x)
    heedful.set_attention_backend(model, DOUBLES)
    want = model(x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), want)
    assert heedful.set_attention_backend(compiled, DOUBLES)["0"].path == "0"
    torch.testing.assert_close(compiled(x), want)
    assert "compiled" in heedful.attention_report(model)["0"].reason
    heedful.reset_attention_backend(compiled)
    torch.testing.assert_close(compiled(x), plain)


@torch.no_grad()
def test_compiled_code_is_refused_as_eager_code_is(x: Tensor) -> None:
    torch._dynamo.reset()
    model = stack(Layer).double()
    heedful.set_attention_backend(model, DOUBLES)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match="doubles refuses: dtype"):
        torch.compile(model, backend="eager", fullgraph=True)(x.double())


class Biased(Layer):
    """With torch's own value for causality."""

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, causal_lower_right(x.shape[-2], x.shape[-2]))


def test_a_causal_bias_of_torch_is_refused_with_what_to_give_and_can_be_left_to_torch(x: Tensor) -> None:
    model = stack(Layer, Biased)
    plain = model(x)
    heedful.set_attention_backend(model, "native")
    with pytest.raises(heedful.InvalidArgument, match=r"attn_mask: got torch's CausalBias .* give heedful.Causal\("):
        model(x)
    heedful.set_attention_backend(model, "native", exclude="1")
    torch.testing.assert_close(model(x), plain)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_torch_jit_trace_is_refused_in_plain_words(x: Tensor) -> None:
    model = stack(Layer)
    heedful.set_attention_backend(model, "native")
    with pytest.raises(heedful.InvalidArgument, match=r"within torch\.jit\.trace.* after reset_attention_backend"):
        torch.jit.trace(model, x)
    heedful.reset_attention_backend(model)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))


def test_no_optional_package_is_imported() -> None:
    code = (
        "import sys, torch, heedful, heedful.models\n"
        "try: heedful.set_attention_backend(torch.nn.Linear(2, 2), 'native')\n"
        "except heedful.NothingCovered: pass\n"
        "print(sorted({'diffusers', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
