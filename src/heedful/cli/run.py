"""``heedful run``: someone's existing script with its attention computed by heedful, and a report at its end."""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import json
import os
import sys
import threading
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from heedful.cli.reporting import print_report
from heedful.cli.running import end_by_interrupt, run_module, run_script, told
from heedful.files import write_json
from heedful.models import report as run_report
from heedful.sdpa import patch_sdpa


def run(
    script: Annotated[str, typer.Argument(help="A Python script, or a module with -m; its arguments follow.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="The script's own arguments.")] = None,
    module: Annotated[bool, typer.Option("-m", help="The name is a module's, as with python -m.")] = False,
    backend: Annotated[str | None, typer.Option(help="A name, or several with commas for a fallback order.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, as the last line.")] = False,
    report: Annotated[Path | None, typer.Option(help="Also save the report, for `heedful report`.")] = None,
) -> None:
    """Run a Python script as it is, its attention calls computed by heedful, and say what ran.

    Options of heedful's come before the script. Every SDPA call is seen, in the threads that the script starts, too;
    not in its subprocesses. Output, exit status and errors are the script's own. The report comes after the script,
    however it ended, on stderr.
    """
    _check(script, module, report)
    patch = patch_sdpa(_names(backend))
    given, place = arguments or [], None if report is None else Path(os.path.abspath(report))  # it may change folders
    finish = functools.partial(_finish, patch, _EveryThread(patch), place, as_json, sys.stdout, sys.stderr)
    before = threading.enumerate()
    with patch:
        status = told(lambda: run_module(script, given) if module else run_script(script, given))
    if status is not None and any(not thread.daemon and thread not in before for thread in threading.enumerate()):
        atexit.register(finish)  # python waits for these threads first
        raise typer.Exit(status)
    unsaved = finish()
    if status is None:
        end_by_interrupt()
    if status or unsaved:
        raise typer.Exit(status or 1)


def _check(script: str, module: bool, report: Path | None) -> None:
    """Whatever can be known to be wrong before the script runs."""
    if report is not None and (report.is_dir() or not report.resolve().parent.is_dir()):
        raise typer.BadParameter(f"{report} is no file in a folder that is there", param_hint="--report")
    if not module and not Path(script).is_file():
        raise typer.BadParameter(f"{script} is no file", param_hint="SCRIPT")


def _names(backend: str | None) -> str | list[str] | None:
    if backend is None:
        return None
    names = [name.strip() for name in backend.split(",") if name.strip()]
    if not names:
        raise typer.BadParameter(f"got {backend!r}; give a name, or several with commas", param_hint="--backend")
    return names[0] if len(names) == 1 else names


class _EveryThread:
    """The patch in every thread that is started until the end, from its first event on.

    By ``threading.setprofile``, which exists to set up threads that somebody else starts.
    """

    def __init__(self, patch: patch_sdpa) -> None:
        self._patch, self._before = patch, threading.getprofile()
        threading.setprofile(self._begin)

    def _begin(self, *_event: Any) -> None:
        sys.setprofile(None)
        self._patch.__enter__()  # for as long as the thread lives

    def end(self) -> bool:
        """Whether it has held until now."""
        held = threading.getprofile() == self._begin
        threading.setprofile(self._before)
        return held


def _finish(patch: patch_sdpa, threads: _EveryThread, path: Path | None, as_json: bool, out: Any, err: Any) -> bool:
    """Print and save what ran; whether it could not be saved. ``out`` and ``err`` may have been closed."""
    found, console = run_report(), Console(file=err if _is_open(err) else io.StringIO(), highlight=False)
    made = {**found.to_dict(), "sdpa": patch.to_dict()}
    if not (as_json and _printed(json.dumps(made), out)):
        print_report(found, console)
        console.print(Text(str(patch)))
    if not threads.end():
        console.print("the script set threading.setprofile: attention in threads that it started later is not seen")
    if not patch.total and not found.calls and not patch.compiled:
        console.print("the script called no attention that heedful can see")
    try:
        if path is not None:
            write_json(path, made)
    except OSError as error:
        console.print(Text(f"heedful: the report is not saved: {error}"))
        return True
    return False


def _printed(line: str, out: Any) -> bool:
    """Whether a line could be printed as the last one. After a newline, as nobody knows how the script's output ended.

    ``out`` is the stream that was standard output before the script, which may have put another one over it.
    """
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.stdout.flush()
    if not _is_open(out):
        return False
    print(f"\n{line}", file=out, flush=True)
    return True


def _is_open(stream: Any) -> bool:
    try:
        return stream is not None and not stream.closed
    except ValueError:  # the script has detached it
        return False
