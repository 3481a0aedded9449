"""What a GPU could do at best: its matrix units' peak, its memory's bandwidth, and the lower of the two for a call.

Floating point operations of a multiprocessor and cycle, dense, fp16 or bf16 with sums in float32:

- sm_80: 2048. Four tensor cores of 256 multiply-adds each: NVIDIA A100 Tensor Core GPU Architecture (white paper,
  2020); 108 multiprocessors at 1.41 GHz give its 312 TFLOP/s.
- sm_90: 4096, twice the A100's a cycle: NVIDIA H100 Tensor Core GPU Architecture (white paper, 2022), table 2.
- sm_100: 8192. NVIDIA's 2.25 PFLOP/s of a B200 with 148 multiprocessors at 1.86 GHz; so ``torch.cuda._device_limits``
  has it, and the two above.

sm_75, 86, 89 and 120 are in no table, because the rate depends on the product: an A40 has 1024 (149.7 TFLOP/s, 84
multiprocessors at 1.74 GHz), a GeForce RTX 4090 and an L40 have 512, all of GPUs that are alike in architecture. Where
a peak is not known, there is only the share of a plain matmul's rate in the same run.

The clock is the highest that the driver allows, at which no GPU multiplies for long: NVIDIA's own figure for an H200,
989 TFLOP/s, is at 1.83 GHz. So a share of the peak is on the low side, and the matmul's is told beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

FLOPS_A_CYCLE = {"sm_80": 2048, "sm_90": 4096, "sm_100": 8192}
HALF = (torch.float16, torch.bfloat16)
LAST_CACHE = {"cuda": 0, "hip": 256 << 20}  # bytes behind the L2 that torch does not tell of: CDNA3's Infinity Cache


@dataclass(frozen=True)
class Roof:
    """A device's limits; None where they are not known. ``peak``: FLOP/s; ``bandwidth``: bytes a second."""

    peak: float | None = None
    bandwidth: float | None = None

    def at(self, flops: int, moved: int) -> float | None:
        """FLOP/s that a call of so many operations, which moves so many bytes at least, cannot pass."""
        if self.peak is None:
            return None
        return self.peak if self.bandwidth is None else min(self.peak, flops / moved * self.bandwidth)

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "peak_tflops": None if self.peak is None else self.peak / 1e12,
            "bandwidth_gb_s": None if self.bandwidth is None else self.bandwidth / 1e9,
        }


def roof_of(architecture: str, properties: Any, dtype: torch.dtype) -> Roof:
    """Of torch's properties of a device, whose clocks are in kHz and whose bus is in bits."""
    a_cycle = FLOPS_A_CYCLE.get(architecture) if dtype in HALF else None
    clock = 1e3 * (getattr(properties, "clock_rate", 0) or 0)
    memory = 1e3 * (getattr(properties, "memory_clock_rate", 0) or 0)
    width = (getattr(properties, "memory_bus_width", 0) or 0) / 8
    return Roof(
        a_cycle * properties.multi_processor_count * clock if a_cycle and clock else None,
        2 * memory * width or None,  # two transfers a cycle
    )


def cached_bytes(properties: Any, kind: str) -> int:
    """What a device keeps of what was read before; ``kind``: cuda or hip."""
    return int(getattr(properties, "L2_cache_size", 0) or 0) + LAST_CACHE[kind]


def copies_beyond(cached: int, size: int, room: int, most: int = 64) -> int:
    """How many copies of inputs of ``size`` bytes: between two uses of one the others fill the cache, if there is room.

    Two at least; ``room``: bytes that all may take.
    """
    wanted = 1 + -(-cached // max(1, size))
    return max(2, min(wanted, most, room // max(1, size)))
