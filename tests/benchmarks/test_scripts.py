"""Each benchmark, run as users run it; and with a wrong answer, which must end it before any time is printed."""

from __future__ import annotations

import functools
import json
import math
import re
import subprocess
import sys
import time

import pytest

import heedful
from heedful import dispatch
from heedful.dispatch import AttentionDispatcher
from heedful.lowering import GatherKeys
from heedful.tune import ahead

SCRIPTS = ("overhead", "routing", "import_time", "padding", "masks", "lowerings", "guard", "kernels")
PARTS = ("measuring", "roofline", "kernel_bench", "kernel_cases", "kernel_checks", "kernel_tables", "kernel_targets")
SLOW = ("regret",)  # it waits between its windows; it runs below, where waiting takes no time


def test_all_benchmarks_are_known_here_and_to_make(benchmark_folder):
    there = {path.stem for path in benchmark_folder.glob("*.py")} - {*PARTS, "aot"}  # aot measures no time
    assert there == {*SCRIPTS, *SLOW}
    makefile = (benchmark_folder.parent / "Makefile").read_text("utf-8")
    listed = re.findall(r"^\S+: BENCHMARKS := (.+)$", makefile, re.MULTILINE)
    assert sorted(" ".join(listed).split()) == sorted(there)


# One process for all: importing torch and diffusers takes longer than the benchmarks.
RUN_ALL = """
import contextlib, io, runpy, sys
folder, out, *names = sys.argv[1:]
sys.path.insert(0, folder)
for name in names:
    sys.argv = [name, "--quick", "--rounds", "2", "--json", "--out", out]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            runpy.run_path(f"{folder}/{name}.py", run_name="__main__")
        except SystemExit as end:
            assert not end.code, f"{name} ends with {end.code}"
    with open(f"{out}/{name}.printed", "w") as file:
        file.write(printed.getvalue())
"""


def test_quick_runs_print_and_save_json(benchmark_folder, tmp_path):
    command = [sys.executable, "-c", RUN_ALL, str(benchmark_folder), str(tmp_path), *SCRIPTS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    for name in SCRIPTS:
        record = json.loads((tmp_path / f"{name}.printed").read_text())
        assert record == json.loads((tmp_path / f"{name}.json").read_text()), name
        assert {"date", "cpu", "cores", "threads", "python", "torch", "heedful"} <= set(record["machine"]), name
        found = figures(record)
        assert found, name
        assert min(found) > 0, name


def test_a_benchmark_is_a_command(benchmark_folder):
    command = [sys.executable, str(benchmark_folder / "padding.py"), "--quick", "--rounds", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "half of the keys padded" in done.stdout
    assert "written to" not in done.stderr


def figures(record: object) -> list[float]:
    """All medians of times, wherever they stand."""
    if isinstance(record, list):
        return [figure for part in record for figure in figures(part)]
    if not isinstance(record, dict):
        return []
    here = record.get("median_us", [])
    found = list(here.values()) if isinstance(here, dict) else [here] if here else []
    return found + [figure for part in record.values() for figure in figures(part)]


def wrong(real):
    """A call whose answer is one percent too large."""
    return lambda *args, **kwargs: real(*args, **kwargs) * 1.01


def wrong_gathering(self, old, new, run, real=GatherKeys.around):
    inner = real(self, old, new, run)
    return lambda x: (inner(x)[0] * 1.01, None)


@pytest.mark.parametrize(
    ("name", "owner", "attribute", "broken"),
    [
        ("overhead", heedful, "attention", wrong(heedful.attention)),
        ("padding", heedful, "attention", wrong(heedful.attention)),
        ("masks", AttentionDispatcher, "attention", wrong(AttentionDispatcher.attention)),
        ("lowerings", GatherKeys, "around", wrong_gathering),
        ("routing", heedful, "set_attention_backend", lambda layer, _: layer.to_out[0].weight.data.mul_(1.01)),
    ],
)
def test_a_wrong_answer_ends_the_run_before_any_time(
    benchmark_module, monkeypatch, tmp_path, capsys, name, owner, attribute, broken
):
    module = benchmark_module(name)
    monkeypatch.setattr(owner, attribute, broken)
    with pytest.raises(benchmark_module("measuring").WrongAnswer):
        module.main(["--quick", "--out", str(tmp_path)])
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())


def test_a_plan_without_the_lowering_ends_the_run(benchmark_module, monkeypatch, capsys):
    module = benchmark_module("lowerings")
    monkeypatch.setattr(GatherKeys, "rewrite", lambda *_: None)
    with pytest.raises((heedful.Refused, benchmark_module("measuring").WrongAnswer)):
        module.main(["--quick", "--only", "gather_keys"])
    assert capsys.readouterr().out == ""


def test_every_lowering_declared_for_a_cpu_is_measured(benchmark_module):
    module = benchmark_module("lowerings")
    assert module.declared() <= set(module.TRIALS)


def test_a_declared_lowering_that_is_not_measured_fails_the_run(benchmark_module, monkeypatch, capsys):
    module = benchmark_module("lowerings")
    monkeypatch.setattr(module, "declared", lambda: {"upcast", "unheard_of"})
    assert module.main(["--quick", "--only", "upcast", "--json"]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out)["not_measured"] == ["unheard_of"]
    assert "unheard_of" in printed.err


# Regret


@pytest.fixture
def regret(benchmark_module, monkeypatch):
    """The benchmark, with a dispatcher that learns, and a pause between windows that takes no time."""
    module = benchmark_module("regret")
    real, passed = time.time, [0.0]
    monkeypatch.setattr(ahead.time, "time", lambda: real() + passed[0])

    def wait(seconds):
        passed[0] += seconds

    learning = AttentionDispatcher(policy=heedful.Policy(tune="ahead"))
    monkeypatch.setattr(module, "tune", functools.partial(ahead.tune, wait=wait))
    monkeypatch.setattr(module, "_dispatcher", lambda: learning)
    monkeypatch.setattr(dispatch, "default_dispatcher", learning)
    monkeypatch.setattr(heedful, "attention", learning.attention)
    monkeypatch.setattr(heedful, "explain", learning.explain)
    monkeypatch.setattr(module, "QUICK", ("clip-l-text",))
    return module


def test_regret_is_printed_and_saved_for_every_mask_and_dtype(regret, tmp_path, capsys):
    assert regret.main(["--quick", "--rounds", "2", "--json", "--out", str(tmp_path)]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((tmp_path / "regret.json").read_text())
    calls = record["calls"]
    assert {(one["mask"], one["dtype"]) for one in calls} == {
        (mask, str(dtype).removeprefix("torch.")) for mask in regret.MASKS for dtype in regret.DTYPES
    }
    assert record["summary"]["calls"] == len(calls) == 12
    for one in calls:
        first, second = one["seconds"]
        assert {"torch", "auto", one["best"]} <= first.keys()
        assert second.keys() <= first.keys() - {"torch"}
        assert "auto" in second
        assert one["chosen"]
        assert min(*first.values(), *second.values()) > 0
        assert one["regret_bound"] <= one["regret"]
    assert all(math.isfinite(record["summary"][name]) for name in ("mean_regret", "p95_regret", "won", "plain"))


def test_a_wrong_answer_ends_regret_before_any_time(regret, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(heedful, "attention", wrong(heedful.attention))
    monkeypatch.setattr(regret, "DTYPES", regret.DTYPES[:1])
    with pytest.raises(sys.modules["measuring"].WrongAnswer):
        regret.main(["--quick", "--rounds", "2", "--out", str(tmp_path)])
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())
