"""What a layer's call costs once ``set_attention_backend`` has routed it, over the same layer left alone.

One diffusers attention layer on a tensor so small that the kernel hardly counts; plain and routed rounds in turn, after
both gave the same answer. Nothing is asserted.

    python benchmarks/routing.py [--rounds 60] [--quick] [--json] [--out FOLDER | --no-save]
"""

from __future__ import annotations

import copy
import sys

import torch
from diffusers.models.attention_processor import Attention
from measuring import Figures, check_alike, finish, machine, measure, options, parsed
from rich.table import Table

import heedful

CALLS = 100


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, save."""
    wanted = parsed(options(__doc__, rounds=60), arguments)
    torch.manual_seed(0)
    plain = Attention(query_dim=32, heads=2, dim_head=16).eval()
    routed = copy.deepcopy(plain)
    heedful.set_attention_backend(routed, "native")
    hidden = torch.randn(1, 16, 32)
    with torch.no_grad():
        check_alike("routed", routed(hidden), plain(hidden))
        calls = {"layer alone": lambda: plain(hidden), "routed": lambda: routed(hidden)}
        times = measure(calls, wanted.rounds, 10 if wanted.quick else CALLS)
    figures = {way: Figures.of(rounds) for way, rounds in times.items()}
    added = Figures.of([sent - alone for alone, sent in zip(*times.values(), strict=True)])
    table = Table(*figures, "added", title="a layer's call: median ± half the quartile gap")
    table.add_row(*map(str, figures.values()), str(added))
    record = {
        "machine": machine("diffusers"),
        "figures": {way: one._asdict() for way, one in figures.items()},
        "added_us": added.median_us,
    }
    finish("routing", record, [table], wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
