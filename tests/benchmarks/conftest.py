"""Every benchmark runs: as a command, with ``--quick``, and inside the tests, where it can be given a wrong answer."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark_folder() -> Path:
    return FOLDER


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a benchmark as it imports its own helper; afterwards it is gone from the modules."""
    monkeypatch.syspath_prepend(FOLDER)
    for path in FOLDER.glob("*.py"):
        monkeypatch.delitem(sys.modules, path.stem, raising=False)
        monkeypatch.setitem(sys.modules, path.stem, None)  # so that undoing deletes what a test imports
        del sys.modules[path.stem]
    return importlib.import_module
