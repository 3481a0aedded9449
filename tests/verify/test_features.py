"""Every check has a row, every row has checks, and each stands where one would look for it."""

from __future__ import annotations

import pytest

from heedful.testing import SAMPLES, Check, checks
from heedful.testing.subject import Subject
from heedful.testing.tolerance import Tolerance
from heedful.verify.features import FEATURES, NAMES, WHOLE, features_of

SUBJECT = Subject.of("reference", "cpu", Tolerance())
EVERY = checks("reference", devices=("cpu",))
BY_NAME = {sample.name: sample for sample in SAMPLES}


def of(name: str, aspect: str = "forward") -> set[str]:
    return set(features_of(Check(SUBJECT, aspect, BY_NAME[name])))


def test_every_check_has_a_row_and_every_row_has_checks() -> None:
    rows = [features_of(check) for check in EVERY if not check.slow]
    assert all(rows)
    assert {name for row in rows for name in row} == set(NAMES)


def test_names_are_unique() -> None:
    assert len(set(NAMES)) == len(NAMES) == len(FEATURES) + 1


@pytest.mark.parametrize(
    ("name", "aspect", "rows"),
    [
        ("plain", "forward", {"float32"}),
        ("plain", "both", {"float32", "LSE", "gradient"}),
        ("head-dim-40-bfloat16", "forward", {"bfloat16", "head dims", "lengths"}),
        ("gqa-bshd-causal", "garbage", {"float32", "grouped heads", "layout BSHD", "causal", "NaN and garbage hidden"}),
        ("gqa-window", "lse", {"float32", "grouped heads", "window", "LSE"}),
        ("bool-mask-that-is-padding-per-head", "forward", {"float32", "padding"}),
        ("bias-that-is-causal", "forward", {"float32", "causal", "bias"}),
        ("varlen-causal-top_left", "forward", {"float32", "packed sequences", "causal", "lengths"}),
        ("empty-row-bias-float16", "forward", {"float16", "bias", "queries without keys"}),
        ("empty-rows-window-away", "forward", {"float32", "window", "queries without keys", "lengths"}),
        ("dropout-gradient", "dropout", {"float32", "dropout", "gradient", "head dims", "lengths"}),
        ("dropout-lse", "dropout", {"float32", "dropout", "LSE", "head dims", "lengths"}),
        ("compiled", "compile", {"float32", "torch.compile"}),
        ("strides-sliced-masked-bfloat16", "forward", {"bfloat16", "strides", "bool mask"}),
        ("zero-keys-causal", "forward", {"float32", "causal", "zero sizes"}),
        ("sinks", "forward", {"float32", "must be refused"}),
        ("scale-0.0", "forward", {"float32", "scale"}),
    ],
)
def test_a_check_stands_where_one_would_look_for_it(name: str, aspect: str, rows: set[str]) -> None:
    assert of(name, aspect) == rows


def test_a_check_of_the_whole_strategy_has_a_row_of_its_own() -> None:
    assert features_of(Check(SUBJECT, "coverage")) == (WHOLE,)
