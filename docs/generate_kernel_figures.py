"""The figures in docs/kernels.md: targets and what became of them, and what was measured on devices.

    python docs/generate_kernel_figures.py            # writes them anew
    python docs/generate_kernel_figures.py --check    # changes nothing; exit status 1 where they are out of date

They come from ``benchmarks/targets.json`` and ``benchmarks/results/*/kernels.json``, which ``make gpu-bench`` writes on
a GPU. Nothing is measured here, and records of a CPU are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "docs")]

from generate_backends import renewed  # noqa: E402
from kernel_tables import share  # noqa: E402
from kernel_targets import Verdict, best, targets, verdicts  # noqa: E402

PAGE = ROOT / "docs" / "kernels.md"
RESULTS = ROOT / "benchmarks" / "results"
MARKS = "<!-- figures: by docs/generate_kernel_figures.py -->", "<!-- end of figures -->"
NOTHING = "**Nothing was measured on a device yet.**"
CELLS = ("D64", "D64 causal", "D128", "D128 causal")
VERSIONS = ("torch", "triton", "cuda", "hip", "driver", "heedful", "revision", "date")


def records(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """What was measured on GPUs, by their folders' names."""
    every = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*/kernels.json"))]
    return [record for record in every if "gpu" in record["machine"]]


def body(found: Iterable[Mapping[str, Any]]) -> str:
    """All that stands between the marks."""
    found, device = list(found), targets()["device"]
    measured = next((record for record in found if record["machine"]["gpu"] == device), None)
    judged = verdicts(measured or {"machine": {"gpu": device}, "calls": []})
    parts = [wanted(judged), fastest(judged)]
    parts += [figures(record) for record in found] or [NOTHING]
    return "\n\n".join(parts)


def wanted(judged: Iterable[Verdict]) -> str:
    """The rates that are wanted, a line for each step."""
    lines: dict[str, dict[str, str]] = {}
    for one in judged:
        if one.unit == "TFLOP/s":
            found = "" if one.found is None else f" ({one.found:.0f})"
            lines.setdefault(one.step, {})[one.cell] = f"≥ {one.wanted:g}: {one.outcome}{found}"
    rows = [f"| {step} | {' | '.join(cells.get(cell, '') for cell in CELLS)} |" for step, cells in lines.items()]
    title = f"Targets, TFLOP/s on an {targets()['device']}, {targets()['dtype']}, 8192 tokens, batch times heads 64:"
    return "\n".join([title, "", f"| | {' | '.join(CELLS)} |", "|---|---|---|---|---|", *rows])


def fastest(judged: Iterable[Verdict]) -> str:
    """Where every other backend is to be beaten, a line for each call."""
    lines: dict[str, dict[str, str]] = {}
    for one in judged:
        if one.unit == "times":
            call, _, direction = one.work.rpartition("-")
            found = "" if one.found is None else f" ({one.found:.2f} times, {one.by})"
            lines.setdefault(call, {})[direction] = f"{one.outcome}{found}"
    rows = [f"| `{call}` | {cells.get('forward', '')} | {cells.get('backward', '')} |" for call, cells in lines.items()]
    title = "There, too, faster than every other installed backend that gives the right answer:"
    return "\n".join([title, "", "| | forward | backward |", "|---|---|---|", *rows])


def figures(record: Mapping[str, Any]) -> str:
    """What was measured on one device: a line for each call."""
    machine = record["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in VERSIONS if machine.get(name))
    left = f"; {len(record['left'])} calls are left" if record["left"] else ""
    title = f"Measured on an **{machine['gpu']}** by `make gpu-bench`: {versions}{left}."
    head = "| call | ours | TFLOP/s | roofline | matmul | fastest other | TFLOP/s | times as fast |"
    return "\n".join([title, "", head, "|---|---|---|---|---|---|---|---|", *_rows(record["calls"])])


def _rows(calls: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for call in calls:
        ours, other = (best(call, ours=whose) for whose in (True, False))
        times = f"{other['median_us'] / ours['median_us']:.2f}" if ours and other else ""
        cells = [f"`{call['name']}`", *_of(ours), *_shares(ours), *_of(other), times]
        yield f"| {' | '.join(cells)} |"


def _of(row: Mapping[str, Any] | None) -> tuple[str, str]:
    """The backend, and its rate with the rounds' spread."""
    if row is None:
        return "", ""
    spread = row["tflops"] * row["spread_us"] / row["median_us"]
    return f"`{row['backend']}`", f"{row['tflops']:.3g} ± {spread:.2g}"


def _shares(row: Mapping[str, Any] | None) -> tuple[str, str]:
    return ("", "") if row is None else (share(row["share_of_roofline"]), share(row["share_of_matmul"]))


def main(arguments: list[str] | None = None) -> int:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where it is out of date")
    asked = parser.parse_args(arguments)
    old = PAGE.read_text("utf-8")
    new = renewed(old, body(records()), MARKS)
    if old == new:
        return 0
    print(f"docs/kernels.md: {'out of date' if asked.check else 'written'}")
    if not asked.check:
        PAGE.write_text(new, "utf-8")
    return 1 if asked.check else 0


if __name__ == "__main__":
    sys.exit(main())
