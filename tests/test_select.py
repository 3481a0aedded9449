"""Selection: pure, in the order of the wish, with a verdict on every candidate."""

import math

import pytest
import torch

from heedful import AttentionProblem, AttentionStrategy, Limits, Policy, Refusal, Refused
from heedful.knowledge import LOCKED, MEASURED, SHIPPED, Knowledge
from heedful.masks import MaskFacts
from heedful.select import candidates, judge, select, variants, worth_timing

PROBLEM = AttentionProblem(batch=1, heads=2, kv_heads=2, query_length=8, key_length=8, head_dim=8, value_dim=8)
SCALED = PROBLEM.replace(scale=0.3)
NOT_SQUARE = PROBLEM.replace(key_length=9, mask=MaskFacts(causal="top_left"))


def strategy(name, exactness="exact", **limits):
    def compute_attention(self, query, key, value, **kwargs):
        raise AssertionError("selecting computes nothing")

    body = {"name": name, "exactness": exactness, "limits": Limits(**limits), "compute_attention": compute_attention}
    return type(name, (AttentionStrategy,), body)()


STRATEGIES = {
    one.name: one
    for one in (
        strategy("half", dtypes=(torch.float16,)),
        strategy("plain"),
        strategy("sparse", "sparse", masks=frozenset({"causal"})),
        strategy("zeta", masks=frozenset({"causal"})),
        strategy("reference", masks=frozenset({"causal"}), lse=True, softcap=True),
    )
}
POLICY = Policy({"cpu": ("half", "plain", "reference"), "*": ("reference",)})


def chosen(problem, wish, **more):
    return select(problem, wish, STRATEGIES, POLICY, **more)


@pytest.mark.parametrize(
    ("problem", "wish", "backend", "rung"),
    [
        (PROBLEM, "auto", "plain", "preference table for cpu"),
        (PROBLEM.replace(dtype=torch.float16), "auto", "half", "preference table for cpu"),
        (NOT_SQUARE, "auto", "zeta", "an exact strategy beside the table"),
        (PROBLEM.replace(needs_lse=True), "auto", "reference", "nothing faster takes it"),
        (PROBLEM.replace(device="mps"), "auto", "plain", "an exact strategy beside the table"),
        (PROBLEM, "zeta", "zeta", "forced by name"),
        (PROBLEM, "reference", "reference", "forced by name"),
        (PROBLEM, "half", "refused", "nothing wanted takes it"),
        (PROBLEM, ("half", "zeta", "plain"), "zeta", "the first of the wanted list that takes it"),
        (NOT_SQUARE, ("plain", "auto"), "zeta", "an exact strategy beside the table"),
        (NOT_SQUARE, ("plain", "half"), "refused", "nothing wanted takes it"),
        (NOT_SQUARE, ("sparse", "auto"), "sparse", "the first of the wanted list that takes it"),
        (PROBLEM.replace(key_length=0), "half", "none", "an empty problem needs no kernel"),
        (PROBLEM.replace(sinks=True), "auto", "refused", "nothing wanted takes it"),
    ],
)
def test_the_ladder(problem, wish, backend, rung):
    plan = chosen(problem, wish)
    assert (plan.backend, plan.rung) == (backend, rung)


def test_the_same_inputs_give_the_same_plan():
    assert chosen(SCALED, ("half", "auto")) == chosen(SCALED, ("half", "auto"))
    assert hash(chosen(SCALED, "auto").problem) == hash(SCALED)


def test_every_candidate_gets_a_verdict_and_no_other():
    names = [verdict.name for verdict in chosen(PROBLEM, "auto").verdicts]
    assert names == ["half", "plain", "zeta", "reference"]
    names = [verdict.name for verdict in chosen(PROBLEM, ("zeta", "auto", "zeta")).verdicts]
    assert names == ["zeta", "half", "plain", "reference"]
    assert [verdict.name for verdict in chosen(PROBLEM, "plain").verdicts] == ["plain"]


def test_what_approximates_is_never_part_of_auto():
    assert "sparse" not in [verdict.name for verdict in chosen(NOT_SQUARE, "auto").verdicts]
    only = {"sparse": STRATEGIES["sparse"]}
    assert select(PROBLEM, "auto", only, POLICY).refused
    assert select(PROBLEM, "sparse", only, POLICY).backend == "sparse"


def test_a_name_outside_of_the_list_of_strategies_is_looked_up():
    """As those are that pin something: part of no "auto", and chosen under their own name."""

    class Named(dict):
        def __missing__(self, name):
            return strategy(name, layouts=("BHSD",))

    plan = select(PROBLEM, ("half", "plain_hub", "auto"), Named(STRATEGIES), POLICY)
    assert plan.backend == "plain_hub"
    assert [verdict.name for verdict in plan.verdicts] == ["half", "plain_hub", "plain", "zeta", "reference"]


def test_what_is_excluded_in_auto_gives_way_to_the_next():
    reason = Refusal("package", "plain not installed", "plain", "pip install plain")
    plan = chosen(PROBLEM, "auto", excluded={"plain": (reason,), "absent": (reason,)})
    assert (plan.backend, plan.rung) == ("zeta", "an exact strategy beside the table")
    assert "- plain             refuses: package is plain not installed, it takes plain (pip install plain)" in str(
        plan
    )
    everything = dict.fromkeys(STRATEGIES, (reason,))
    with pytest.raises(Refused, match="zeta refuses: package is plain not installed"):
        chosen(PROBLEM, "auto", excluded=everything).checked()


def test_a_rewrite_is_part_of_the_verdict():
    verdict = judge(STRATEGIES["plain"], SCALED)
    assert verdict.accepts
    assert str(verdict) == "takes it after fold_scale (mends scale)"
    assert verdict.lowered == PROBLEM
    assert str(judge(STRATEGIES["plain"], PROBLEM)) == "takes it as it is"


def test_a_refusal_holds_what_is_left_after_rewriting():
    verdict = judge(STRATEGIES["plain"], SCALED.replace(needs_lse=True))
    assert [refusal.field for refusal in verdict.refusals] == ["return_lse"]
    assert str(verdict).startswith("refuses: return_lse is wanted")


def test_what_was_excluded_at_the_call_is_passed_over_with_its_reason():
    reason = Refusal("validate_constraints", "strides", "contiguous ones")
    plan = chosen(PROBLEM, ("plain", "zeta"), excluded={"plain": (reason,)})
    assert plan.backend == "zeta"
    assert plan.passed_over[0].refusals == (reason,)


def test_only_candidates_before_the_chosen_one_were_passed_over():
    assert [verdict.name for verdict in chosen(PROBLEM, ("half", "plain", "half")).passed_over] == ["half"]
    assert [verdict.name for verdict in chosen(PROBLEM, ("plain", "half")).passed_over] == []


def test_a_refused_plan_is_a_value_until_it_is_checked():
    plan = chosen(NOT_SQUARE, ("half", "plain"))
    assert plan.refused
    with pytest.raises(Refused) as caught:
        plan.checked()
    assert list(caught.value.refusals) == ["half", "plain"]
    assert "half refuses: dtype is float32, it takes float16" in str(caught.value)
    assert "plain refuses: mask is causal, it takes no mask" in str(caught.value)


def test_an_empty_problem_is_never_refused():
    plan = chosen(PROBLEM.replace(batch=0), "half")
    assert plan.checked() is plan
    assert not plan.refused


def test_a_plan_prints_as_its_explanation():
    assert str(chosen(NOT_SQUARE, ("half", "auto"), origin="scope")).splitlines() == [
        "B1 H2 Q8 K9 D8 float32 BHSD on cpu, mask causal top_left",
        "-> zeta: an exact strategy beside the table (wish 'half > auto' from scope)",
        "  - half              refuses: dtype is float32, it takes float16 (cast the tensors); "
        "mask is causal, it takes no mask (use native or reference)",
        "  - plain             refuses: mask is causal, it takes no mask (use native or reference)",
        "  * zeta              takes it as it is",
        "  + reference         takes it as it is",
    ]


# What experience says

LARGE = PROBLEM.replace(query_length=512, key_length=512, head_dim=64, value_dim=64)
BANDED = LARGE.replace(mask=MaskFacts(causal="top_left"))
HALF = LARGE.replace(dtype=torch.float16)


def measured(winner, source=MEASURED, **more):
    return Knowledge(winner, source, **more)


@pytest.mark.parametrize(
    ("known", "backend", "rung"),
    [
        (Knowledge(), "plain", "preference table for cpu"),
        (measured("zeta", SHIPPED), "zeta", "shipped timing table"),
        (measured("zeta"), "zeta", "measured timing"),
        (measured("reference"), "reference", "measured timing"),
        (measured("zeta", LOCKED), "zeta", "lock"),
        (measured("half"), "plain", "preference table for cpu"),
        (measured("half", LOCKED), "refused", "the lock's half does not take it"),
        (measured("absent"), "plain", "preference table for cpu"),
        (measured("absent", LOCKED), "refused", "the lock's absent does not take it"),
        (measured("zeta", faults={"zeta": "wrong"}), "plain", "preference table for cpu"),
        (measured("zeta", LOCKED, faults={"zeta": "wrong"}), "refused", "the lock's zeta does not take it"),
        (Knowledge(faults={"plain": "wrong"}), "zeta", "an exact strategy beside the table"),
        (Knowledge(faults={"plain": "wrong", "zeta": "wrong"}), "reference", "nothing faster takes it"),
    ],
)
@pytest.mark.parametrize("problem", [LARGE, PROBLEM], ids=["large", "small"])
def test_the_ladder_with_knowledge(problem, known, backend, rung):
    plan = chosen(problem, "auto", known=known)
    assert (plan.backend, plan.rung) == (backend, rung)
    assert plan == chosen(problem, "auto", known=known)


@pytest.mark.parametrize("source", [SHIPPED, MEASURED, LOCKED])
@pytest.mark.parametrize("winner", ["plain", "plain+upcast", "zeta"])
def test_the_winners_row_is_the_one_with_the_star(source, winner):
    plan = chosen(HALF, "auto", known=measured(winner, source))
    assert [verdict.label for verdict in plan.rows if verdict is plan.chosen] == [winner]
    assert [line.split()[1] for line in str(plan).splitlines() if line.startswith("  * ")] == [winner]


@pytest.mark.parametrize("source", [SHIPPED, MEASURED, LOCKED])
def test_a_name_and_a_list_of_names_are_obeyed_whatever_is_known(source):
    known = measured("zeta", source, faults={"plain": "wrong"})
    assert chosen(LARGE, "plain", known=known).rung == "forced by name"
    assert chosen(LARGE, ("reference", "auto"), known=known).backend == "reference"
    assert chosen(LARGE, ("plain", "reference"), known=known).backend == "reference"


@pytest.mark.parametrize(("source", "rung"), [(SHIPPED, SHIPPED), (MEASURED, MEASURED), (LOCKED, LOCKED)])
def test_auto_in_a_list_stands_for_the_whole_ladder(source, rung):
    plan = chosen(LARGE, ("half", "auto"), known=measured("zeta", source))
    assert (plan.backend, plan.rung) == ("zeta", rung)
    assert [verdict.name for verdict in plan.passed_over] == ["half"]


def test_a_lock_may_name_what_does_not_contend():
    slow = strategy("slow", contends=False)
    strategies = {**STRATEGIES, "slow": slow}
    assert select(LARGE, "auto", strategies, POLICY, known=measured("slow", LOCKED)).backend == "slow"
    assert select(LARGE, "auto", strategies, POLICY, known=measured("slow")).backend == "plain"


def test_quarantine_is_a_refusal_with_the_reason_and_the_way_out():
    plan = chosen(LARGE, "auto", known=Knowledge(faults={"plain": "NaN in query 3"}))
    (refusal,) = next(verdict for verdict in plan.verdicts if verdict.name == "plain").refusals
    assert (refusal.field, refusal.observed) == ("guard", "NaN in query 3")
    assert "--forget" in refusal.remedy


# Contenders


def labels(plan):
    return [verdict.label for verdict in plan.contenders]


def test_contenders_are_in_the_order_of_preference_usual_chains_before_others():
    assert labels(chosen(HALF, "auto")) == [
        "half", "plain", "zeta", "reference", "plain+upcast", "zeta+upcast", "reference+upcast",
    ]  # fmt: skip
    assert labels(chosen(HALF, ("reference", "auto"))) == []


def test_the_chosen_one_comes_first_though_it_does_not_contend():
    strategies = {"first": strategy("first", contends=False), "second": strategy("second")}
    plan = select(LARGE, "auto", strategies, Policy({"*": ("first", "second")}))
    assert (plan.backend, labels(plan)) == ("first", ["first", "second"])


def test_there_are_at_most_eight():
    strategies = {name: strategy(name) for name in "abcdefghijkl"}
    assert labels(select(LARGE, "auto", strategies, POLICY)) == list("abcdefgh")
    assert select(LARGE, "auto", strategies, POLICY, known=measured("i")).backend == "a"
    assert select(LARGE, "auto", strategies, POLICY, known=measured("i", LOCKED)).backend == "i"


def test_what_is_excluded_or_quarantined_is_no_contender():
    plan = chosen(
        LARGE, "auto", excluded={"zeta": (Refusal("package", "x", "y"),)}, known=Knowledge(faults={"plain": "x"})
    )
    assert labels(plan) == ["reference"]


def test_small_problems_have_contenders_only_where_a_winner_is_known():
    assert not worth_timing(PROBLEM)
    assert worth_timing(LARGE)
    assert labels(chosen(PROBLEM, "auto")) == []
    assert labels(chosen(PROBLEM, "auto", known=measured("zeta"))) == ["plain", "zeta", "reference"]


def test_a_problem_is_worth_timing_from_a_million_operations_on():
    one = PROBLEM.replace(batch=1, heads=1, kv_heads=1, head_dim=64, value_dim=64, query_length=64)
    assert worth_timing(one.replace(key_length=64))
    assert not worth_timing(one.replace(key_length=63))


def test_variants_are_the_usual_chain_and_one_optional_rewrite_more_or_less():
    quick = strategy("quick", faster_with=frozenset({"upcast"}), masks=frozenset({"causal"}))
    assert [each.label for each in variants(quick, HALF)] == ["quick+upcast", "quick"]
    assert [each.label for each in variants(quick, LARGE)] == ["quick"]
    assert judge(quick, HALF).label == "quick+upcast"
    assert all(each.accepts for each in variants(quick, HALF))


# Approximate strategies


ALLOWED = LARGE.replace(max_error=0.1)


def test_an_approximate_strategy_is_a_candidate_where_an_error_is_allowed_and_the_guard_watches():
    def has_sparse(problem, policy=POLICY):
        return "sparse" in candidates("auto", problem, STRATEGIES, policy)

    assert has_sparse(ALLOWED)
    assert has_sparse(LARGE.replace(max_error=math.inf))
    assert not has_sparse(LARGE)
    assert not has_sparse(LARGE.replace(max_error=0.0))
    assert not has_sparse(ALLOWED, Policy(POLICY.preferences, guard="off"))
    assert not has_sparse(ALLOWED.replace(dropout_p=0.1))
    assert not has_sparse(ALLOWED.replace(compiling=True))


def test_it_is_chosen_by_measured_timing_and_not_before():
    assert chosen(ALLOWED, "auto").backend == "plain"
    assert labels(chosen(ALLOWED, "auto"))[-1] == "sparse"
    assert chosen(ALLOWED, "auto", known=measured("sparse")).backend == "sparse"
    assert chosen(LARGE, "auto", known=measured("sparse")).backend == "plain"


def test_where_nothing_exact_takes_it_it_is_said_to_be_approximate():
    plan = select(ALLOWED, "auto", {"sparse": STRATEGIES["sparse"]}, POLICY)
    assert (plan.backend, plan.rung) == ("sparse", "within max_error; no exact strategy takes it")


def test_a_bound_on_its_error_that_nobody_measures_is_refused_by_name_too():
    unwatched = Policy(POLICY.preferences, guard="off")
    plan = select(ALLOWED, "sparse", STRATEGIES, unwatched)
    assert [refusal.field for refusal in plan.verdicts[0].refusals] == ["max_error"]
    for problem in (LARGE, LARGE.replace(max_error=math.inf)):
        assert select(problem, "sparse", STRATEGIES, unwatched).backend == "sparse"


# What a plan says of its candidates


def test_rows_have_each_measured_candidate_of_a_strategy_by_its_label():
    known = measured("plain+upcast", seconds={"half": 4e-3, "plain": 3e-3, "plain+upcast": 1e-3})
    plan = chosen(HALF, "auto", known=known)
    rows = [(plan.name_of(row), plan.seconds_of(row)) for row in plan.rows]
    assert rows == [
        ("half", 4e-3), ("plain", 3e-3), ("plain+upcast", 1e-3), ("zeta", None), ("reference", None),
    ]  # fmt: skip
    lines = str(plan).splitlines()
    assert lines[1].startswith("-> plain: measured timing")
    assert lines[2].strip() == "4 times as fast as half"
    assert any(line.startswith("  * plain+upcast") and line.endswith("; 1 ms a call") for line in lines)


def test_a_chosen_candidate_has_a_row_though_it_was_not_measured():
    plan = chosen(HALF, "auto", known=measured("plain+upcast", LOCKED))
    assert [plan.name_of(row) for row in plan.rows if row.name == "plain"] == ["plain", "plain+upcast"]
    assert plan.won == ""


def test_a_refused_candidate_shows_no_time():
    plan = chosen(LARGE, "auto", known=Knowledge(seconds={"half": 1e-3, "plain": 2e-3}))
    assert [plan.seconds_of(row) for row in plan.rows][:2] == [None, 2e-3]


def test_what_was_won_names_the_error_that_it_costs():
    known = measured("sparse", seconds={"plain": 2e-3, "sparse": 1e-3}, errors={"sparse": 0.0123})
    assert chosen(ALLOWED, "auto", known=known).won == "2 times as fast as plain, error 0.012 of at most 0.1"
    assert chosen(ALLOWED, "auto").won == ""
