"""Scopes: separate for every thread and task, nested, restored after errors, and never left behind."""

import asyncio
import contextvars
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import heedful
from heedful import AttentionDispatcher, AttentionStrategy, AttentionStrategyFactory, Limits, Policy
from heedful.policy import current_wish, mirror

NAMES = ("auto_pick", "one", "two")
TENSOR = torch.zeros(1, 1, 2, 2)


class Numbered(AttentionStrategy):
    """Gives its number instead of attention, so an answer says who computed it."""

    limits = Limits(backward=True, compile=True)
    number = 0.0

    def compute_attention(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        return value * 0 + self.number


@pytest.fixture
def dispatcher() -> AttentionDispatcher:
    factory = AttentionStrategyFactory(packages=(), plugins=False)
    for number, name in enumerate(NAMES):
        factory.register_strategy(name, type(name, (Numbered,), {"number": float(number)}))
    return AttentionDispatcher(factory, policy=Policy(guard="off"))  # numbers are no attention


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    yield
    assert current_wish() is None
    assert (mirror.wish, mirror.in_coroutines, mirror.entered) == (None, [], [])


def ran(dispatcher: AttentionDispatcher, **words: Any) -> str:
    """Which backend computed a call; explain must have said so."""
    name = NAMES[int(dispatcher.attention(TENSOR, TENSOR, TENSOR, **words)[0, 0, 0, 0])]
    assert dispatcher.explain(TENSOR, TENSOR, TENSOR, **words).backend == name
    return name


def test_nested_scopes_and_a_calls_own_backend(dispatcher: AttentionDispatcher) -> None:
    assert ran(dispatcher) == "auto_pick"
    with dispatcher.attention_backend("one"):
        assert ran(dispatcher) == "one"
        with dispatcher.attention_backend("two"):
            assert ran(dispatcher) == "two"
            assert ran(dispatcher, backend="one") == "one"
            with dispatcher.attention_backend("auto"):
                assert ran(dispatcher) == "auto_pick"
        assert ran(dispatcher) == "one"
    assert ran(dispatcher) == "auto_pick"


def test_an_exception_restores(dispatcher: AttentionDispatcher) -> None:
    with dispatcher.attention_backend("one"):
        with pytest.raises(KeyError), dispatcher.attention_backend("two"):
            raise KeyError
        assert ran(dispatcher) == "one"
    assert ran(dispatcher) == "auto_pick"


def test_a_wrong_name_leaves_the_scope_as_it_was(dispatcher: AttentionDispatcher) -> None:
    with dispatcher.attention_backend("one"):
        with pytest.raises(heedful.UnknownBackend, match="did you mean 'two'"):
            dispatcher.attention_backend("twoo")
        assert ran(dispatcher) == "one"


def test_a_scope_goes_before_the_environment(dispatcher: AttentionDispatcher) -> None:
    policy = Policy.from_environment({"HEEDFUL_BACKEND": "one", "HEEDFUL_GUARD": "off"})
    told = AttentionDispatcher(dispatcher.factory, policy=policy)
    assert ran(told) == "one"
    with told.attention_backend("two"):
        assert ran(told) == "two"


def test_one_object_entered_again_and_within_itself(dispatcher: AttentionDispatcher) -> None:
    one, two = dispatcher.attention_backend("one"), dispatcher.attention_backend("two")
    with one:
        with two, one:
            assert ran(dispatcher) == "one"
            with one:
                assert ran(dispatcher) == "one"
        assert ran(dispatcher) == "one"
    with one:
        assert ran(dispatcher) == "one"


def test_as_a_decorator(dispatcher: AttentionDispatcher) -> None:
    @dispatcher.attention_backend("two")
    def inner(depth: int) -> list[str]:
        """Its docstring."""
        return [ran(dispatcher), *(inner(depth - 1) if depth else [])]

    assert inner(2) == ["two"] * 3
    assert inner.__doc__ == "Its docstring."
    with dispatcher.attention_backend("one"):
        assert inner(0) == ["two"]
        assert ran(dispatcher) == "one"


async def test_as_a_decorator_of_a_coroutine(dispatcher: AttentionDispatcher) -> None:
    @dispatcher.attention_backend("two")
    async def inner() -> str:
        await asyncio.sleep(0)
        return ran(dispatcher)

    assert await asyncio.gather(inner(), inner()) == ["two", "two"]
    assert ran(dispatcher) == "auto_pick"


def test_a_generator_is_not_decorated(dispatcher: AttentionDispatcher) -> None:
    def numbers() -> Iterator[int]:
        yield 1

    async def later() -> AsyncIterator[int]:
        yield 1

    for function in (numbers, later):
        with pytest.raises(heedful.InvalidArgument, match="generator function; use it in a with statement"):
            dispatcher.attention_backend("one")(function)


# Generators share their caller's context, so their scopes reach it until they are closed.


def generating(dispatcher: AttentionDispatcher, name: str) -> Iterator[str]:
    with dispatcher.attention_backend(name):
        yield ran(dispatcher)
        yield ran(dispatcher)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_generators_closed_in_any_order_leave_nothing(dispatcher: AttentionDispatcher, order: tuple[int, int]) -> None:
    open_ones = [generating(dispatcher, "one"), generating(dispatcher, "two")]
    assert [next(one) for one in open_ones] == ["one", "two"]
    first, second = (open_ones[place] for place in order)
    first.close()  # type: ignore[attr-defined]
    assert ran(dispatcher) == ("two" if order[0] == 0 else "one")
    second.close()  # type: ignore[attr-defined]
    assert ran(dispatcher) == "auto_pick"


def test_a_generator_closed_in_another_context(dispatcher: AttentionDispatcher) -> None:
    one = generating(dispatcher, "one")
    context = contextvars.copy_context()
    assert context.run(next, one) == "one"
    one.close()  # type: ignore[attr-defined]  # here, where it was not entered: nothing to restore
    assert ran(dispatcher) == "auto_pick"


def test_a_copied_context_keeps_its_scope(dispatcher: AttentionDispatcher) -> None:
    with dispatcher.attention_backend("one"):
        context = contextvars.copy_context()
    assert context.run(ran, dispatcher) == "one"
    assert ran(dispatcher) == "auto_pick"

    def nested() -> str:
        with dispatcher.attention_backend("two"):
            return ran(dispatcher)

    assert context.run(nested) == "two"
    assert context.run(ran, dispatcher) == "one"


# Threads


def test_two_threads_never_see_each_others_backend(dispatcher: AttentionDispatcher) -> None:
    barrier = threading.Barrier(2, timeout=20)

    def work(name: str) -> set[str]:
        seen = set()
        for _ in range(50):
            with dispatcher.attention_backend(name):
                barrier.wait()
                seen.add(ran(dispatcher))
            barrier.wait()
            assert ran(dispatcher) == "auto_pick"
        return seen

    with dispatcher.attention_backend("two"), ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, ["one", "two"])) == [{"one"}, {"two"}]


def test_threads_share_one_object(dispatcher: AttentionDispatcher) -> None:
    one = dispatcher.attention_backend("one")

    def work(_: int) -> tuple[str, str]:
        with one:
            inside = ran(dispatcher)
        return inside, ran(dispatcher)

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(work, range(64))) == {("one", "auto_pick")}


def test_a_pool_does_not_inherit_the_scope(dispatcher: AttentionDispatcher) -> None:
    """As with every ContextVar: hand the context over to take the scope along."""
    with dispatcher.attention_backend("one"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(ran, dispatcher).result() == "auto_pick"
        assert pool.submit(contextvars.copy_context().run, ran, dispatcher).result() == "one"
        assert pool.submit(ran, dispatcher).result() == "auto_pick"


# Tasks


async def test_two_tasks_never_see_each_others_backend(dispatcher: AttentionDispatcher) -> None:
    async def work(name: str) -> set[str]:
        seen = set()
        for _ in range(50):
            with dispatcher.attention_backend(name):
                await asyncio.sleep(0)
                seen.add(ran(dispatcher))
            await asyncio.sleep(0)
            assert ran(dispatcher) == "auto_pick"
        return seen

    assert await asyncio.gather(work("one"), work("two")) == [{"one"}, {"two"}]


async def test_scopes_of_tasks_that_are_left_out_of_order(dispatcher: AttentionDispatcher) -> None:
    entered, leave = [asyncio.Event(), asyncio.Event()], asyncio.Event()

    async def first() -> str:
        with dispatcher.attention_backend("one"):
            entered[0].set()
            await entered[1].wait()
        leave.set()
        return ran(dispatcher)

    async def second() -> str:
        await entered[0].wait()
        with dispatcher.attention_backend("two"):
            entered[1].set()
            await leave.wait()
            return ran(dispatcher)

    assert await asyncio.gather(first(), second()) == ["auto_pick", "two"]


async def test_a_task_and_to_thread_inherit_the_scope_they_start_in(dispatcher: AttentionDispatcher) -> None:
    async def child() -> str:
        await asyncio.sleep(0)
        return ran(dispatcher)

    with dispatcher.attention_backend("one"):
        task = asyncio.create_task(child())
        assert await asyncio.to_thread(ran, dispatcher) == "one"
    assert await task == "one"
    assert ran(dispatcher) == "auto_pick"


async def test_a_cancelled_task_restores(dispatcher: AttentionDispatcher) -> None:
    async def stuck() -> None:
        with dispatcher.attention_backend("one"):
            await asyncio.sleep(60)

    task = asyncio.create_task(stuck())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ran(dispatcher) == "auto_pick"


async def test_an_async_generator(dispatcher: AttentionDispatcher) -> None:
    async def values() -> AsyncIterator[str]:
        with dispatcher.attention_backend("two"):
            yield ran(dispatcher)
            await asyncio.sleep(0)
            yield ran(dispatcher)

    assert [name async for name in values()] == ["two", "two"]
    assert ran(dispatcher) == "auto_pick"


async def test_compiled_code_within_a_tasks_scope_is_refused_until_named(dispatcher: AttentionDispatcher) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, **words: dispatcher.attention(x, x, x, **words), backend="aot_eager", fullgraph=True
    )

    async def scoped(started: asyncio.Event, go_on: asyncio.Event) -> str:
        with dispatcher.attention_backend("one"):
            started.set()
            await go_on.wait()
            with pytest.raises(heedful.InvalidArgument, match="pass backend= to the compiled call"):
                compiled(TENSOR)
            return NAMES[int(compiled(TENSOR, backend="two")[0, 0, 0, 0])]

    started, go_on = asyncio.Event(), asyncio.Event()
    task = asyncio.create_task(scoped(started, go_on))
    await started.wait()
    with pytest.raises(heedful.InvalidArgument, match="pass backend= to the compiled call"):
        compiled(TENSOR)  # another task's scope is open: compiled code cannot tell that it is not this one's
    go_on.set()
    assert await task == "two"
    assert NAMES[int(compiled(TENSOR)[0, 0, 0, 0])] == "auto_pick"
    torch._dynamo.reset()
