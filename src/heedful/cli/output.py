"""What commands write: files, whole or not at all, JSON, and a progress bar."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


def check_writable(path: Path, option: str) -> None:
    """Raise BadParameter before anything is measured for nothing."""
    if path.is_dir():
        raise typer.BadParameter(f"got {path}, which is a folder; give the name of a file", param_hint=option)
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        remedy = "give a file in a folder that is there and can be written"
        raise typer.BadParameter(f"got {path}: {error.strerror}; {remedy}", param_hint=option) from error


def write_text(path: Path, text: str) -> None:
    """The whole file or none: readers never see half of it."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        file.write(text)
    try:
        mode = path.stat().st_mode if path.exists() else 0o666 & ~_umask()
        os.chmod(file.name, mode)
        os.replace(file.name, path)
    except OSError:
        os.unlink(file.name)
        raise


def _umask() -> int:
    """There is no reading it without setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def json_text(record: Mapping[str, Any]) -> str:
    """A record as text, for a file or a pipe."""
    return json.dumps(record, indent=2, allow_nan=False) + "\n"


class Bar(AbstractContextManager["Bar"]):
    """A progress bar on stderr where somebody watches; it is gone when the work is done."""

    def __init__(self, steps: int) -> None:
        console = Console(stderr=True)
        columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task("", total=steps)

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._progress.stop()

    def more(self, steps: int) -> None:
        """So many steps more than was known."""
        task = self._progress.tasks[0]
        self._progress.update(self._task, total=(task.total or 0) + steps)

    def step(self, doing: str, steps: int) -> None:
        """What is being done, and how many steps are done with it."""
        self._progress.update(self._task, advance=steps, description=doing)
