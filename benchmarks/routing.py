"""What a layer's call costs once ``set_attention_backend`` has routed it, over the same layer left alone.

    python benchmarks/routing.py

One diffusers attention layer on a tensor so small that the kernel hardly counts; plain and routed rounds in turn, after
both gave the same answer. Prints medians; nothing is asserted.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import torch
from diffusers.models.attention_processor import Attention
from rich.console import Console
from rich.table import Table

import heedful

ROUNDS, CALLS = 60, 100


def seconds(call: Callable[[], object]) -> float:
    """The time of one call, over a round of them."""
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS


def main() -> None:
    """Measure and print."""
    torch.manual_seed(0)
    plain = Attention(query_dim=32, heads=2, dim_head=16).eval()
    routed = copy.deepcopy(plain)
    heedful.set_attention_backend(routed, "native")
    hidden = torch.randn(1, 16, 32)
    with torch.no_grad():
        torch.testing.assert_close(plain(hidden), routed(hidden), rtol=0, atol=0)
        rounds = [(seconds(lambda: plain(hidden)), seconds(lambda: routed(hidden))) for _ in range(ROUNDS)]
    alone, sent = (statistics.median(column) * 1e6 for column in zip(*rounds, strict=True))
    table = Table("layer alone", "routed", "added", title="microseconds a layer call, medians")
    table.add_row(f"{alone:.1f}", f"{sent:.1f}", f"{statistics.median(b - a for a, b in rounds) * 1e6:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
