"""What a dispatcher costs over the kernel itself, on a tensor so small that the kernel hardly counts.

Four ways to the same answer, in interleaved rounds (one machine's noise hits all of them alike): torch's SDPA on
tensors that lie right already, SDPA with the transposes that a (B, S, H, D) model needs, diffusers'
``dispatch_attention_fn``, and ``heedful.attention(..., layout="BSHD")``. Each must give SDPA's numbers before it is
timed. The ratio is what heedful adds over the transposes, by what diffusers adds; at most 0.65 is wanted.

    python benchmarks/overhead.py [--rounds 25] [--json] [--out FOLDER | --no-save]

Shapes: B batch, S length, H heads, D head dim; query, key and value are alike.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import timeit
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import heedful

SHAPE_BSHD = (1, 8, 2, 16)
TARGET = 0.65
WAYS = ("sdpa", "transposes", "diffusers", "heedful")  # "transposes": SDPA with them

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Row:
    """One setting: the median of each way in microseconds a call, and half the distance between its quartiles."""

    setting: str
    median_us: dict[str, float]
    spread_us: dict[str, float]
    ratio: float

    @classmethod
    def of(cls, setting: str, times: dict[str, list[float]]) -> Row:
        """The row of each way's rounds. The ratio is a median too: of the rounds, each by itself."""
        rounds = zip(*(times[way] for way in WAYS[1:]), strict=True)
        ratios = [(ours - bare) / (theirs - bare) for bare, theirs, ours in rounds if theirs > bare]
        quartiles = {way: statistics.quantiles(times[way], n=4) for way in WAYS}
        return cls(
            setting,
            {way: statistics.median(times[way]) for way in WAYS},
            {way: (high - low) / 2 for way, (low, _, high) in quartiles.items()},
            statistics.median(ratios),
        )


def settings() -> dict[str, tuple[bool, dict[str, Call]]]:
    """By name: whether gradients are recorded, and the four ways."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(SHAPE_BSHD) for _ in range(3))
    wanted = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    batch, length, heads, _ = SHAPE_BSHD
    full = torch.rand(batch, heads, length, length) < 0.7
    full[..., 0] = True
    keep = torch.arange(length)[None] < length - 2
    padding = heedful.KeyPadding(keep)
    return {
        "no_grad": (False, ways(query, key, value)),
        "grad mode": (True, ways(query, key, value)),
        "grad wanted": (True, ways(*wanted)),
        "bool mask": (False, ways(query, key, value, full, full, full)),
        "key padding tensor": (False, ways(query, key, value, keep[:, None, None, :], keep, keep[:, None, None, :])),
        "KeyPadding": (False, ways(query, key, value, keep[:, None, None, :], keep, padding)),
    }


def ways(query: Tensor, key: Tensor, value: Tensor, plain: Any = None, theirs: Any = None, ours: Any = None) -> dict:
    """The four ways to one answer (B, S, H, D); each takes the mask in its own form."""
    lying = [tensor.detach().transpose(1, 2).contiguous() for tensor in (query, key, value)]
    for tensor in lying:
        tensor.requires_grad_(query.requires_grad)

    def bare() -> Tensor:
        return sdpa(lying[0], lying[1], lying[2], plain)

    def transposed() -> Tensor:
        return sdpa(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), plain).transpose(1, 2)

    def diffusers() -> Tensor:
        return dispatch_attention_fn(query, key, value, attn_mask=theirs)

    def ours_() -> Tensor:
        return heedful.attention(query, key, value, attn_mask=ours, layout="BSHD")

    calls = {"sdpa": bare, "transposes": transposed, "diffusers": diffusers, "heedful": ours_}
    wanted = transposed()
    torch.testing.assert_close(bare().transpose(1, 2), wanted)
    for way in ("diffusers", "heedful"):
        torch.testing.assert_close(calls[way](), wanted)
    return calls


def measure(calls: dict[str, Call], rounds: int, number: int) -> dict[str, list[float]]:
    """Microseconds a call, one figure a round and way. Every round times all ways, each time in another order."""
    timers = {way: timeit.Timer(call) for way, call in calls.items()}
    times: dict[str, list[float]] = {way: [] for way in calls}
    for timer in timers.values():
        timer.timeit(number)
    order = list(calls)
    for _ in range(rounds):
        order.append(order.pop(0))
        for way in order:
            times[way].append(timers[way].timeit(number) / number * 1e6)
    return times


def table(rows: list[Row]) -> Table:
    """The rows, as one reads them."""
    drawn = Table(
        title=f"microseconds a call, (B, S, H, D) = {SHAPE_BSHD}, float32: median ± half the quartile gap",
        caption="transposes: SDPA with them; ratio: what heedful adds to them by what diffusers adds",
    )
    drawn.add_column("setting")
    for way in WAYS:
        drawn.add_column(way, justify="right")
    drawn.add_column("ratio", justify="right")
    for row in rows:
        figures = [f"{row.median_us[way]:.2f} ± {row.spread_us[way]:.2f}" for way in WAYS]
        drawn.add_row(row.setting, *figures, f"{row.ratio:.2f}")
    return drawn


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "cpu": names[0] if names else platform.processor(),
        "cores": torch.multiprocessing.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "diffusers", "heedful")},
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def save(name: str, record: dict[str, Any], folder: Path | None) -> Path:
    """Write a record into the folder, by default that of this machine's size, and say where."""
    folder = folder or Path(__file__).parent / "results" / f"cpu-{record['machine']['cores']}core"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def main() -> int:
    """Measure, print, save; the exit status is 1 where the plain no_grad call misses the target."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--number", type=int, default=2000, help="calls a round")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", type=Path, help="folder of the record")
    parser.add_argument("--no-save", action="store_true")
    wanted = parser.parse_args()

    rows = []
    for setting, (grad, calls) in settings().items():
        with nullcontext() if grad else torch.no_grad():
            rows.append(Row.of(setting, measure(calls, wanted.rounds, wanted.number)))
    record = {"machine": machine(), "shape_bshd": SHAPE_BSHD, "target": TARGET, "rows": [asdict(row) for row in rows]}
    console = Console()
    if wanted.json:
        print(json.dumps(record, indent=2))
    else:
        console.print(table(rows))
    if not wanted.no_save:
        print(f"written to {save('overhead', record, wanted.out)}", file=sys.stderr)
    return int(rows[0].ratio > TARGET)


if __name__ == "__main__":
    sys.exit(main())
