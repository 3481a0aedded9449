"""Which checks are made: few, the table's, or all; in which dtypes; by name."""

from __future__ import annotations

from collections import Counter

import torch

from heedful.testing import SAMPLES, checks
from heedful.verify.choice import Choice
from heedful.verify.features import NAMES, features_of

EVERY = checks("reference", devices=("cpu",))


def samples(choice: Choice) -> list[str]:
    return list(dict.fromkeys(check.sample.name for check in choice.of(EVERY) if check.sample))


def test_usually_every_sample_of_the_table_is_asked_once() -> None:
    assert samples(Choice()) == [sample.name for sample in SAMPLES]
    assert not any(check.slow for check in Choice().of(EVERY))


def test_all_is_all() -> None:
    assert Choice("all").of(EVERY) == EVERY


def test_quick_has_a_few_of_every_feature() -> None:
    quick, usual = Choice("quick").of(EVERY), Choice().of(EVERY)
    assert len(quick) < len(usual) / 8
    few, many = (Counter(name for check in every for name in features_of(check)) for every in (quick, usual))
    for name in NAMES[:-1]:
        assert few[name] >= min(3, many[name]), name
    assert {check.aspect for check in quick if check.sample is None} == {"device", "plain", "auto"}


def test_in_some_dtypes_every_sample_is_in_these_and_no_other() -> None:
    chosen = Choice(dtypes=(torch.float16, torch.bfloat16)).of(EVERY)
    found = {check.sample.dtype for check in chosen if check.sample}
    assert found == {torch.float16, torch.bfloat16}
    names = [check.id for check in chosen]
    assert len(set(names)) == len(names)
    for name in ("plain*float16", "plain*bfloat16", "dropout-0.25*float16", "compiled*bfloat16", "dtype-float16"):
        assert name in samples(Choice(dtypes=(torch.float16, torch.bfloat16)))
    assert not [name for name in names if "*bshd" in name]
    features = {name for check in chosen for name in features_of(check)}
    assert set(NAMES) - features <= {"float32", "float64", "autocast", "must be refused"}


def test_in_a_dtype_quick_is_quick() -> None:
    assert len(Choice("quick", dtypes=(torch.float16,)).of(EVERY)) < 150


def test_by_name_or_pattern_out_of_all() -> None:
    assert [check.name for check in Choice(only=("window-(2,0)-lse",)).of(EVERY)] == ["window-(2,0)-lse"]
    assert [check.name for check in Choice(only=("plain*float16-forward",)).of(EVERY)] == ["plain*float16-forward"]
    assert len(Choice(only=("scale-*",)).of(EVERY)) > 30
    assert [check.name for check in Choice(only=("coverage",)).of(EVERY)] == ["coverage"]
    assert Choice(only=("no-such-check",)).of(EVERY) == ()
