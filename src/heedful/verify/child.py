"""A worker as its parent sees it: events in order, and an end in every case, by itself, by a crash or by the clock."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from heedful.verify.job import Job

_MAIN = "import sys; sys.path[:] = {path!r}; {before}from {module} import main; main()"
_STARTING = 300.0  # seconds until the first line: the import of torch from a cold disk, and drawing up the checks
_SETTLING = 60.0  # seconds for a worker's first check at the least: it imports, compiles, and wakes a GPU
_LAST_WORDS = 2000  # characters of stderr that are kept of a crash
_LEAVING = 10.0  # seconds
_EVENTS = ("ready", "begin", "end", "done", "invalid")


def command(module: str, *arguments: str, before: str = "") -> list[str]:
    """A new process that calls ``main`` of one of heedful's modules, found where this process finds it; ``before`` it
    runs that statement.

    Not ``python -m``, which would put the current folder before everything else. The folder comes last here: a plug-in
    that lies in it is found.
    """
    here = os.getcwd()
    path = [*sys.path, *([] if here in sys.path or "" in sys.path else [here])]
    return [sys.executable, "-c", _MAIN.format(path=path, before=before, module=module), *arguments]


class Child(AbstractContextManager["Child"]):
    """One worker on one job. ``seconds``: the most that one check may take, but the first."""

    def __init__(self, job: Job, seconds: float) -> None:
        self.job, self.seconds = job, seconds
        self.ended = False
        self._said: queue.Queue[str | None] = queue.Queue()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        self._process = subprocess.Popen(
            command("heedful.verify.worker"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # Ctrl-C in a terminal goes to whole groups
        )
        threading.Thread(target=self._listen, name="heedful-verify-child", daemon=True).start()

    def end(self) -> None:
        """Have it ended, from any thread: what it tells from then on is of no interest."""
        self.ended = True
        self._end()

    def __exit__(self, *_error: object) -> None:
        self._end()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                _close(pipe)
        self._errors.close()

    def events(self) -> Iterator[dict[str, Any]]:
        """What the worker tells. The last event is ``done``, ``invalid``, ``crashed`` (with what its end was and the
        last it wrote) or ``hung``.
        """
        self._ask()
        limit, settled = _STARTING, False
        while True:
            try:
                line = self._said.get(timeout=limit)
            except queue.Empty:
                self._end()
                yield {"event": "hung", "seconds": limit}
                return
            if line is None:
                yield {"event": "crashed", "how": self._how(), "stderr": self._last_words()}
                return
            event = _event(line)
            if event is None:
                self._end()
                how = "something else than the worker wrote where its results go"
                yield {"event": "crashed", "how": how, "stderr": self._last_words()}
                return
            yield event
            if event["event"] in {"done", "invalid"}:
                return
            settled |= event["event"] == "end"
            limit = self.seconds if settled else max(self.seconds, _SETTLING)

    def _ask(self) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(self.job.to_dict()) + "\n")
            self._process.stdin.flush()
        except OSError:  # it is gone already: the end of its output says so
            return

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.endswith("\n"):  # the last line of a process that was ended may be cut
                self._said.put(line)
        self._said.put(None)

    def _end(self) -> None:
        """End the worker, and what it has started: torch.compile has processes of its own."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it ended by itself meanwhile
                os.killpg(self._process.pid, signal.SIGKILL) if hasattr(os, "killpg") else self._process.kill()
        self._process.wait(_LEAVING)

    def _how(self) -> str:
        """How it ended, in words."""
        try:
            status = self._process.wait(_LEAVING)
        except subprocess.TimeoutExpired:
            self._end()
            return "it closed its output and stayed"
        if status >= 0:
            return f"exit status {status}"
        names = {one.value: one.name for one in signal.Signals}
        return f"signal {-status} ({names.get(-status, 'unknown')})"

    def _last_words(self) -> str:
        self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, self._errors.tell() - _LAST_WORDS))
        return self._errors.read().decode("utf-8", "replace").strip()


def _event(line: str) -> dict[str, Any] | None:
    """What a line tells; None where it is none of the worker's."""
    with contextlib.suppress(ValueError):
        data = json.loads(line)
        if isinstance(data, dict) and data.get("event") in _EVENTS:
            return data
    return None


def _close(pipe: Any) -> None:
    try:
        pipe.close()
    except OSError:  # what was not flushed has no reader any more
        return
