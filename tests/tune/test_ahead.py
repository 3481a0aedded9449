"""Measuring ahead of time: every candidate checked, timed in two windows that lie apart, and kept where auto looks."""

import math
import re
import threading
import time

import pytest
import torch
import torch.nn.functional as F

from heedful import AttentionDispatcher, AttentionProblem, AttentionStrategy, AttentionStrategyFactory, Limits, Policy
from heedful.knowledge import MEASURED
from heedful.masks import MaskFacts
from heedful.problem_class import class_of
from heedful.records import APART
from heedful.tune import ahead as module
from heedful.tune.ahead import tune

CPU = torch.device("cpu")
PROBLEM = AttentionProblem(batch=1, heads=2, kv_heads=2, query_length=96, key_length=96, head_dim=64, value_dim=64)
OTHER = PROBLEM.replace(query_length=160)


class Plain(AttentionStrategy):
    limits = Limits(masks=frozenset({"causal"}), scale=True, lse=False)

    def compute_attention(self, query, key, value, **kwargs):
        return F.scaled_dot_product_attention(query, key, value, **kwargs)


class Slow(Plain):
    def compute_attention(self, query, key, value, **kwargs):
        threading.Event().wait(0.002)
        return super().compute_attention(query, key, value, **kwargs)


class Wrong(Plain):
    """And fast at that."""

    def compute_attention(self, query, key, value, **kwargs):
        return torch.full_like(query, math.nan)


class WrongInHalf(Plain):
    """Right in float16, and wrong where it is given float32."""

    def compute_attention(self, query, key, value, **kwargs):
        out = super().compute_attention(query, key, value, **kwargs)
        return out if query.dtype == torch.float16 else out * 1.5


class Rough(Plain):
    """One per cent off, as it says."""

    exactness = "quantised"

    def compute_attention(self, query, key, value, **kwargs):
        return super().compute_attention(query, key, value, **kwargs) * 1.01


class Raises(Plain):
    def compute_attention(self, query, key, value, **kwargs):
        raise RuntimeError("no kernel image\nfor this device")


def fresh(*kinds, **policy):
    factory = AttentionStrategyFactory(packages=(), plugins=False)
    for kind in kinds:
        factory.register_strategy(kind.__name__, kind)
    names = tuple(kind.__name__ for kind in kinds)
    return AttentionDispatcher(factory, policy=Policy({"*": names}, **{"tune": "ahead", **policy}))


@pytest.fixture
def wait(monkeypatch):
    """Waiting as it is asked for, in no time; it remembers how long."""
    real, passed, waited = time.time, [0.0], []
    monkeypatch.setattr(module.time, "time", lambda: real() + passed[0])

    def waiting(seconds):
        waited.append(seconds)
        passed[0] += seconds

    waiting.waited = waited
    return waiting


def plan_of(dispatcher, problem=PROBLEM):
    return dispatcher.plan(problem, device=CPU)


def test_the_winner_is_kept_and_a_fresh_dispatcher_chooses_it(wait, tmp_path):
    (one,) = tune(fresh(Slow, Plain, cache=tmp_path), [PROBLEM], CPU, rounds=3, wait=wait)
    assert (one.usual, one.winner, one.refused, one.wrong) == ("Slow", "Plain", "", {})
    assert one.key == class_of(PROBLEM)
    assert one.gain == one.seconds["Slow"] / one.seconds["Plain"] > 1
    later = fresh(Slow, Plain, cache=tmp_path)
    plan = plan_of(later, PROBLEM.replace(query_length=92))
    assert (plan.backend, plan.rung) == ("Plain", MEASURED)
    assert plan.known.seconds == one.seconds


def test_the_second_window_waits_until_it_is_apart_from_the_first(wait):
    dispatcher = fresh(Slow, Plain)
    steps = []
    tune(dispatcher, [PROBLEM, OTHER], CPU, rounds=3, wait=wait, on_step=steps.append)
    assert steps == [str(PROBLEM), str(OTHER)] * 2
    assert 0 < wait.waited[0] <= APART
    for problem in (PROBLEM, OTHER):
        windows = dispatcher.experience.store(CPU).get(class_of(problem)).windows
        assert len(windows) == 2
        assert windows[1].ended - windows[0].ended >= APART


def test_one_problem_of_each_class_is_measured(wait):
    tuned = tune(fresh(Slow, Plain), [PROBLEM, PROBLEM.replace(query_length=92)], CPU, rounds=3, wait=wait)
    assert len(tuned) == 1


@pytest.mark.parametrize("order", [(Wrong, Slow, Plain), (Slow, Wrong, Plain)], ids=["usual", "other"])
def test_a_wrong_candidate_is_told_quarantined_and_never_the_winner(wait, tmp_path, order):
    dispatcher = fresh(*order, cache=tmp_path)
    (one,) = tune(dispatcher, [PROBLEM], CPU, rounds=3, wait=wait)
    assert one.winner == "Plain"
    assert list(one.wrong) == ["Wrong"]
    assert "finite" in one.wrong["Wrong"]
    assert "Wrong" not in one.seconds
    assert one.gain >= 1
    dispatcher.experience.finish()
    plan = plan_of(fresh(*order, cache=tmp_path))
    assert plan.backend == "Plain"
    refusals = {verdict.name: verdict.refusals for verdict in plan.verdicts}
    assert [refusal.field for refusal in refusals["Wrong"]] == ["guard"]


def test_a_strategy_that_is_wrong_in_one_chain_wins_by_none(wait):
    (one,) = tune(fresh(Slow, WrongInHalf), [PROBLEM.replace(dtype=torch.float16)], CPU, rounds=3, wait=wait)
    assert list(one.wrong) == ["WrongInHalf+upcast"]
    assert one.winner.startswith("Slow")
    assert not any(label.startswith("WrongInHalf") for label in one.seconds)


def test_where_all_are_wrong_that_is_said(wait):
    other = type("Other", (Wrong,), {})
    (one,) = tune(fresh(Wrong, other), [PROBLEM], CPU, rounds=3, wait=wait)
    assert (one.refused, set(one.wrong), one.winner) == ("every candidate is wrong", {"Wrong", "Other"}, "")
    assert wait.waited == []


def test_a_kernel_that_raises_ends_its_own_class_only(wait):
    picky = type("Picky", (Raises,), {"limits": Limits(masks=frozenset({"causal"}), scale=True)})

    def refusals(self, problem, inherited=Raises.refusals):
        return inherited(self, problem.replace(softcap=1.0 if problem.query_length > 100 else None))

    picky.refusals = refusals
    spoilt, sound = tune(fresh(Slow, Plain, picky), [PROBLEM, OTHER], CPU, rounds=3, wait=wait)
    assert spoilt.refused == "no kernel image"
    assert (sound.winner, sound.refused) == ("Plain", "")


@pytest.mark.parametrize(
    ("kinds", "changes", "reason"),
    [
        ((Slow, Plain), {"query_length": 4}, "too small to matter"),
        ((Plain,), {}, "Plain has no rival"),
        ((Slow, Plain), {"softcap": 3.0}, "softcap"),
        ((Slow, Plain), {"dropout_p": 0.5}, "dropout"),
        ((Slow, Plain), {"needs_grad": True}, "gradient"),
        ((Slow, Plain), {"mask": MaskFacts(block=True)}, "block mask"),
    ],
    ids=str,
)
def test_what_is_not_measured_has_a_reason_in_one_line_and_waits_for_nothing(wait, kinds, changes, reason):
    dispatcher = fresh(*kinds)
    (one,) = tune(dispatcher, [PROBLEM.replace(**changes)], CPU, rounds=3, wait=wait)
    assert re.search(reason, one.refused)
    assert "\n" not in one.refused
    assert (one.seconds, one.winner, one.wrong, one.gain) == ({}, "", {}, 1.0)
    assert wait.waited == []
    assert not dispatcher.experience.store(CPU).records()


def test_an_approximate_candidate_is_held_to_the_error_that_is_allowed(wait):
    kinds = (Slow, Plain, Rough)
    (exact,) = tune(fresh(*kinds), [PROBLEM], CPU, rounds=3, wait=wait)
    assert "Rough" not in {*exact.seconds, *exact.wrong}
    (loose,) = tune(fresh(*kinds), [PROBLEM.replace(max_error=0.1)], CPU, rounds=3, wait=wait)
    assert "Rough" in loose.seconds
    tight = fresh(*kinds)
    (found,) = tune(tight, [PROBLEM.replace(max_error=1e-4)], CPU, rounds=3, wait=wait)
    assert list(found.wrong) == ["Rough"]
    assert "Rough" in tight.experience.known(PROBLEM.replace(max_error=1e-4), CPU).faults
    assert "Rough" not in tight.experience.known(PROBLEM.replace(max_error=0.1), CPU).faults


def test_nothing_counts_as_a_call(wait):
    dispatcher = fresh(Slow, Plain)
    tune(dispatcher, [PROBLEM], CPU, rounds=3, wait=wait)
    assert not dispatcher.experience.tallies


def test_no_problems_are_no_work(wait):
    assert tune(fresh(Plain), [], CPU, wait=wait) == []
