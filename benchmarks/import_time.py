"""What ``import heedful`` costs over ``import torch``, each in fresh processes; less than 50 ms is wanted.

Rounds are interleaved, so that another program's load falls on both.

    python benchmarks/import_time.py [--rounds 7] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

TARGET_MS = 50.0
STATEMENTS = {"torch": "import torch", "torch, heedful": "import torch; import heedful"}
TIMED = "import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"


def once(statement: str) -> float:
    """Milliseconds that a statement takes in a process of its own."""
    command = [sys.executable, "-c", TIMED.format(statement=statement)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) * 1e3


def main() -> int:
    """Measure and print; the exit status is 1 where the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    wanted = parser.parse_args()

    for statement in STATEMENTS.values():  # fills the file cache, and writes the byte code
        once(statement)
    times: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for _ in range(max(5, wanted.rounds)):
        for name, statement in STATEMENTS.items():
            times[name].append(once(statement))
    medians = {name: statistics.median(figures) for name, figures in times.items()}
    added = medians["torch, heedful"] - medians["torch"]
    if wanted.json:
        print(
            json.dumps({"median_ms": medians, "added_ms": added, "target_ms": TARGET_MS, "times_ms": times}, indent=2)
        )
    else:
        for name, median in medians.items():
            print(f"import {name:<16} {median:7.1f} ms   ({min(times[name]):.1f} to {max(times[name]):.1f})")
        print(f"heedful adds {added:18.1f} ms   (at most {TARGET_MS:.0f} is wanted)")
    return int(added > TARGET_MS)


if __name__ == "__main__":
    sys.exit(main())
