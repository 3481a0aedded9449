"""Times of single calls, read without making a device wait: wall time on a CPU, events on a GPU.

A GPU's events are read once they have passed, perhaps many calls later; until then a time is not known.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

R = TypeVar("R")
Reading = Callable[[], float | None]
DEVICES = ("cpu", "cuda")  # where times can be read so


def timed(call: Callable[[], R], device: torch.device) -> tuple[R, Reading]:
    """What a call returns, and its time in seconds; the reading gives None while the device is not there yet."""
    if device.type != "cuda":
        start = time.perf_counter()
        out = call()
        seconds = time.perf_counter() - start
        return out, lambda: seconds
    stream = torch.cuda.current_stream(device)
    before, behind = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record(stream)
    out = call()
    behind.record(stream)
    return out, lambda: before.elapsed_time(behind) * 1e-3 if behind.query() else None


def settle(device: torch.device) -> None:
    """Wait until a device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
