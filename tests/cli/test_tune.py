"""``heedful tune``, as a user types it; pauses take no time here, and the candidate with the longest name wins."""

import functools
import importlib
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import heedful
from heedful import AttentionProblem
from heedful.cli import app
from heedful.facts import INTERPRETED
from heedful.masks import MaskFacts
from heedful.records import APART
from heedful.strategies.native_math import NativeMathAttentionStrategy as Unfused
from heedful.timings import shipped_for
from heedful.trace import Trace
from heedful.tune import ahead

SOURCES = Path(heedful.__file__).parent.parent
run = CliRunner(env={"NO_COLOR": "1", "FORCE_COLOR": None, "COLUMNS": "140"}).invoke
SMALL = AttentionProblem(batch=1, heads=2, kv_heads=2, query_length=64, key_length=64, head_dim=64, value_dim=64)


@pytest.fixture(autouse=True)
def certain(monkeypatch):
    """Times that no busy machine changes, and a clock that is put forward in place of waiting."""

    def times(calls, _device, rounds, rough):
        return {label: [1e-3 * (0.7 + 1 / len(label))] * rounds for label in calls}

    monkeypatch.setattr(ahead, "interleaved", times)
    monkeypatch.setattr(ahead, "seconds_of", lambda _call, _device: 1e-3)
    twice = tuple(replace(limits, contends=True) for limits in Unfused.limits)  # a rival for plain float32 calls
    monkeypatch.setattr(Unfused, "limits", twice)
    real, passed = time.time, [0.0]
    monkeypatch.setattr(ahead.time, "time", lambda: real() + passed[0])

    def wait(seconds):
        passed[0] += seconds

    command = importlib.import_module("heedful.cli.tune")  # the package's ``tune`` is the function in it
    monkeypatch.setattr(command, "measure", functools.partial(ahead.tune, wait=wait))


@pytest.fixture
def dispatcher(process, tmp_path):
    return process(tune="ahead", cache=tmp_path / "cache")


def tuned(*arguments, status=0):
    answer = run(app, ["tune", "--device", "cpu", "--rounds", "3", *arguments, "--json"])
    assert answer.exit_code == status, answer.output
    return json.loads(answer.stdout)


def test_cases_by_a_pattern_as_json_and_as_a_table_that_others_can_ship(dispatcher, tmp_path):
    data = tuned("clip-l*", "--dtype", "fp32", "--dtype", "fp16", "--export", str(tmp_path / "cpu.json"))
    store = dispatcher.experience.store(torch.device("cpu"))
    assert data["machine"] == str(store.fingerprint)
    assert data["store"] == str(store.path)
    assert store.path.is_file()
    assert [one["problem"] for one in data["classes"]] == [
        f"B1 H12 Q77 K77 D64 {dtype} BHSD on cpu, mask causal top_left" for dtype in ("float32", "float16")
    ]
    shipped = shipped_for(store.fingerprint, tmp_path)
    for one in data["classes"]:
        assert one["refused"] == ""
        assert one["wrong"] == {}
        assert one["winner"] == max(one["seconds"], key=len) != one["usual"]
        assert one["gain"] == pytest.approx(one["seconds"][one["usual"]] / one["seconds"][one["winner"]])
        assert shipped[one["key"]].seconds() == pytest.approx(one["seconds"])
        assert shipped[one["key"]].winner() == one["winner"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="explain asks about the GPU here; a named CPU is only supposed")
def test_explain_shows_what_was_measured(dispatcher, tmp_path):
    (one,) = tuned("clip-l-text")["classes"]
    environ = {"HEEDFUL_CACHE": str(tmp_path / "cache"), "HEEDFUL_TUNE": "ahead"}
    arguments = ["explain", "--case", "clip-l-text"]
    answer = run(app, [*arguments, "--json"], env=environ)
    assert answer.exit_code == 0, answer.output
    data = json.loads(answer.stdout)
    assert (data["rung"], data["won"]) == ("measured timing", f"{one['gain']:.3g} times as fast as native")
    times = {row["candidate"]: row["seconds"] for row in data["backends"] if row["seconds"] is not None}
    assert times == pytest.approx(one["seconds"])
    assert [row["candidate"] for row in data["backends"] if row["answer"] == "runs"] == [one["winner"]]
    printed = run(app, arguments, env=environ).stdout
    assert "measured timing" in printed
    assert re.search(r"backend +takes it +a call +after what", printed)
    off = run(app, arguments, env={**environ, "HEEDFUL_TUNE": "off"}).stdout
    assert "a call" not in off


def test_the_table_says_who_won_how_much_and_where_it_is_kept(dispatcher):
    answer = run(app, ["tune", "clip-l-text", "--device", "cpu", "--rounds", "3"])
    assert answer.exit_code == 0, answer.output
    assert "winner" in answer.stdout
    assert re.search(r"native\S* +[\d.]+ [mu]s +[\d.]+ [mu]s +[\d.]+x +B1 H12 Q77", answer.stdout)
    assert "1 of 1 classes measured, kept in " in answer.stdout


def test_a_trace_is_tuned_without_what_is_of_other_devices_or_cannot_be_drawn(dispatcher, tmp_path):
    path = tmp_path / "run.trace"
    drawn = SMALL.replace(needs_grad=True)
    Trace({SMALL: 3, SMALL.replace(device="cuda"): 2, drawn: 1}).save(path)
    one, other = tuned(str(path))["classes"]
    assert (one["problem"], one["refused"]) == (str(SMALL), "")
    assert other["refused"].startswith("problem: got gradient in B1 H2")
    answer = run(app, ["tune", str(path), "--device", "cpu", "--rounds", "3"])
    assert answer.exit_code == 0
    assert "not measured" in answer.stdout
    assert "1 of 2 classes measured" in answer.stdout


def test_where_nothing_could_be_measured_the_status_is_1(dispatcher, tmp_path):
    path = tmp_path / "run.trace"
    Trace({SMALL.replace(query_length=1): 3, SMALL.replace(mask=MaskFacts(block=True)): 1}).save(path)
    reasons = [one["refused"] for one in tuned(str(path), status=1)["classes"]]
    assert reasons[0] == "too small to matter"
    assert "block mask" in reasons[1]


def test_forgetting_drops_faults_first(dispatcher, tmp_path):
    path = tmp_path / "run.trace"
    Trace({SMALL: 1}).save(path)
    dispatcher.experience.quarantine(SMALL, "native", "odd")
    dispatcher.experience.finish()
    (one,) = tuned(str(path))["classes"]
    assert not any(label.startswith("native") and label[6:7] in ("", "+") for label in one["seconds"])
    (one,) = tuned(str(path), "--forget")["classes"]
    assert "native" in one["seconds"]


def test_the_layout_of_cases_may_be_that_of_newer_models(dispatcher):
    (one,) = tuned("clip-l-text", "--layout", "bshd")["classes"]
    assert one["problem"].startswith("B1 H12 Q77 K77 D64 float32 BSHD")


def plain(text):
    return " ".join(text.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sdxll*"], "got 'sdxll*'; give a trace (heedful trace writes one), the folder of a diffusers pipeline, or a"),
        (["clip-l-text", "--dtype", "int8"], "--dtype"),
        (["clip-l-text", "--layout", "THD"], "got 'THD'; give BHSD or BSHD"),
        (["clip-l-text", "--device", "tpu"], "got 'tpu'; give cpu"),
        (["clip-l-text", "--rounds", "1"], "--rounds"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_told_with_what_can(dispatcher, arguments, message):
    answer = run(app, ["tune", *arguments])
    assert answer.exit_code == 2
    assert message in plain(answer.output)


def test_a_file_that_is_no_trace_is_named(dispatcher, tmp_path):
    (tmp_path / "notes.txt").write_text("no trace")
    answer = run(app, ["tune", str(tmp_path / "notes.txt")])
    assert "notes.txt; it cannot be read" in str(answer.exception)


def test_it_says_that_times_would_not_be_used(process):
    process(tune="off")
    answer = run(app, ["tune", "clip-l-text"])
    assert answer.exit_code == 2
    assert "HEEDFUL_TUNE is off" in plain(answer.output)


# Tiles: what is measured is in tests/tune/test_tiles.py, and with real kernels in tests/kernels/on_device


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels run on a CPU then")
@pytest.mark.parametrize("arguments", [["clip-l-text"], ["clip-l-text", "--grad", "--backend", "triton"], ["--forget"]])
def test_tiles_are_not_for_a_cpu(dispatcher, arguments):
    answer = run(app, ["tune", "--tiles", "--device", "cpu", *arguments])
    assert answer.exit_code == 2
    assert "tiles are of Triton kernels on a GPU, and this is cpu; run it on the machine with the GPU" in plain(
        answer.output
    )


@pytest.mark.parametrize("option", [["--grad"], ["--backend", "triton"]], ids=" ".join)
def test_options_of_tiles_are_for_tiles(dispatcher, option):
    answer = run(app, ["tune", "clip-l-text", "--device", "cpu", *option])
    assert answer.exit_code == 2
    assert "it is for --tiles alone" in plain(answer.output)


@pytest.mark.slow
def test_tiles_in_a_process_of_its_own_with_its_pauses(tmp_path):
    """In Triton's interpreter: the second process goes by what the first has found."""
    small = SMALL.replace(heads=1, kv_heads=1, query_length=20, key_length=20, head_dim=16, value_dim=16)
    Trace({small.replace(architecture=INTERPRETED): 1}).save(tmp_path / "one.trace")
    of_interpreter = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    of_heedful = {"HEEDFUL_CACHE": str(tmp_path / "cache"), "HEEDFUL_TUNE": "ahead", "PYTHONPATH": str(SOURCES)}

    def python(*arguments):
        environ = {**os.environ, **of_interpreter, **of_heedful}
        done = subprocess.run([sys.executable, *arguments], env=environ, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    words = ["-m", "heedful", "tune", "--tiles", str(tmp_path / "one.trace"), "--device", "cpu", "--rounds", "3"]
    (found,) = json.loads(python(*words, "--json"))["tiles"]
    assert found["key"] == "tiles forward 32 16 to 128"
    assert found["refused"] == ""
    assert len(found["seconds"]) > 2
    (stored,) = (tmp_path / "cache" / "timings").glob("*.json")
    windows = json.loads(stored.read_text())["records"][found["key"]]["windows"]
    assert len(windows) >= 2
    assert windows[1]["ended"] - windows[0]["ended"] >= APART
    asked = (
        "import heedful, torch; x = torch.zeros(1, 1, 20, 16); print(heedful.explain(x, x, x, backend='triton').tuned)"
    )
    assert python("-c", asked).strip() == str({"forward": found["winner"]})
