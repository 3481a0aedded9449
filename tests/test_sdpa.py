"""patch_sdpa: what it covers, what it passes on and why, beside layers, scopes, threads and compiled code."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.overrides import TorchFunctionMode

import heedful
from heedful.policy import mirror
from heedful.sdpa import patch_sdpa

DOUBLES = "doubles"


class Doubled(heedful.AttentionStrategy):
    """SDPA times two, so that a test sees who computed; takes float32 only."""

    limits = heedful.Limits(
        dtypes=(torch.float32,), masks=frozenset({"causal", "dense", "bias"}), backward=True, compile=True
    )

    def compute_attention(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        return 2 * F.scaled_dot_product_attention(query, key, value, **kwargs)


@pytest.fixture(autouse=True)
def doubles() -> Iterator[None]:
    heedful.AttentionStrategyFactory.register_strategy(DOUBLES, Doubled)
    yield
    heedful.AttentionStrategyFactory.unregister_strategy(DOUBLES)
    assert torch._C._len_torch_function_stack() == 0


@pytest.fixture
def q() -> Tensor:
    return torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))


def sdpa(q: Tensor, **more: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, q, q, **more)


def test_every_call_is_computed_by_heedful_and_counted(q: Tensor) -> None:
    keep = torch.ones(6, 6, dtype=torch.bool).tril()
    with heedful.patch_sdpa(DOUBLES) as seen:
        outs = [sdpa(q), sdpa(q, is_causal=True), F.scaled_dot_product_attention(q, q, q, keep, scale=0.3)]
        outs.append(torch._C._nn.scaled_dot_product_attention(query=q, key=q, value=q))
    wants = [sdpa(q), sdpa(q, is_causal=True), sdpa(q, attn_mask=keep, scale=0.3), sdpa(q)]
    for out, want in zip(outs, wants, strict=True):
        torch.testing.assert_close(out, 2 * want)
    assert (seen.covered, seen.total, seen.backends, seen.passed) == (4, 4, {DOUBLES: 4}, {})
    assert str(seen) == "covered 4 of 4 attention calls: doubles 4"
    assert torch.equal(sdpa(q), wants[0])
    assert seen.total == 4


def test_without_a_name_auto_decides_and_answers_are_torch_s(q: Tensor) -> None:
    with heedful.patch_sdpa() as seen:
        out = sdpa(q)
    torch.testing.assert_close(out, sdpa(q))
    assert seen.backends == {"native": 1}


def test_a_name_is_obeyed_or_raises_and_the_block_is_left(q: Tensor) -> None:
    with pytest.raises(heedful.Refused, match="doubles refuses: dtype"), heedful.patch_sdpa(DOUBLES):
        sdpa(q.double())
    with pytest.raises(heedful.UnknownBackend, match="no backend is called 'nope'"):
        heedful.patch_sdpa("nope")
    with pytest.raises(heedful.InvalidArgument, match="backend"):
        heedful.patch_sdpa([])
    with heedful.patch_sdpa([DOUBLES, "native"]) as seen:
        sdpa(q.double())
    assert seen.backends == {"native": 1}


def test_scopes_around_and_inside_decide(q: Tensor) -> None:
    with heedful.attention_backend("reference"), heedful.patch_sdpa() as outer:
        sdpa(q)
        with heedful.attention_backend(DOUBLES):
            sdpa(q)
    with heedful.attention_backend("reference"), heedful.patch_sdpa("native") as inner:
        sdpa(q)
    assert (outer.backends, inner.backends) == ({DOUBLES: 1, "reference": 1}, {"native": 1})


def test_the_innermost_of_two_sees_a_call_and_only_once(q: Tensor) -> None:
    with heedful.patch_sdpa("reference") as outer:
        with heedful.patch_sdpa(DOUBLES) as inner:
            torch.testing.assert_close(sdpa(q), 2 * sdpa_outside(q))
        sdpa(q)
    assert (outer.backends, inner.backends) == ({"reference": 1}, {DOUBLES: 1})


def sdpa_outside(q: Tensor) -> Tensor:
    """The plain answer, by the formula."""
    return torch.softmax(q @ q.mT * q.shape[-1] ** -0.5, -1) @ q


def test_a_call_of_heedful_s_own_is_not_seen_twice(q: Tensor) -> None:
    with heedful.patch_sdpa(DOUBLES) as seen:
        out = heedful.attention(q, q, q)
        heedful.attention(q, q, q, backend="native")
    torch.testing.assert_close(out, 2 * sdpa(q))
    assert seen.backends == {DOUBLES: 1, "native": 1}


def test_one_object_may_be_entered_again_and_within_itself(q: Tensor) -> None:
    patch = heedful.patch_sdpa(DOUBLES)
    for _ in range(2):
        with patch, patch:
            torch.testing.assert_close(sdpa(q), 2 * sdpa_outside(q))
    assert patch.backends == {DOUBLES: 2}


def test_an_exception_leaves_nothing_behind(q: Tensor) -> None:
    with pytest.raises(LookupError), heedful.patch_sdpa(DOUBLES):
        raise LookupError
    assert heedful.explain(q, q, q).wish == "auto"


# Composite functions


class Encoder(nn.TransformerEncoderLayer):
    def __init__(self) -> None:
        super().__init__(16, 4, 16, dropout=0.0, batch_first=True)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_an_encoder_layer_is_covered_where_torch_would_take_its_fused_path_too(grad: bool, padded: bool) -> None:
    torch.manual_seed(0)
    layer, x = Encoder().eval(), torch.randn(2, 5, 16)
    keep = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    with torch.set_grad_enabled(grad):
        want = layer(x, src_key_padding_mask=keep)
        with heedful.patch_sdpa("native") as seen:
            got = layer(x, src_key_padding_mask=keep)
    assert seen.backends == {"native": 1}
    real = slice(None) if keep is None else ~keep
    torch.testing.assert_close(got[real], want[real])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")
def test_a_stack_of_layers_with_nested_tensors_inside_is_covered() -> None:
    torch.manual_seed(0)
    stack, x = nn.TransformerEncoder(Encoder(), 2).eval(), torch.randn(2, 5, 16)
    keep = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        want = stack(x, src_key_padding_mask=keep)
        with heedful.patch_sdpa("native") as seen:
            got = stack(x, src_key_padding_mask=keep)
    assert seen.backends == {"native": 2}
    torch.testing.assert_close(got[~keep], want[~keep])


@pytest.mark.parametrize("separate", [False, True])
def test_multihead_attention_is_covered_without_weights_and_counted_with_them(separate: bool) -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(16, 4, kdim=12 if separate else None, add_bias_kv=True)
    x, y = torch.randn(5, 2, 16), torch.randn(7, 2, 12 if separate else 16)
    value = torch.randn(7, 2, 16)
    want, weights = layer(x, y, value)
    with heedful.patch_sdpa("native") as seen:
        out, none = layer(x, y, value, need_weights=False)
        same, again = layer(x, y, value)
    torch.testing.assert_close(out, want)
    assert none is None
    assert torch.equal(same, want)
    assert torch.equal(again, weights)
    assert (seen.covered, seen.total) == (1, 2)
    assert [reason.partition(" was")[0] for reason in seen.passed] == ["nn.MultiheadAttention"]
    assert "passed on untouched 1: nn.MultiheadAttention was asked for its weights" in str(seen)


def test_other_functions_inside_a_composite_one_are_seen_by_modes_around() -> None:
    class Counting(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Counting.calls += func is F.linear
            return func(*args, **(kwargs or {}))

    x = torch.randn(5, 2, 16)
    with Counting(), heedful.patch_sdpa():
        nn.MultiheadAttention(16, 4)(x, x, x, need_weights=False)
    assert Counting.calls >= 1


# What is passed on


def test_a_causal_bias_is_passed_on(q: Tensor) -> None:
    bias = causal_lower_right(6, 6)
    want = sdpa(q, attn_mask=bias)
    with heedful.patch_sdpa(DOUBLES) as seen:
        assert torch.equal(sdpa(q, attn_mask=bias), want)
        assert torch.equal(F.scaled_dot_product_attention(q, q, q, bias), want)
    assert (seen.covered, seen.passed) == (0, {"CausalBias has rules of its own": 2})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")
def test_nested_tensors_are_passed_on() -> None:
    nested = torch.nested.nested_tensor([torch.randn(4, 3, 8), torch.randn(4, 5, 8)])
    jagged = torch.nested.nested_tensor([torch.randn(3, 4, 8), torch.randn(5, 4, 8)], layout=torch.jagged)
    with heedful.patch_sdpa(DOUBLES) as seen:
        assert sdpa(nested).is_nested
        assert sdpa(jagged.transpose(1, 2)).is_nested
    assert (seen.covered, seen.passed) == (0, {"nested tensors": 2})


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_what_torch_jit_traces_is_passed_on(q: Tensor) -> None:
    with heedful.patch_sdpa() as seen:
        traced = torch.jit.trace(sdpa, q, check_trace=False)
    torch.testing.assert_close(traced(q), sdpa(q))
    assert seen.passed == {"torch.jit.trace, to which sizes are tensors": 1}


def test_a_fused_operator_called_itself_is_counted() -> None:
    layer, x = Encoder().eval(), torch.randn(2, 5, 16)
    attn = layer.self_attn
    weights = (attn.in_proj_weight, attn.in_proj_bias, attn.out_proj.weight, attn.out_proj.bias)
    with torch.no_grad(), heedful.patch_sdpa() as seen:
        torch._native_multi_head_attention(x, x, x, 16, 4, *weights)
    assert seen.passed == {"one of torch's fused operators was called itself": 1}


# Beside layers that are set


class Layer(nn.Module):
    """Attention by SDPA."""

    def __init__(self, inside: nn.Module | None = None) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x) if self.inside is None else self.inside(x)


def test_layers_that_are_set_keep_their_backends_and_are_counted(q: Tensor) -> None:
    model = nn.ModuleList([Layer(), Layer()])
    heedful.set_attention_backend(model, DOUBLES, {"1": "keep"})
    with heedful.patch_sdpa("reference") as seen:
        torch.testing.assert_close(model[0](q), 2 * sdpa_outside(q))
        model[1](q)
    assert (seen.covered, seen.total, seen.backends) == (2, 2, {"reference": 1})
    assert heedful.attention_report(model)["0"].ran == ((DOUBLES, 1),)
    assert "layers set by set_attention_backend 1" in str(seen)
    with heedful.patch_sdpa():
        pass
    torch.testing.assert_close(model[0](q), 2 * sdpa(q))


# Threads, decorators, training


def test_other_threads_are_untouched(q: Tensor) -> None:
    results: list[Tensor] = []
    with heedful.patch_sdpa(DOUBLES) as seen:
        thread = threading.Thread(target=lambda: results.append(sdpa(q)))
        thread.start()
        thread.join()
    assert torch.equal(results[0], sdpa(q))
    assert seen.total == 0


def test_one_object_counts_for_several_threads(q: Tensor) -> None:
    patch = heedful.patch_sdpa("native")

    def work() -> None:
        with patch:
            for _ in range(200):
                sdpa(q)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert patch.backends == {"native": 800}


def test_a_thread_that_runs_under_the_mode_alone_is_covered(q: Tensor) -> None:
    """As autograd's threads are, which take over the modes of the thread that called backward, and no thread-locals."""
    patch, results = heedful.patch_sdpa(DOUBLES), []

    def recompute() -> None:
        with patch._mode:
            results.append(sdpa(q))
            results.append(sdpa(q))

    thread = threading.Thread(target=recompute)
    thread.start()
    thread.join()
    for result in results:
        torch.testing.assert_close(result, 2 * sdpa(q))
    assert patch.backends == {DOUBLES: 2}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_right_under_checkpointing(q: Tensor, reentrant: bool) -> None:
    def gradient(patch: Any) -> Tensor:
        x = q.clone().requires_grad_()
        with patch:
            torch.utils.checkpoint.checkpoint(sdpa, x, use_reentrant=reentrant).square().sum().backward()
        return x.grad

    torch.testing.assert_close(gradient(heedful.patch_sdpa(DOUBLES)), 4 * gradient(heedful.patch_sdpa("native")))


def test_it_decorates_functions(q: Tensor) -> None:
    patch = heedful.patch_sdpa(DOUBLES)

    @patch
    def run(x: Tensor) -> Tensor:
        """Its own words."""
        return sdpa(x)

    torch.testing.assert_close(run(q), 2 * sdpa(q))
    assert (run.__name__, run.__doc__, patch.covered) == ("run", "Its own words.", 1)


async def _later() -> None: ...


def _each() -> Iterator[int]:
    yield 1


@pytest.mark.parametrize("function", [_later, _each])
def test_what_runs_between_calls_is_not_decorated(function: Any) -> None:
    with pytest.raises(heedful.InvalidArgument, match="patch_sdpa: got a generator or an async function"):
        heedful.patch_sdpa()(function)


def test_what_it_saw_is_plain_data(q: Tensor) -> None:
    with heedful.patch_sdpa(DOUBLES) as seen:
        sdpa(q)
        sdpa(q, attn_mask=causal_lower_right(6, 6))
    assert json.loads(json.dumps(seen.to_dict())) == {
        "backends": {DOUBLES: 1},
        "by_layers": 0,
        "compiled": False,
        "covered": 1,
        "passed": {"CausalBias has rules of its own": 1},
        "total": 2,
    }


# Blocks that end out of turn


def stream(patch: patch_sdpa) -> Iterator[None]:
    """Text that comes word by word, say: the block is open between the words."""
    with patch:
        yield


def routed() -> nn.Module:
    model = nn.Sequential(Layer())
    heedful.set_attention_backend(model, DOUBLES)
    return model


def check_that_nothing_is_left(q: Tensor) -> None:
    assert (mirror.route, torch._C._len_torch_function_stack()) == (None, 0)
    torch.testing.assert_close(routed()(q), 2 * sdpa(q))


@pytest.mark.parametrize("first", [0, 1])
def test_generators_may_be_closed_in_any_order(q: Tensor, first: int) -> None:
    patches = [heedful.patch_sdpa(DOUBLES), heedful.patch_sdpa("reference")]
    streams = [stream(patch) for patch in patches]
    for one in streams:
        next(one)
    streams.pop(first).close()
    left = patches[1 - first]
    sdpa(q)
    assert (left.covered, patches[first].covered) == (1, 0)
    streams.pop().close()
    check_that_nothing_is_left(q)
    sdpa(q)
    assert left.covered == 1


def test_asyncio_tasks_may_take_turns_and_each_has_its_own_backend(q: Tensor) -> None:
    async def task(backend: str, *naps: float) -> Tensor:
        with heedful.patch_sdpa(backend):
            for nap in naps:
                await asyncio.sleep(nap)
                out = sdpa(q)
        return out

    async def both() -> list[Tensor]:
        return await asyncio.gather(task(DOUBLES, 0, 0), task("native", 0, 0, 0, 0))

    doubled, plain = asyncio.run(both())
    torch.testing.assert_close(doubled, 2 * plain)
    check_that_nothing_is_left(q)


def test_one_object_that_is_open_several_times_may_be_closed_in_any_order(q: Tensor) -> None:
    patch, other = heedful.patch_sdpa(DOUBLES), heedful.patch_sdpa("native")
    streams = [stream(patch), stream(other), stream(patch)]
    for one in streams:
        next(one)
    for place, covered in ((0, (0, 1)), (1, (1, 1))):
        streams[place].close()
        sdpa(q)
        assert (patch.covered, other.covered) == covered
    streams[2].close()
    check_that_nothing_is_left(q)


def test_another_mode_that_is_entered_inside_stays(q: Tensor) -> None:
    class Other(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    open_one, other = stream(heedful.patch_sdpa(DOUBLES)), Other()
    next(open_one)
    with other:
        open_one.close()
        assert torch.overrides._get_current_function_mode_stack() == [other]
        torch.testing.assert_close(sdpa(q), sdpa_outside(q))
    check_that_nothing_is_left(q)


def test_a_block_may_end_in_a_thread_that_did_not_begin_it(q: Tensor) -> None:
    """As a generator's does that is collected there."""
    patch = heedful.patch_sdpa(DOUBLES).__enter__()
    errors: list[BaseException] = []

    def end() -> None:
        try:
            patch.__exit__(None, None, None)
            check_that_nothing_is_left(q)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=end)
    thread.start()
    thread.join()
    patch.__exit__(None, None, None)
    assert not errors
    check_that_nothing_is_left(q)


class Closing(nn.Module):
    """While it runs, a block ends that began before; or one begins that ends later."""

    def __init__(self, do: Any) -> None:
        super().__init__()
        self.do = do

    def forward(self, x: Tensor) -> Tensor:
        self.do()
        return F.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize("begun", ["before", "inside"])
def test_a_block_and_a_layer_may_overlap(q: Tensor, begun: str) -> None:
    open_one = stream(heedful.patch_sdpa(DOUBLES))
    if begun == "before":
        next(open_one)
    layer = Closing(open_one.close if begun == "before" else open_one.__next__)
    heedful.set_attention_backend(layer, "native")
    layer(q)
    torch.testing.assert_close(routed()(q), 2 * sdpa_outside(q))
    open_one.close()
    assert torch._C._len_torch_function_stack() == 0
    assert mirror.route is None
    torch.testing.assert_close(routed()(q), 2 * sdpa(q))


# Compiled code


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.heads(x, x, x, need_weights=False)[0].unflatten(-1, (4, 4)).transpose(1, 2)
        return F.scaled_dot_product_attention(y, y, y)


@torch.no_grad()
def test_compiled_code_is_covered_in_one_graph_and_each_wish_is_obeyed() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 5, 16)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)  # "eager" calls torch's functions anew
    plain = model(x)
    with heedful.patch_sdpa(DOUBLES) as seen:
        twice = model(x)
        torch.testing.assert_close(compiled(x), twice)
        torch.testing.assert_close(compiled(x), twice)
    assert (seen.covered, seen.compiled) == (2, True)
    assert "compiled code computed attention, too" in str(seen)
    assert not torch.allclose(twice, plain)
    torch.testing.assert_close(compiled(x), plain)
    with heedful.patch_sdpa("native"):
        torch.testing.assert_close(compiled(x), plain)
    with heedful.patch_sdpa(DOUBLES):
        torch.testing.assert_close(compiled(x), twice)


@torch.no_grad()
def test_a_layer_that_is_set_is_compiled_within_it(q: Tensor) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(Layer())
    heedful.set_attention_backend(model, DOUBLES)
    with heedful.patch_sdpa("native"):
        out = torch.compile(model, backend="aot_eager", fullgraph=True)(q)
    torch.testing.assert_close(out, 2 * sdpa(q))


def test_the_public_name_is_the_class() -> None:
    assert heedful.patch_sdpa is patch_sdpa
