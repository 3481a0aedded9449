"""The search for tiles: every one checked first, timed in two windows, and kept where the strategy is told of it.

By a strategy that stands in for the kernels, which choose among words; ``tests/kernels/on_device`` has the real ones.
"""

import re
import time

import pytest
import torch
import torch.nn.functional as F

from heedful import AttentionDispatcher, AttentionProblem, AttentionStrategy, AttentionStrategyFactory, Limits, Policy
from heedful.masks import MaskFacts
from heedful.records import APART, Window
from heedful.strategies.reference import ReferenceAttentionStrategy
from heedful.tune import ahead
from heedful.tune import tiles as module
from heedful.tune.tiles import kinds_of, tune_tiles

CPU = torch.device("cpu")
PROBLEM = AttentionProblem(batch=1, heads=2, kv_heads=2, query_length=96, key_length=96, head_dim=64, value_dim=64)
LONG = PROBLEM.replace(query_length=300, key_length=280)
TRAINED = PROBLEM.replace(needs_grad=True)


class Backwards(torch.autograd.Function):
    """The same, with another gradient."""

    @staticmethod
    def forward(ctx, tensor, factor):
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


class Tiled(AttentionStrategy):
    """``usual`` is its default, ``quick`` the fastest; ``wrong`` is, ``large`` cannot run."""

    limits = Limits(masks=frozenset({"causal"}), scale=True, backward=True)
    labels = ("usual", "wrong", "quick", "large")

    def tunable(self, problem):
        long = "long" if problem.query_length > 100 else "short"
        roles = ("forward", "keys", "queries") if problem.needs_grad else ("forward",)
        return {role: f"tiles {role} {long}" for role in roles}

    def choices(self, _role, _problem, _device):
        return self.labels

    def compute_attention(self, query, key, value, *, tuning=None, **kwargs):
        words = {role: tuning and tuning.get(role) for role in ("forward", "keys", "queries")}
        for role, label in words.items():
            if label == "large":
                tuning.drop(role, label, "OutOfResources: shared memory")
        query = Backwards.apply(query, 1.1 if words["queries"] == "wrong" else 1.0)
        key = Backwards.apply(key, 1.1 if words["keys"] == "wrong" else 1.0)
        out = F.scaled_dot_product_attention(query, key, value, **kwargs)
        return out * 1.5 if words["forward"] == "wrong" else out


class Without(AttentionStrategy):
    def compute_attention(self, query, key, value, **kwargs):
        return F.scaled_dot_product_attention(query, key, value, **kwargs)


def fresh(kind=Tiled, **policy):
    factory = AttentionStrategyFactory(packages=(), plugins=False)
    for name, one in (("tiled", kind), ("without", Without), ("reference", ReferenceAttentionStrategy)):
        factory.register_strategy(name, one)
    return AttentionDispatcher(factory, policy=Policy({"*": ("tiled", "without")}, **{"tune": "ahead", **policy}))


@pytest.fixture(autouse=True)
def certain(monkeypatch):
    """Times that no busy machine changes; every call is made once, and those that were made are remembered."""
    timed = []

    def times_of(calls, _device, _rounds):
        for call in calls.values():
            call()
        timed.append(list(calls))
        return {label: 1e-3 if label == "quick" else 2e-3 for label in calls}

    monkeypatch.setattr(module, "times_of", times_of)
    return timed


@pytest.fixture
def wait(monkeypatch):
    """Waiting as it is asked for, in no time; it remembers how long."""
    real, passed, waited = time.time, [0.0], []
    monkeypatch.setattr(ahead.time, "time", lambda: real() + passed[0])

    def waiting(seconds):
        waited.append(seconds)
        passed[0] += seconds

    waiting.waited = waited
    return waiting


def test_the_fastest_that_is_right_is_kept_and_a_fresh_dispatcher_goes_by_it(wait, tmp_path, certain):
    (one,) = tune_tiles(fresh(cache=tmp_path), [PROBLEM], CPU, rounds=3, wait=wait)
    assert (one.key, one.strategy, one.role) == ("tiles forward short", "tiled", "forward")
    assert (one.usual, one.winner, one.settled, one.gain) == ("usual", "quick", True, 2.0)
    assert one.wrong == ["wrong"]
    assert one.out.keys() == {"wrong", "large"}
    assert one.out["large"] == "OutOfResources: shared memory"
    assert certain == [["usual", "quick"], ["quick"]]  # what is 1.5 times as slow is not timed again
    later = fresh(cache=tmp_path)
    assert later.plan(PROBLEM, "tiled", device=CPU).tuned == {"forward": "quick"}
    assert later.experience.store(CPU).get(one.key).faults == one.out


def test_the_same_process_goes_by_it_at_once(wait):
    dispatcher = fresh()
    query = torch.randn(1, 2, 96, 64, generator=torch.Generator().manual_seed(0))
    dispatcher.attention(query, query, query)
    runs = dispatcher._runs
    tune_tiles(dispatcher, [PROBLEM], CPU, rounds=3, wait=wait)
    assert dispatcher._runs is not runs
    assert dispatcher.explain(query, query, query).tuned == {"forward": "quick"}


def test_passes_for_gradients_are_measured_apart_and_held_to_the_formula_s_gradients(wait):
    tuned = tune_tiles(fresh(), [TRAINED], CPU, rounds=3, wait=wait)
    assert [one.role for one in tuned] == ["forward", "keys", "queries"]
    for one in tuned:
        assert (one.refused, one.winner, one.wrong) == ("", "quick", ["wrong"])
    for one, name in zip(tuned[1:], ("key", "query"), strict=True):
        assert re.fullmatch(rf"the gradient of {name} is off by \S+, of at most \S+", one.out["wrong"])


@pytest.mark.parametrize("changes", [{}, {"mask": MaskFacts(causal="top_left")}, {"dtype": torch.float16}], ids=str)
def test_long_problems_are_checked_on_a_part_of_them(wait, monkeypatch, changes):
    asked = []
    real = module.inputs_for
    monkeypatch.setattr(module, "inputs_for", lambda problem, device: asked.append(problem) or real(problem, device))
    tuned = tune_tiles(fresh(), [LONG.replace(needs_grad=True, **changes)], CPU, rounds=3, wait=wait)
    assert [one.winner for one in tuned] == ["quick"] * 3
    assert {(one.query_length, one.key_length) for one in asked} == {(300, 280), (250, 250)}


def test_each_kind_is_measured_once_on_the_largest_of_its_problems(wait):
    problems = [PROBLEM, PROBLEM.replace(heads=4, kv_heads=4), LONG, LONG.replace(batch=2)]
    tuned = kinds_of(fresh(), problems)
    assert [(one.key, one.problem.heads, one.problem.batch) for one in tuned] == [
        ("tiles forward long", 2, 2), ("tiles forward short", 4, 1)
    ]  # fmt: skip


def test_the_second_window_waits_until_it_is_apart_from_the_first(wait):
    dispatcher, steps = fresh(), []
    tune_tiles(dispatcher, [PROBLEM, LONG], CPU, rounds=3, wait=wait, on_step=steps.append)
    assert steps == ["tiled tiles forward long", "tiled tiles forward short"] * 2
    for one in kinds_of(dispatcher, [PROBLEM, LONG]):
        first, second = dispatcher.experience.store(CPU).get(one.key).windows
        assert second.ended - first.ended >= APART


def test_what_was_found_out_is_not_tried_again(wait, certain):
    dispatcher = fresh()
    tune_tiles(dispatcher, [PROBLEM], CPU, rounds=3, wait=wait)
    del certain[:]
    (again,) = tune_tiles(dispatcher, [PROBLEM], CPU, rounds=3, wait=wait)
    assert again.out.keys() == {"wrong", "large"}
    assert again.wrong == []  # it was not asked
    assert certain == [["usual", "quick"], ["quick"]]


def test_where_every_one_fails_that_is_said(wait):
    kind = type("Broken", (Tiled,), {"labels": ("wrong", "large")})
    dispatcher = fresh(kind)
    (one,) = tune_tiles(dispatcher, [PROBLEM], CPU, rounds=3, wait=wait)
    assert (one.refused, one.failed, one.winner) == ("every tile fails", True, "")
    assert dispatcher.plan(PROBLEM, "tiled", device=CPU).tuned == {}


def test_an_error_that_is_not_the_tile_s_quarantines_none(wait):
    class Raises(Tiled):
        def compute_attention(self, query, key, value, **kwargs):
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    dispatcher = fresh(Raises)
    (one,) = tune_tiles(dispatcher, [PROBLEM], CPU, rounds=3, wait=wait)
    assert (one.refused, one.failed) == ("CUDA error: an illegal memory access was encountered", True)
    assert not dispatcher.experience.store(CPU).records()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"softcap": 3.0}, "softcap is 3.0"), ({"dropout_p": 0.5}, "dropout"), ({"query_length": 0}, "needs no kernel")],
    ids=str,
)
def test_what_is_not_measured_has_its_reason_and_waits_for_nothing(wait, changes, reason):
    (one,) = tune_tiles(fresh(), [PROBLEM.replace(**changes)], CPU, rounds=3, wait=wait)
    assert reason in one.refused
    assert (one.seconds, one.gain) == ({}, 1.0)
    assert wait.waited == []


def test_a_backend_that_is_named_and_has_no_tiles_says_so(wait):
    (one,) = tune_tiles(fresh(), [PROBLEM], CPU, backends=["without"], wait=wait)
    assert (one.strategy, one.refused) == ("without", "it has no tiles")


def test_times_are_those_of_this_search(wait):
    """An earlier one may have measured a larger problem of the same kind."""
    dispatcher = fresh()
    slow = Window(ended=1e9, run="earlier", seconds={"usual": 5.0, "quick": 4.0}, turns=5)
    dispatcher.experience.store(CPU).add_window("tiles forward short", slow)
    (one,) = tune_tiles(dispatcher, [PROBLEM], CPU, rounds=3, wait=wait)
    assert one.seconds == {"usual": 2e-3, "quick": 1e-3}
    assert len(dispatcher.experience.store(CPU).get(one.key).windows) == 1 + len(one.windows)


def test_strategies_without_tiles_have_none(wait):
    factory = AttentionStrategyFactory(packages=(), plugins=False)
    factory.register_strategy("without", Without)
    dispatcher = AttentionDispatcher(factory, policy=Policy({"*": ("without",)}, tune="ahead"))
    assert tune_tiles(dispatcher, [PROBLEM], CPU, wait=wait) == []


class Deaf(Tiled):
    """It says that a call leaves it a choice, and goes by none there."""

    def compute_attention(self, query, key, value, *, tuning=None, **kwargs):
        return F.scaled_dot_product_attention(query, key, value, **kwargs)


def test_what_nobody_asked_for_is_no_tile_that_was_measured():
    """Its time would be that of the default, and calls that do ask would go by what was never looked at."""
    dispatcher = fresh(Deaf)
    (one,) = tune_tiles(dispatcher, [PROBLEM], CPU, wait=lambda _: None)
    assert one.refused == "every tile fails"
    assert set(one.out.values()) == {"these calls go by no tile of their own"}
