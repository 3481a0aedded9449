"""A worker in a process of its own: it ends by itself, by a crash, or by the clock; its parent lives, and knows why."""

from __future__ import annotations

import subprocess
import sys

import pytest

from heedful.verify.child import Child, command
from heedful.verify.job import Job

AT_40 = ("head-dim-32-forward", "head-dim-40-forward", "head-dim-64-forward")


def events(job: Job, seconds: float = 100.0) -> list[dict[str, object]]:
    with Child(job, seconds) as child:
        return list(child.events())


def test_a_crash_is_told_with_the_signal_and_the_last_words(plugins: str) -> None:
    *before, last = events(Job(plugin=f"{plugins}:Aborts", only=AT_40))
    assert [event["event"] for event in before] == ["ready", "begin", "end", "begin"]
    assert before[-1]["check"] == "head-dim-40-forward"
    assert last["event"] == "crashed"
    assert last["how"] == "signal 6 (SIGABRT)"
    assert "kernel: illegal instruction" in str(last["stderr"])  # what was printed, and kept out of the results


def test_what_hangs_is_ended_by_the_clock(plugins: str) -> None:
    with Child(Job(plugin=f"{plugins}:Hangs", only=AT_40), 0.5) as child:
        every = list(child.events())
    assert [event["event"] for event in every] == ["ready", "begin", "end", "begin", "hung"]
    assert every[-1]["seconds"] == 0.5
    assert child._process.returncode is not None


def test_a_process_that_never_begins_is_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "heedful.verify.child.command", lambda module: [sys.executable, "-c", "import sys; sys.exit(3)"]
    )
    assert [(event["event"], event["how"]) for event in events(Job())] == [("crashed", "exit status 3")]


def test_a_line_that_was_cut_is_no_event(monkeypatch: pytest.MonkeyPatch) -> None:
    text = 'print(\'{"event": "ready"}\'); print(\'{"event": "do\', end=\'\')'
    monkeypatch.setattr("heedful.verify.child.command", lambda module: [sys.executable, "-c", text])
    assert [event["event"] for event in events(Job())] == ["ready", "crashed"]


@pytest.mark.parametrize("junk", ["garbage", "[1]", "null", '{"event": "nonsense"}'])
def test_what_others_write_where_the_results_go_is_a_crash_not_a_loss(
    monkeypatch: pytest.MonkeyPatch, junk: str
) -> None:
    text = f'import time; print(\'{{"event": "ready"}}\'); print({junk!r}, flush=True); time.sleep(60)'
    monkeypatch.setattr("heedful.verify.child.command", lambda module: [sys.executable, "-c", text])
    *before, last = events(Job())
    assert [event["event"] for event in before] == ["ready"]
    assert (last["event"], last["how"]) == ("crashed", "something else than the worker wrote where its results go")


def test_a_worker_ends_with_its_parent() -> None:
    """What it is at is a check that never returns."""
    wait = "import threading; from heedful.verify import worker; threading.Thread(target=worker._end_with_the_parent)"
    text = f"{wait}.start(); import time; print('here', flush=True); time.sleep(1000)"
    child = subprocess.Popen([*command("os")[:2], text], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout.readline() == b"here\n"
        child.stdin.close()
        assert child.wait(60) == 0
    finally:
        child.kill()
        child.stdout.close()
        child.wait()


def test_a_new_process_finds_what_this_one_finds(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('the folder one is in')\n")
    (tmp_path / "only_here.py").write_text("import sys\n\ndef main():\n    print(sys.argv[1:], sys.path[-1])\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    done = subprocess.run(command("only_here", "a", "b"), capture_output=True, text=True, check=True)
    assert done.stdout == f"['a', 'b'] {tmp_path}\n"
    found = subprocess.run(
        command("only_here", before="import importlib.util as u; print(u.find_spec('torch').origin); "),
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(tmp_path) not in found.stdout.splitlines()[0]
