"""Classes of problems: what changes speed or rightness separates them, what does not leaves them one."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from heedful import AttentionProblem
from heedful.masks import MaskFacts
from heedful.problem_class import _bucket, class_of

PROBLEM = AttentionProblem(
    batch=2, heads=8, kv_heads=8, query_length=1024, key_length=1024, head_dim=64, value_dim=64, needs_lse=False
)
PADDED = MaskFacts(key_padding=True, side="right", kept=2)
BIASED = MaskFacts(bias="HQK", bias_dtype=torch.float32)


def with_mask(**facts):
    return PROBLEM.replace(mask=MaskFacts(**facts))


def test_a_class_is_spelled_in_words():
    assert class_of(PROBLEM) == "cpu B2 H8/8 Q1024 K1024 D64/64 float32 BHSD"
    problem = with_mask(causal="top_left").replace(dtype=torch.float16, kv_heads=2, key_length=1001, needs_lse=True)
    assert class_of(problem) == "cpu B2 H8/2 Q1024 K1024* D64/64 float16 BHSD causal-top_left needs_lse"


@pytest.mark.parametrize("field", ["query_length", "key_length", "batch"])
def test_lengths_within_a_quarter_octave_share_a_class(field):
    middle = PROBLEM.replace(**{field: 1024})
    for alike in (944, 1112):  # 1024 * 2 ** (±1/8) is 939 and 1117
        assert class_of(PROBLEM.replace(**{field: alike})) == class_of(middle)
    for other in (936, 1120, 512, 2048):
        assert class_of(PROBLEM.replace(**{field: other})) != class_of(middle)


@given(st.integers(0, 1 << 24), st.floats(1.0, 1.03))
def test_neighbouring_lengths_are_in_the_same_or_in_adjacent_buckets(length, factor):
    one, other = _bucket(length), _bucket(int(length * factor))
    assert one <= other
    between = {_bucket(each) for each in (length, int(length * factor))}
    assert len(between) == 1 or other <= math.ceil(one * 2**0.25) + 1


@given(st.integers(1, 1 << 24))
def test_a_bucket_is_an_eighth_of_an_octave_to_either_side(length):
    assert abs(_bucket(length) - length) <= (2**0.125 - 1) * length + 0.5  # the middle is rounded


def test_each_short_length_is_a_class_of_its_own():
    assert [_bucket(length) for length in range(9)] == list(range(9))


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": torch.float16}, {"device": "cuda"}, {"layout": "BSHD"}, {"heads": 16}, {"kv_heads": 4},
        {"head_dim": 72}, {"value_dim": 72}, {"key_length": 1023}, {"needs_lse": True}, {"needs_grad": True},
        {"dropout_p": 0.1}, {"softcap": 30.0}, {"sinks": True}, {"deterministic": True}, {"autocast": True},
        {"broadcast": True}, {"compiling": True}, {"max_error": 0.1}, {"max_error": math.inf},
        {"options": (("block", 64),)},
    ],
    ids=str,
)  # fmt: skip
def test_what_matters_separates(changes):
    assert class_of(PROBLEM.replace(**changes)) != class_of(PROBLEM)


def test_an_error_budget_separates_to_the_last_digit():
    """A strategy that is quarantined under a tight budget may serve a loose one, and the other way round."""
    budgets = (None, 1e-3, 0.1, 0.1 + 1e-9, math.inf)
    assert len({class_of(PROBLEM.replace(max_error=budget)) for budget in budgets}) == len(budgets)


STRUCTURES = (
        {"causal": "top_left"}, {"causal": "bottom_right"}, {"window": (64, 0, "top_left")},
        {"window": (128, 0, "top_left")}, {"window": (None, 0, "top_left")}, {"window": (64, 0, "bottom_right")},
        {"key_padding": True}, {"key_padding": True, "side": "right", "kept": 2},
        {"key_padding": True, "side": "right", "kept": 3}, {"key_padding": True, "side": "left", "kept": 2},
        {"query_padding": True}, {"varlen": True, "packing": "tidy"}, {"varlen": True, "packing": "loose"},
        {"dense": "QK"}, {"dense": "BQK"}, {"dense": ""}, {"dense": "", "noop": True}, {"block": True},
        {"bias": "HQK", "bias_dtype": torch.float32}, {"bias": "HQK", "bias_dtype": torch.float16},
        {"bias": "QK", "bias_dtype": torch.float32}, {"causal": "top_left", "key_padding": True},
)  # fmt: skip


def test_each_structure_of_a_mask_is_another_class():
    classes = {class_of(PROBLEM)} | {class_of(with_mask(**facts)) for facts in STRUCTURES}
    assert len(classes) == 1 + len(STRUCTURES)


@pytest.mark.parametrize(
    "changes",
    [{"scale": 0.3}, {"capability": (9, 0)}, {"architecture": "sm_90"}, {"query_length": 1000}, {"key_length": 1000}],
    ids=str,
)
def test_what_changes_no_time_does_not_separate(changes):
    assert class_of(PROBLEM.replace(**changes)) == class_of(PROBLEM)


PROBLEMS = st.builds(
    AttentionProblem,
    batch=st.integers(0, 64), heads=st.integers(1, 32), kv_heads=st.integers(1, 32),
    query_length=st.integers(0, 1 << 20), key_length=st.integers(0, 1 << 20),
    head_dim=st.integers(1, 512), value_dim=st.integers(0, 512),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    layout=st.sampled_from(["BHSD", "BSHD", "THD"]),
    mask=st.sampled_from([MaskFacts(), PADDED, BIASED, MaskFacts(window=(7, None, "top_left"), noop=True)]),
    dropout_p=st.sampled_from([0.0, 0.25]), scale=st.none() | st.floats(-1, 1), softcap=st.none() | st.floats(1, 50),
    needs_lse=st.booleans(), needs_grad=st.booleans(), max_error=st.none() | st.floats(0, 1),
    options=st.lists(st.tuples(st.sampled_from(["block", "mode"]), st.text() | st.integers())).map(tuple),
)  # fmt: skip


@given(PROBLEMS)
def test_a_problem_read_back_is_of_the_same_class_which_is_one_printable_line(problem):
    key = class_of(problem)
    assert class_of(AttentionProblem.from_dict(json.loads(json.dumps(problem.to_dict())))) == key
    assert key.isprintable()
    assert "\n" not in key


def test_options_with_lists_are_read_back_as_they_were():
    problem = PROBLEM.replace(options=(("blocks", (64, (1, 2))),))
    back = AttentionProblem.from_dict(json.loads(json.dumps(problem.to_dict())))
    assert back == problem
    assert hash(back) == hash(problem)
