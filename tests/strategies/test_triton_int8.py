"""The int8 strategy: where it runs, what it refuses, and that nothing picks it unasked. The kernels: tests/kernels."""

import math

import pytest
import torch

from heedful import AttentionDispatcher, AttentionStrategyFactory, Facts, Policy
from heedful.facts import INTERPRETED, DeviceFacts, probe
from heedful.masks import MaskFacts
from heedful.problem import problem_for_shapes
from heedful.strategies import TritonInt8AttentionStrategy

HALF, FLOAT = torch.float16, torch.float32
INTERPRETER = DeviceFacts("cpu", "cpu", None, INTERPRETED)
EVERYTHING = MaskFacts(causal="bottom_right", window=(9, 3, "top_left"), key_padding=True, query_padding=True,
                       dense="BHQK", bias="HQK", bias_dtype=FLOAT)  # fmt: skip


def plan(place, backend="triton_int8", *, dtype=HALF, packages=None, **fields):
    here = probe()
    named = {"cuda:0" if place.type == "cuda" else place.type: place}
    facts = Facts(here.torch_version, here.python_version, here.system, named, packages)
    problem = problem_for_shapes(*[(2, 8, 4096, 72)] * 3, dtype=dtype, device=place)
    dispatcher = AttentionDispatcher(AttentionStrategyFactory(plugins=False), facts, Policy())
    return dispatcher.plan(problem.replace(**fields), backend)


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_it_takes_what_the_exact_kernel_takes_without_a_rewrite(name):
    found = plan(DeviceFacts.parse(name), mask=EVERYTHING, softcap=3.0, scale=0.3, needs_lse=True, value_dim=40,
                 kv_heads=2)  # fmt: skip
    assert found.backend == "triton_int8", str(found)
    assert [step.name for step in found.chosen.steps] == []


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("sm_75", {}, "compute capability is 7.5, it takes at least 8.0"),
        ("sm_90", {"dtype": FLOAT}, "dtype is float32, it takes float16/bfloat16"),
        ("sm_90", {"needs_grad": True}, "gradient is wanted"),
        ("sm_90", {"compiling": True}, "torch.compile"),
        ("cpu", {}, "TRITON_INTERPRET=1"),
    ],
)
def test_refusals(name, changes, told):
    found = plan(DeviceFacts.parse(name), **changes)
    assert found.refused
    assert told in str(found)


def test_auto_has_it_only_where_an_error_is_allowed_and_then_by_measurement():
    gpu, triton = DeviceFacts.parse("sm_90"), {"triton": "3.9.0"}
    assert "triton_int8" not in {one.name for one in plan(gpu, "auto", packages=triton).verdicts}
    found = plan(gpu, "auto", packages=triton, max_error=0.1)
    assert found.backend != "triton_int8"
    assert "triton_int8" in {one.name for one in found.contenders}


@pytest.mark.parametrize("max_error", [None, 0.1, math.inf])
def test_auto_never_has_it_in_the_interpreter(max_error):
    found = plan(INTERPRETER, "auto", max_error=max_error, softcap=2.0, mask=EVERYTHING)
    assert "triton_int8" not in {found.backend, *(one.name for one in found.contenders)}
    assert plan(INTERPRETER, dtype=FLOAT).backend == "triton_int8"


def test_what_it_declares():
    strategy = TritonInt8AttentionStrategy()
    assert (strategy.exactness, strategy.relative_error) == ("quantised", 0.1)
