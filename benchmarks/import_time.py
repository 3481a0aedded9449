"""What ``import heedful`` costs over ``import torch``, each in fresh processes; less than 50 ms is wanted.

Rounds are interleaved, so that another program's load falls on both. Byte code is kept, as a user's Python keeps it,
also where the environment forbids that (PYTHONDONTWRITEBYTECODE).

    python benchmarks/import_time.py [--rounds 7] [--quick] [--json] [--out FOLDER | --no-save]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

from measuring import Bar, Figures, Times, finish, machine, options, parsed
from rich.table import Table

TARGET_MS = 50.0
STATEMENTS = {"torch": "import torch", "torch, heedful": "import torch; import heedful"}
TIMED = "import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"


def once(statement: str, byte_code: str) -> float:
    """Microseconds that a statement takes in a process of its own, which keeps its byte code in that folder."""
    command = [sys.executable, "-c", TIMED.format(statement=statement)]
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environ["PYTHONPYCACHEPREFIX"] = byte_code
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environ)
    return float(done.stdout) * 1e6


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, save; the exit status is 1 where the target is missed."""
    wanted = parsed(options(__doc__, rounds=7), arguments)
    times: Times = {name: [] for name in STATEMENTS}
    with tempfile.TemporaryDirectory() as byte_code, Bar() as bar:
        bar.expect(wanted.rounds)
        for statement in () if wanted.quick else STATEMENTS.values():  # fills the file cache, writes the byte code
            once(statement, byte_code)
        for _ in range(wanted.rounds):
            for name, statement in STATEMENTS.items():
                times[name].append(once(statement, byte_code))
            bar.step()
    figures = {name: Figures.of(rounds) for name, rounds in times.items()}
    added = (figures["torch, heedful"].median_us - figures["torch"].median_us) / 1e3
    table = Table("import", "median ± half the quartile gap", caption=f"at most {TARGET_MS:.0f} ms more are wanted")
    for name, one in figures.items():
        table.add_row(name, str(one))
    table.add_row("added by heedful", f"{added:.1f} ms")
    record = {
        "machine": machine(),
        "figures": {name: one._asdict() for name, one in figures.items()},
        "added_ms": added,
        "target_ms": TARGET_MS,
    }
    finish("import_time", record, [table], wanted)
    return int(added > TARGET_MS and not wanted.quick)


if __name__ == "__main__":
    sys.exit(main())
