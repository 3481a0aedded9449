"""What the benchmarks share: right answers pass, wrong ones do not, and records are where they were wanted."""

from __future__ import annotations

import json
import math

import pytest
import torch
from rich.table import Table


@pytest.fixture
def measuring(benchmark_module):
    return benchmark_module("measuring")


def drawn():
    torch.manual_seed(0)
    return tuple(torch.randn(2, 3, length, 8) for length in (130, 20, 20))


def test_sdpa_is_held_to_the_formula(measuring):
    query, key, value = drawn()
    seen = torch.rand(2, 1, 130, 20) < 0.5
    seen[..., 0] = True
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, seen)
    measuring.check_by_formula("sdpa", out, query, key, value, seen)
    with pytest.raises(measuring.WrongAnswer, match="sdpa"):
        measuring.check_by_formula("sdpa", out, query, key, value, None)


@pytest.mark.parametrize("broken", [lambda out: out * 1.01, lambda out: out[:, :1], lambda out: out.fill_(math.nan)])
def test_wrong_answers_are_found(measuring, broken):
    query, key, value = drawn()
    sdpa = torch.nn.functional.scaled_dot_product_attention
    calls = {"one": lambda: sdpa(query, key, value), "other": lambda: broken(sdpa(query, key, value))}
    with pytest.raises(measuring.WrongAnswer, match="these: other"):
        measuring.check_ways(calls, query, key, value, of="these")


def test_a_wrong_row_between_the_checked_ones_is_found(measuring):
    query, key, value = drawn()
    right = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    wrong = right.clone()
    wrong[0, 0, 1] = 0.0
    with pytest.raises(measuring.WrongAnswer):
        measuring.check_ways({"one": lambda: right, "other": lambda: wrong}, query, key, value)


def test_each_round_times_every_way(measuring):
    made = []
    calls = {way: lambda way=way: made.append(way) for way in ("a", "b")}
    times = measuring.measure(calls, rounds=4, number=3)
    assert {way: len(rounds) for way, rounds in times.items()} == {"a": 4, "b": 4}
    assert made.count("a") == made.count("b")
    assert "".join(made[-24:]) == "bbbaaa" + "aaabbb" + "aaabbb" + "bbbaaa"


def test_ratios_are_medians_of_the_rounds(measuring):
    assert measuring.ratio({"a": [2.0, 30.0, 4.0], "b": [1.0, 10.0, 4.0]}, "a", "b") == 2.0


@pytest.mark.parametrize(("time", "text"), [(0.5, "0.5 us"), (1500.0, "1.5 ms"), (2.5e6, "2.5 s")])
def test_times_have_units(measuring, time, text):
    assert measuring.spoken(time) == text


@pytest.mark.parametrize(("arguments", "saved"), [([], False), (["--no-save"], False), (["--out"], True)])
def test_a_quick_run_saves_only_where_it_is_told(measuring, monkeypatch, tmp_path, capsys, arguments, saved):
    monkeypatch.setattr(measuring, "RESULTS", tmp_path / "usual")
    arguments = ["--out", str(tmp_path / "told")] if arguments == ["--out"] else arguments
    wanted = measuring.parsed(measuring.options("What it is.", rounds=9), ["--quick", "--json", *arguments])
    measuring.finish("name", {"machine": {"cores": 2}}, [Table()], wanted)
    assert json.loads(capsys.readouterr().out) == {"machine": {"cores": 2}}
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json")] == ["told/name.json"] * saved


def test_a_usual_run_saves_by_the_size_of_the_machine(measuring, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(measuring, "RESULTS", tmp_path)
    wanted = measuring.parsed(measuring.options("What it is.", rounds=9), [])
    assert wanted.rounds == 9
    measuring.finish("name", {"machine": {"cores": 2}}, [Table("a column")], wanted)
    assert json.loads((tmp_path / "cpu-2core" / "name.json").read_text()) == {"machine": {"cores": 2}}
    assert "a column" in capsys.readouterr().out
