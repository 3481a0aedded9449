"""Our own kernels compiled for GPUs that are not here: registers, shared memory, spills, matrix instructions.

Fails where a kernel does not compile, spills in a configuration that is shipped for sm_80, sm_90 or sm_100, or has no
matrix instructions. No time is measured, and none could be.

    python benchmarks/aot.py [--target sm_90 ...] [--jobs 2] [--json] [--out FILE | --no-save]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton.errors import TritonError

from heedful.files import write_json
from heedful.kernels import aot

RESULTS = Path(__file__).parent / "results" / "aot.json"


def main() -> int:
    """Compile, print, keep; 1 where a gate is closed."""
    asked = parsed()
    wanted = [(name, target) for name, target in aot.every() if not asked.target or target in asked.target]
    failures: list[str] = []
    found = sorted(compiled(wanted, asked.jobs, failures), key=lambda one: wanted.index((one.kernel, one.target)))
    faults = [*failures, *(fault for one in found for fault in one.faults)]
    if asked.json:
        print(json.dumps([asdict(one) for one in found], indent=1))
    else:
        show(found)
    for fault in faults:
        print(fault, file=sys.stderr)
    if asked.save and not asked.target and not failures:
        write_json(asked.out, {"triton": aot.triton_version(), "kernels": [asdict(one) for one in found]})
    return 1 if faults else 0


def compiled(wanted: list[tuple[str, str]], jobs: int, failures: list[str]) -> Iterable[aot.Compiled]:
    """All of them, some at a time. What does not compile is among ``failures`` then, in words."""
    with ProcessPoolExecutor(jobs) as pool:
        running = {pool.submit(aot.compile_variant, *each): each for each in wanted}
        console = Console(stderr=True)
        for done in track(as_completed(running), "compiling", total=len(running), console=console, transient=True):
            try:
                yield done.result()
            except (TritonError, RuntimeError, AssertionError) as error:  # of its front end, of its passes
                kernel, target = running[done]
                failures.append(f"{kernel} for {target} does not compile: {type(error).__name__}: {error}")


def show(found: Iterable[aot.Compiled]) -> None:
    """The table."""
    table = Table("kernel", "target", "tile", "warps", "registers", "shared", "spilled", "matrix instructions")
    for one in found:
        matrix = ", ".join(f"{count} {name}" for name, count in one.matrix.items()) or "none"
        tile = f"{one.tile[0]}×{one.tile[1]}"
        spilled = f"{one.spilled} B" if one.spilled else "0"
        shared = f"{one.shared / 1024:.0f} KiB"
        row = (one.kernel, one.target, tile, str(one.tile[2]), str(one.registers), shared, spilled, matrix)
        table.add_row(*row, style="red" if one.faults else None)
    Console().print(table)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=aot.TARGETS, help="only this one; may be repeated")
    parser.add_argument("--jobs", type=int, default=2, help="compilations at a time")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where all targets' figures are kept")
    parser.add_argument("--no-save", dest="save", action="store_false", help="keep nothing")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
