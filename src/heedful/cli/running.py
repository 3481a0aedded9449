"""Running a user's own script in this process, as ``python script.py`` would, with something done at its end."""

from __future__ import annotations

import contextlib
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def _as_main(script: Path, arguments: list[str]) -> Iterator[None]:
    before = sys.argv[:], sys.path[:]
    sys.argv[:] = [str(script), *arguments]
    sys.path[0] = str(script.resolve().parent)
    try:
        yield
    finally:
        sys.argv[:], sys.path[:] = before


def run_script(script: Path, arguments: list[str]) -> int:
    """Run it as ``__main__``; its exit status. What it raises passes through, after Ctrl-C too."""
    with _as_main(script, arguments):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            if end.code is None or isinstance(end.code, int):
                return end.code or 0
            print(end.code, file=sys.stderr)
            return 1
    return 0
