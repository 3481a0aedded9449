"""Rounds, figures, a matmul's rate and memory: what every command and benchmark measures with."""

import math

import pytest
import torch

from heedful import measuring
from heedful.measuring import Figures, Matmul, interleaved, machine_record, matmul_rate, peak_bytes, sized, spoken

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """Each call takes as long as it says; returns the log of (name, number) that was timed."""
    log = []

    def seconds_of(call, device, number=1):
        log.append((call.name, number))
        return call.seconds

    monkeypatch.setattr(measuring, "seconds_of", seconds_of)
    return log


class Takes:
    """A call of a known length."""

    def __init__(self, name, seconds):
        self.name, self.seconds, self.made = name, seconds, 0

    def __call__(self):
        self.made += 1


def test_each_round_times_every_way_in_another_order(clock):
    calls = {name: Takes(name, 0.01) for name in "abc"}
    steps = []
    times = interleaved(calls, CPU, 4, on_round=lambda: steps.append(1))
    assert times == {name: [0.01] * 4 for name in "abc"}
    assert len(steps) == 4
    assert "".join(name for name, _ in clock[3:]) == "bca" + "cab" + "cba" + "acb"
    assert [call.made for call in calls.values()] == [1, 1, 1]  # the warming one


def test_a_round_is_filled(clock):
    calls = {"short": Takes("short", 1e-5), "long": Takes("long", 1.0)}
    interleaved(calls, CPU, 2, least_seconds=0.005)
    numbers = dict(clock)
    assert numbers["long"] == 1
    assert 500 <= numbers["short"] <= 1000


def test_what_is_known_to_fill_a_round_is_not_called_to_find_that_out(clock):
    calls = {"short": Takes("short", 0.001), "long": Takes("long", 1.0)}
    interleaved(calls, CPU, 2, least_seconds=0.005, rough={"short": 0.001, "long": 1.0})
    assert (calls["short"].made, calls["long"].made) == (1, 0)
    assert [number for name, number in clock if name == "long"] == [1, 1]
    assert dict(clock)["short"] >= 5


def test_a_slow_way_sits_out_the_rounds_after_its_third(clock):
    calls = {"slow": Takes("slow", 2.0), "slower": Takes("slower", 9.0), "fast": Takes("fast", 0.1)}
    times = interleaved(calls, CPU, 9, most_seconds=9.0)
    assert {name: len(rounds) for name, rounds in times.items()} == {"slow": 5, "slower": 3, "fast": 9}


def test_an_interruption_leaves_the_rounds_so_far(clock):
    def stop():
        if len(times["a"]) == 2:
            raise KeyboardInterrupt

    times = {}
    with pytest.raises(KeyboardInterrupt):
        interleaved({"a": Takes("a", 0.01)}, CPU, 9, on_round=stop, times=times)
    assert times == {"a": [0.01, 0.01]}


def test_figures_are_the_median_and_half_the_quartile_gap():
    assert Figures.of([1.0, 2.0, 3.0, 4.0, 100.0]) == (3.0, (52.0 - 1.5) / 2)
    assert str(Figures(0.0015, 2e-6)) == "1.5 ms ± 2 us"


@pytest.mark.parametrize(("seconds", "text"), [(5e-7, "0.5 us"), (1.5e-3, "1.5 ms"), (2.5, "2.5 s"), (0.0, "0 us")])
def test_times_have_units(seconds, text):
    assert spoken(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(12, "12 B"), (1536, "1.5 KiB"), (3 << 20, "3 MiB"), (5 << 30, "5 GiB")])
def test_sizes_have_units(number, text):
    assert sized(number) == text


def test_a_real_call_has_a_real_time():
    one = torch.ones(8)
    times = interleaved({"add": lambda: one + one}, CPU, 3, least_seconds=0.001)
    assert all(0 < seconds < 1 for seconds in times["add"])


def test_the_rate_of_a_matmul():
    call, flops = Matmul.of(torch.float32, CPU)
    assert call().shape[0] ** 3 * 2 == flops
    assert 1e6 < matmul_rate(torch.float32, CPU) < 1e15


@pytest.mark.parametrize(
    ("call", "bytes_held"),
    [
        (lambda one: one + 1, 1 << 20),
        (lambda one: (one + 1).mul(2).add(3), 2 << 20),  # two at a time, not three
        (lambda one: (one.clone().sum(), one.sum()), 1 << 20),
        (lambda one: one.view(-1), 0),
    ],
)
def test_memory_is_what_is_held_at_once(call, bytes_held, capfd):
    one = torch.ones(1 << 18)
    assert peak_bytes(lambda: call(one), CPU) == pytest.approx(bytes_held, abs=256)
    assert capfd.readouterr().err == ""  # kineto's two lines


def test_what_a_call_prints_while_its_memory_is_measured_is_kept(capfd):
    import os

    peak_bytes(lambda: os.write(2, b"mine\n"), CPU)
    assert capfd.readouterr().err == "mine\n"


def test_memory_where_nothing_is_known_of_it():
    assert peak_bytes(lambda: None, torch.device("meta")) is None


def test_the_machine_is_told():
    known = machine_record(CPU, ["typer"])
    assert {"date", "cpu", "cores", "threads", "load", "python", "torch", "typer", "heedful"} == set(known)
    assert not measuring.busy({"load": 0.2, "cores": 2})
    assert measuring.busy({"load": 1.0, "cores": 2})
    assert not measuring.busy({"load": None, "cores": 2})


def test_ratios_are_medians_of_the_common_rounds():
    assert measuring.ratio({"a": [2.0, 30.0, 4.0], "b": [1.0, 10.0, 4.0, 5.0]}, "a", "b") == 2.0
    assert not math.isnan(measuring.ratio({"a": [1.0], "b": [2.0]}, "a", "b"))
