"""The record of a run on a GPU, filled with made-up outcomes: no GPU is needed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gpu import record as records
from gpu.record import Record

from heedful import AttentionStrategyFactory
from heedful.measuring import folder_name
from heedful.refusal import Refusal

HERE = Path(__file__).parent


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "some-gpu" / "contract.json"


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_outcomes_are_grouped_by_backend(path):
    record = Record(path, {"machine": {"device": "Some GPU"}})
    record.wanted = 5
    record.add("flash", "plain", "right")
    record.add("flash", "bias-forward", "refused", "mask (takes causal)")
    record.add("flash", "dense-forward", "refused", "mask (takes causal)")
    record.add("flash", "window-forward", "wrong", "0.3 away")
    record.add("sage", "package", "absent", "sageattention is not installed")
    record.write("completed")
    found = read(path)
    assert found["machine"] == {"device": "Some GPU"}
    assert (found["ended"], found["wanted"], found["running"]) == ("completed", 5, [])
    assert found["counts"] == {"right": 1, "refused": 2, "wrong": 1, "absent": 1}
    assert found["backends"]["flash"] == {
        "right": ["plain"],
        "refused": {"mask (takes causal)": ["bias-forward", "dense-forward"]},
        "wrong": {"window-forward": "0.3 away"},
        "absent": "",
    }
    assert found["backends"]["sage"]["absent"] == "sageattention is not installed"


@pytest.mark.parametrize("first", ["right", "refused"])
def test_an_error_in_tear_down_makes_an_outcome_wrong(path, first):
    record = Record(path, {})
    record.add("flash", "plain", first, "why")
    record.add("flash", "plain", "wrong", "illegal access")
    record.add("flash", "plain", first, "why")
    record.write("completed")
    found = read(path)
    assert found["counts"] == {"right": 0, "refused": 0, "wrong": 1, "absent": 0}
    assert found["backends"]["flash"] == {
        "right": [],
        "refused": {},
        "wrong": {"plain": "illegal access"},
        "absent": "",
    }


def test_of_a_long_error_the_end_is_kept(path):
    record = Record(path, {})
    record.add("flash", "plain", "wrong", "x" * 10_000 + "the point")
    record.write("completed")
    error = read(path)["backends"]["flash"]["wrong"]["plain"]
    assert len(error) == records.MOST_CHARACTERS
    assert error.endswith("the point")


def test_it_is_written_every_few_seconds_and_names_what_runs(path):
    now = 0.0
    record = Record(path, {}, clock=lambda: now)
    record.start("first")
    assert not path.exists()
    record.add("flash", "first", "right")
    record.stop("first")
    now = records.SECONDS_BETWEEN
    record.start("second")
    assert read(path)["ended"] == "unfinished"
    assert read(path)["running"] == ["second"]
    assert read(path)["counts"]["right"] == 1


def test_a_failed_write_leaves_the_last_file_whole(path, monkeypatch):
    record = Record(path, {})
    record.write("unfinished")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    record.add("flash", "plain", "right")
    with pytest.raises(OSError, match="disk full"):
        record.write("completed")
    assert read(path)["ended"] == "unfinished"
    assert [file.name for file in path.parent.iterdir()] == ["contract.json"]


@pytest.mark.parametrize(
    ("name", "folder"),
    [("NVIDIA H200", "nvidia-h200"), ("AMD Instinct MI300X (gfx942)", "amd-instinct-mi300x-gfx942"), ("/../", "gpu")],
)
def test_folder_of_a_device(name, folder):
    assert folder_name(name) == folder


# A pytest run of its own, with made-up checks under the real hooks, on a machine that pretends to have a GPU.
RUN = """
import sys
import pytest, torch
torch.cuda.is_available = lambda: True
torch.cuda.synchronize = lambda: None
import gpu.conftest as hooks
hooks.machine = lambda: {"machine": {"device": "Pretended GPU"}}
sys.exit(pytest.main([*sys.argv[1:], "-q", "-p", "no:cacheprovider", "-p", "no:xdist"], plugins=[hooks]))
"""
CHECKS = """
import pathlib, time
import pytest
pytestmark = pytest.mark.gpu

@pytest.mark.parametrize("check", ["a-cuda-right", "a-cuda-refused", "a-cuda-wrong", "b-cuda-package", "c-cuda-last"])
def test_contract(check):
    if check.endswith("refused"):
        pytest.skip("head dim (takes at most 256)")
    if check.endswith("package"):
        pytest.skip("b is absent")
    assert not check.endswith("wrong"), "0.3 away"
    if check.endswith("last"):
        LAST
"""


def command(folder: Path, last: str, *more: str) -> list[str]:
    (folder / "test_real_packages.py").write_text(CHECKS.replace("LAST", last))
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    return [sys.executable, "-c", RUN, str(folder), "-c", str(folder / "pytest.ini"), "--record", str(folder), *more]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE.parents[1] / "src")])}


def test_tests_beside_the_contract_are_recorded_by_their_names():
    from gpu.conftest import OTHERS, name_of, outcome_of

    name = "tests/kernels/on_device/test_forward.py::test_windows[0-1]"
    assert name_of(name) == (OTHERS, "kernels/on_device/test_forward.py::test_windows[0-1]")
    assert name_of("tests/gpu/test_real_packages.py::test_contract[a-cuda-window-(2,0)-lse]") == (
        "a",
        "window-(2,0)-lse",
    )
    failed = SimpleNamespace(nodeid=name, failed=True, skipped=False, when="call", longrepr="0.3 away")
    assert outcome_of(failed) == (OTHERS, "kernels/on_device/test_forward.py::test_windows[0-1]", "wrong", "0.3 away")


@pytest.mark.parametrize(("marked", "broken", "ends"), [(True, True, True), (True, False, False), (False, True, False)])
def test_a_worker_ends_after_the_test_that_broke_its_gpu_whatever_the_folder(monkeypatch, marked, broken, ends):
    from gpu import conftest as hooks

    def synchronised():
        if broken:
            raise RuntimeError("an illegal memory access was encountered")

    plugins, ended = [], []
    manager = SimpleNamespace(register=lambda plugin, name: plugins.append(plugin))
    hooks.pytest_configure(SimpleNamespace(workerinput={}, pluginmanager=manager, getoption=lambda *_, **__: None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronised)
    monkeypatch.setattr(hooks.os, "_exit", ended.append)
    (watch,) = plugins
    watch.pytest_runtest_teardown(SimpleNamespace(get_closest_marker=lambda name: name == "gpu" and marked))
    assert ended == ([hooks.BROKEN_GPU] if ends else [])


def test_a_run_is_recorded(tmp_path):
    done = subprocess.run(
        command(tmp_path, "pass"), capture_output=True, text=True, timeout=60, env=environment(), check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    found = read(tmp_path / "pretended-gpu" / "contract.json")
    assert found["counts"] == {"right": 2, "refused": 1, "wrong": 1, "absent": 1}
    assert (found["ended"], found["wanted"], found["running"]) == ("completed", 5, [])
    assert found["backends"]["a"]["refused"] == {"head dim (takes at most 256)": ["refused"]}
    assert "0.3 away" in found["backends"]["a"]["wrong"]["wrong"]
    assert found["backends"]["b"]["absent"] == "b is absent"
    assert "written to" in done.stdout


def test_a_run_ended_by_sigterm_is_recorded(tmp_path):
    last = f"pathlib.Path({str(tmp_path / 'there')!r}).touch(); time.sleep(60)"
    run = subprocess.Popen(
        command(tmp_path, last), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
    )
    until = time.monotonic() + 60
    while not (tmp_path / "there").exists() and run.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    output, _ = run.communicate(timeout=60)
    found = read(tmp_path / "pretended-gpu" / "contract.json")
    assert found["ended"] == "interrupted", output
    assert found["counts"]["right"] == 1
    assert [name.partition("[")[2] for name in found["running"]] == ["c-cuda-last]"]


def test_a_killed_run_leaves_what_it_knew(tmp_path):
    """Nothing can be written at a SIGKILL; the last file says what was under way."""
    killed = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from gpu import record as records\n"
        "records.SECONDS_BETWEEN = 0.0\n"
        "record = records.Record(Path(sys.argv[2]), {})\n"
        "record.add('flash', 'plain', 'right'); record.start('flash-cuda-window'); os.kill(os.getpid(), 9)"
    )
    path = tmp_path / "contract.json"
    done = subprocess.run([sys.executable, "-c", killed, str(HERE.parent), str(path)], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    found = read(path)
    assert (found["ended"], found["running"]) == ("unfinished", ["flash-cuda-window"])
    assert found["backends"]["flash"]["right"] == ["plain"]


def test_an_absent_package_is_one_check_that_says_so(monkeypatch):
    from gpu import test_real_packages as real

    lack = Refusal("package", "flash-attn is not installed", "flash-attn 2.6.3", "install it")
    strategy = type(AttentionStrategyFactory.create_strategy("flash"))
    monkeypatch.setattr(strategy, "lacks", lambda *_: (lack,))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(real, "probe", lambda: None)
    (case,) = real.cases("flash")
    assert case.id == "flash-cuda-package"
    assert "flash-attn is not installed" in case.values[0]
    with pytest.raises(pytest.skip.Exception, match="flash is absent"):
        real.test_contract(case.values[0])


def test_pinned_aliases_are_names_of_their_own():
    from gpu import test_real_packages as real

    every = dict(real.names())
    assert every["flash"] is False
    assert every["flash_hub"] is True
    assert "_native_flash" not in every  # it pins nothing: the very same strategy


def test_the_crash_of_a_worker_is_wrong():
    from gpu.conftest import outcome_of

    crashed = SimpleNamespace(
        nodeid="tests/gpu/test_real_packages.py::test_contract[flash-cuda-window-(2,0)-lse]",
        failed=True,
        skipped=False,
        when="???",
        longrepr="worker 'gw0' crashed while running ...",
    )
    assert outcome_of(crashed) == ("flash", "window-(2,0)-lse", "wrong", "worker 'gw0' crashed while running ...")


def test_without_a_gpu_the_run_fails(tmp_path):
    run = RUN.replace("available = lambda: True", "available = lambda: False")
    called = command(tmp_path, "pass")
    called[2] = run
    done = subprocess.run(called, capture_output=True, text=True, timeout=60, env=environment(), check=False)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "no GPU" in done.stderr + done.stdout
    assert not list(tmp_path.glob("*/contract.json"))
