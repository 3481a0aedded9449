"""What is collected of workers, whatever becomes of them. Those here are scripted; ``test_child`` has real ones."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from heedful import AttentionDispatcher, AttentionStrategyFactory, Facts, Policy
from heedful.verify import run as module
from heedful.verify.job import Job
from heedful.verify.run import MOST_ENDS, Run, is_wrong, lacking

RIGHT = {"event": "end", "outcome": "right", "detail": "", "limits": [], "reasons": [], "seconds": 0.5}
RIGHT |= {"what": "the output", "error": 1e-7, "units": 0.25}
REFUSED = {**RIGHT, "outcome": "refused", "detail": "softcap (takes none)", "limits": ["softcap"], "units": None}
WRONG = {**RIGHT, "outcome": "wrong", "detail": "the output is off by 3", "units": 40.0, "error": 3.0}
CRASH = {"event": "crashed", "how": "signal 11 (SIGSEGV)", "stderr": "a\nCUDA error: an illegal access"}
HANG = {"event": "hung", "seconds": 2.0}
NAMES = ("one", "two", "three", "four")


class Workers:
    """Workers by script: what becomes of each check, once; what ends a worker stands in place of an ``end``."""

    def __init__(self, fates: dict[str, list[dict[str, Any]]], starts: list[dict[str, Any]]) -> None:
        self.fates, self.starts = fates, starts
        self.jobs: list[Job] = []
        self.open = 0

    def __call__(self, job: Job, seconds: float) -> Worker:
        self.jobs.append(job)
        return Worker(self, job)


class Worker:
    def __init__(self, workers: Workers, job: Job) -> None:
        self.workers, self.job, self.ended = workers, job, False

    def __enter__(self) -> Worker:
        self.workers.open += 1
        return self

    def __exit__(self, *_error: object) -> None:
        self.workers.open -= 1

    def end(self) -> None:
        self.ended = True

    def events(self) -> Iterator[dict[str, Any]]:
        if self.workers.starts:
            yield self.workers.starts.pop(0)
            return
        yield {
            "event": "ready",
            "name": "mine",
            "checks": len(NAMES),
            "samples": 2,
            "exactness": "exact",
            "version": "1",
        }
        for name in NAMES[self.job.done :]:
            yield {
                "event": "begin",
                "check": name,
                "sample": name,
                "aspect": "forward",
                "features": ["float32", "causal"],
            }
            fate = self.workers.fates.get(name, [RIGHT])
            fate = fate.pop(0) if len(fate) > 1 else fate[0]
            yield fate
            if fate.get("last"):
                yield CRASH
                return
            if fate["event"] != "end":
                return
        yield {"event": "done"}


def ran(
    monkeypatch: pytest.MonkeyPatch,
    fates: dict[str, list[dict[str, Any]]],
    *starts: dict[str, Any],
    job: Job | None = None,
) -> tuple[Run, Workers, dict[str, Any]]:
    workers = Workers(fates, list(starts))
    monkeypatch.setattr(module, "Child", workers)
    run = Run((job or Job(backend="native"),), 2.0)
    run.go()
    assert workers.open == 0
    record = run.record({"cpu": "one"}, {"device": "cpu"})
    return run, workers, record


def test_outcomes_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    worse = {**RIGHT, "units": 0.5, "error": 1e-9}
    _, _, record = ran(monkeypatch, {"two": [REFUSED], "three": [worse]})
    [column] = record["backends"]
    assert (column["status"], column["made"], column["planned"], column["seconds"]) == ("right", 4, 4, 2.0)
    assert column["counts"] == {"right": 3, "refused": 1, "wrong": 0, "crashed": 0, "hung": 0} == record["counts"]
    cell = {"outcome": "right", "right": 3, "refused": 1, "units": 0.5, "error": 1e-7, "limits": {"softcap": 1}}
    assert column["cells"] == {"float32": cell, "causal": cell}
    assert column["refusals"] == {"softcap (takes none)": ["two"]}
    assert record["features"] == ["float32", "causal"]
    assert not is_wrong(record)


def test_a_wrong_answer_is_a_fault_with_how_to_have_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(backend="native", device="cuda:1", dtypes=("float16",), seed=3)
    _, _, record = ran(monkeypatch, {"two": [WRONG]}, job=job)
    [column] = record["backends"]
    [fault] = column["faults"]
    assert (column["status"], fault["check"], fault["outcome"], fault["units"]) == ("wrong", "two", "wrong", 40.0)
    command = "heedful verify native --device cuda:1 --dtype float16 --seed 3 --only two"
    assert fault["reproduce"]["command"] == command
    assert "t.verify('native', devices=('cuda',), only=('two',), seed=3)" in fault["reproduce"]["python"]
    assert column["cells"]["causal"]["outcome"] == "wrong"
    assert is_wrong(record)


def test_a_crash_costs_one_check_and_the_rest_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    _, workers, record = ran(monkeypatch, {"two": [CRASH]})
    [column] = record["backends"]
    assert [job.done for job in workers.jobs] == [0, 2]
    assert (column["made"], column["counts"]["crashed"], column["counts"]["right"]) == (4, 1, 3)
    [fault] = column["faults"]
    assert fault["check"] == "two"
    assert fault["detail"].splitlines() == [
        "the process ended: signal 11 (SIGSEGV)",
        "a",
        "CUDA error: an illegal access",
    ]


def test_a_hang_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    _, workers, record = ran(monkeypatch, {"four": [HANG]})
    [column] = record["backends"]
    assert (len(workers.jobs), column["made"], column["counts"]["hung"]) == (1, 4, 1)
    assert column["faults"][0]["detail"] == "no answer after 2 s, and the process was ended"


def test_a_worker_that_ends_between_checks_blames_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does where a wrong kernel left a GPU on which nothing runs any more."""
    _, workers, record = ran(monkeypatch, {"two": [{**WRONG, "last": True}, WRONG]})
    [column] = record["backends"]
    assert [job.done for job in workers.jobs] == [0, 2]
    assert (column["counts"]["wrong"], column["counts"]["crashed"], column["made"]) == (1, 0, 4)


def test_after_some_crashes_the_rest_is_left_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.NAMES", tuple(f"check-{number}" for number in range(9)))
    _, workers, record = ran(monkeypatch, {name: [CRASH] for name in NAMES})
    [column] = record["backends"]
    assert len(workers.jobs) == MOST_ENDS == column["counts"]["crashed"]
    assert column["reason"] == "4 checks were not made, after 5 workers that crashed or hung"


def test_a_worker_that_crashes_at_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    _, workers, record = ran(monkeypatch, {}, CRASH)
    [column] = record["backends"]
    assert len(workers.jobs) == 1
    assert (column["status"], column["planned"], column["made"]) == ("wrong", None, 0)
    assert column["faults"][0]["check"] == "start"
    assert column["cells"]["as a whole"]["outcome"] == "crashed"
    assert column["reason"].startswith("all checks were not made")


def test_what_is_no_strategy_is_invalid(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(plugin="a:B")
    _, _, record = ran(monkeypatch, {}, {"event": "invalid", "text": "plugin: got 'a:B'"}, job=job)
    [column] = record["backends"]
    assert (column["name"], column["status"], column["reason"]) == ("a:B", "invalid", "plugin: got 'a:B'")
    assert not is_wrong(record)  # a wrong argument


def test_a_plugin_goes_by_its_own_name_and_its_line_of_python_imports_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, record = ran(monkeypatch, {"one": [WRONG]}, job=Job(plugin="my.attention:Mine"))
    [column] = record["backends"]
    assert (column["name"], column["plugin"]) == ("mine", "my.attention:Mine")
    how = column["faults"][0]["reproduce"]
    assert how["command"] == "heedful verify --plugin my.attention:Mine --device cpu --only one"
    assert how["python"].startswith(
        "import my.attention; import heedful.testing as t; print(t.verify(my.attention.Mine,"
    )


def test_a_plugin_with_a_name_that_is_taken_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Child", Workers({}, []))
    run = Run((Job(backend="mine"), Job(plugin="a:B")), 2.0)
    run.go()
    assert [column.name for column in run.columns] == ["mine", "mine (a:B)"]


def test_ctrl_c_leaves_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The main thread is interrupted while a worker is at its third check, and another backend waits."""
    there, go_on = threading.Event(), threading.Event()

    class Slow(Worker):
        def events(self) -> Iterator[dict[str, Any]]:
            for event in super().events():
                if event.get("check") == "three":
                    there.set()
                    go_on.wait(60)
                    yield CRASH  # what is heard of a process that was ended
                    return
                yield event

        def end(self) -> None:
            super().end()
            go_on.set()

    def interrupted(*_args: object) -> None:
        assert there.wait(60)
        raise KeyboardInterrupt

    workers = Workers({}, [])
    monkeypatch.setattr(module, "Child", lambda job, seconds: workers.jobs.append(job) or Slow(workers, job))
    monkeypatch.setattr(module.futures, "wait", interrupted)
    run = Run((Job(backend="native"), Job(backend="flex")), 2.0)
    run.go()
    record = run.record({}, {})
    assert record["interrupted"]
    first, second = record["backends"]
    assert (first["status"], first["made"], first["counts"]["right"]) == ("unfinished", 2, 2)
    assert (second["name"], second["status"], second["made"]) == ("flex", "unfinished", 0)
    assert [job.backend for job in workers.jobs] == ["native"]
    assert not is_wrong(record)


def test_steps_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Child", Workers({"two": [CRASH]}, []))
    steps: list[int] = []
    planned: list[int] = []
    Run((Job(backend="native"),), 2.0, on_step=lambda doing, number: steps.append(number), on_plan=planned.append).go()
    assert (sum(steps), planned) == (4, [4])


def test_an_error_of_our_own_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(job: Job, seconds: float) -> Worker:
        raise OSError("no more processes")

    monkeypatch.setattr(module, "Child", broken)
    with pytest.raises(OSError, match="no more processes"):
        Run((Job(backend="native"), Job(backend="flex")), 2.0).go()


# What a machine lacks


@pytest.mark.parametrize(
    ("name", "device", "packages", "fields"),
    [
        ("native", "cpu", {}, []),
        ("flash", "cpu", None, ["device"]),
        ("flash", "sm_75", None, ["compute capability"]),
        ("flash", "sm_80", {}, ["package", "package"]),  # flash-attn, and the library that fetches from the Hub
        ("flash", "sm_80", None, []),
        ("aiter", "sm_80", None, ["architecture"]),
    ],
)
def test_what_a_machine_lacks_is_known_without_a_process(
    name: str, device: str, packages: dict[str, str] | None, fields: list[str]
) -> None:
    pretended = Facts.pretend(device)
    facts = Facts("2.13.0", "3.12", "Linux", pretended.devices, packages)
    dispatcher = AttentionDispatcher(AttentionStrategyFactory(plugins=False), facts, Policy())
    kind = "cpu" if device == "cpu" else "cuda"
    assert [one.field for one in lacking(dispatcher, name, torch.device(kind))] == fields
