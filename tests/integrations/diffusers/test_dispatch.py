"""The drop-in functions: signatures, every meaning of a mask, extra arguments, names; nothing is installed here."""

from __future__ import annotations

import inspect
import math
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch as theirs
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

import heedful
from heedful.errors import InvalidArgument, Refused, RegistrationError, UnknownBackend
from heedful.integrations import diffusers as ours
from heedful.integrations.diffusers.backends import BY_BACKEND, FUNCTIONS
from heedful.integrations.diffusers.names import NAMES, own_names

BACKENDS = list(theirs._AttentionBackendRegistry._backends.items())
BATCH, QUERIES, KEYS, HEADS, DIM = 2, 5, 7, 3, 8
Naive = Callable[..., tuple[Tensor, Tensor]]


def made(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


def operands(batch: int = BATCH, queries: int = QUERIES, keys: int = KEYS, heads: int = HEADS) -> tuple[Tensor, ...]:
    return made(batch, queries, heads, DIM), made(batch, keys, heads, DIM), -made(batch, keys, heads, DIM)


def holes(*shape: int) -> Tensor:
    """A bool mask with keys hidden at the start, inside and at the end; every row sees one."""
    seen = made(*shape) > 0
    seen[..., shape[-1] // 2] = True
    return seen


@pytest.fixture
def expected(naive_attention: Naive) -> Callable[..., Tensor]:
    """The formula in diffusers' layout; masks broadcast to (B, H, Q, K)."""

    def attention(query: Tensor, key: Tensor, value: Tensor, **masks: Any) -> Tensor:
        out, _ = naive_attention(*(tensor.transpose(1, 2) for tensor in (query, key, value)), **masks)
        return out.transpose(1, 2).float()

    return attention


def close(out: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)


# Names and signatures


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    return [(one.name, one.kind, one.default) for one in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("name", ["dispatch_attention_fn", "attention_backend"])
def test_the_functions_have_diffusers_signatures(name: str) -> None:
    assert parameters(getattr(ours, name)) == parameters(getattr(theirs, name))


@pytest.mark.parametrize(("member", "function"), BACKENDS, ids=lambda one: getattr(one, "value", ""))
def test_every_backend_has_its_function_with_diffusers_signature(member: Any, function: Any) -> None:
    found = getattr(ours, function.__name__)
    assert found is FUNCTIONS[function.__name__] is BY_BACKEND[member.value]
    assert found.__name__ == function.__name__
    assert parameters(found) == parameters(function)


@pytest.mark.parametrize(
    "name", ["register", "get_active_backend", "set_active_backend", "list_backends", "_is_context_parallel_available"]
)
def test_registry_calls_have_diffusers_signatures(name: str) -> None:
    their_call = getattr(theirs._AttentionBackendRegistry, name)
    assert parameters(getattr(ours._AttentionBackendRegistry, name)) == parameters(their_call)


def test_public_names_are_listed_and_others_are_missing() -> None:
    assert {"install", "uninstall", "_flash_attention", "AttentionBackendName"} <= set(dir(ours))
    assert all(getattr(ours, name) is not None for name in dir(ours) if not name.startswith("__"))
    with pytest.raises(AttributeError, match="_flesh_attention"):
        _ = ours._flesh_attention


def test_the_enum_is_diffusers_own_and_the_other_one_has_the_same_members() -> None:
    assert ours.AttentionBackendName is theirs.AttentionBackendName
    spare = own_names()
    assert {name: one.value for name, one in theirs.AttentionBackendName.__members__.items()} | {"AITER": "aiter"} == {
        name: one.value for name, one in spare.__members__.items()
    }
    assert spare.FLASH == theirs.AttentionBackendName.FLASH == "flash"
    assert len(set(NAMES)) == len(NAMES)


def test_without_diffusers_everything_works_but_install(fresh_python: Any) -> None:
    text = """
import importlib.util, pickle, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "diffusers" else found(name, *more)
import torch
import heedful.integrations.diffusers as ours
query = torch.ones(1, 2, 3, 8)
assert ours.dispatch_attention_fn(query, query, query, backend="native").shape == query.shape
names = ours.AttentionBackendName
assert names is ours.AttentionBackendName and names("_native_math") is names._NATIVE_MATH and names.AITER == "aiter"
assert pickle.loads(pickle.dumps(names.FLASH)) is names.FLASH
with ours.attention_backend(names._NATIVE_MATH):
    assert ours._AttentionBackendRegistry.get_active_backend() == (names._NATIVE_MATH, ours._native_math_attention)
assert ours._native_math_attention(query, query, query).shape == query.shape
assert "diffusers" not in sys.modules
"""
    done = fresh_python(text)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("backend", ["native", theirs.AttentionBackendName._NATIVE_MATH, "reference", "auto", None,
                                     [theirs.AttentionBackendName._NATIVE_MATH, "native"]])  # fmt: skip
def test_backends_are_named_by_members_strings_and_lists(backend: Any, expected: Any) -> None:
    query, key, value = operands()
    close(ours.dispatch_attention_fn(query, key, value, backend=backend), expected(query, key, value))


def test_an_unknown_name_is_refused_with_the_closest() -> None:
    with pytest.raises(UnknownBackend, match="did you mean 'native'"):
        ours.dispatch_attention_fn(*operands(), backend="nativ")


# Masks


def test_two_dimensions_are_key_padding(expected: Any) -> None:
    query, key, value = operands()
    keep = holes(BATCH, KEYS)
    want = expected(query, key, value, seen=keep[:, None, None])
    for backend in ("native", "reference", "flex"):
        close(ours.dispatch_attention_fn(query, key, value, keep, backend=backend), want)
    bias = made(BATCH, KEYS)
    want = expected(query, key, value, bias=bias[:, None, None])
    close(ours.dispatch_attention_fn(query, key, value, bias, backend="native"), want)


def test_a_row_without_keys_gets_zeros() -> None:
    keep = holes(BATCH, KEYS)
    keep[1] = False
    out = ours.dispatch_attention_fn(*operands(), keep)
    assert out[1].count_nonzero() == 0
    assert out.isfinite().all()


def test_two_dimensions_that_fit_only_queries_and_keys_are_these(expected: Any) -> None:
    query, key, value = operands()
    seen = holes(QUERIES, KEYS)
    close(ours.dispatch_attention_fn(query, key, value, seen), expected(query, key, value, seen=seen))
    for batch in (1, BATCH):
        query, key, value = operands(batch)
        one = holes(1, KEYS)
        close(ours.dispatch_attention_fn(query, key, value, one), expected(query, key, value, seen=one))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_two_dimensions_with_as_many_queries_as_batch_rows_are_refused(dtype: Any, expected: Any) -> None:
    query, key, value = operands(4, 4, KEYS)
    mask = holes(4, KEYS).to(dtype)
    with pytest.raises(InvalidArgument, match=r"attn_mask\[:, None, None, :\]") as caught:
        ours.dispatch_attention_fn(query, key, value, mask)
    assert caught.value.argument == "attn_mask"
    word = "seen" if dtype is torch.bool else "bias"
    for clear in (mask[:, None, None, :], mask[None, None]):  # the remedy
        out = ours.dispatch_attention_fn(query, key, value, clear)
        close(out, expected(query, key, value, **{word: clear}))


def test_one_query_of_one_batch_row_is_not_ambiguous(expected: Any) -> None:
    query, key, value = operands(1, 1)
    keep = holes(1, KEYS)
    close(ours.dispatch_attention_fn(query, key, value, keep), expected(query, key, value, seen=keep))


def test_three_dimensions_are_for_each_batch_row(expected: Any) -> None:
    query, key, value = operands()
    seen, bias = holes(BATCH, QUERIES, KEYS), made(BATCH, QUERIES, KEYS)
    close(ours.dispatch_attention_fn(query, key, value, seen), expected(query, key, value, seen=seen[:, None]))
    close(ours.dispatch_attention_fn(query, key, value, bias), expected(query, key, value, bias=bias[:, None]))
    heads = holes(HEADS, QUERIES, KEYS)
    close(ours.dispatch_attention_fn(query, key, value, heads), expected(query, key, value, seen=heads))


def test_three_dimensions_with_as_many_heads_as_batch_rows_are_refused(expected: Any) -> None:
    query, key, value = operands(HEADS)
    mask = holes(HEADS, QUERIES, KEYS)
    with pytest.raises(InvalidArgument, match=r"attn_mask\[:, None\] is for each batch row"):
        ours.dispatch_attention_fn(query, key, value, mask)
    for clear in (mask[:, None], mask[None]):
        close(ours.dispatch_attention_fn(query, key, value, clear), expected(query, key, value, seen=clear))


def test_four_dimensions_mask_values_and_block_masks_pass(expected: Any) -> None:
    query, key, value = operands()
    seen = holes(BATCH, HEADS, QUERIES, KEYS)
    close(ours.dispatch_attention_fn(query, key, value, seen), expected(query, key, value, seen=seen))
    last = torch.ones(QUERIES, KEYS, dtype=torch.bool).tril(KEYS - QUERIES)
    out = ours.dispatch_attention_fn(query, key, value, heedful.Causal("bottom_right"))
    close(out, expected(query, key, value, seen=last))
    block = create_block_mask(lambda b, h, q, k: q + 2 >= k, None, None, QUERIES, KEYS, device="cpu")
    want = expected(query, key, value, seen=torch.ones(QUERIES, KEYS, dtype=torch.bool).tril(2))
    close(ours.dispatch_attention_fn(query, key, value, block, backend="flex"), want)


@pytest.mark.parametrize("backend", ["native", "flex", "reference"])
def test_causality_means_the_same_with_every_backend_and_beside_a_mask(backend: str, expected: Any) -> None:
    query, key, value = operands()
    first = torch.ones(QUERIES, KEYS, dtype=torch.bool).tril()
    out = ours.dispatch_attention_fn(query, key, value, is_causal=True, backend=backend)
    close(out, expected(query, key, value, seen=first))
    keep = holes(BATCH, KEYS)
    keep[:, 0] = True
    out = ours.dispatch_attention_fn(query, key, value, keep, is_causal=True, backend=backend)
    close(out, expected(query, key, value, seen=first & keep[:, None, None]))


@pytest.mark.parametrize("shape", [(3, KEYS), (BATCH, KEYS + 1), (BATCH, QUERIES + 1, KEYS), (2, 1, 1, QUERIES, KEYS)])
def test_a_mask_that_fits_nothing_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidArgument, match="attn_mask"):
        ours.dispatch_attention_fn(*operands(), holes(*shape))
    with pytest.raises(InvalidArgument, match=r"attn_mask: got torch.int64"):
        ours.dispatch_attention_fn(*operands(), torch.ones(BATCH, KEYS, dtype=torch.int64))


def test_tensors_of_another_rank_are_refused_by_name() -> None:
    query, key, value = operands()
    with pytest.raises(InvalidArgument, match="query: got shape"):
        ours.dispatch_attention_fn(query[0], key, value, holes(BATCH, KEYS))


# Extra arguments


@pytest.mark.parametrize(
    "name",
    [
        *inspect.signature(theirs.dispatch_attention_fn).parameters,
        "_parallel_config",
        "return_lse",
        "return_attn_probs",
    ],
)
def test_no_option_overrides_an_argument(name: str) -> None:
    with pytest.raises(InvalidArgument, match=f"attention_kwargs\\['{name}'\\]"):
        ours.dispatch_attention_fn(*operands(), attention_kwargs={name: 1})


def test_an_unknown_option_is_refused_and_not_dropped() -> None:
    with pytest.raises(Refused, match="is_casual"):
        ours.dispatch_attention_fn(*operands(), attention_kwargs={"is_casual": True}, backend="native")
    with pytest.raises(InvalidArgument, match="attention_kwargs"):
        ours.dispatch_attention_fn(*operands(), attention_kwargs=[("window_size", 1)])


def test_none_is_as_good_as_no_option(expected: Any) -> None:
    query, key, value = operands()
    nothing = {"window_size": None, "softcap": None, "anything": None}
    close(ours.dispatch_attention_fn(query, key, value, attention_kwargs=nothing), expected(query, key, value))


def test_an_option_reaches_the_backend(option_taker: list[Any]) -> None:
    ours.dispatch_attention_fn(*operands(), attention_kwargs={"tile": 4}, backend="takes_tile")
    assert option_taker == [4]


@pytest.fixture
def option_taker() -> Iterator[list[Any]]:
    seen: list[Any] = []

    class TakesTile(heedful.AttentionStrategy):
        limits = heedful.Limits(options=frozenset({"tile"}))

        def compute_attention(self, query: Tensor, key: Tensor, value: Tensor, *, tile: int) -> Tensor:
            seen.append(tile)
            return query

    heedful.AttentionStrategyFactory.register_strategy("takes_tile", TakesTile)
    yield seen
    heedful.AttentionStrategyFactory.unregister_strategy("takes_tile")


@pytest.mark.parametrize("queries", [QUERIES, KEYS])
def test_window_size_is_flash_attns(queries: int, expected: Any) -> None:
    query, key, value = operands(queries=queries)
    place = torch.arange(queries)[:, None] + KEYS - queries
    keys = torch.arange(KEYS)[None]
    seen = (keys >= place - 2) & (keys <= place + 1)
    out = ours.dispatch_attention_fn(query, key, value, attention_kwargs={"window_size": (2, 1)})
    close(out, expected(query, key, value, seen=seen))
    keep = holes(BATCH, KEYS)
    keep[:, -2:] = True
    out = ours.dispatch_attention_fn(query, key, value, keep, attention_kwargs={"window_size": (-1, 1)})
    close(out, expected(query, key, value, seen=keep[:, None, None] & (keys <= place + 1)))
    out = ours.dispatch_attention_fn(query, key, value, attention_kwargs={"window_size": (-1, -1)})
    close(out, expected(query, key, value))
    with pytest.raises(InvalidArgument, match="window_size"):
        ours.dispatch_attention_fn(query, key, value, attention_kwargs={"window_size": 3})


def test_softcap_is_computed(expected: Any) -> None:
    query, key, value = operands()
    out = ours.dispatch_attention_fn(query, key, value, attention_kwargs={"softcap": 2.0}, backend="reference")
    close(out, expected(query, key, value, softcap=2.0))


def test_context_parallelism_is_refused_by_name() -> None:
    with pytest.raises(InvalidArgument, match=r"parallel_config.*no context parallelism"):
        ours.dispatch_attention_fn(*operands(), parallel_config=object())
    with pytest.raises(InvalidArgument, match="parallel_config"):
        ours._native_attention(*operands(), _parallel_config=object())


# The functions of the backends


@pytest.mark.parametrize("name", ["_native_attention", "_native_math_attention", "_native_flash_attention",
                                  "_native_flex_attention"])  # fmt: skip
def test_functions_of_backends_compute(name: str, expected: Any) -> None:
    query, key, value = operands()
    function = getattr(ours, name)
    keep = holes(BATCH, KEYS)
    close(function(query, key, value, scale=0.3), expected(query * 0.3 * math.sqrt(DIM), key, value))
    close(function(query, key, value, keep), expected(query, key, value, seen=keep[:, None, None]))


def test_the_lse_is_flash_attns(naive_attention: Naive) -> None:
    query, key, value = operands()
    _, want = naive_attention(*(tensor.transpose(1, 2) for tensor in (query, key, value)))
    for name in ("_native_flash_attention", "_native_flex_attention"):
        out, lse = getattr(ours, name)(query, key, value, return_lse=True)
        assert out.shape == query.shape
        assert lse.dtype is torch.float32
        torch.testing.assert_close(lse, want.float(), atol=1e-5, rtol=1e-5)  # (B, H, Q)


def test_a_backend_is_obeyed_or_refused() -> None:
    with pytest.raises(Refused, match="native_cudnn refuses: device"):
        ours._native_cudnn_attention(*operands())


@pytest.mark.parametrize("name", [one for one in FUNCTIONS if "enable_gqa" not in
                                  inspect.signature(FUNCTIONS[one]).parameters])  # fmt: skip
def test_kernels_of_grouped_heads_take_them_unasked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(heedful.dispatch, "attention", lambda **call: seen.append(call))
    FUNCTIONS[name](*operands())
    assert seen[0]["enable_gqa"] is True
    assert seen[0]["backend"] == next(
        backend for backend, function in BY_BACKEND.items() if function is FUNCTIONS[name]
    )


def test_every_argument_of_a_backends_function_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(heedful.dispatch, "attention", lambda **call: seen.append(call))
    given = {"dropout_p": 0.5, "is_causal": True, "scale": 2.0, "softcap": 3.0, "return_lse": True}
    for function in FUNCTIONS.values():
        takes = inspect.signature(function).parameters
        function(*operands(), **{name: value for name, value in given.items() if name in takes})
        call = seen.pop()
        assert all(call[name] == value for name, value in given.items() if name in takes)
        if "window_size" in takes:
            function(*operands(), window_size=(1, 0))
            assert seen.pop()["attn_mask"].window == (1, 0, "bottom_right")
    FUNCTIONS["_flash_attention_3_hub"](*operands(), deterministic=True, return_attn_probs=True)
    assert (seen[0]["options"], seen[0]["return_lse"]) == ({"deterministic": True}, True)


# Scope and registry


def test_the_scope_is_this_threads_own() -> None:
    registry = ours._AttentionBackendRegistry
    found = []
    with ours.attention_backend(theirs.AttentionBackendName._NATIVE_MATH):
        thread = threading.Thread(target=lambda: found.append(registry.get_active_backend()[0]))
        thread.start()
        thread.join()
        assert registry.get_active_backend()[0] is theirs.AttentionBackendName._NATIVE_MATH
        assert registry.get_active_backend()[1] is ours._native_math_attention
        with ours.attention_backend():
            assert registry.get_active_backend() == (theirs.AttentionBackendName.NATIVE, ours._native_attention)
    assert found == ["auto"]
    assert registry.get_active_backend()[0] == "auto"
    with pytest.raises(UnknownBackend):
        ours.attention_backend("nativ")


def test_the_active_backends_function_computes(expected: Any) -> None:
    query, key, value = operands()
    with ours.attention_backend("reference"):
        name, function = ours._AttentionBackendRegistry.get_active_backend()
    assert name == "reference"
    close(function(query, key, value), expected(query, key, value))


def test_no_backend_can_be_set_for_the_process() -> None:
    with pytest.raises(InvalidArgument, match="HEEDFUL_BACKEND"):
        ours._AttentionBackendRegistry.set_active_backend("native")


def test_the_registry_lists_all_names() -> None:
    listed = ours._AttentionBackendRegistry.list_backends()
    assert set(theirs._AttentionBackendRegistry.list_backends()) <= set(listed)
    assert "reference" in listed
    assert not ours._AttentionBackendRegistry._is_context_parallel_available("native")


@pytest.fixture
def registered() -> Iterator[list[dict[str, Any]]]:
    seen: list[dict[str, Any]] = []

    def check(query: Tensor, **rest: Any) -> None:
        seen.append({"query": tuple(query.shape), **rest})
        if query.shape[-1] != DIM:
            raise ValueError("only 8 features")

    @ours._AttentionBackendRegistry.register("mine", constraints=[check])
    def mine(
        query: Any, key: Any, value: Any, attn_mask: Any = None, scale: Any = None, return_lse: bool = False
    ) -> Any:
        assert not return_lse
        return theirs._native_attention(query, key, value, attn_mask, scale=scale)

    yield seen
    heedful.AttentionStrategyFactory.unregister_strategy("mine")


@torch.no_grad()
def test_a_registered_function_is_a_strategy(registered: list[dict[str, Any]], expected: Any) -> None:
    query, key, value = operands()
    keep = holes(BATCH, KEYS)
    close(
        ours.dispatch_attention_fn(query, key, value, keep, backend="mine", is_causal=True),
        ours.dispatch_attention_fn(query, key, value, keep, backend="reference", is_causal=True),
    )
    swapped = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    close(heedful.attention(*swapped, backend="mine").transpose(1, 2), expected(query, key, value))
    assert {one["query"] for one in registered} == {tuple(query.shape)}
    with pytest.raises(ValueError, match="only 8 features"):
        ours.dispatch_attention_fn(*(torch.ones(1, 2, 3, 16) for _ in range(3)), backend="mine")
    with pytest.raises(Refused, match="dropout_p"):
        ours.dispatch_attention_fn(query, key, value, dropout_p=0.5, backend="mine")
    with pytest.raises(RegistrationError, match="taken"):
        ours._AttentionBackendRegistry.register("native")(lambda query, key, value: query)


def test_a_registered_function_gets_no_gradients_unasked(registered: list[dict[str, Any]]) -> None:
    query, key, value = operands()
    with pytest.raises(Refused, match="gradient"):
        ours.dispatch_attention_fn(query.requires_grad_(), key, value, backend="mine")


def test_functions_pickle_by_name() -> None:
    assert pickle.loads(pickle.dumps(ours.dispatch_attention_fn)) is ours.dispatch_attention_fn
