"""How time and memory are measured: in rounds that time every way in turn, each time in another order.

What else the machine does then falls on all ways alike. Two rounds go forwards, two backwards, so that no way always
finds the caches as the same other one has left them. A way's first call, which may compile, is in no figure, and
caches are warm. Times are seconds a call.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import math
import os
import platform
import re
import statistics
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch

from heedful.facts import probe

Call = Callable[[], object]
Times = dict[str, list[float]]

LEAST_ROUNDS = 3  # of a way that has used up its time
_MATMUL_SIZES = (256, 512, 1024, 2048, 4096, 8192)
_MATMUL_ROUNDS = 7
_KINETO = re.compile(rb"USDT:[^\n]*\n")


class Figures(NamedTuple):
    """Seconds a call: the median of the rounds, and half the distance between their quartiles."""

    median: float
    spread: float

    @classmethod
    def of(cls, rounds: Sequence[float]) -> Figures:
        """Of one figure a round, two rounds at least."""
        low, _, high = statistics.quantiles(rounds, n=4)
        return cls(statistics.median(rounds), (high - low) / 2)

    def __str__(self) -> str:
        return f"{spoken(self.median)} ± {spoken(self.spread)}"


def spoken(seconds: float) -> str:
    """A time with its unit, in three digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def sized(number: int) -> str:
    """Bytes with their unit, in three digits."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number} B"


def ratio(times: Mapping[str, Sequence[float]], over: str, under: str) -> float:
    """How many times as long one way takes as another: the median of the rounds that both were in, each by itself."""
    return statistics.median(one / other for one, other in zip(times[over], times[under], strict=False))


def synchronise(device: torch.device) -> None:
    """Wait for all that was asked of a device; a CPU has nothing to wait for."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def seconds_of(call: Call, device: torch.device, number: int = 1) -> float:
    """Seconds a call, of so many one after the other; on CUDA between two events of the current stream."""
    if device.type == "cpu":
        return timeit.Timer(call).timeit(number) / number
    synchronise(device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            timeit.Timer(call).timeit(number)
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3 / number
    started = time.perf_counter()
    timeit.Timer(call).timeit(number)
    synchronise(device)
    return (time.perf_counter() - started) / number


def interleaved(
    calls: Mapping[str, Call],
    device: torch.device,
    rounds: int,
    least_seconds: float = 0.005,
    on_round: Callable[[], None] | None = None,
    *,
    most_seconds: float = math.inf,
    times: Times | None = None,
    rough: Mapping[str, float] | None = None,
) -> Times:
    """Seconds a call, one figure a round and way; each way is called as often as fills ``least_seconds`` a round.

    ``on_round`` is called after each round. A way that has taken ``most_seconds`` in all sits out the rounds after its
    third. ``times`` is filled and returned where it is given: what an interruption leaves. ``rough``: what a call of a
    way takes at least, where it was called before; one that fills a round alone is not called to find that out.
    """
    times = {} if times is None else times
    times.update({way: [] for way in calls})
    filled = {way for way, seconds in (rough or {}).items() if seconds >= least_seconds}
    numbers = {way: 1 if way in filled else _calls_a_round(call, device, least_seconds) for way, call in calls.items()}
    order = list(calls)
    for round_ in range(rounds):
        order.append(order.pop(0))
        for way in order if round_ % 4 < 2 else reversed(order):
            done = times[way]
            if len(done) < LEAST_ROUNDS or sum(done) * numbers[way] < most_seconds:
                done.append(seconds_of(calls[way], device, numbers[way]))
        if on_round is not None:
            on_round()
    return times


def _calls_a_round(call: Call, device: torch.device, least_seconds: float) -> int:
    """How many calls take that long, found by doing it; the first call only warms up."""
    call()
    number = 1
    while (taken := seconds_of(call, device, number) * number) < least_seconds:
        number = max(2 * number, min(math.ceil(number * least_seconds / max(taken, 1e-9)), 100 * number))
    return number


class Matmul(NamedTuple):
    """A plain matmul, to measure others by: the call, and its floating point operations."""

    call: Call
    flops: int

    @classmethod
    def of(cls, dtype: torch.dtype, device: torch.device) -> Matmul:
        """Of square matrices, from 256 on as large as takes 10 ms on a CPU and 2 ms elsewhere, at most 8192."""
        enough = 1e-2 if device.type == "cpu" else 2e-3
        for size in _MATMUL_SIZES:
            one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
            call = functools.partial(torch.matmul, one, other)
            call()
            if min(seconds_of(call, device) for _ in range(3)) >= enough:
                break
        return cls(call, 2 * size**3)


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Floating point operations a second of a plain matmul of a size that keeps the device busy: the median of some."""
    call, flops = Matmul.of(dtype, device)
    return flops / statistics.median(interleaved({"matmul": call}, device, _MATMUL_ROUNDS)["matmul"])


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """The most memory that one call holds beyond what is held before it, its answer included; None where unknown.

    What torch's allocators hand out: on CUDA by their statistics, on a CPU by the profiler's record of each block.
    """
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device) - before
    return _peak_of_cpu(call) if device.type == "cpu" else None


def _peak_of_cpu(call: Call) -> int:
    with _without_kinetos_log(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                                        profile_memory=True) as profile:  # fmt: skip
        answer = call()
    del answer
    blocks = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(blocks, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@contextlib.contextmanager
def _without_kinetos_log() -> Iterator[None]:
    """Kineto writes two lines a profile to the process's stderr, at every log level (torch 2.13)."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            log.seek(0)
            os.write(2, _KINETO.sub(b"", log.read()))


def machine_record(device: torch.device | None = None, packages: Sequence[str] = ()) -> dict[str, Any]:
    """What figures depend on; ``packages`` are distributions whose versions are told beside torch's and heedful's."""
    on_gpu = {} if device is None or device.type == "cpu" else _of_gpu(device)
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        **on_gpu,
        "cpu": _cpu_name(),
        "cores": torch.multiprocessing.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", *packages, "heedful")},
    }


def folder_name(device: str) -> str:
    """A device's name as that of a folder of results: ``NVIDIA H200`` is ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9.]+", "-", device.lower()).strip("-.") or "gpu"


def busy(machine: dict[str, Any]) -> bool:
    """Whether a `machine_record` tells of others at work: half of the cores taken, or more."""
    return machine["load"] is not None and bool(machine["load"] >= machine["cores"] / 2)


def _of_gpu(device: torch.device) -> dict[str, Any]:
    known = probe().device(device)
    runtime = torch.version.hip or torch.version.cuda if device.type == "cuda" else None
    kind = "hip" if torch.version.hip else "cuda"
    return {"gpu": known.name, "architecture": known.architecture, **({kind: runtime} if runtime else {})}


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
