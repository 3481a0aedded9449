"""The functions that calls go to: watched, taking turns, asking first; and which candidates work at all."""

import pytest
import torch
import torch.nn.functional as F

from heedful import AttentionDispatcher, AttentionStrategy, AttentionStrategyFactory, Limits, Policy, Refused
from heedful.running import AskFirst, own_refusal
from heedful.sources import Package

CPU = torch.device("cpu")
QUERY = torch.randn(1, 4, 128, 64, generator=torch.Generator().manual_seed(0))
CALL = {"is_causal": False, "causal_alignment": "top_left", "window": None}


class Plain(AttentionStrategy):
    limits = Limits(masks=frozenset({"causal"}), scale=True)

    def compute_attention(self, query, key, value, **kwargs):
        return F.scaled_dot_product_attention(query, key, value, **kwargs)


class Quick(Plain):
    """Takes 16-bit numbers, and float32 faster by way of them; both ways are candidates."""

    limits = Limits(masks=frozenset({"causal"}), scale=True, faster_with=frozenset({"upcast"}))


class Picky(Plain):
    """Checks every call itself: no tensor whose first number is negative."""

    def validate_constraints(self, **kwargs):
        if kwargs["query"].flatten()[0] < 0:
            raise ValueError("a negative number")


class Broken(Plain):
    """Its package is there, and lacks the function."""

    sources = (Package("typer", ("attend",)),)


def fresh(*kinds, **policy):
    factory = AttentionStrategyFactory(packages=(), plugins=False)
    for kind in kinds:
        factory.register_strategy(kind.__name__, kind)
    return AttentionDispatcher(factory, policy=Policy({"*": tuple(kind.__name__ for kind in kinds)}, **policy))


def labels(dispatcher, query=QUERY, **call):
    plan, calls = dispatcher.rivals(query, query, query, **call)
    assert [verdict.label for verdict in plan.contenders] == list(calls)
    return list(calls)


# Rivals


def test_rivals_are_the_contenders_as_functions_and_nobody_counts_them():
    dispatcher = fresh(Plain, Quick)
    _, calls = dispatcher.rivals(QUERY.half(), QUERY.half(), QUERY.half())
    assert list(calls) == ["Plain", "Quick+upcast", "Plain+upcast", "Quick"]
    want = F.scaled_dot_product_attention(QUERY, QUERY, QUERY)
    for call in calls.values():
        torch.testing.assert_close(call().float(), want, atol=5e-3, rtol=5e-3)
    assert not dispatcher.experience.tallies


def test_rivals_of_a_name_are_its_chains_of_rewrites_only():
    dispatcher = fresh(Plain, Quick)
    assert labels(dispatcher, QUERY.half(), backend="Quick") == ["Quick+upcast", "Quick"]
    assert labels(dispatcher, QUERY, backend="Quick") == ["Quick"]


def test_who_checks_calls_itself_or_cannot_be_loaded_is_no_rival():
    assert labels(fresh(Plain, Picky, Broken)) == ["Plain"]


def test_a_small_problem_has_the_chosen_one_alone():
    dispatcher = fresh(Plain, Quick)
    assert labels(dispatcher, QUERY[:, :, :2]) == ["Plain"]


def test_rivals_of_a_refused_call_are_refused():
    with pytest.raises(Refused):
        fresh(Plain).rivals(QUERY, QUERY, QUERY, softcap=3.0)


# Asked first


def test_a_strategy_that_checks_calls_is_asked_at_each_and_the_next_one_computes_what_it_refuses():
    dispatcher = fresh(Picky, Plain)
    positive, negative = QUERY.abs(), -QUERY.abs()
    for query in (positive, negative, positive, negative):
        torch.testing.assert_close(
            dispatcher.attention(query, QUERY, QUERY), F.scaled_dot_product_attention(query, QUERY, QUERY)
        )
    counted = {label: tally.calls for (_, _, label), tally in dispatcher.experience.tallies.items()}
    assert counted == {"Picky": 2, "Plain": 2}


def test_by_name_its_refusal_is_raised():
    dispatcher = fresh(Picky, Plain)
    dispatcher.attention(QUERY.abs(), QUERY, QUERY, backend="Picky")
    with pytest.raises(Refused, match="a negative number"):
        dispatcher.attention(-QUERY.abs(), QUERY, QUERY, backend="Picky")


def test_asking_gives_the_function_that_will_run():
    asked = AskFirst("run", lambda **operands: operands["query"], lambda refusal: f"another, for {refusal}")
    assert asked.pick(None, 1, 2, 3) == "run"
    assert asked.pick("this", 1, 2, 3) == "another, for this"


@pytest.mark.parametrize("error", [ValueError, TypeError, RuntimeError])
def test_what_a_strategys_check_raises_is_its_refusal(error):
    def validate_constraints(self, **kwargs):
        raise error(f"not with {sorted(kwargs)}")

    strategy = type("Strict", (Plain,), {"validate_constraints": validate_constraints, "name": "strict"})()
    refusal = own_refusal(strategy, attn_mask=None, query=QUERY, softcap=None, is_causal=True)
    assert (refusal.field, refusal.observed) == ("validate_constraints", "not with ['attn_mask', 'is_causal', 'query']")


def test_a_fault_of_the_check_itself_passes_through_and_no_check_is_no_refusal():
    def validate_constraints(self, **kwargs):
        raise AssertionError

    strategy = type("Faulty", (Plain,), {"validate_constraints": validate_constraints})()
    with pytest.raises(AssertionError):
        own_refusal(strategy, attn_mask=None)
    assert own_refusal(Plain(), attn_mask=None) is None


# Turns


@pytest.mark.parametrize("order", [(480, 536), (536, 480)])
def test_calls_of_one_class_with_other_candidates_do_not_disturb_each_other(factory, order):
    """480 and 536 are of one class; from 512 on a causal call has one candidate more, ``native+chunk_queries``."""
    dispatcher = AttentionDispatcher(factory, policy=Policy(tune="live"))
    for length in order:
        query = torch.randn(1, 2, length, 16)
        for _ in range(8):
            out = dispatcher.attention(query, query, query, is_causal=True)
        torch.testing.assert_close(out, F.scaled_dot_product_attention(query, query, query, is_causal=True))


def test_whoever_is_watched_says_what_will_run():
    dispatcher = fresh(Plain, Quick, tune="live")
    plan = dispatcher.explain(QUERY, QUERY, QUERY)
    run = dispatcher.runs.of(plan, CALL, CPU)
    assert run.pick(QUERY, QUERY, QUERY, None).tally.plan.backend == "Plain"
    off = fresh(Plain, Quick, tune="off")
    assert off.runs.of(off.explain(QUERY, QUERY, QUERY), CALL, CPU).tally.plan.backend == "Plain"


def test_nobody_takes_turns_where_one_candidate_is_left():
    dispatcher = fresh(Plain, Broken, tune="live")
    run = dispatcher.runs.of(dispatcher.explain(QUERY, QUERY, QUERY), CALL, CPU)
    assert not hasattr(run, "pick")


def test_an_empty_problem_is_neither_watched_nor_counted():
    dispatcher = fresh(Plain, tune="live")
    out = dispatcher.attention(QUERY, QUERY[:, :, :0], QUERY[:, :, :0])
    assert out.eq(0).all()
    assert not dispatcher.experience.tallies
