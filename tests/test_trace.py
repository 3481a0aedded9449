"""Traces: problems with their numbers of calls, the most called first, written and read back."""

import dataclasses
import json

import pytest
import torch

from heedful import AttentionDispatcher, InvalidArgument, Policy
from heedful.trace import Trace


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.trace"


@pytest.fixture
def traced(factory):
    """Calls of three problems: two of self-attention, five of causal attention, one under a name and one under auto."""
    dispatcher = AttentionDispatcher(factory, policy=Policy())
    query, other = torch.randn(1, 2, 8, 16), torch.randn(1, 2, 12, 16)
    for _ in range(2):
        dispatcher.attention(query, query, query)
    for _ in range(5):
        dispatcher.attention(query, query, query, is_causal=True)
    dispatcher.attention(other, other, other, backend="reference")
    dispatcher.attention(other, other, other, max_error=0.5)
    dispatcher.attention(other, other, other)
    return Trace.of(dispatcher.experience.tallies.values())


def test_calls_are_counted_by_problem_whoever_computed_them(traced):
    told = [(str(problem), calls) for problem, calls in traced.calls.items()]
    start = "B1 H2 Q{} K{} D16 float32 BHSD on cpu"
    assert told[0] == (start.format(8, 8) + ", mask causal top_left", 5)
    assert dict(told[1:]) == {
        start.format(8, 8): 2,
        start.format(12, 12): 2,
        start.format(12, 12) + ", max_error 0.5": 1,
    }
    assert told[-1][1] == 1


def test_a_problem_without_calls_is_not_in_it(factory):
    dispatcher = AttentionDispatcher(factory, policy=Policy())
    query = torch.randn(1, 2, 8, 16)
    dispatcher.explain(query, query, query)
    assert Trace.of(dispatcher.experience.tallies.values()) == Trace({})


def test_it_is_read_back_as_it_was(traced, path):
    traced.save(path)
    back = Trace.load(path)
    assert back == traced
    assert list(back.calls) == list(traced.calls)


def test_options_of_a_call_are_kept(path, traced):
    problem = dataclasses.replace(next(iter(traced.calls)), options=(("kernel_options", (64, 32)),))
    Trace({problem: 3}).save(path)
    assert Trace.load(path).calls == {problem: 3}


@pytest.mark.parametrize("calls", [0, -1, "2", None, 2.5])
def test_calls_that_are_no_number_are_refused(traced, path, calls):
    traced.save(path)
    data = json.loads(path.read_text())
    data["problems"][0]["calls"] = calls
    path.write_text(json.dumps(data))
    with pytest.raises(InvalidArgument, match=r"trace: got .*run\.trace; it cannot be read"):
        Trace.load(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("batch", -1), ("dtype", "int8"), ("scale", 10**400), ("mask", None), ("dropout_p", "x"), ("layout", []),
     ("options", [["name", {"no": "hash"}]]), ("options", 3), ("capability", [9])],
)  # fmt: skip
def test_each_field_of_a_problem_is_checked(traced, path, field, value):
    traced.save(path)
    data = json.loads(path.read_text())
    data["problems"][0]["problem"][field] = value
    path.write_text(json.dumps(data))
    with pytest.raises(InvalidArgument, match="cannot be read"):
        Trace.load(path)


@pytest.mark.parametrize("problems", [None, 3, [3], [{}], {"a": 1}])
def test_problems_that_are_no_list_of_them_are_refused(path, problems):
    path.write_text(json.dumps({"format": 1, "kind": "trace", "problems": problems}))
    with pytest.raises(InvalidArgument, match="cannot be read"):
        Trace.load(path)
