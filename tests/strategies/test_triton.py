"""Our own kernels' strategy: where it runs, what it refuses, and its place. The kernels: tests/kernels."""

import dataclasses

import pytest
import torch

from heedful import AttentionDispatcher, AttentionStrategyFactory, Facts, Policy
from heedful.errors import CannotLoad
from heedful.facts import INTERPRETED, DeviceFacts, probe
from heedful.masks import MaskFacts
from heedful.policy import PREFERENCES
from heedful.problem import problem_for_shapes
from heedful.strategies.triton import TritonAttentionStrategy

BF16, HALF, FLOAT = torch.bfloat16, torch.float16, torch.float32
INTERPRETER = DeviceFacts("cpu", "cpu", None, INTERPRETED)
EVERYTHING = MaskFacts(causal="bottom_right", window=(9, 3, "top_left"), key_padding=True, query_padding=True,
                       dense="BHQK", bias="HQK", bias_dtype=FLOAT)  # fmt: skip


def machine(*devices):
    """A machine with everything installed."""
    here = probe()
    named = {"cuda:0" if one.type == "cuda" else one.type: one for one in devices}
    return Facts(here.torch_version, here.python_version, here.system, named)


def plan(place, backend="triton", *, dtype=HALF, head_dim=72, **fields):
    facts = machine(place)
    problem = problem_for_shapes(*[(2, 8, 512, head_dim)] * 3, dtype=dtype, device=place)
    return AttentionDispatcher(AttentionStrategyFactory(plugins=False), facts, Policy()).plan(
        problem.replace(**fields), backend
    )


@pytest.mark.parametrize("name", ["sm_75", "sm_80", "sm_90", "sm_120", "gfx942", "gfx1100"])
def test_it_takes_all_of_part_one_without_a_rewrite(name):
    found = plan(DeviceFacts.parse(name), mask=EVERYTHING, softcap=3.0, scale=0.3, needs_lse=True, value_dim=40,
                 kv_heads=2)  # fmt: skip
    assert found.backend == "triton", str(found)
    assert [step.name for step in found.chosen.steps] == []


def test_bshd_comes_as_a_view():
    assert [step.name for step in plan(DeviceFacts.parse("sm_90"), layout="BSHD").chosen.steps] == ["layout"]


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("sm_70", {}, "compute capability is 7.0, it takes at least 7.5"),
        ("sm_75", {"dtype": BF16}, "bfloat16 from 8.0 on"),
        ("gfx906", {}, "architecture is gfx906"),
        ("sm_90", {"head_dim": 257}, "head dim is 257, it takes at most 256"),
        ("sm_90", {"dtype": torch.float64}, "dtype is float64"),
        ("sm_90", {"mask": MaskFacts(block=True)}, ""),
        ("sm_90", {"dropout_p": 0.1}, "dropout_p"),
    ],
)
def test_refusals(name, changes, told):
    found = plan(DeviceFacts.parse(name), **changes)
    assert told in str(found)
    assert found.refused == bool(told)


def test_without_a_gpu_it_names_the_least_version_and_how_to_install_it(dispatcher):
    query = torch.zeros(1, 1, 8, 16)
    told = str(dispatcher.explain(query, query, query, backend="triton"))
    assert "device is cpu" in told
    assert "triton 3.4 or newer" in told
    assert "pip install 'triton>=3.4'" in told
    assert "TRITON_INTERPRET=1" in told


def test_without_triton_it_says_so():
    facts = dataclasses.replace(machine(DeviceFacts.parse("sm_90")), packages={})
    (lack,) = TritonAttentionStrategy().lacks(facts)
    assert str(lack) == "package is triton not installed, it takes triton 3.4 or newer (pip install 'triton>=3.4')"
    old = dataclasses.replace(facts, packages={"triton": "3.1.0"})
    assert "triton 3.1.0" in str(TritonAttentionStrategy().lacks(old)[0])
    assert TritonAttentionStrategy().lacks(dataclasses.replace(facts, packages={"triton": "3.4.0"})) == ()


# In the interpreter


def test_in_the_interpreter_it_runs_by_name_on_a_cpu():
    assert plan(INTERPRETER, mask=EVERYTHING).backend == "triton"


def test_the_interpreters_bf16_is_wrong_so_it_computes_in_float32():
    """Nothing else would say so: no error, no warning."""
    found = plan(INTERPRETER, dtype=BF16)
    assert [step.name for step in found.chosen.steps] == ["upcast"]
    assert BF16 not in TritonAttentionStrategy().limits_for("cpu").dtypes


@pytest.mark.parametrize("changes", [{}, {"softcap": 2.0, "needs_lse": True}, {"mask": EVERYTHING, "softcap": 1.0}])
def test_auto_never_chooses_it_in_the_interpreter(changes):
    found = plan(INTERPRETER, "auto", **changes)
    assert found.backend != "triton"
    assert "triton" not in {one.name for one in found.contenders}
    assert PREFERENCES["cpu"].index("triton") > PREFERENCES["cpu"].index("reference")


def test_the_interpreter_beside_a_gpu_is_refused():
    gpu = DeviceFacts.parse("sm_90")
    (lack,) = TritonAttentionStrategy().lacks(machine(gpu, INTERPRETER))
    assert "unset TRITON_INTERPRET" in str(lack)
    assert TritonAttentionStrategy().lacks(machine(gpu, DeviceFacts("cpu"))) == ()


def test_a_variable_that_changed_after_the_start_is_told():
    """This process compiles kernels; the facts say that it interprets them."""
    facts = dataclasses.replace(machine(INTERPRETER), packages=probe().packages)
    strategy = TritonAttentionStrategy()
    with pytest.raises(CannotLoad, match="TRITON_INTERPRET"):
        strategy.load(facts)
    assert "kernels" not in strategy.__dict__


# auto


def test_torchs_kernels_stand_before_it_for_what_they_take():
    for head_dim in (64, 128):
        found = plan(DeviceFacts.parse("sm_90"), "auto", head_dim=head_dim)
        assert found.backend == "native"
        assert "triton" in {one.name for one in found.contenders}  # a measured time may change that


def test_it_stands_before_flex_which_compiles_and_makes_whole_masks():
    found = plan(DeviceFacts.parse("sm_90"), "auto", softcap=30.0)
    assert found.backend == "triton"
    assert plan(DeviceFacts.parse("sm_90"), "auto", softcap=30.0, needs_grad=True).backend == "triton"
    assert plan(DeviceFacts.parse("sm_90"), "auto", softcap=30.0, compiling=True).backend == "triton"


def test_importing_heedful_and_looking_at_all_strategies_leaves_triton_alone(fresh_python):
    done = fresh_python(
        "import sys, heedful, torch\n"
        "heedful.list_backends()\n"
        "q = torch.zeros(1, 1, 8, 16)\n"
        "heedful.explain(q, q, q)\n"
        "print([name for name in sys.modules if name.startswith(('triton', 'heedful.kernels'))])\n"
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
