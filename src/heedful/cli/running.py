"""Running a user's own script or module in this process, as ``python`` would, with something done at its end."""

from __future__ import annotations

import builtins
import contextlib
import os
import pkgutil
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType, TracebackType

_MAIN_OF_CHILDREN = "__mp_main__"


@contextlib.contextmanager
def _as_main(arguments: list[str], folder: Path) -> Iterator[None]:
    """``sys.argv``, ``sys.path`` with the folder that python would put first, and what multiprocessing calls main."""
    before = sys.argv[:], sys.path[:], sys.modules.get(_MAIN_OF_CHILDREN)
    sys.argv[:] = arguments
    if not getattr(sys.flags, "safe_path", False):  # python -P puts none
        sys.path[0] = str(folder)
    sys.modules[_MAIN_OF_CHILDREN] = _main_of_children()
    try:
        yield
    finally:
        sys.argv[:], sys.path[:] = before[:2]
        if before[2] is None:
            del sys.modules[_MAIN_OF_CHILDREN]
        else:
            sys.modules[_MAIN_OF_CHILDREN] = before[2]


def _main_of_children() -> ModuleType:
    """The module that spawned processes name as the owner of the script's classes: whatever is main at that time.

    multiprocessing takes it once, when it is imported, which torch has done long before the script.
    """
    module = ModuleType(_MAIN_OF_CHILDREN)
    module.__getattr__ = lambda name: getattr(sys.modules["__main__"], name)  # type: ignore[method-assign]
    return module


def run_script(script: str, arguments: list[str]) -> int:
    """Run it as ``__main__``; its exit status. What it raises passes through, after Ctrl-C too."""
    with _as_main([script, *arguments], Path(script).resolve().parent):
        return _status(lambda: _run_file(os.path.abspath(script)))


class _Script(SourceFileLoader):
    """A source of which nothing is kept in ``__pycache__``, as python keeps nothing of a script."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


def _run_file(path: str) -> None:
    """A file by its absolute path, with the names that python gives ``__main__``; runpy would give a module's.

    Archives and bytecode are runpy's.
    """
    if path.endswith(".pyc") or pkgutil.get_importer(path) is not None:
        runpy.run_path(path, run_name="__main__")
        return
    main = ModuleType("__main__")
    main.__file__, main.__loader__ = path, SourceFileLoader("__main__", path)
    vars(main).update(__builtins__=builtins, __cached__=None)
    before, sys.modules["__main__"] = sys.modules["__main__"], main
    try:
        _Script("__main__", path).exec_module(main)
    finally:
        sys.modules["__main__"] = before


def run_module(name: str, arguments: list[str]) -> int:
    """The same as ``python -m`` does with a module, or with a package that has a ``__main__``."""
    with _as_main(["-m", *arguments], Path.cwd()):
        return _status(lambda: runpy.run_module(name, run_name="__main__", alter_sys=True))


def _status(run: Callable[[], object]) -> int:
    try:
        run()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    return 0


def told(run: Callable[[], int]) -> int | None:
    """The exit status, with what the script raised told as python tells it: then it is 1. None after Ctrl-C."""
    try:
        return run()
    except BaseException as error:
        trace = _own_frames(error.__traceback__)
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        return None if isinstance(error, KeyboardInterrupt) else 1


def end_by_interrupt() -> None:
    """End this process as Ctrl-C ends python: by the signal, so that a shell's loop ends, too."""
    sys.stdout.flush()
    sys.stderr.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)


def _own_frames(trace: TracebackType | None) -> TracebackType | None:
    """The traceback from the script's first frame on: neither ours nor runpy's."""
    while trace is not None and _is_ours(trace):
        trace = trace.tb_next
    return trace


def _is_ours(step: TracebackType) -> bool:
    file = step.tb_frame.f_code.co_filename
    return file.startswith((str(Path(__file__).parent), "<frozen runpy", "<frozen importlib")) or file == runpy.__file__
