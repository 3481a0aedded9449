"""The tests of ``on_device`` in Triton's interpreter: each file in processes of its own, in shares."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "on_device"
ROOT = FOLDER.parents[2]
SHARES = {"test_contract": 4, "test_forward": 2}
FILES = sorted(path.stem for path in FOLDER.glob("test_*.py"))
SLOW = ("test_contract", "test_no_argument_is_ignored")  # files with proofs that are slow


def run(file: str, share: str, marker: str, timeout: int) -> str:
    """Run a share of a file's tests in the interpreter. Gives pytest's last line."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith("PYTEST_")}
    environ = {**kept, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
               "PYTHONPATH": str(ROOT / "src")}  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-m", marker,
               "--share", share, str(FOLDER / f"{file}.py")]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("file", "share"),
    [(file, f"{part + 1}/{SHARES.get(file, 1)}") for file in FILES for part in range(SHARES.get(file, 1))],
)
def test_in_the_interpreter(file, share):
    passed = re.search(r"(\d+) passed", run(file, share, "not slow", 900))
    assert passed, "nothing ran"


@pytest.mark.slow
@pytest.mark.parametrize("file", SLOW)
def test_the_slow_proofs_in_the_interpreter(file):
    assert re.search(r"(\d+) passed", run(file, "1/1", "slow", 3600))
