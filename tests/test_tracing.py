"""Under torch.compile: every strategy works or is refused with its reason, and what the decision reads is guarded."""

import asyncio
import gc
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import heedful
from heedful import AttentionDispatcher, AttentionStrategy, AttentionStrategyFactory, Limits, tracing
from heedful.strategy import ALL_MASKS

KNOWN = AttentionStrategyFactory.default().strategies()
HERE = tuple(name for name, strategy in KNOWN.items() if strategy.limits_for("cpu").covers("cpu"))
WISHES = ("auto", *HERE, "flash")  # the last stands for all that are refused for the device
TRACEABLE = tuple(name for name in HERE if KNOWN[name].limits_for("cpu").compile)[:6]  # the inductor is slow
inductor = pytest.mark.inductor
needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++") or shutil.which("cl")), reason="needs a C++ compiler"
)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def qkv(*shape: int, keys: int | None = None, heads: int | None = None, axis: int = -2) -> list[Tensor]:
    """Query, key and value; ``keys`` and ``heads`` of key and value where they differ from the query's."""
    small = list(shape)
    small[axis] = keys or shape[axis]
    if heads is not None:
        small[1 if axis == -2 else -2] = heads
    return [torch.randn(shape), torch.randn(small), torch.randn(small)]


def keep(batch: int, length: int) -> Tensor:
    return torch.arange(length)[None] < torch.arange(length, length - batch, -1)[:, None]


def cu(*ends: int) -> Tensor:
    return torch.tensor(ends, dtype=torch.int32)


# Calls: name -> (tensors, function of the tensors and further keyword arguments).

Call = Callable[..., Any]
attention = heedful.attention
CALLS: dict[str, tuple[Callable[[], list[Tensor]], Call]] = {
    "plain": (lambda: qkv(2, 4, 16, 8), lambda q, k, v, **w: attention(q, k, v, **w)),
    "rank 2": (lambda: qkv(16, 8), lambda q, k, v, **w: attention(q, k, v, **w)),
    "rank 3": (lambda: qkv(4, 16, 8), lambda q, k, v, **w: attention(q, k, v, **w)),
    "BSHD": (lambda: qkv(2, 16, 4, 8), lambda q, k, v, **w: attention(q, k, v, layout="BSHD", **w)),
    "is_causal": (lambda: qkv(2, 4, 16, 8), lambda q, k, v, **w: attention(q, k, v, is_causal=True, **w)),
    "Causal": (lambda: qkv(2, 4, 16, 8), lambda q, k, v, **w: attention(q, k, v, heedful.Causal(), **w)),
    "bottom right": (
        lambda: qkv(2, 4, 12, 8, keys=20),
        lambda q, k, v, **w: attention(q, k, v, is_causal=True, causal_alignment="bottom_right", **w),
    ),
    "window": (lambda: qkv(2, 4, 16, 8), lambda q, k, v, **w: attention(q, k, v, window=(3, 0), **w)),
    "bool mask": (
        lambda: [*qkv(2, 4, 16, 8), torch.rand(2, 1, 16, 16) < 0.8],
        lambda q, k, v, m, **w: attention(q, k, v, m, **w),
    ),
    "bias": (
        lambda: [*qkv(2, 4, 16, 8), torch.randn(4, 16, 16)],
        lambda q, k, v, m, **w: attention(q, k, v, m, **w),
    ),
    "KeyPadding": (
        lambda: [*qkv(2, 4, 16, 8), keep(2, 16)],
        lambda q, k, v, m, **w: attention(q, k, v, heedful.KeyPadding(m), **w),
    ),
    "KeyPadding and causal": (
        lambda: [*qkv(2, 16, 4, 8), keep(2, 16)],
        lambda q, k, v, m, **w: attention(q, k, v, heedful.KeyPadding(m), is_causal=True, layout="BSHD", **w),
    ),
    "GQA": (
        lambda: qkv(2, 4, 16, 8, heads=2),
        lambda q, k, v, **w: attention(q, k, v, enable_gqa=True, **w),
    ),
    "packed": (
        lambda: [*qkv(16, 4, 8, axis=-3), cu(0, 5, 16)],
        lambda q, k, v, c, **w: attention(q, k, v, heedful.Varlen(c), layout="THD", **w),
    ),
    "scale": (lambda: qkv(2, 4, 16, 8), lambda q, k, v, **w: attention(q, k, v, scale=0.3, **w)),
    "softcap": (lambda: qkv(2, 4, 16, 8), lambda q, k, v, **w: attention(q, k, v, softcap=20.0, **w)),
    "LSE": (lambda: qkv(2, 4, 16, 8), lambda q, k, v, **w: attention(q, k, v, return_lse=True, **w)),
    "autocast inside": (
        lambda: qkv(2, 4, 16, 8),
        lambda q, k, v, **w: _autocast(lambda: attention(q, k, v, **w)),
    ),
}


def _autocast(call: Callable[[], Any]) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return call()


def same(got: Any, want: Any) -> None:
    """aot_eager runs the kernels that eager runs, so the numbers agree to the last bits."""
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6, equal_nan=True)


def compiled_or_refused(call: Call, tensors: list[Tensor], compiled: Call, **words: Any) -> bool:
    """Compare with the eager call, or see that the refusal carries its reason. Whether it ran."""
    try:
        want = call(*tensors, **words)
    except heedful.Refused:
        with pytest.raises(heedful.Refused, match="refuses: "):
            compiled(*tensors, **words)
        return False
    reasons = [str(reason) for reason in _refusals(lambda: compiled(*tensors, **words), want)]
    assert not reasons or any("torch.compile is tracing" in reason for reason in reasons)
    return not reasons


def _refusals(run: Callable[[], Any], want: Any) -> list[heedful.Refusal]:
    """The reasons of a refusal; none where it ran and gave the wanted numbers."""
    try:
        got = run()
    except heedful.Refused as refused:
        return [reason for reasons in refused.refusals.values() for reason in reasons]
    same(got, want)
    return []


@pytest.mark.parametrize("wish", WISHES)
def test_every_strategy_runs_or_refuses_every_call(wish: str) -> None:
    ran = set()
    for name, (make, call) in CALLS.items():
        torch._dynamo.reset()
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        if compiled_or_refused(call, make(), compiled, backend=wish):
            ran.add(name)
    assert ran == set(CALLS) or wish != "auto", "auto computes every call"


OFTEN = ("plain", "rank 3", "bias", "KeyPadding and causal", "packed", "scale", "softcap")


@pytest.mark.parametrize("dynamic", ["all", "marked"])
@pytest.mark.parametrize(
    "name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in CALLS]
)
def test_auto_with_dynamic_lengths(name: str, dynamic: str) -> None:
    """One graph for several lengths. ``dynamic=True`` makes every number a symbol, custom scales and soft caps too."""
    make, call = CALLS[name]
    axis = {"BSHD": 1, "KeyPadding and causal": 1, "packed": 0}.get(name, -2)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=True if dynamic == "all" else None)
    first = 0
    for extra in (1, 7):
        tensors = make()
        grown = _grown(tensors, axis, extra)
        if dynamic == "marked":
            for tensor in grown[:3]:
                torch._dynamo.mark_dynamic(tensor, tensor.dim() + axis if axis < 0 else axis)
            for mask in grown[3:]:
                if mask.is_floating_point() or mask.dtype == torch.bool:
                    for place in range(mask.dim() - (1 if mask.dim() == 2 else 2), mask.dim()):
                        torch._dynamo.mark_dynamic(mask, place)
        same(compiled(*grown), call(*grown))
        first = first or counter.frame_count
    assert counter.frame_count == first, "one graph serves every length"


def _grown(tensors: list[Tensor], axis: int, extra: int) -> list[Tensor]:
    """The same call with longer sequences."""
    long = [torch.cat([t, t.narrow(axis, 0, extra)], dim=axis) for t in tensors[:3]]
    for mask in tensors[3:]:
        if mask.dtype == torch.int32:
            long.append(torch.cat([mask[:-1], mask[-1:] + extra]))
            continue
        for place in range(mask.dim() - (1 if mask.dim() == 2 else 2), mask.dim()):
            mask = torch.cat([mask, mask.narrow(place, 0, extra)], dim=place)
        long.append(mask)
    return long


@pytest.mark.parametrize(("batch", "queries", "keys"), [(6, 6, 9), (6, 6, 6), (2, 4, 1), (1, 1, 1), (2, 2, 64)])
@pytest.mark.parametrize("rows", ["all", "one"])
def test_key_padding_whose_sizes_meet_others(batch: int, queries: int, keys: int, rows: str) -> None:
    query, key = torch.randn(batch, 2, queries, 8), torch.randn(batch, 2, keys, 8)
    keep = heedful.KeyPadding(torch.rand(batch if rows == "all" else 1, keys) < 0.7)
    compiled = torch.compile(heedful.attention, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(query, key, key, keep), heedful.attention(query, key, key, keep))


def test_no_recompile_for_a_repeated_shape() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda q, k, v: heedful.attention(q, k, v), backend=counter, fullgraph=True)
    for length in (16, 16, 24, 16, 24, 40):  # the second length makes a dynamic graph
        tensors = qkv(2, 4, length, 8)
        same(compiled(*tensors), heedful.attention(*tensors))
    assert counter.frame_count == 2


@pytest.mark.parametrize("wish", WISHES)
def test_gradient(wish: str) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        return heedful.attention(q, k, v, m, is_causal=True, backend=wish)

    def run(f: Call) -> list[Tensor]:
        torch.manual_seed(3)
        leaves = [t.requires_grad_() for t in (*qkv(2, 4, 16, 8), torch.randn(4, 16, 16))]
        out = f(*leaves)
        return [out, *torch.autograd.grad(out.sum(), leaves)]

    try:
        want = run(call)
    except heedful.Refused as refused:
        with pytest.raises(heedful.Refused, match=next(iter(next(iter(refused.refusals.values())))).field):
            run(torch.compile(call, backend="aot_eager", fullgraph=True))
        return
    same(run(torch.compile(call, backend="aot_eager", fullgraph=True)), want)


def test_dropout_argument() -> None:
    """Zero weights as dropout makes them: of the right number, and others with another seed."""
    compiled = torch.compile(
        lambda q, k, v, p: heedful.attention(q, k, v, dropout_p=p), backend="aot_eager", fullgraph=True
    )
    query, key, _ = qkv(1, 1, 64, 8)
    seen = compiled(query, key, torch.eye(64)[None, None], 0.25)
    assert 0.2 < (seen == 0).float().mean() < 0.3
    assert not torch.equal(seen, compiled(query, key, torch.eye(64)[None, None], 0.25))
    same(compiled(query, key, key, 0.0), heedful.attention(query, key, key))


def test_autocast_outside() -> None:
    tensors = qkv(2, 4, 16, 8)
    compiled = torch.compile(lambda q, k, v: heedful.attention(q, k, v), backend="aot_eager", fullgraph=True)
    assert compiled(*tensors).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        got, want = compiled(*tensors), heedful.attention(*tensors)
    assert got.dtype == torch.bfloat16
    same(got, want)


# Errors


WRONG: dict[str, Call] = {
    "query": lambda q, k, v: heedful.attention(q[0, 0, 0], k, v),
    "key": lambda q, k, v: heedful.attention(q, 3, v),
    "key dtype": lambda q, k, v: heedful.attention(q, k.half(), v),
    "key device": lambda q, k, v: heedful.attention(q, k.to("meta"), v),
    "key heads": lambda q, k, v: heedful.attention(q, k[:, :2], v[:, :2]),
    "value": lambda q, k, v: heedful.attention(q, k, v[..., :3, :]),
    "query head dim": lambda q, k, v: heedful.attention(q[..., :0], k[..., :0], v),
    "query rank": lambda q, k, v: heedful.attention(q[0, 0], k[0, 0], v[0, 0], layout="BSHD"),
    "attn_mask": lambda q, k, v: heedful.attention(q, k, v, torch.ones(16, 16, dtype=torch.int64)),
    "attn_mask type": lambda q, k, v: heedful.attention(q, k, v, "causal"),
    "attn_mask shape": lambda q, k, v: heedful.attention(q, k, v, torch.ones(3, 16, dtype=torch.bool)),
    "attn_mask device": lambda q, k, v: heedful.attention(q, k, v, torch.ones(16, 16, device="meta")),
    "attn_mask padding": lambda q, k, v: heedful.attention(
        q, k, v, heedful.KeyPadding(torch.ones(2, 9, dtype=torch.bool))
    ),
    "dropout_p": lambda q, k, v: heedful.attention(q, k, v, dropout_p=2.0),
    "is_causal": lambda q, k, v: heedful.attention(q, k, v, is_causal="yes"),
    "scale": lambda q, k, v: heedful.attention(q, k, v, scale="half"),
    "layout": lambda q, k, v: heedful.attention(q, k, v, layout="SBHD"),
    "causal_alignment": lambda q, k, v: heedful.attention(q, k, v, is_causal=True, causal_alignment="middle"),
    "window": lambda q, k, v: heedful.attention(q, k, v, window="wide"),
    "window sides": lambda q, k, v: heedful.attention(q, k, v, window=(1, 2, 3)),
    "softcap": lambda q, k, v: heedful.attention(q, k, v, softcap=0.0),
    "max_error": lambda q, k, v: heedful.attention(q, k, v, max_error=-1.0),
    "options": lambda q, k, v: heedful.attention(q, k, v, options=3),
    "backend": lambda q, k, v: heedful.attention(q, k, v, backend=3),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named_as_in_eager(name: str) -> None:
    tensors = qkv(2, 4, 16, 8)
    with pytest.raises(heedful.InvalidArgument) as eager:
        WRONG[name](*tensors)
    with pytest.raises(heedful.InvalidArgument, match=name.split()[0]) as traced:
        torch.compile(WRONG[name], backend="aot_eager", fullgraph=True)(*tensors)
    assert traced.value.argument == eager.value.argument


def test_an_unknown_backend_and_an_unhashable_option() -> None:
    tensors = qkv(2, 4, 16, 8)
    compiled = torch.compile(lambda q, k, v, **w: heedful.attention(q, k, v, **w), backend="aot_eager", fullgraph=True)
    with pytest.raises(heedful.UnknownBackend, match=r"'nativ'.*did you mean 'native'"):
        compiled(*tensors, backend="nativ")
    with pytest.raises(heedful.Refused, match="options is 'kernel_options'"):
        compiled(*tensors, backend="native", options={"kernel_options": {"BLOCK_M": 16}})


def test_a_refusal_is_the_same_exception_without_fullgraph() -> None:
    compiled = torch.compile(lambda q, k, v: heedful.attention(q, k, v, backend="native", softcap=2.0), backend="eager")
    with pytest.raises(heedful.Refused, match=r"native refuses: softcap is 2\.0"):
        compiled(*qkv(2, 4, 16, 8))


# What the decision reads


class Add(AttentionStrategy):
    """Recognisable: value plus ``number``."""

    number = 1.0
    limits = Limits(masks=ALL_MASKS, backward=True, compile=True)

    def compute_attention(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        return value + self.number


class AddTwo(Add):
    number = 2.0


def adding(*names: str) -> tuple[AttentionStrategyFactory, AttentionDispatcher]:
    factory = AttentionStrategyFactory(packages=(), plugins=False)
    for number, name in enumerate(names, 1):
        factory.register_strategy(name, type(name, (Add,), {"number": float(number)}))
    return factory, AttentionDispatcher(factory)


def added(compiled: Call, **words: Any) -> float:
    query, key, value = qkv(1, 1, 4, 4)
    return round((compiled(query, key, value, **words) - value).mean().item(), 3)


def compile_of(dispatcher: AttentionDispatcher) -> Call:
    return torch.compile(lambda q, k, v, **w: dispatcher.attention(q, k, v, **w), backend="aot_eager", fullgraph=True)


def test_a_changed_outer_scope_is_seen() -> None:
    _, dispatcher = adding("one", "two")
    compiled = compile_of(dispatcher)
    for _ in range(2):
        for number, name in enumerate(("one", "two"), 1):
            with dispatcher.attention_backend(name):
                assert added(compiled) == number
        with dispatcher.attention_backend("one"):
            with dispatcher.attention_backend("two"):
                assert added(compiled) == 2
            assert added(compiled) == 1
            assert added(compiled, backend="two") == 2


def test_a_second_thread_has_its_own_scope() -> None:
    _, dispatcher = adding("one", "two")
    compiled = compile_of(dispatcher)
    seen = []

    def work() -> None:
        seen.append(added(compiled))
        with dispatcher.attention_backend("one"):
            seen.append(added(compiled))

    with dispatcher.attention_backend("two"):
        assert added(compiled) == 2
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert added(compiled) == 2
    assert seen == [1, 1]


async def test_a_scope_inside_a_task_is_refused_with_the_remedy() -> None:
    _, dispatcher = adding("one", "two")
    compiled = compile_of(dispatcher)
    with (
        dispatcher.attention_backend("two"),
        pytest.raises(heedful.InvalidArgument, match="pass backend= to the compiled call"),
    ):
        added(compiled)
    with dispatcher.attention_backend("two"):
        assert added(compiled, backend="one") == 1
    assert added(compiled) == 1


def test_tasks_see_the_scope_around_the_loop() -> None:
    _, dispatcher = adding("one", "two")
    compiled = compile_of(dispatcher)

    async def work() -> float:
        await asyncio.sleep(0)
        return added(compiled)

    async def both() -> list[float]:
        return await asyncio.gather(work(), work())

    with dispatcher.attention_backend("two"):
        assert asyncio.run(both()) == [2, 2]


async def test_a_scope_that_came_with_a_copied_context_is_refused() -> None:
    """``asyncio.to_thread`` copies the ContextVar, which compiled code cannot see."""
    _, dispatcher = adding("one", "two")
    with dispatcher.attention_backend("two"):
        assert await asyncio.to_thread(added, dispatcher.attention) == 2
        with pytest.raises(heedful.InvalidArgument, match="inherited a scope from another thread"):
            await asyncio.to_thread(added, compile_of(dispatcher))


def test_a_replaced_strategy_takes_effect() -> None:
    factory, dispatcher = adding("one")
    compiled = compile_of(dispatcher)
    assert added(compiled) == 1
    factory.register_strategy("one", AddTwo, replace=True)
    assert added(compiled) == 2
    assert len(vars(dispatcher.traced.runs)) == 1, "what was bound before is forgotten"


def test_the_environments_wish() -> None:
    factory, _ = adding("one", "two")
    policy = heedful.Policy.from_environment({"HEEDFUL_BACKEND": "two"})
    compiled = compile_of(AttentionDispatcher(factory, policy=policy))
    assert added(compiled) == 2
    assert added(compiled, backend="one") == 1
    assert added(compiled, backend="auto") == 1


def test_a_list_of_backends_falls_back() -> None:
    compiled = torch.compile(
        lambda q, k, v, names: heedful.attention(q, k, v, softcap=2.0, backend=names),
        backend="aot_eager",
        fullgraph=True,
    )
    tensors = qkv(2, 4, 16, 8)
    same(compiled(*tensors, ["native", "reference"]), heedful.attention(*tensors, softcap=2.0, backend="reference"))
    with pytest.raises(heedful.Refused, match=r"native refuses: softcap(.|\n)*native_math refuses: softcap"):
        compiled(*tensors, ["native", "native_math"])


def test_dispatchers_in_one_graph_keep_apart() -> None:
    (_, one), (_, other) = adding("one"), adding("none", "two")
    compiled = torch.compile(
        lambda q, k, v: one.attention(q, k, v) + other.attention(q, k, v, backend="two"),
        backend="aot_eager",
        fullgraph=True,
    )
    query, key, value = qkv(1, 1, 4, 4)
    same(compiled(query, key, value), 2 * value + 3)


def test_what_was_bound_dies_with_its_dispatcher() -> None:
    _, dispatcher = adding("one")
    added(compile_of(dispatcher))
    dead = weakref.ref(dispatcher)
    torch._dynamo.reset()
    del dispatcher
    gc.collect()
    assert dead() is None


def test_what_was_bound_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heedful.tracing._MOST_OUTLINES", 2)
    _, dispatcher = adding("one")
    compiled = compile_of(dispatcher)
    for dim in (3, 4, 5, 6, 3):
        query, key, value = qkv(1, 1, 4, dim)
        same(compiled(query, key, value), value + 1)
        assert len(vars(dispatcher.traced.runs)) <= 2


def test_the_decision_is_marked_as_torch_marks_it() -> None:
    """Without calling its decorator, which would import dynamo with heedful."""

    def marked() -> None: ...

    assert vars(torch.compiler.assume_constant_result(marked)) == vars(tracing._decide) == vars(tracing._raise)


# torch.export


class Block(torch.nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, keep: Tensor) -> Tensor:
        return heedful.attention(query, key, value, keep[:, None, None, :], layout="BSHD")


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
def test_export(strict: bool, dynamic: bool) -> None:
    inputs = (*qkv(2, 16, 4, 8), keep(2, 16))
    length = torch.export.Dim("length", min=2, max=512)
    shapes = ({1: length}, {1: length}, {1: length}, {1: length}) if dynamic else None
    program = torch.export.export(Block(), inputs, strict=strict, dynamic_shapes=shapes)
    same(program.module()(*inputs), Block()(*inputs))
    if dynamic:
        longer = (*qkv(2, 24, 4, 8), keep(2, 24))
        same(program.module()(*longer), Block()(*longer))


# Activation checkpointing


@pytest.mark.parametrize("place", ["inside", "outside", "other scope", "thread"])
def test_checkpoint_context_recomputes_in_the_forwards_scope(place: str) -> None:
    ran, dispatcher = recording("one", "two")
    leaves = [t.requires_grad_() for t in qkv(1, 1, 4, 4)]
    with dispatcher.attention_backend("two"):
        out = checkpoint(dispatcher.attention, *leaves, use_reentrant=False, context_fn=heedful.checkpoint_context)
        if place == "inside":
            out.sum().backward()
    _backward(out, place, dispatcher)
    assert ran == ["two", "two"]
    assert leaves[0].grad is not None


@pytest.mark.parametrize("reentrant", [True, False])
def test_without_checkpoint_context_the_recomputation_sees_another_scope(reentrant: bool) -> None:
    ran, dispatcher = recording("one", "two")
    leaves = [t.requires_grad_() for t in qkv(1, 1, 4, 4)]
    with dispatcher.attention_backend("two"):
        out = checkpoint(dispatcher.attention, *leaves, use_reentrant=reentrant)
    out.sum().backward()
    assert ran == ["two", "one"]


def test_reentrant_checkpointing_with_the_scope_inside() -> None:
    ran, dispatcher = recording("one", "two")
    leaves = [t.requires_grad_() for t in qkv(1, 1, 4, 4)]
    checkpoint(dispatcher.attention_backend("two")(dispatcher.attention), *leaves, use_reentrant=True).sum().backward()
    assert ran == ["two", "two"]


def test_checkpoint_context_without_a_scope_and_twice_backward() -> None:
    ran, dispatcher = recording("one", "two")
    leaves = [t.requires_grad_() for t in qkv(1, 1, 4, 4)]
    out = checkpoint(dispatcher.attention, *leaves, use_reentrant=False, context_fn=heedful.checkpoint_context)
    with dispatcher.attention_backend("two"):
        out.sum().backward(retain_graph=True)
        out.sum().backward()
    assert set(ran) == {"one"}


def test_checkpoint_in_compiled_code() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(heedful.attention, q, k, v, use_reentrant=False)

    leaves = [t.requires_grad_() for t in qkv(2, 4, 16, 8)]
    want = torch.autograd.grad(run(*leaves).sum(), leaves)
    got = torch.autograd.grad(torch.compile(run, backend="aot_eager", fullgraph=True)(*leaves).sum(), leaves)
    same(got, want)


def recording(*names: str) -> tuple[list[str], AttentionDispatcher]:
    ran: list[str] = []
    factory = AttentionStrategyFactory(packages=(), plugins=False)

    def computes(name: str) -> Call:
        def compute_attention(self: Any, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
            ran.append(name)
            return torch.softmax(query @ key.transpose(-2, -1), -1) @ value

        return compute_attention

    for name in names:
        body = {"limits": Add.limits, "compute_attention": computes(name)}
        factory.register_strategy(name, type(name, (AttentionStrategy,), body))
    return ran, AttentionDispatcher(factory)


def _backward(out: Tensor, place: str, dispatcher: AttentionDispatcher) -> None:
    if place == "outside":
        out.sum().backward()
    elif place == "other scope":
        with dispatcher.attention_backend("one"):
            out.sum().backward()
    elif place == "thread":
        thread = threading.Thread(target=lambda: out.sum().backward())
        thread.start()
        thread.join()


# The code generator


@inductor
@needs_compiler
@pytest.mark.parametrize("name", ["plain", "KeyPadding and causal", "bias", "packed"])
def test_inductor(name: str) -> None:
    make, call = CALLS[name]
    tensors = make()
    got = torch.compile(call, fullgraph=True)(*tensors)
    torch.testing.assert_close(got, call(*tensors), rtol=1e-5, atol=1e-5)


@inductor
@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("wish", TRACEABLE)
def test_inductor_for_each_strategy(wish: str) -> None:
    make, call = CALLS["bool mask"]
    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    tensors = make()
    try:
        want = call(*tensors, backend=wish)
    except heedful.Refused:
        with pytest.raises(heedful.Refused, match="refuses: "):
            compiled(*tensors, backend=wish)
        return
    torch.testing.assert_close(compiled(*tensors, backend=wish), want, rtol=1e-5, atol=1e-5)
