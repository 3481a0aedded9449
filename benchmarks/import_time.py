"""What ``import heedful`` costs over ``import torch``, each in fresh processes; less than 50 ms is wanted.

Rounds are interleaved, so that another program's load falls on both.

    python benchmarks/import_time.py [--rounds 7] [--quick] [--json] [--out FOLDER | --no-save]
"""

from __future__ import annotations

import subprocess
import sys

from measuring import Bar, Figures, Times, finish, machine, options, parsed
from rich.table import Table

TARGET_MS = 50.0
STATEMENTS = {"torch": "import torch", "torch, heedful": "import torch; import heedful"}
TIMED = "import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"


def once(statement: str) -> float:
    """Microseconds that a statement takes in a process of its own."""
    command = [sys.executable, "-c", TIMED.format(statement=statement)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) * 1e6


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, save; the exit status is 1 where the target is missed."""
    wanted = parsed(options(__doc__, rounds=7), arguments)
    times: Times = {name: [] for name in STATEMENTS}
    with Bar() as bar:
        bar.expect(wanted.rounds)
        for statement in () if wanted.quick else STATEMENTS.values():  # fills the file cache, writes the byte code
            once(statement)
        for _ in range(wanted.rounds):
            for name, statement in STATEMENTS.items():
                times[name].append(once(statement))
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
