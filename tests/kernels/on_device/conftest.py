"""Tests that launch kernels: where there is a GPU they run on it, else in Triton's interpreter.

Triton decides when kernels are defined, once a process, so with the interpreter they run in processes of their own:
``tests/kernels/test_interpreted.py`` starts those. By hand: ``TRITON_INTERPRET=1 python -m pytest
tests/kernels/on_device``. ``--share 2/4`` runs every fourth test, from the second on.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED:
    of_a_cpu = ["test_contract.py", "test_no_argument_is_ignored.py", "test_measured_tiles.py"]  # small tiles
    collect_ignore_glob = of_a_cpu if torch.cuda.is_available() else ["*.py"]


def pytest_configure(config: pytest.Config) -> None:
    """NumPy says aloud what a GPU does without a word: the lowest number times log2(e) is -inf, as is meant."""
    silent = "ignore:(overflow|invalid value) encountered:RuntimeWarning:triton\\.runtime\\.interpreter"
    config.addinivalue_line("filterwarnings", silent)
    # torch says so once in autograd's own thread, and goes on.
    config.addinivalue_line("filterwarnings", "ignore:Attempting to run cuBLAS, but there was no current:UserWarning")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Known only where pytest is pointed at this folder."""
    parser.addoption("--share", default="1/1", help="which share of the tests to run, such as 2/4")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    first, of = map(int, config.getoption("share", default="1/1").split("/"))
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in here if not INTERPRETED else ():
        item.add_marker(pytest.mark.gpu)
    others = [item for place, item in enumerate(here) if place % of != first - 1]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cpu" if INTERPRETED else "cuda")
