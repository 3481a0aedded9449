"""The roofline, against the makers' own figures, and the copies that inputs rotate through."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch


@pytest.fixture
def roofline(benchmark_module):
    return benchmark_module("roofline")


def properties(processors=132, clock=1_830_000, memory_clock=3_201_000, width=6144, cache=60 << 20):
    return SimpleNamespace(
        multi_processor_count=processors,
        clock_rate=clock,
        memory_clock_rate=memory_clock,
        memory_bus_width=width,
        L2_cache_size=cache,
    )


@pytest.mark.parametrize(
    ("architecture", "processors", "clock", "tflops"),
    [("sm_80", 108, 1_410_000, 312), ("sm_90", 132, 1_830_000, 989), ("sm_100", 148, 1_856_000, 2250)],
)
def test_the_peak_is_the_makers(roofline, architecture, processors, clock, tflops):
    roof = roofline.roof_of(architecture, properties(processors, clock), torch.bfloat16)
    assert roof.peak / 1e12 == pytest.approx(tflops, rel=0.005)


def test_the_bandwidth_of_an_h200(roofline):
    roof = roofline.roof_of("sm_90", properties(), torch.float16)
    assert roof.bandwidth / 1e12 == pytest.approx(4.9, rel=0.01)


@pytest.mark.parametrize(
    ("architecture", "dtype", "clock"),
    [
        ("sm_89", torch.bfloat16, 1),
        ("gfx942", torch.bfloat16, 1),
        ("sm_90", torch.float32, 1),
        ("sm_90", torch.half, 0),
    ],
)
def test_no_peak_where_none_is_known(roofline, architecture, dtype, clock):
    roof = roofline.roof_of(architecture, properties(clock=clock), dtype)
    assert roof.peak is None
    assert roof.at(10, 10) is None


def test_properties_without_clocks_give_no_roof(roofline):
    bare = SimpleNamespace(multi_processor_count=132)
    assert roofline.roof_of("sm_90", bare, torch.half) == roofline.Roof()
    assert roofline.cached_bytes(bare, "cuda") == 0


def test_the_roof_is_the_lower_of_the_two(roofline):
    roof = roofline.Roof(peak=1000.0, bandwidth=10.0)
    assert roof.at(flops=5000, moved=10) == 1000.0
    assert roof.at(flops=50, moved=10) == 50.0
    assert roofline.Roof(peak=1000.0).at(1, 10) == 1000.0
    assert roof.to_dict() == {"peak_tflops": 1e-9, "bandwidth_gb_s": 1e-8}


@pytest.mark.parametrize(
    ("cached", "size", "room", "copies"),
    [(0, 10, 1000, 2), (50, 10, 1000, 6), (55, 10, 1000, 7), (50, 100, 1000, 2), (50, 10, 40, 4), (50, 10, 5, 2),
     (10_000, 1, 100_000, 64)],
)  # fmt: skip
def test_the_other_copies_fill_the_cache(roofline, cached, size, room, copies):
    assert roofline.copies_beyond(cached, size, room) == copies


def test_amds_last_cache_counts_too(roofline):
    found = properties(cache=4 << 20)
    assert roofline.cached_bytes(found, "hip") == 260 << 20
    assert roofline.cached_bytes(found, "cuda") == 4 << 20
