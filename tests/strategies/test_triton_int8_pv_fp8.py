"""The int8 strategy with values in fp8: where it runs, what it refuses, and that nothing picks it unasked.

The kernels: tests/kernels.
"""

import pytest
import torch

from heedful import AttentionDispatcher, AttentionStrategyFactory, Facts, Policy
from heedful.facts import INTERPRETED, DeviceFacts, probe
from heedful.masks import MaskFacts
from heedful.problem import problem_for_shapes
from heedful.strategies import TritonInt8AttentionStrategy, TritonInt8Fp8AttentionStrategy

HALF, FLOAT = torch.float16, torch.float32
EVERYTHING = MaskFacts(causal="bottom_right", window=(9, 3, "top_left"), key_padding=True, query_padding=True,
                       dense="BHQK", bias="HQK", bias_dtype=FLOAT)  # fmt: skip


def plan(place, backend="triton_int8_pv_fp8", *, dtype=HALF, packages=None, head_dim=72, **fields):
    here = probe()
    named = {"cuda:0" if place.type == "cuda" else place.type: place}
    facts = Facts(here.torch_version, here.python_version, here.system, named, packages)
    problem = problem_for_shapes(*[(2, 8, 4096, head_dim)] * 3, dtype=dtype, device=place)
    dispatcher = AttentionDispatcher(AttentionStrategyFactory(plugins=False), facts, Policy())
    return dispatcher.plan(problem.replace(**fields), backend)


@pytest.mark.parametrize("name", ["sm_89", "sm_90", "sm_100", "sm_103", "sm_120"])
@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16])
def test_it_takes_what_the_exact_kernel_takes_without_a_rewrite(name, dtype):
    for head_dim in (16, 40, 80, 96, 160, 256):
        found = plan(DeviceFacts.parse(name), mask=EVERYTHING, softcap=3.0, scale=0.3, needs_lse=True, value_dim=40,
                     kv_heads=2, dtype=dtype, head_dim=head_dim)  # fmt: skip
        assert found.backend == "triton_int8_pv_fp8", str(found)
        assert [step.name for step in found.chosen.steps] == []


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("sm_80", {}, "compute capability is 8.0, it takes at least 8.9"),
        ("sm_86", {}, "compute capability is 8.6, it takes at least 8.9"),
        ("gfx942", {}, "architecture is gfx942, it takes NVIDIA devices only"),
        ("gfx1100", {}, "architecture is gfx1100, it takes NVIDIA devices only"),
        ("sm_90", {"dtype": FLOAT}, "dtype is float32, it takes float16/bfloat16"),
        ("sm_90", {"head_dim": 264}, "at most 256"),
        ("sm_90", {"dropout_p": 0.1}, "dropout"),
        ("sm_90", {"needs_grad": True}, "gradient is wanted"),
        ("sm_90", {"compiling": True}, "torch.compile"),
        ("cpu", {}, "TRITON_INTERPRET=1"),
    ],
)
def test_refusals(name, changes, told):
    found = plan(DeviceFacts.parse(name), **changes)
    assert found.refused
    assert told in str(found)


def test_auto_has_both_int8_forms_only_where_an_error_is_allowed_and_then_by_measurement():
    gpu, triton = DeviceFacts.parse("sm_90"), {"triton": "3.7.1"}
    ours = {"triton_int8", "triton_int8_pv_fp8"}
    assert not ours & {one.name for one in plan(gpu, "auto", packages=triton).verdicts}
    found = plan(gpu, "auto", packages=triton, max_error=0.1)
    assert found.backend not in ours
    assert {one.name for one in found.contenders} >= ours


@pytest.mark.parametrize("name", ["sm_89", "sm_90", "sm_120"])
def test_the_forms_of_other_packages_do_not_keep_it_from_being_timed(name):
    """With every package there, it is the last of them by name."""
    found = plan(DeviceFacts.parse(name), "auto", max_error=0.1)
    names = {one.name for one in found.contenders}
    assert names >= {"sage", "sage_qk_int8_pv_fp8_cuda", "triton_int8", "triton_int8_pv_fp8"}


def test_auto_never_has_it_in_the_interpreter():
    here = DeviceFacts("cpu", "cpu", None, INTERPRETED)
    found = plan(here, "auto", max_error=0.1, softcap=2.0, mask=EVERYTHING)
    assert "triton_int8_pv_fp8" not in {found.backend, *(one.name for one in found.contenders)}
    assert plan(here, dtype=FLOAT).backend == "triton_int8_pv_fp8"


def test_what_it_declares():
    strategy = TritonInt8Fp8AttentionStrategy()
    assert (strategy.exactness, strategy.relative_error) == ("quantised", 0.15)
    assert strategy.relative_error > TritonInt8AttentionStrategy.relative_error
