"""Times of single calls: read once, known at once on a CPU, and late on a GPU."""

import time

import pytest
import torch

from heedful import clock
from heedful.clock import settle, timed

CPU = torch.device("cpu")


def test_a_call_on_a_cpu_is_timed_and_its_time_stays(monkeypatch):
    moments = iter((10.0, 10.25))
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(moments))
    out, reading = timed(lambda: "answer", CPU)
    assert out == "answer"
    assert reading() == 0.25
    assert reading() == 0.25


def test_an_error_of_the_call_passes_through():
    def fails():
        raise KeyError("kernel")

    with pytest.raises(KeyError, match="kernel"):
        timed(fails, CPU)


def test_a_gpus_time_is_not_known_until_its_events_have_passed(monkeypatch):
    """With stand-ins for torch's events: the second one passes when it is told to."""
    made = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            self.passed, self.stream = False, None
            made.append(self)

        def record(self, stream):
            self.stream = stream

        def query(self):
            return self.passed

        def elapsed_time(self, _other):
            return 5.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    out, reading = timed(lambda: len([event for event in made if event.stream]), torch.device("cuda", 1))
    assert out == 1  # the call lies between the events
    assert [event.stream for event in made] == ["stream of cuda:1"] * 2
    assert reading() is None
    made[1].passed = True
    assert reading() == pytest.approx(5e-3)


def test_only_a_gpu_is_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    settle(CPU)
    assert waited == []
    settle(torch.device("cuda", 0))
    assert waited == [torch.device("cuda", 0)]


def test_a_real_reading_is_a_time():
    before = time.perf_counter()
    _, reading = timed(lambda: torch.ones(8).sum(), CPU)
    assert 0 < reading() <= time.perf_counter() - before
