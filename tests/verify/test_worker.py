"""What a worker tells of its checks, in this process: right with its error, refused with its limits, wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from heedful.verify import worker
from heedful.verify.job import Job
from heedful.verify.worker import work


def told(job: Job) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    work(job, lambda event: events.append(json.loads(json.dumps(event, allow_nan=False))))
    return events


def test_a_right_check_has_its_error_in_units_of_what_is_allowed() -> None:
    ready, begin, end, done = told(Job(backend="native", only=("window-(2,0)-gradient",)))
    assert (ready["event"], ready["name"], ready["checks"], ready["samples"]) == ("ready", "native", 1, 1)
    assert ready["exactness"] == "exact"
    assert (begin["check"], begin["sample"], begin["aspect"]) == ("window-(2,0)-gradient", "window-(2,0)", "gradient")
    assert begin["features"] == ["float32", "window", "gradient"]
    assert (end["outcome"], end["detail"]) == ("right", "")
    assert 0 < end["units"] <= 1
    assert 0 < end["error"] < 1e-5
    assert done == {"event": "done"}


def test_a_refused_check_names_its_limits() -> None:
    end = told(Job(backend="native", only=("softcap-forward",)))[2]
    assert (end["outcome"], end["limits"]) == ("refused", ["softcap"])
    assert "softcap is 2.0, it takes none" in end["reasons"][0]
    assert end["units"] is None


def test_a_wrong_check_says_by_how_much(plugins: str) -> None:
    end = told(Job(plugin=f"{plugins}:Deaf", only=("scale-0.3-forward",)))[2]
    assert (end["outcome"], end["what"]) == ("wrong", "the output")
    assert end["units"] > 1000
    assert end["detail"].startswith("the output is off by")


def test_a_worker_goes_on_behind_the_checks_that_were_done() -> None:
    job = Job(backend="native", only=("plain-*",))
    every = [event["check"] for event in told(job) if event["event"] == "begin"]
    last = told(Job(backend="native", only=("plain-*",), done=len(every) - 1))
    assert [event["event"] for event in last] == ["ready", "begin", "end", "done"]
    assert (last[0]["checks"], last[1]["check"]) == (len(every), every[-1])


def test_another_seed_draws_other_tensors() -> None:
    first, again, other = (
        told(Job(backend="native", only=("plain-forward",), seed=seed))[2]["error"] for seed in (0, 0, 5)
    )
    assert first == again != other


def test_what_is_no_plugin_is_told(plugins: str) -> None:
    [event] = told(Job(plugin=f"{plugins}:no_strategy"))
    assert event["event"] == "invalid"
    assert "give a subclass" in event["text"]


def test_a_device_that_a_kernel_broke_ends_the_worker(plugins: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that comes after an illegal access on a GPU says anything about a kernel."""

    class Ended(Exception):
        pass

    def end(status: int) -> None:
        raise Ended(status)

    monkeypatch.setattr(worker, "_is_broken", lambda device: True)
    monkeypatch.setattr(worker.os, "_exit", end)
    with pytest.raises(Ended, match=str(worker.BROKEN_DEVICE)):
        told(Job(plugin=f"{plugins}:Deaf", only=("scale-0.3-*",)))


def test_a_cpu_is_never_broken() -> None:
    assert not worker._is_broken("cpu")


def test_half_characters_of_an_error_do_not_reach_the_parent(fresh_python: Callable[..., Any]) -> None:
    script = "from heedful.verify.worker import _results, _teller; _teller(_results())({'detail': 'x' + chr(0xD800)})"
    answer = fresh_python(script)
    assert json.loads(answer.stdout) == {"detail": "x?"}, answer.stderr
