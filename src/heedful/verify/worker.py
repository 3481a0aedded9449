"""The process that one backend is verified in: it reads a job on stdin, and tells each check as a line of JSON.

Before a check it says which one begins, so that a kernel that ends the process, or never returns, is known by its last
line. What kernels print goes to stderr. It ends with its parent, whose end it sees by stdin.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

import torch

from heedful.errors import InvalidArgument, RegistrationError
from heedful.facts import probe
from heedful.testing.contract import Check, Result, checks, examined
from heedful.verify.features import features_of
from heedful.verify.job import Job, plugin_name

BROKEN_DEVICE = 70  # exit status: a kernel left a device on which nothing runs any more
Tell = Callable[[dict[str, Any]], None]


def main() -> None:
    """Do the job on stdin."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who ends this process
    out = _results()
    job = Job.from_dict(json.loads(sys.stdin.readline()))
    threading.Thread(target=_end_with_the_parent, name="heedful-verify-parent", daemon=True).start()

    work(job, _teller(out))
    os._exit(0)  # whatever a kernel's library does at the end of a process is no matter


def _teller(out: TextIO) -> Tell:
    def tell(event: dict[str, Any]) -> None:
        out.write(json.dumps(event, allow_nan=False, ensure_ascii=False) + "\n")
        out.flush()

    return tell


def _results() -> TextIO:
    """The parent's pipe, kept from everybody else: what was stdout is stderr from now on."""
    pipe = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(pipe, "w", encoding="utf-8", errors="replace")  # half characters that no file can hold


def _end_with_the_parent() -> None:
    sys.stdin.read()
    os._exit(0)


def work(job: Job, tell: Tell) -> None:
    """Make the job's checks, and tell what becomes of each."""
    try:
        every = _checks(job)
    except (InvalidArgument, RegistrationError) as error:
        tell({"event": "invalid", "text": str(error)})
        return
    tell({"event": "ready", "checks": len(every), **_about(job, every)})
    for check in every[job.done :]:
        tell({"event": "begin", **described(check)})
        started = time.perf_counter()
        result = examined(check)
        tell({"event": "end", "seconds": round(time.perf_counter() - started, 4), **_told(result)})
        if result.outcome == "wrong" and _is_broken(check.subject.device):
            os._exit(BROKEN_DEVICE)
    tell({"event": "done"})


def _checks(job: Job) -> tuple[Check, ...]:
    """The chosen ones. On CUDA the device's number is the process's, and checks are asked for the type alone."""
    torch.set_num_threads(job.threads)
    place = torch.device(job.device)
    if place.type == "cuda" and place.index is not None:
        torch.cuda.set_device(place.index)
    return job.choice.of(checks(job.strategy(), devices=(place.type,), seed=job.seed))


def _about(job: Job, every: tuple[Check, ...]) -> dict[str, Any]:
    if not every:
        strategy = job.strategy()
        return {"name": strategy if isinstance(strategy, str) else plugin_name(strategy)}
    subject = every[0].subject
    return {
        "name": subject.name,
        "exactness": subject.strategy.exactness,
        "version": subject.strategy.version(probe()),
        "samples": len({check.sample.name for check in every if check.sample is not None}),
    }


def described(check: Check) -> dict[str, Any]:
    """A check as JSON data, before anything has become of it."""
    return {
        "check": check.name,
        "sample": None if check.sample is None else check.sample.name,
        "aspect": check.aspect,
        "features": list(features_of(check)),
    }


def _told(result: Result) -> dict[str, Any]:
    """What became of a check, as JSON data, which has neither NaN nor infinity."""
    far = result.deviation
    return {
        "outcome": result.outcome,
        "detail": "" if result.outcome == "right" else result.detail,
        "limits": list(dict.fromkeys(one.field for one in result.refusals)),
        "reasons": [str(one) for one in result.refusals],
        "what": None if far is None else far.what,
        "error": None if far is None else _finite(far.error),
        "units": None if far is None else _finite(far.units),
    }


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _is_broken(device: str) -> bool:
    """Whether the device takes no more work: an illegal access on CUDA spoils all that comes after it."""
    if device == "cpu":
        return False
    try:
        torch.get_device_module(device).synchronize()
        torch.zeros(1, device=device).add_(1).item()
    except RuntimeError:
        return True
    return False
