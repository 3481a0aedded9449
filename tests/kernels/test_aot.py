"""Gates without a GPU: the kernels compile for each target, do not spill where that is promised, and multiply matrices.

``python benchmarks/aot.py`` prints what stands behind them.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from heedful.kernels import aot, forward, fp8, int8
from heedful.kernels.aot import Compiled
from heedful.kernels.jit import fp8 as fp8_kernels
from heedful.kernels.tiles import FP8

MOST = 60  # compilations that CI may have, all kernels together


@pytest.mark.parametrize(("name", "target"), aot.every())
def test_a_kernel_passes_its_gates(name, target):
    assert aot.compile_variant(name, target).faults == []


CODED = {"extremes": fp8_kernels.extremes_kernel, "scales": fp8_kernels.value_scales_kernel,
         "values": fp8_kernels.quantise_values_kernel}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_89", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("kernel", CODED)
@pytest.mark.parametrize("head_dim", [80, 128])
def test_kernels_that_make_codes_of_values_compile(kernel, target, head_dim):
    call = aot.sample_call(head_dim, dtype=aot.BF16, padded=True)
    tile, seen = forward.tile_of(call, target, FP8), call.key.new_empty(call.key.shape[:3], dtype=torch.uint8)
    values, room = fp8.room_for(call, tile), fp8.extremes_for(call)
    given = {
        "extremes": lambda: fp8.extremes_arguments(call, seen, *room),
        "scales": lambda: fp8.scales_arguments(values, *room, smooth=True),
        "values": lambda: fp8.values_arguments(call, tile, values, seen),
    }[kernel]()
    found = aot.compile_for(target, kernel, CODED[kernel], given, int8.options_for(call), tile)
    assert (found.faults, found.spilled) == ([], 0)


def test_the_targets_and_how_many_compilations_there_are():
    pairs = aot.every()
    assert len(pairs) == len(set(pairs)) <= MOST
    assert {target for _, target in pairs} == set(aot.TARGETS)


FINE = Compiled("forward", "sm_90", (128, 64, 8, 3), 200, 0, 1000, {"wgmma.mma_async": 8})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, None),
        ({"spilled": 8}, "spills 8 bytes"),
        ({"spilled": 8, "target": "sm_89", "matrix": {"mma.sync": 1}}, None),  # nothing is promised there
        ({"matrix": {}}, "has no wgmma"),
        ({"matrix": {"mma.sync": 8}}, "has no wgmma"),  # a slower path
        ({"matrix": {}, "exact": True}, None),
        ({"shared": 300 * 1024}, "227 KiB"),
        ({"eight_bit": 8}, None),
        ({"eight_bit": 0}, "multiplies int8 by other instructions"),
        ({"still": 2}, "has 2 operands that lie still in loops"),
        ({"eight_bit": 8, "fp8": 4}, None),
        ({"eight_bit": 8, "fp8": 0}, "multiplies fp8 by other instructions"),
    ],
)
def test_each_gate_can_close(changes, told):
    faults = dataclasses.replace(FINE, **changes).faults
    assert (told is None and not faults) or told in " ".join(faults)


def test_one_stage_leaves_operands_in_their_places():
    """What the gate of ``still`` is for: the same call with two stages and with one."""
    variant = next(one for one in aot.variants() if one.name == "backward of queries d96 fp16")
    kernel, arguments, options, tile = variant.make("sm_90")
    one = aot.compile_for("sm_90", "x", kernel, arguments, options | {"num_stages": 1}, tile)
    assert one.still > 0
    assert aot.compile_for("sm_90", "x", kernel, arguments, options, tile).still == 0


def test_arguments_are_specialised_as_triton_does():
    """A stride of 1 is a constant, 16 divides others or not, and lengths are never looked at."""
    variant = next(iter(aot.variants()))
    kernel, arguments, _, _ = variant.make("sm_90")
    source = aot.source_of(kernel, arguments)
    named = {kernel.arg_names[index]: value for (index,), value in source.constants.items()}
    assert named["stride_query_d"] == 1
    assert named["bias"] is None
    assert source.signature["query"] == "*fp16"
    assert source.signature["key_length"] == "i32"
    marked = {kernel.arg_names[index] for (index,) in source.attrs}
    assert {"query", "out"} <= marked
    assert not marked & {"key_length", "heads", "scale"}
