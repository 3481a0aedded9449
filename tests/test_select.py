"""Selection: pure, in the order of the wish, with a verdict on every candidate."""

import pytest
import torch

from heedful import AttentionProblem, AttentionStrategy, Limits, Policy, Refusal, Refused
from heedful.masks import MaskFacts
from heedful.select import judge, select

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
