"""kernels.py with made-up backends: wrong ones are never timed, and nothing that was measured is lost.

On a CPU, whatever this machine has; our own kernels in Triton's interpreter.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from heedful import AttentionStrategy, AttentionStrategyFactory
from heedful.facts import DeviceFacts, Facts
from heedful.measuring import folder_name
from heedful.strategies.triton import TritonKernelStrategy
from heedful.strategy import Limits

SOURCES = Path(__file__).parents[2] / "src"
QUICK = ["--quick", "--device", "cpu", "--rounds", "2"]
ONE = ["--only", "d16-32-forward"]


class Counted(AttentionStrategy):
    """torch's answer, and how often it was asked for."""

    limits = Limits(devices=("cpu",), dtypes=(torch.float32,), backward=True)
    asked = 0

    def compute_attention(self, query, key, value, **_):
        type(self).asked += 1
        return self.spoilt(query, sdpa(query, key, value))

    def spoilt(self, query, out):
        return out


class OnePercentOff(Counted):
    """answers that are one percent too large."""

    def spoilt(self, query, out):
        return out * 1.01


class NotANumber(Counted):
    """answers with a NaN."""

    def spoilt(self, query, out):
        return torch.where(out == out[0, 0, 0, 0], torch.nan, out)


class Compiled(Counted):
    """compiled code."""

    compiled = staticmethod(torch.compile(lambda q, k, v: torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v,
                                          backend="aot_eager"))  # fmt: skip

    def compute_attention(self, query, key, value, **_):
        return self.compiled(query, key, value)


class WrongGradient(Counted):
    """right answers, with a gradient that is not theirs."""

    def spoilt(self, query, out):
        more = query * 0.1
        return out + (more - more.detach())


class WrongLater(Counted):
    """right at first."""

    def spoilt(self, query, out):
        return out if self.asked < 4 else out * 1.01


class Breaking(Counted):
    """no answer at all."""

    def spoilt(self, query, out):
        raise RuntimeError("an illegal access")


class OursToo(TritonKernelStrategy):
    """one of our own kernels, which runs here, and is wrong."""

    sources = ()
    limits = Counted.limits
    refusals, lacks = AttentionStrategy.refusals, AttentionStrategy.lacks

    def compute_attention(self, query, key, value, **_):
        return sdpa(query, key, value) * 1.01


@pytest.fixture
def kernels(benchmark_module):
    return benchmark_module("kernels")


@pytest.fixture
def register():
    """Register a strategy under ``stand_in`` for one test."""

    def registered(strategy):
        strategy.asked = 0
        AttentionStrategyFactory.register_strategy("stand_in", strategy)
        return ["--backend", "native", "--backend", "stand_in"]

    yield registered
    AttentionStrategyFactory.unregister_strategy("stand_in")


def run(kernels, capsys, *arguments, status=0, **edges):
    """The record that is printed."""
    assert kernels.main([*QUICK, *arguments, "--json"], **edges) == status
    return json.loads(capsys.readouterr().out)


def rows(record, call=0):
    return {row["backend"]: row for row in record["calls"][call]["rows"]}


def test_a_right_backend_is_timed_beside_the_others(kernels, register, capsys):
    record = run(kernels, capsys, *ONE, *register(Counted))
    (call,) = record["calls"]
    assert record["ended"] == "completed"
    assert record["left"] == []
    for name in ("native", "stand_in"):
        row = rows(record)[name]
        assert row["status"] == "right"
        assert row["median_us"] > 0
        assert row["tflops"] == pytest.approx(call["flops"] / row["median_us"] / 1e6)
        assert row["share_of_matmul"] > 0
        assert row["share_of_roofline"] is None
        assert not row["ours"]
    assert call["copies"] == 2
    assert Counted.asked > 2


def test_a_wrong_answer_is_never_timed(kernels, register, capsys):
    record = run(kernels, capsys, *ONE, *register(OnePercentOff))
    row = rows(record)["stand_in"]
    assert (row["status"], row["median_us"], row["tflops"], row["rounds"]) == ("wrong", None, None, 0)
    assert row["reason"]
    assert row["error_in_units_of_allowed"] > 1
    assert OnePercentOff.asked == 1
    assert rows(record)["native"]["median_us"] > 0


def test_an_answer_that_is_no_number_is_wrong_and_the_record_is_json(kernels, register, capsys):
    row = rows(run(kernels, capsys, *ONE, *register(NotANumber)))["stand_in"]
    assert (row["status"], row["median_us"], row["error_in_units_of_allowed"]) == ("wrong", None, None)


def test_compiled_code_is_differentiated_again_and_again_in_every_shape(kernels, register, capsys):
    """Nothing is run uncompiled because other shapes were compiled before."""
    ask = ["--only", "d??-??-backward", "--backend", "stand_in", *register(Compiled)]
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        record = run(kernels, capsys, *ask)
    assert len(record["calls"]) == 3
    assert {rows(record, place)["stand_in"]["status"] for place in range(3)} == {"right"}


def test_a_wrong_gradient_is_never_timed(kernels, register, capsys):
    record = run(kernels, capsys, "--only", "d16-32-backward", *register(WrongGradient))
    row = rows(record)["stand_in"]
    assert (row["status"], row["median_us"]) == ("wrong", None)
    assert "gradient of the query" in row["reason"]
    assert rows(record)["native"]["median_us"] > 0


def test_an_answer_that_goes_wrong_in_the_rounds_loses_its_times(kernels, register, capsys):
    row = rows(run(kernels, capsys, *ONE, *register(WrongLater)))["stand_in"]
    assert (row["status"], row["median_us"]) == ("wrong", None)
    assert row["reason"].startswith("after the rounds: ")


def test_a_backend_that_breaks_is_told_and_the_others_go_on(kernels, register, capsys):
    record = run(kernels, capsys, *ONE, *register(Breaking))
    row = rows(record)["stand_in"]
    assert (row["status"], row["reason"]) == ("failed", "RuntimeError: an illegal access")
    assert rows(record)["native"]["median_us"] > 0


def test_a_broken_device_ends_the_run_and_keeps_what_there_is(kernels, register, capsys, monkeypatch, tmp_path):
    def broken(_device):
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(sys.modules["kernel_bench"], "synchronise", broken)
    record = run(kernels, capsys, *ONE, "--out", str(tmp_path), *register(Breaking), status=1)
    assert record["ended"] == "stand_in broke the device on d16-32-forward: an illegal access"
    assert record["left"] == ["d16-32-forward"]
    assert json.loads((tmp_path / "kernels.json").read_text()) == record


def test_a_refusal_is_told_with_its_reason(kernels, register, capsys):
    record = run(kernels, capsys, "--only", "d16-*-32-forward", "--backend", "native_cudnn", *register(Counted))
    assert "device is cpu" in record["absent"]["native_cudnn"]
    assert "native_cudnn" not in rows(record)
    by_name = {call["name"]: {row["backend"]: row for row in call["rows"]} for call in record["calls"]}
    row = by_name["d16-biased-32-forward"]["stand_in"]
    assert (row["status"], row["median_us"]) == ("refused", None)
    assert "mask" in row["reason"]


def test_one_of_our_own_that_is_wrong_fails_the_run(kernels, register, capsys):
    record = run(kernels, capsys, *ONE, *register(OursToo), status=1)
    row = rows(record)["stand_in"]
    assert (row["ours"], row["status"]) == (True, "wrong")


def test_a_slow_backend_is_left_out_of_longer_calls(kernels, register, capsys, monkeypatch):
    monkeypatch.setattr(sys.modules["kernel_bench"], "seconds_of", lambda *_: 9.0)
    monkeypatch.setattr(kernels, "works", lambda *_, **__: sorted(every, key=lambda work: work.case.query_length))
    every = sys.modules["kernel_cases"].works(sys.modules["kernel_cases"].TINY, torch.float32, "d16-??-forward")
    record = run(kernels, capsys, *register(Counted))
    short, long = (rows(record, place)["stand_in"] for place in (0, 1))
    assert short["reason"].startswith("one call takes 9 s")
    assert long["reason"].startswith("not tried: on d16-16-forward, one call takes 9 s")
    assert Counted.asked == 1


def test_compiling_for_too_long_ends_the_trials_of_others(kernels, register, capsys, monkeypatch):
    monkeypatch.setattr(sys.modules["kernel_bench"], "FIRST_SECONDS", 0.0)
    record = run(kernels, capsys, "--only", "d16-??-forward", *register(Counted))
    first, second = (rows(record, place)["stand_in"] for place in (0, 1))
    assert first["status"] == "right"
    assert second["reason"].startswith("not tried: its first calls have taken")


# Nothing is lost


def test_the_time_is_up_and_another_run_goes_on(kernels, register, capsys, tmp_path):
    ask = ["--only", "d16-??-forward", "--out", str(tmp_path), "--minutes", "1", *register(Counted)]
    now = iter([0.0, 0.0, 61.0])
    record = run(kernels, capsys, *ask, clock=lambda: next(now))
    assert record["ended"] == "the time was up"
    assert [call["name"] for call in record["calls"]] == ["d16-32-forward"]
    assert record["left"] == ["d16-16-forward"]
    assert json.loads((tmp_path / "kernels.json").read_text()) == record
    again = run(kernels, capsys, *ask, "--resume")
    assert again["calls"][0] == record["calls"][0]
    assert [call["name"] for call in again["calls"]] == ["d16-32-forward", "d16-16-forward"]
    assert (again["ended"], again["left"]) == ("completed", [])


def test_a_killed_run_leaves_what_was_measured(kernels, register, monkeypatch, tmp_path):
    real = kernels.Bench.measured

    def until_killed(self, work):
        if work.name == "d16-16-forward":
            raise SystemExit
        return real(self, work)

    monkeypatch.setattr(kernels.Bench, "measured", until_killed)
    with pytest.raises(SystemExit):
        kernels.main([*QUICK, "--only", "d16-??-forward", "--out", str(tmp_path), *register(Counted)])
    record = json.loads((tmp_path / "kernels.json").read_text())
    assert (record["ended"], record["left"]) == ("unfinished", ["d16-16-forward"])
    assert [call["name"] for call in record["calls"]] == ["d16-32-forward"]


def test_calls_that_are_not_asked_for_again_stay(kernels, register, capsys, tmp_path):
    ask = ["--out", str(tmp_path), *register(Counted)]
    first = run(kernels, capsys, "--only", "d16-??-forward", *ask)
    again = run(kernels, capsys, "--only", "d16-16-forward", *ask)
    assert again["calls"][0] == first["calls"][0]
    assert again["calls"][1]["name"] == "d16-16-forward"
    assert rows(again, 1)["native"] != rows(first, 1)["native"]
    assert len(again["calls"]) == 2


def test_a_run_of_some_backends_replaces_no_record(kernels, register, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules["measuring"], "RESULTS", tmp_path)
    ask = ["--device", "cpu", "--rounds", "2", *ONE, "--json"]
    monkeypatch.setattr(kernels, "Grid", lambda: sys.modules["kernel_cases"].TINY)
    assert kernels.main([*ask, *register(Counted)]) == 0
    assert not list(tmp_path.iterdir())
    assert kernels.main(ask) == 0
    assert [path.name for path in tmp_path.glob("*/*")] == ["kernels.json"]


def test_an_interruption_is_told(kernels, register, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(kernels.Bench, "measured", interrupted)
    assert run(kernels, capsys, *ONE, *register(Counted), status=130)["ended"] == "interrupted"


def test_a_record_of_another_machine_is_not_gone_on_with(kernels, register, capsys, tmp_path):
    ask = [*ONE, "--out", str(tmp_path), *register(Counted)]
    run(kernels, capsys, *ask)
    path = tmp_path / "kernels.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "machine": {**record["machine"], "torch": "1.0", "load": 99}}))
    with pytest.raises(SystemExit, match="2"):
        kernels.main([*QUICK, *ask, "--resume"])
    told = capsys.readouterr().err
    assert "torch was 1.0, is " in told
    assert "load" not in told
    assert run(kernels, capsys, *ask)["machine"]["torch"] == record["machine"]["torch"]
    path.write_text("{}")
    with pytest.raises(SystemExit, match="2"):
        kernels.main([*QUICK, *ask, "--resume"])
    assert "cannot be read" in capsys.readouterr().err


# What is asked for


def test_without_a_gpu_it_refuses_and_says_what_to_do(kernels, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        kernels.main([])
    told = capsys.readouterr().err
    assert "no GPU" in told
    assert "--device cpu" in told
    assert "--quick" in told


@pytest.mark.parametrize(
    ("ask", "told"),
    [(["--device", "cuda:7"], "cuda:7"), (["--only", "nothing-*"], "nothing-*"), (["--backend", "flsh"], "flash")],
)
def test_what_is_not_there_is_told(kernels, capsys, monkeypatch, ask, told):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        kernels.main([*QUICK, *ask])
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("short", "name", "dtype", "peak"),
    [("sm_90", "NVIDIA H200", torch.bfloat16, 989e12), ("sm_75", "Tesla T4", torch.float16, None),
     ("gfx942", "AMD Instinct MI300X", torch.bfloat16, None)],
)  # fmt: skip
def test_what_is_read_of_a_gpu(kernels, monkeypatch, short, name, dtype, peak):
    chosen, known = [], dataclasses.replace(DeviceFacts.parse(short), name=name)
    read = SimpleNamespace(multi_processor_count=132, clock_rate=1_830_000, memory_clock_rate=3_201_000,
                           memory_bus_width=6144, L2_cache_size=60 << 20, total_memory=100 << 30)  # fmt: skip
    facts = Facts("2.13.0", "3.11", "Linux", {"cuda:0": known}, {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: read)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(kernels, "_said", lambda command: "580.1\n580.1" if command[0] == "nvidia-smi" else "abc")
    monkeypatch.setattr(kernels, "probe", lambda: facts)
    monkeypatch.setattr("heedful.measuring.probe", lambda: facts)
    parser = kernels._options()
    wanted = kernels.parsed(parser, [])
    device = kernels._device(parser, wanted)
    dispatcher = kernels.AttentionDispatcher(facts=facts)
    bench = kernels._bench(wanted, device, dispatcher, ("native",))
    machine = kernels.about(device, ("native",), dispatcher)
    assert chosen == [device] == [torch.device("cuda", 0)]
    assert kernels._dtype(wanted, device) == dtype
    assert (bench.cached, bench.room) == (60 << 20, 10 << 30)
    assert kernels._roof(device, dtype).peak == (None if peak is None else pytest.approx(peak, rel=0.005))
    assert (machine["gpu"], machine["cuda"], machine["driver"]) == (name, "13.0", "580.1")
    assert machine["revision"] == "abc, changed"
    path = kernels.path_of("kernels", machine, wanted)
    assert path.parts[-3:] == ("results", folder_name(name), "kernels.json")


def test_tables_name_every_call_what_is_wrong_and_the_targets(kernels, register, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert kernels.main([*QUICK, *ONE, *register(OnePercentOff)]) == 0
    told = capsys.readouterr().out
    assert "d16-32-forward (B 1 H 2 N 2 Q 32 K 32 D 16, float32" in told
    assert "WRONG" in told
    assert "Ended: completed" in told
    assert "targets" not in told  # they are another device's


def test_targets_are_printed_for_their_device(benchmark_module):
    from rich.console import Console

    targets, tables = benchmark_module("kernel_targets"), benchmark_module("kernel_tables")
    record = {
        "machine": {"gpu": targets.targets()["device"]},
        "calls": [],
        "absent": {},
        "left": [],
        "ended": "completed",
    }
    record["targets"] = [one.to_dict() for one in targets.verdicts(record)]
    console = Console(width=160, record=True, file=io.StringIO())
    for table in tables.tables(record):
        console.print(table)
    told = console.export_text()
    assert told.count("not measured") == len(record["targets"]) == 26
    assert "≥ 340 TFLOP/s" in told


def test_our_own_are_those_of_the_registry(kernels):
    bench = kernels.Bench(torch.device("cpu"), (), 2, kernels.AttentionDispatcher())
    ours = {name for name in AttentionStrategyFactory.strategies() if bench._row(name).ours}
    assert {"triton", "triton_int8"} <= ours
    assert not ours & {"native", "flex", "flash", "sage_int8", "reference"}


def test_our_own_are_tried_first_and_what_holds_all_scores_last(kernels, register, capsys):
    register(Counted)
    names = [word for name in ("native_math", "native", "triton") for word in ("--backend", name)]
    record = run(kernels, capsys, *ONE, *names, "--backend", "stand_in")
    assert list(record["absent"]) == ["triton"]
    assert record["settings"]["backends"] == ["native", "stand_in", "native_math"]


def test_our_own_kernels_in_the_interpreter(benchmark_folder, tmp_path):
    environ = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(SOURCES), "OMP_NUM_THREADS": "1",
               "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    names = [word for name in ("triton", "triton_int8", "native") for word in ("--backend", name)]
    more = ["--only", "d16-causal-16-*", "--max-seconds", "60", "--out", str(tmp_path), *names]
    command = [sys.executable, str(benchmark_folder / "kernels.py"), *QUICK, *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environ, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "kernels.json").read_text())
    forward, backward = (rows(record, place) for place in (0, 1))
    assert record["absent"] == {}
    assert "triton" in record["machine"]
    assert forward["triton"]["status"] == backward["triton"]["status"] == "right"
    assert forward["triton_int8"]["status"] == "right"
    assert forward["triton_int8"]["error_in_units_of_allowed"] < 1
    assert backward["triton_int8"]["status"] == "refused"
