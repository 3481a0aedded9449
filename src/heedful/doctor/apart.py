"""Packages imported and tried in processes of their own: what raises, aborts or hangs there harms nobody here."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, get_args

from heedful.doctor.environment import Fault, Found

CHILD = Path(__file__).with_name("child.py")
SECONDS = 60.0  # a cold import of torch from a slow disc takes half of it
_KEPT = 2000  # characters of what a package printed


@dataclass(frozen=True)
class Job:
    """One package to import in ``module``, and the strategies that are to compute a tiny problem on ``device``.

    ``supposed``: the machine that the device passes for (``sm_80``), where a stand-in plays one.
    """

    distribution: str
    version: str
    module: str
    strategies: tuple[str, ...] = ()
    device: str = "cpu"
    supposed: str = ""


def tried(
    jobs: Iterable[Job], *, executable: str = "", seconds: float = SECONDS, at_once: int | None = None
) -> tuple[Found, ...]:
    """What became of each job, in its order; each has a process of its own, ``at_once`` of them at a time.

    Ctrl-C ends them all.
    """
    jobs, live = tuple(jobs), list[subprocess.Popen[bytes]]()
    with ThreadPoolExecutor(max_workers=max(1, at_once or os.cpu_count() or 1)) as pool:
        try:
            return tuple(pool.map(lambda job: _tried(job, executable or sys.executable, seconds, live), jobs))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in live:
                if process.poll() is None:  # the number of one that has ended may be another's
                    _end(process)
            raise


def _tried(job: Job, executable: str, seconds: float, live: list[subprocess.Popen[bytes]]) -> Found:
    told = {"module": job.module, "strategies": job.strategies, "device": job.device, "supposed": job.supposed}
    argument = json.dumps({**told, "path": [path for path in sys.path if path]})
    # Files, not pipes: what a package leaves running would hold a pipe open.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [executable, "-X", "faulthandler", str(CHILD), argument],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=errors,
            start_new_session=os.name == "posix",
        )
        live.append(process)
        late = False
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            _end(process)
            process.wait()
        printed, said = (_read(file) for file in (out, errors))
    lines = _lines(printed)
    fault, text = _outcome(lines, process.returncode, seconds if late else None, _tail(said))
    failed = tuple(map(str, lines[-1].get("failed", ()))) if fault == "fails a tiny problem" else ()
    return Found(job.distribution, job.version, job.module, fault, text, failed)


def _read(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read()


def _end(process: subprocess.Popen[bytes]) -> None:
    """It, and on POSIX whatever it started, even where it has ended itself."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if os.name == "posix":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def _lines(printed: bytes) -> list[dict[str, Any]]:
    """What the child told. A process that died may have left half a line, and a package may print anything."""
    found = []
    for line in printed.decode("utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError):
            data = json.loads(line)
            if isinstance(data, dict) and data.get("fault", "") in get_args(Fault):
                found.append(data)
    return found


def _outcome(lines: list[dict[str, Any]], status: int, seconds: float | None, said: str) -> tuple[Fault, str]:
    last = lines[-1] if lines else {}
    if seconds is None and last.get("fault"):
        return last["fault"], str(last.get("text", ""))
    if seconds is None and "fault" in last and status == 0:
        return _remarks(said)
    during = f"at the {last.get('stage', 'start')} of {last.get('of', 'the process')}"
    if seconds is not None:
        return "hangs", _joined(f"nothing came back within {seconds:g} s, {during}", said)
    return "ends the process", _joined(f"the process ended by {_ending(status)}, {during}", said)


def _remarks(said: str) -> tuple[Fault, str]:
    """What a package that works printed on its way: xFormers, for one, only warns that it lacks its kernels."""
    return ("warns", said) if said else ("", "")


def _ending(status: int) -> str:
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(-status).name}"
    return f"exit status {status}" if abs(status) < 1 << 16 else f"exit status {status & 0xFFFFFFFF:#x}"


def _tail(said: bytes) -> str:
    return said.decode("utf-8", errors="replace").strip()[-_KEPT:]


def _joined(text: str, said: str) -> str:
    return f"{text}\n{said}" if said else text
