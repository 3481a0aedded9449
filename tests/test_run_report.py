"""The report of a run: rows by layer and plan, their share of the time, the guard's word; saved and read back."""

import json

import pytest
import torch

from heedful import AttentionProblem, AttentionStrategyFactory, InvalidArgument, Policy
from heedful.run_report import RunReport, RunRow, run_report, stars
from heedful.select import select
from heedful.tally import Tally, Trust

PROBLEM = AttentionProblem(batch=1, heads=2, kv_heads=2, query_length=8, key_length=8, head_dim=8, value_dim=8)
STRATEGIES = AttentionStrategyFactory(plugins=False).strategies()


def tally(calls, problem=PROBLEM, wish="auto", **trust):
    """Calls of a plan, with what the guard knows."""
    made = Tally(select(problem, wish, STRATEGIES, Policy()), Trust(**trust))
    made.before = calls
    return made


@pytest.fixture
def report():
    slow = tally(4, checks=2, seconds=0.03)
    fast = tally(40, PROBLEM.replace(scale=0.5), checks=3, seconds=0.001)
    untimed = tally(7, PROBLEM.replace(dtype=torch.float64), wish="reference")
    return run_report([untimed, fast, slow], {slow: {"unet.down.0.attn1": 1, "unet.down.1.attn1": 2}})


def test_rows_come_by_layer_those_that_took_most_time_first(report):
    assert [(row.layer, row.calls, row.backend) for row in report] == [
        ("unet.down.*.attn1", 3, "native"),
        ("", 40, "native"),
        ("", 1, "native"),
        ("", 7, "reference"),
    ]
    assert [row.seconds for row in report] == pytest.approx([0.09, 0.04, 0.03, 0.0])
    assert [row.share for row in report] == pytest.approx([9 / 16, 4 / 16, 3 / 16, 0])
    assert (len(report), report.calls) == (4, 51)


def test_it_prints_as_a_table(report):
    lines = str(report).splitlines()
    assert lines[0].split() == ["calls", "time", "a", "call", "backend", "lowerings", "guard", "layer", "problem"]
    assert lines[1].split()[:5] == ["3", "56%", "30", "ms", "native"]
    assert "right in 2" in lines[1]
    assert lines[4].split()[:4] == ["7", "reference", "not", "checked"]  # no time, and none is made up
    assert lines[-1] == "51 calls of 4 kinds"
    assert len({line.index("B1 H2 Q8") for line in lines[1:-1]}) == 1


def test_an_empty_report_is_one_too(tmp_path):
    empty = run_report([], {})
    assert str(empty).endswith("0 calls of 0 kinds")
    empty.save(tmp_path / "report")
    assert RunReport.load(tmp_path / "report") == empty


def test_a_fault_of_any_of_the_calls_of_a_row_is_told():
    """Two kinds of calls that read alike, as a scale is printed in four digits, and only the second one wrong."""
    right = tally(1, PROBLEM.replace(scale=0.5), checks=5)
    wrong = tally(1, PROBLEM.replace(scale=0.50001), fault="all of it is NaN")
    (row,) = run_report([right, wrong], {})
    assert (row.calls, row.guard) == (2, "WRONG: all of it is NaN")


@pytest.mark.parametrize(
    ("path", "starred"),
    [
        ("unet.down_blocks.0.attentions.11.attn1", "unet.down_blocks.*.attentions.*.attn1"),
        ("0.attn", "*.attn"), ("0", "*"), ("attn1", "attn1"), ("", ""), ("a.1b.c2", "a.1b.c2"),
    ],
)  # fmt: skip
def test_numbers_are_starred_and_names_with_digits_are_not(path, starred):
    assert stars(path) == starred


def test_it_is_read_back_as_it_was(report, tmp_path):
    report.save(tmp_path / "report")
    assert RunReport.load(tmp_path / "report") == report
    assert json.loads((tmp_path / "report").read_text()) == json.loads(json.dumps(report.to_dict()))


@pytest.mark.parametrize(
    ("field", "value"),
    [("calls", 0), ("calls", -1), ("calls", 1.0), ("calls", True), ("calls", 10**400), ("seconds", 1),
     ("seconds", -1.0), ("share", -0.1), ("share", "1"), ("layer", None), ("backend", ["a"]), ("lowerings", "upcast"),
     ("lowerings", [1]),
     ("guard", 3), ("more", "than that")],
    ids=str,
)  # fmt: skip
def test_each_field_of_a_row_is_checked(report, tmp_path, field, value):
    data = json.loads(json.dumps(report.to_dict()))
    data["rows"][1][field] = value
    (tmp_path / "report").write_text(json.dumps(data))
    with pytest.raises(InvalidArgument, match=r"report: got .*; it cannot be read"):
        RunReport.load(tmp_path / "report")


@pytest.mark.parametrize("number", ["1e999", "NaN", "Infinity"])
def test_times_without_end_are_refused(report, tmp_path, number):
    text = json.dumps({**report.to_dict(), "rows": [{**report.to_dict()["rows"][0], "seconds": "HERE"}]})
    (tmp_path / "report").write_text(text.replace('"HERE"', number))
    with pytest.raises(InvalidArgument, match="cannot be read"):
        RunReport.load(tmp_path / "report")


def test_a_row_that_lacks_a_field_is_refused(report, tmp_path):
    data = json.loads(json.dumps(report.to_dict()))
    del data["rows"][0]["guard"]
    (tmp_path / "report").write_text(json.dumps(data))
    with pytest.raises(InvalidArgument, match="guard"):
        RunReport.load(tmp_path / "report")


def test_a_row_is_a_value():
    row = RunRow("", "B1", "native", (), "auto", 1, 0.0, 0.0, "")
    with pytest.raises(AttributeError):
        row.calls = 2
