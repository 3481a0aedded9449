"""Inputs out of a description: calls whose problems are of the class that was asked for, or a reason why not."""

import pytest
import torch

from heedful import AttentionDispatcher, AttentionProblem, InvalidArgument, Policy
from heedful.masks import MaskFacts
from heedful.problem_class import class_of
from heedful.tune.inputs import inputs_for

CPU = torch.device("cpu")
PROBLEM = AttentionProblem(batch=2, heads=4, kv_heads=4, query_length=40, key_length=48, head_dim=16, value_dim=16)
PACKED = PROBLEM.replace(layout="THD", batch=1)


def padding(side, kept, **more):
    return MaskFacts(key_padding=True, side=side, kept=kept, **more)


MASKS = {
    "none": MaskFacts(),
    "causal": MaskFacts(causal="top_left"),
    "causal bottom right": MaskFacts(causal="bottom_right"),
    "window": MaskFacts(window=(5, 3, "top_left")),
    "window bottom right": MaskFacts(window=(5, 0, "bottom_right")),
    "open window": MaskFacts(window=(None, 3, "top_left")),
    "causal window": MaskFacts(causal="bottom_right", window=(5, None, "bottom_right")),
    "right": padding("right", 3),
    "left": padding("left", 2),
    "interior": padding("interior", 4),
    "one key kept": padding("right", 1),
    "nearly all kept": padding("right", 8),
    "nearly all kept, left": padding("left", 8),
    "causal padding": padding("right", 3, causal="top_left"),
    "queries too": padding("right", 3, query_padding=True),
    "dense": MaskFacts(dense="BQK"),
    "dense for all": MaskFacts(dense="QK"),
    "dense of every head": MaskFacts(dense="BHQK"),
    "bias": MaskFacts(bias="HQK", bias_dtype=torch.float32),
    "bias of keys": MaskFacts(bias="BK", bias_dtype=torch.float16),
    "dense and bias": MaskFacts(dense="QK", bias="BHQK", bias_dtype=torch.float32),
}


def problem_made(problem, seed=0):
    given = inputs_for(problem, CPU, seed)
    dispatcher = AttentionDispatcher(policy=Policy())
    return dispatcher.rivals(*given[:4], **given.words)[0].problem


@pytest.mark.parametrize("facts", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("layout", ["BHSD", "BSHD"])
@pytest.mark.parametrize("changes", [{}, {"kv_heads": 2, "value_dim": 8, "dtype": torch.bfloat16}], ids=["", "gqa"])
def test_a_call_is_of_the_class_that_was_asked_for(facts, layout, changes):
    problem = PROBLEM.replace(mask=facts, layout=layout, **changes)
    assert class_of(problem_made(problem)) == class_of(problem)


@pytest.mark.parametrize(
    "facts",
    [
        MaskFacts(varlen=True, packing="tidy"),
        MaskFacts(varlen=True, packing="loose"),
        MaskFacts(varlen=True, packing="tidy", causal="top_left"),
        MaskFacts(varlen=True, packing="tidy", packed_alike=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["THD", "BHSD"])
def test_packed_sequences_too(facts, layout):
    problem = PACKED.replace(mask=facts, layout=layout)
    if facts.packed_alike:
        problem = problem.replace(key_length=problem.query_length)
    made = problem_made(problem)
    assert class_of(made) == class_of(problem)
    assert made.mask.packed_alike >= facts.packed_alike


@pytest.mark.parametrize(
    "changes",
    [{"needs_lse": True}, {"softcap": 20.0}, {"scale": 0.3}, {"max_error": 0.2}, {"batch": 1}, {"key_length": 7},
     {"dtype": torch.float64}, {"heads": 1, "kv_heads": 1}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("mask", ["none", "causal", "dense for all"])
def test_what_is_asked_beside_the_mask_is_asked_of_the_call(changes, mask):
    problem = PROBLEM.replace(mask=MASKS[mask], **changes)
    made = problem_made(problem)
    assert class_of(made) == class_of(problem)
    assert made.scale == problem.scale


def test_one_query_of_many_keys_as_models_that_write_have_it():
    problem = PROBLEM.replace(query_length=1, kv_heads=1)
    assert class_of(problem_made(problem)) == class_of(problem)


def test_a_padding_is_drawn_as_told_and_leaves_no_row_without_keys():
    for side, kept in (("right", 1), ("left", 8), ("interior", 4), ("right", 0)):
        given = inputs_for(PROBLEM.replace(mask=padding(side, kept)), CPU)
        keep = given.attn_mask.padding
        assert keep.shape == (2, 48)
        assert 1 <= keep.sum(-1).min() == keep.sum(-1).max() < 48
    assert inputs_for(PROBLEM.replace(key_length=1, mask=padding("right", 4)), CPU).attn_mask.padding.all()


def test_a_dense_mask_hides_some_pairs_and_no_row():
    seen = inputs_for(PROBLEM.replace(mask=MASKS["dense"]), CPU).attn_mask.dense
    assert seen.shape == (2, 1, 40, 48)
    assert 0.5 < seen.float().mean() < 0.9
    assert seen.any(-1).all()


def test_the_same_seed_gives_the_same_call_and_another_one_another():
    problem = PROBLEM.replace(mask=MASKS["dense and bias"])
    one, two, other = (inputs_for(problem, CPU, seed) for seed in (0, 0, 1))
    for name in ("query", "key", "value"):
        assert torch.equal(getattr(one, name), getattr(two, name))
        assert not torch.equal(getattr(one, name), getattr(other, name))
    assert torch.equal(one.attn_mask.bias, two.attn_mask.bias)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"broadcast": True}, "broadcast"), ({"mask": MaskFacts(block=True)}, "block mask"), ({"sinks": True}, "sinks"),
        ({"needs_grad": True}, "gradient"), ({"autocast": True}, "autocast"), ({"dropout_p": 0.1}, "dropout"),
        ({"deterministic": True}, "determinism"), ({"compiling": True}, "torch.compile"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused_with_the_reason(changes, reason):
    with pytest.raises(InvalidArgument, match=f"problem: got {reason} in B2 H4.*; nothing measures such calls"):
        inputs_for(PROBLEM.replace(**changes), CPU)
