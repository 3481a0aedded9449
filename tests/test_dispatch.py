"""The one call: whose wish counts, what happens where a backend refuses, and what is remembered."""

import contextlib
import gc
import inspect
import logging
import weakref

import pytest
import torch
import torch.nn.functional as F

import heedful
from heedful import (
    AttentionDispatcher,
    AttentionStrategy,
    Causal,
    Facts,
    InvalidArgument,
    KeyPadding,
    Limits,
    Policy,
    Refused,
    UnknownBackend,
)
from heedful import dispatch as module
from heedful.sources import Hub, Package
from heedful.strategy import ALL_MASKS, Pin


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


QUERY, KEY = randn(2, 4, 5, 8), randn(2, 4, 7, 8)


class Counting(AttentionStrategy):
    """SDPA, counting what is asked of it."""

    limits = Limits(masks=frozenset({"causal", "dense", "bias"}), backward=True, scale=True, bias_backward=True)

    def __init__(self):
        self.judged = self.computed = 0

    def refusals(self, problem):
        self.judged += 1
        return super().refusals(problem)

    def compute_attention(self, query, key, value, **kwargs):
        self.computed += 1
        return F.scaled_dot_product_attention(query, key, value, **kwargs)


@pytest.fixture
def counting(factory):
    factory.register_strategy("counting", Counting)
    return factory.create_strategy("counting")


# The answer


@pytest.mark.parametrize("backend", ["auto", "native", "native_math", "native_flash", "flex", "reference"])
def test_the_answer_is_sdpas(dispatcher, backend):
    out = dispatcher.attention(QUERY, KEY, KEY, backend=backend)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(QUERY, KEY, KEY))


def test_the_first_arguments_are_those_of_sdpa(dispatcher):
    mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) < 0.8
    arguments = (QUERY, KEY[:, :2], KEY[:, :2], mask, 0.0, False, 0.3, True)
    expected = F.scaled_dot_product_attention(*arguments[:6], scale=0.3, enable_gqa=True)
    torch.testing.assert_close(dispatcher.attention(*arguments), expected)


def test_the_lse_comes_with_the_output(dispatcher, naive_attention):
    out, lse = dispatcher.attention(QUERY, KEY, KEY, is_causal=True, return_lse=True)
    expected = naive_attention(QUERY, KEY, KEY, seen=torch.ones(5, 7, dtype=torch.bool).tril())
    torch.testing.assert_close((out.double(), lse.double()), expected, atol=1e-5, rtol=1e-5)


def test_dispatch_is_attention_with_the_backend_first(dispatcher):
    out = dispatcher.dispatch("native_math", query=QUERY, key=KEY, value=KEY)
    assert torch.equal(out, dispatcher.attention(QUERY, KEY, KEY, backend="native_math"))
    torch.testing.assert_close(dispatcher.dispatch(query=QUERY, key=KEY, value=KEY), out)


@pytest.mark.parametrize("shape", [(2, 4, 0, 8), (0, 4, 7, 8), (2, 0, 7, 8)])
@pytest.mark.parametrize("backend", ["auto", "native", "reference", "native_cudnn"])
def test_an_empty_call_has_an_empty_answer(dispatcher, shape, backend):
    empty = torch.zeros(shape)
    assert dispatcher.attention(empty, empty, empty, backend=backend).shape == shape


# Wishes: the call's > the scope's > the environment's > auto


def test_precedence_of_wishes(factory):
    from_environment = AttentionDispatcher(factory, policy=Policy.from_environment({"HEEDFUL_BACKEND": "native_flash"}))
    with_none = AttentionDispatcher(factory, policy=Policy())

    def chosen(dispatcher, backend=None):
        plan = dispatcher.explain(QUERY, KEY, KEY, backend=backend)
        return plan.backend, plan.origin

    assert chosen(with_none) == ("native", "auto")
    assert chosen(from_environment) == ("native_flash", "HEEDFUL_BACKEND")
    with from_environment.attention_backend("flex"):
        assert chosen(from_environment) == ("flex", "scope")
        with from_environment.attention_backend(["native_cudnn", "native_math"]):
            assert chosen(from_environment) == ("native_math", "scope")
            assert chosen(from_environment, "reference") == ("reference", "call")
            assert chosen(from_environment, "auto") == ("native", "call")
        assert chosen(from_environment) == ("flex", "scope")
    assert chosen(from_environment) == ("native_flash", "HEEDFUL_BACKEND")


def test_a_call_obeys_the_same_wishes_as_its_explanation(dispatcher, counting):
    dispatcher.attention(QUERY, KEY, KEY)
    assert counting.computed == 0
    with dispatcher.attention_backend("counting"):
        dispatcher.attention(QUERY, KEY, KEY)
        assert counting.computed == 1
        dispatcher.attention(QUERY, KEY, KEY, backend="native")
        assert counting.computed == 1
    dispatcher.attention(QUERY, KEY, KEY)
    assert counting.computed == 1


@pytest.mark.parametrize("text", ["reference", "native_cudnn, reference"])
def test_the_environment_of_the_process_counts(fresh_python, text):
    script = (
        "import torch, heedful; q = torch.zeros(1, 1, 2, 8); plan = heedful.explain(q, q, q);"
        "print(plan.backend, plan.origin)"
    )
    assert fresh_python(script, HEEDFUL_BACKEND=text).stdout.split() == ["reference", "HEEDFUL_BACKEND"]


def test_an_unknown_backend_in_the_environment_is_an_error_that_names_the_variable(fresh_python):
    script = "import torch, heedful; q = torch.zeros(1, 1, 2, 8); heedful.attention(q, q, q)"
    ended = fresh_python(script, HEEDFUL_BACKEND="nativ")
    assert ended.returncode == 1
    assert "HEEDFUL_BACKEND: no backend is called 'nativ'; did you mean 'native'" in ended.stderr


# Refusals


def test_a_backend_that_is_named_is_obeyed_or_refuses(dispatcher):
    with pytest.raises(Refused, match=r"native_cudnn refuses: device is cpu, it takes cuda") as caught:
        dispatcher.attention(QUERY, KEY, KEY, backend="native_cudnn")
    assert list(caught.value.refusals) == ["native_cudnn"]


def test_a_refusal_holds_every_reason_of_every_wanted_backend(dispatcher):
    tensors = [tensor.clone().requires_grad_() for tensor in (QUERY, KEY, KEY)]
    with pytest.raises(Refused) as caught:
        dispatcher.attention(*tensors, dropout_p=0.1, softcap=30.0, backend=["flex", "native_flash"])
    reasons = {name: [reason.field for reason in found] for name, found in caught.value.refusals.items()}
    assert reasons == {"flex": ["dropout_p", "gradient"], "native_flash": ["softcap", "dropout_p"]}
    for words in ("flex refuses: dropout_p is 0.1", "native_flash refuses: softcap is 30.0"):
        assert words in str(caught.value)


def test_sinks_are_refused_by_every_backend(dispatcher):
    for name in dispatcher.factory.strategies():
        with pytest.raises(Refused, match=r"sinks|device is cpu"):
            dispatcher.attention(QUERY, KEY, KEY, sinks=torch.zeros(4), backend=name)
    with pytest.raises(Refused, match="sinks is given"):
        dispatcher.attention(QUERY, KEY, KEY, sinks=torch.zeros(4))


def test_an_unknown_option_is_refused_by_name(dispatcher):
    with pytest.raises(Refused, match="options is 'block_size', it takes kernel_options"):
        dispatcher.attention(QUERY, KEY, KEY, options={"block_size": 64}, backend="flex")


def test_an_option_reaches_its_kernel_even_where_it_cannot_be_hashed(dispatcher):
    out = dispatcher.attention(QUERY, KEY, KEY, options={"kernel_options": {"PRESCALE_QK": True}}, backend="flex")
    torch.testing.assert_close(out, F.scaled_dot_product_attention(QUERY, KEY, KEY))


def test_a_list_is_its_own_fallback_order_and_says_so_once(dispatcher, caplog):
    with caplog.at_level(logging.WARNING, "heedful"):
        for _ in range(3):
            dispatcher.attention(QUERY, KEY, KEY, backend=["native_cudnn", "native_math", "native"])
            dispatcher.attention(QUERY[:1], KEY[:1], KEY[:1], backend=["native_cudnn", "native_math", "native"])
    (record,) = caplog.records
    assert record.getMessage() == (
        "heedful: native_cudnn refuses: device is cpu, it takes cuda (move the tensors, or name another backend); "
        "using native_math"
    )


def test_auto_passes_over_backends_silently(dispatcher, caplog):
    with caplog.at_level(logging.WARNING, "heedful"):
        dispatcher.attention(QUERY, KEY, KEY, return_lse=True)
    assert caplog.records == []


# A strategy that looks at the tensors itself


class Picky(Counting):
    """Takes tensors that hold no negative number, which no problem can tell."""

    def validate_constraints(self, **kwargs):
        if (kwargs["query"] < 0).any():
            raise ValueError(f"query holds {kwargs['query'].min():.1f}")


@pytest.fixture
def picky(factory):
    factory.register_strategy("picky", Picky)
    return factory.create_strategy("picky")


def test_its_own_refusal_is_raised_where_it_was_named(dispatcher, picky):
    with pytest.raises(Refused, match=r"picky refuses: validate_constraints is query holds -\d\.\d"):
        dispatcher.attention(QUERY, KEY, KEY, backend="picky")
    assert picky.computed == 0


def test_its_own_refusal_leads_on_in_a_list_call_by_call(dispatcher, picky, caplog):
    expected = F.scaled_dot_product_attention(QUERY, KEY, KEY, is_causal=True)
    with caplog.at_level(logging.WARNING, "heedful"):
        for _ in range(2):
            out = dispatcher.attention(QUERY, KEY, KEY, is_causal=True, backend=["picky", "native"])
            torch.testing.assert_close(out, expected)
    assert picky.computed == 0
    assert len(caplog.records) == 1
    dispatcher.attention(QUERY.abs(), KEY, KEY, is_causal=True, backend=["picky", "native"])
    assert picky.computed == 1


def test_its_own_refusal_leads_on_in_auto(factory, picky):
    dispatcher = AttentionDispatcher(factory, policy=Policy({"*": ("picky", "native")}))
    torch.testing.assert_close(dispatcher.attention(QUERY, KEY, KEY), F.scaled_dot_product_attention(QUERY, KEY, KEY))
    dispatcher.attention(QUERY.abs(), KEY, KEY)
    assert picky.computed == 1


def test_two_strategies_that_refuse_themselves_are_both_told(factory, dispatcher, picky):
    factory.register_strategy("pickier", type("Pickier", (Picky,), {}))
    with pytest.raises(Refused) as caught:
        dispatcher.attention(QUERY, KEY, KEY, backend=["picky", "pickier"])
    assert list(caught.value.refusals) == ["picky", "pickier"]


def test_its_own_refusal_is_part_of_the_explanation(dispatcher, picky):
    assert dispatcher.explain(QUERY.abs(), KEY, KEY, backend=["picky", "native"]).backend == "picky"
    plan = dispatcher.explain(QUERY, KEY, KEY, backend=["picky", "native"])
    assert plan.backend == "native"
    assert "picky             refuses: validate_constraints is query holds -" in str(plan)
    assert dispatcher.explain(QUERY, KEY, KEY, backend="picky").refused


def test_it_sees_the_mask_of_each_call_and_no_mask_is_kept(factory, dispatcher):
    seen = []

    class Looking(Counting):
        def validate_constraints(self, **kwargs):
            seen.append(kwargs["attn_mask"].data_ptr())

    factory.register_strategy("looking", Looking)
    masks = [torch.ones(5, 7, dtype=torch.bool) for _ in range(2)]
    for mask in masks:
        dispatcher.attention(QUERY, KEY, KEY, mask, backend="looking")
    assert seen == [mask.data_ptr() for mask in masks]
    alive = [weakref.ref(mask) for mask in masks]
    del mask, masks
    gc.collect()
    assert [reference() for reference in alive] == [None, None]


# What is remembered


def test_calls_of_one_kind_are_planned_once(dispatcher, counting):
    for _ in range(3):
        dispatcher.attention(randn(2, 4, 5, 8), KEY, KEY, torch.zeros(5, 7), backend="counting")
    assert counting.judged == 1
    assert counting.computed == 3


KINDS = {
    "plain": {},
    "batch": {"query": QUERY[:1], "key": KEY[:1], "value": KEY[:1]},
    "length": {"query": QUERY[:, :, :4]},
    "dtype": {"query": QUERY.double(), "key": KEY.double(), "value": KEY.double()},
    "device": {name: torch.empty(2, 4, 7, 8, device="meta") for name in ("query", "key", "value")},
    "gradient": {"query": QUERY.clone().requires_grad_()},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "another scale": {"scale": 0.4},
    "bool mask": {"attn_mask": torch.ones(5, 7, dtype=torch.bool)},
    "mask of another shape": {"attn_mask": torch.ones(1, 7, dtype=torch.bool)},
    "bias": {"attn_mask": torch.zeros(5, 7)},
    "bias with gradient": {"attn_mask": torch.zeros(5, 7, requires_grad=True)},
    "mask value": {"attn_mask": Causal()},
    "padding": {"attn_mask": KeyPadding(torch.ones(2, 7, dtype=torch.bool))},
}


def test_calls_that_differ_in_what_selection_reads_are_different_kinds(dispatcher, counting):
    for number, changes in enumerate(KINDS.values(), 1):
        for _ in range(2):
            dispatcher.attention(**{"query": QUERY, "key": KEY, "value": KEY, **changes}, backend="counting")
        assert counting.judged == number, changes


OTHERS = {
    "query": QUERY[:, :, :4],
    "key": KEY.double(),
    "value": randn(2, 4, 7, 16),
    "attn_mask": torch.ones(5, 7, dtype=torch.bool),
    "dropout_p": 0.1,
    "is_causal": True,
    "scale": 0.3,
    "enable_gqa": True,
    "layout": "BSHD",
    "causal_alignment": "bottom_right",
    "window": (1, 1),
    "softcap": 30.0,
    "sinks": torch.zeros(4),
    "max_error": 0.5,
    "options": {"anything": 1},
    "backend": "native",
    "return_lse": True,
}


@pytest.mark.parametrize("name", list(inspect.signature(AttentionDispatcher.attention).parameters)[1:])
def test_no_parameter_is_left_out_of_the_memory(dispatcher, name):
    """After the plain call was remembered, the call with one argument changed is looked at anew."""
    plain = {"query": QUERY, "key": KEY, "value": KEY}
    for _ in range(2):  # the very first call loads the registry, which forgets
        dispatcher.attention(**plain)
    asked = []
    planned = dispatcher.plan

    def plan(*arguments, **more):
        asked.append(arguments)
        return planned(*arguments, **more)

    dispatcher.plan = plan
    with contextlib.suppress(InvalidArgument, Refused, RuntimeError):
        dispatcher.attention(**{**plain, name: OTHERS[name]})
        assert asked
    dispatcher.attention(**plain)
    assert len(asked) <= 1


def test_modes_of_torch_make_different_kinds(dispatcher, counting):
    query = QUERY.clone().requires_grad_()

    def judged():
        dispatcher.attention(query, KEY, KEY, backend=["counting", "native"])
        return counting.judged

    assert judged() == 1
    with torch.no_grad():
        assert judged() == 2
    with torch.autocast("cpu", torch.bfloat16):
        assert judged() == 3
    with torch.autocast("cpu", torch.float16):
        assert judged() == 4
    with torch.autocast("cpu", enabled=False):
        assert judged() == 4
    torch.use_deterministic_algorithms(True)
    try:
        assert judged() == 5
    finally:
        torch.use_deterministic_algorithms(False)
    assert judged() == 5


def test_autocast_computes_in_its_dtype(dispatcher):
    with torch.autocast("cpu", torch.bfloat16):
        out = dispatcher.attention(QUERY, KEY, KEY)
        assert out.dtype == F.scaled_dot_product_attention(QUERY, KEY, KEY).dtype == torch.bfloat16
    assert dispatcher.attention(QUERY, KEY, KEY).dtype == torch.float32


def test_a_changed_registry_takes_effect_at_once(factory, counting):
    dispatcher = AttentionDispatcher(factory, policy=Policy({"*": ("preferred", "counting")}))
    dispatcher.attention(QUERY, KEY, KEY)
    assert counting.computed == 1
    factory.register_strategy("preferred", Counting)
    dispatcher.attention(QUERY, KEY, KEY)
    assert (factory.create_strategy("preferred").computed, counting.computed) == (1, 1)
    factory.register_strategy("preferred", Picky, replace=True)
    dispatcher.attention(QUERY, KEY, KEY)
    assert (factory.create_strategy("preferred").computed, counting.computed) == (0, 2)
    factory.unregister_strategy("counting")
    with pytest.raises(UnknownBackend):
        dispatcher.attention(QUERY, KEY, KEY, backend="counting")


def test_an_invalid_call_is_invalid_the_second_time_too(dispatcher):
    for _ in range(2):
        with pytest.raises(Refused):
            dispatcher.attention(QUERY, KEY, KEY, backend="native_cudnn")
        with pytest.raises(heedful.InvalidArgument):
            dispatcher.attention(QUERY, KEY, KEY, scale=float("nan"))


def test_what_is_remembered_is_bounded(dispatcher, counting, monkeypatch):
    monkeypatch.setattr(module, "_MOST_KINDS", 4)
    for length in range(1, 20):
        dispatcher.attention(randn(1, 1, length, 8), KEY[:1, :1], KEY[:1, :1], backend="counting")
        assert len(dispatcher._runs) <= 4
    assert counting.computed == counting.judged == 19


def test_a_mask_is_read_at_every_call(dispatcher):
    mask = torch.ones(5, 7, dtype=torch.bool)
    before = dispatcher.attention(QUERY, KEY, KEY, mask)
    mask[:, 3:] = False
    after = dispatcher.attention(QUERY, KEY, KEY, mask)
    torch.testing.assert_close(after, F.scaled_dot_product_attention(QUERY, KEY[:, :, :3], KEY[:, :, :3]))
    assert not torch.equal(before, after)


# Explaining, and the table of backends


def test_explaining_computes_nothing_and_says_what_would_run(dispatcher, counting):
    plan = dispatcher.explain(QUERY, KEY, KEY, backend=["native_cudnn", "counting"], scale=0.3)
    assert plan.backend == "counting"
    assert counting.computed == 0
    assert "- native_cudnn" in str(plan)
    assert "scale 0.3" in str(plan)


def test_explaining_a_refused_call_raises_nothing(dispatcher):
    plan = dispatcher.explain(QUERY, KEY, KEY, backend="native_cudnn")
    assert plan.refused
    assert "device is cpu, it takes cuda" in str(plan)


def test_the_table_has_a_row_for_every_backend(dispatcher):
    table = dispatcher.list_backends()
    assert [row.name for row in table] == list(dispatcher.factory.strategies())
    assert len(table) == len(list(table))
    assert table["_native_math"] is table["native_math"]
    assert table["native"].available
    assert not table["native_cudnn"].available
    with pytest.raises(UnknownBackend, match=r"'nativ'; did you mean 'native'"):
        table["nativ"]
    for row in table:
        assert row.name in str(table)
        assert row.description in str(table) or all(str(reason) in str(table) for reason in row.refusals)


def test_the_table_of_a_machine_with_a_gpu_is_about_its_gpu(factory):
    dispatcher = AttentionDispatcher(factory, Facts.pretend("sm_75"), Policy())
    assert (dispatcher.list_backends().problem.device, dispatcher.list_backends().problem.dtype) == (
        "cuda",
        torch.float16,
    )
    assert dispatcher.list_backends("cpu").problem.dtype == torch.float32


def test_a_dispatcher_probes_the_machine_and_reads_the_environment_when_first_asked(factory, monkeypatch):
    dispatcher = AttentionDispatcher(factory)
    monkeypatch.setenv("HEEDFUL_BACKEND", "flex")
    assert dispatcher.policy.default == "flex"
    monkeypatch.setenv("HEEDFUL_BACKEND", "native")
    assert dispatcher.policy.default == "flex"
    assert "cpu" in dispatcher.facts.devices


def test_every_kind_of_mask_reaches_some_backend(dispatcher, naive_attention):
    from torch.nn.attention.flex_attention import create_block_mask

    seen = torch.ones(5, 5, dtype=torch.bool).tril()
    square = randn(2, 4, 5, 8)
    masks = {
        "causal": Causal(),
        "window": heedful.SlidingWindow(None, 0),
        "dense": seen,
        "bias": torch.zeros(5, 5).masked_fill(~seen, float("-inf")),
        "block": create_block_mask(lambda b, h, q, k: q >= k, None, None, 5, 5, device="cpu"),
        "key_padding": Causal() & KeyPadding(torch.ones(1, 5, dtype=torch.bool)),
        "query_padding": Causal() & KeyPadding(*torch.ones(2, 1, 5, dtype=torch.bool).unbind()),
        "varlen": heedful.Varlen(torch.tensor([0, 2, 5])),
    }
    assert set(masks) == ALL_MASKS
    for name, mask in masks.items():
        packed = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)) > 0
        tensor, keep = (square[:1], packed) if name == "varlen" else (square, seen)
        out = dispatcher.attention(tensor, tensor, tensor, mask)
        expected, _ = naive_attention(tensor, tensor, tensor, seen=keep)
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("backend", ["auto", "reference", "native", "native_math", "native_flash", "flex"])
@pytest.mark.parametrize("analyse", [True, False])
def test_padded_queries_get_zeros_and_hidden_keys_no_weight(factory, naive_attention, backend, analyse):
    dispatcher = AttentionDispatcher(factory, policy=Policy(analyse=analyse))
    keys, rows = torch.ones(2, 7, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool)
    keys[0, 4:], keys[1, 2], rows[0, 3:], rows[1, 0] = False, False, False, False
    seen = keys[:, None, None, :] & rows[:, None, :, None]
    expected, _ = naive_attention(QUERY, KEY, KEY, seen=seen)
    out = dispatcher.attention(QUERY, KEY, KEY, KeyPadding(keys, queries=rows), backend=backend)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    assert (out.transpose(1, 2)[~rows] == 0).all()


# Names that pin something


class FromAfar(AttentionStrategy):
    """SDPA in one layout or the other, from a package or the Hub; notes the layouts."""

    aliases = {"afar_packed": Pin(layouts=("BSHD",)), "afar_hub": Pin(source="hub"), "afar_too": Pin()}
    sources = (Package("math", ("sqrt",)), Hub("someone/attention", 3, ("sqrt",)))
    limits = Limits(devices=("cpu",), layouts=("BHSD", "BSHD"))
    seen: list = []

    def compute_attention(self, query, key, value):
        assert self.kernels.sqrt(4) == 2
        self.seen.append(self.name)
        if self.pin.layouts == ("BSHD",):
            return self.compute_transposed(query, key, value)
        return F.scaled_dot_product_attention(query, key, value)

    @staticmethod
    def compute_transposed(*tensors):
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in tensors)).transpose(1, 2)


@pytest.fixture
def from_afar(factory):
    """The strategy, registered; what it noted, its trials left out."""
    factory.register_strategy("afar", FromAfar)
    warm = AttentionDispatcher(factory, policy=Policy())
    for name in ("afar", "afar_packed"):
        assert warm.explain(QUERY, KEY, KEY, backend=name).backend == name
    FromAfar.seen.clear()
    return FromAfar.seen


def test_a_name_that_pins_something_is_a_backend(dispatcher, from_afar):
    expected = F.scaled_dot_product_attention(QUERY, KEY, KEY)
    for name in ("afar_packed", ["native_cudnn", "afar_packed", "native"]):
        torch.testing.assert_close(dispatcher.attention(QUERY, KEY, KEY, backend=name), expected)
        plan = dispatcher.explain(QUERY, KEY, KEY, backend=name)
        assert plan.backend == "afar_packed"
        assert "* afar_packed       takes it after layout (mends layout)" in str(plan)
    with dispatcher.attention_backend("afar_packed"):
        torch.testing.assert_close(dispatcher.attention(QUERY, KEY, KEY), expected)
    with dispatcher.attention_backend(["afar_hub", "afar_packed"]):
        torch.testing.assert_close(dispatcher.attention(QUERY, KEY, KEY), expected)
    assert from_afar == ["afar_packed"] * 4
    torch.testing.assert_close(dispatcher.dispatch("afar_too", query=QUERY, key=KEY, value=KEY), expected)
    assert from_afar[-1] == "afar"


def test_a_name_that_pins_something_in_the_environment(factory, from_afar):
    for text, chosen in (
        ("afar_packed", "afar_packed"),
        ("afar_hub, afar_packed", "afar_packed"),
        ("afar_too", "afar"),
    ):
        by_environment = AttentionDispatcher(factory, policy=Policy.from_environment({"HEEDFUL_BACKEND": text}))
        plan = by_environment.explain(QUERY, KEY, KEY)
        assert (plan.backend, plan.origin) == (chosen, "HEEDFUL_BACKEND")


def test_a_pinned_source_that_lacks_is_refused_by_its_name(dispatcher, from_afar, monkeypatch):
    monkeypatch.delenv("LOCAL_KERNELS", raising=False)
    with pytest.raises(Refused, match=r"afar_hub refuses: (download is not allowed|package is kernels not installed)"):
        dispatcher.attention(QUERY, KEY, KEY, backend="afar_hub")
    assert dispatcher.explain(QUERY, KEY, KEY, backend=["afar_hub", "afar"]).backend == "afar"


def test_names_that_pin_something_are_no_part_of_auto(dispatcher, from_afar):
    names = [verdict.name for verdict in dispatcher.explain(QUERY, KEY, KEY).verdicts]
    assert "afar" in names
    assert not set(names) & set(FromAfar.aliases)


def test_the_table_knows_names_that_pin_something(dispatcher, from_afar):
    table = dispatcher.list_backends("cpu")
    assert table["afar_packed"] is table["afar"]
    assert set(FromAfar.aliases) == set(table["afar"].aliases)


def test_an_unknown_name_close_to_one_that_pins_something(dispatcher, from_afar):
    for ask in (
        lambda: dispatcher.attention(QUERY, KEY, KEY, backend="afar_pack"),
        lambda: dispatcher.explain(QUERY, KEY, KEY, backend=["native", "afar_pack"]),
        lambda: dispatcher.attention_backend("afar_pack"),
        lambda: dispatcher.list_backends("cpu")["flash_hubb"],
    ):
        with pytest.raises(UnknownBackend, match=r"did you mean '(afar_packed|flash)"):
            ask()


def test_a_plan_for_a_machine_one_does_not_have_supposes_its_packages(factory):
    away = AttentionDispatcher(factory, Facts.pretend("sm_90"), Policy())
    half = torch.zeros(1, 2, 5, 64, dtype=torch.float16)
    problem = heedful.AttentionProblem(
        batch=1, heads=2, kv_heads=2, query_length=5, key_length=5, head_dim=64, value_dim=64, dtype=half.dtype,
        device="cuda", capability=(9, 0), architecture="sm_90",
    )  # fmt: skip
    for name in ("flash", "flash_hub", "flash_varlen"):
        assert away.plan(problem, name).backend == name
    assert "kernels" not in away.factory.create_strategy("flash").__dict__


@pytest.mark.parametrize("backend", ["reference", "native", "flex"])
@pytest.mark.parametrize("more", [{}, {"is_causal": True}], ids=["alone", "with causality"])
def test_a_block_mask_that_is_blocks_only_is_honoured(backend, more):
    from torch.nn.attention.flex_attention import BlockMask

    query, key, value = torch.randn(3, 1, 2, 8, 4).unbind()
    counts, columns = torch.ones(1, 1, 2, dtype=torch.int32), torch.tensor([[[[0, 1], [1, 0]]]], dtype=torch.int32)
    block = BlockMask.from_kv_blocks(counts, columns, BLOCK_SIZE=4)
    same = torch.arange(8)[:, None] // 4 == torch.arange(8) // 4
    out = heedful.attention(query, key, value, attn_mask=block, backend=backend, **more)
    torch.testing.assert_close(out, heedful.attention(query, key, value, attn_mask=same, backend="reference", **more))


@pytest.mark.parametrize("sizes", [(3, 1, 8, 8), (1, 5, 8, 8), (1, 1, 16, 8), (1, 1, 8, 16)])
def test_a_block_mask_of_another_shape_is_named(sizes):
    from torch.nn.attention.flex_attention import create_block_mask

    query, key, value = torch.randn(3, 2, 4, 8, 4).unbind()
    block = create_block_mask(lambda b, h, q, k: q >= k, *sizes, device="cpu")
    with pytest.raises(heedful.InvalidArgument, match=r"attn_mask: got BlockMask of shape .*; give \(2, 4, 8, 8\)"):
        heedful.attention(query, key, value, attn_mask=block)


@pytest.mark.parametrize("backend", ["reference", "native", "native_flash", "flex"])
def test_packed_heads_broadcast(backend):
    query, key = torch.randn(7, 4, 8), torch.randn(7, 1, 8)
    words = {"layout": "THD", "attn_mask": heedful.Varlen(torch.tensor([0, 3, 7])), "backend": backend}
    wide = key.expand(7, 4, 8).contiguous()
    torch.testing.assert_close(
        heedful.attention(query, key, wide, **words), heedful.attention(query, wide, wide, **words)
    )


def test_a_negative_scale_costs_no_accuracy():
    query, key, value = (torch.randn(3, 1, 2, 33, 16) * 8).to(torch.float16).unbind()
    scores = -0.7 * query.double() @ key.double().transpose(-2, -1)
    want = (torch.softmax(scores, -1) @ value.double()).half()
    out = heedful.attention(query, key, value, scale=-0.7, backend="reference")
    torch.testing.assert_close(out, want, rtol=0.0, atol=0.0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch scripts its decompositions at the first dual level
@pytest.mark.parametrize("with_lse", [False, True])
def test_flex_refuses_a_forward_mode_gradient_rather_than_lose_it(with_lse):
    from torch.autograd import forward_ad

    query, key, value = torch.randn(3, 1, 2, 5, 8).unbind()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(query, torch.ones_like(query))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            heedful.attention(dual, key, value, backend="flex", return_lse=with_lse)


def test_keys_of_more_batch_rows_than_the_queries_meet_a_mask_that_is_a_pack(dispatcher):
    query, key = randn(1, 2, 8, 4), randn(3, 2, 8, 4)
    packed = torch.block_diag(torch.ones(4, 4), torch.ones(4, 4)) > 0
    want = torch.nn.functional.scaled_dot_product_attention(query, key, key, packed)
    torch.testing.assert_close(dispatcher.attention(query, key, key, packed), want)
    torch.testing.assert_close(dispatcher.attention(query[0], key, key, packed), want)


def test_a_block_mask_of_another_size_is_refused_after_one_that_fits(dispatcher):
    from torch.nn.attention.flex_attention import create_block_mask

    query = randn(1, 2, 64, 8)
    fits, small = (create_block_mask(lambda b, h, q, k: q >= k, None, None, n, n, device="cpu") for n in (64, 32))
    dispatcher.attention(query, query, query, heedful.Mask(block=fits))
    with pytest.raises(InvalidArgument, match="BlockMask of shape"):
        dispatcher.attention(query, query, query, heedful.Mask(block=small))


@pytest.mark.parametrize("window", [2**63 - 1, (2**63 - 2, 2**63 - 2), (None, 10**23)])
@pytest.mark.parametrize("backend", ["native", "flex", "reference"])
def test_a_side_beyond_every_key_is_open(dispatcher, window, backend):
    query = randn(1, 2, 9, 8)
    want = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    torch.testing.assert_close(dispatcher.attention(query, query, query, window=window, backend=backend), want)
