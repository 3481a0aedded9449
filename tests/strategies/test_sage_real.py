"""The stand-in for SageAttention held to a real kernel: sageattention 1.0.6 of PyPI, in Triton's interpreter on a CPU.

Its int8 kernels are the ancestors of 2.x's Triton ones; what is new there are head dims padded inside, the LSE, and the
mask at the end of the keys. Triton decides at its import whether it interprets, so all of it runs in a new process.
"""

from __future__ import annotations

import importlib.util
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

STAND_IN = Path(__file__).parent.parent / "stand_ins" / "sageattention_2"

SCRIPT = """
import importlib, json, sys
import torch

# The package asserts that tensors are on CUDA; its kernels do not mind where the interpreter is.
torch.Tensor.is_cuda = property(lambda tensor: True)
real = importlib.import_module("sageattention")
for name in [name for name in sys.modules if name.partition(".")[0] == "sageattention"]:
    del sys.modules[name]
sys.path.insert(0, STAND_IN)
stand_in = importlib.import_module("sageattention")
assert STAND_IN in stand_in.__file__ and STAND_IN not in real.__file__

torch.manual_seed(0)


def draw(*shape, bias=0.0):
    return torch.randn(shape, dtype=dtype) + bias


def figures(got, other, want):
    error = lambda one, two: (one.double() - two.double()).square().mean().sqrt().item()
    return {"real": error(got, want), "stand_in": error(other, want), "apart": error(got, other)}


def formula(q, k, v, **call):
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1).double() for t in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q.double(), k, v, **call)


found = {}
for dtype in (torch.float16, torch.bfloat16):
    of = lambda name: f"{name}-{str(dtype)[6:]}"
    for name, keys, bias, call in (
        ("plain", 128, 0.0, {}), ("biased keys", 128, 4.0, {}), ("causal", 150, 0.0, {"is_causal": True}),
        ("scale", 64, 0.0, {"sm_scale": 0.3}),
    ):
        q, k, v = draw(1, 4, 150, 64), draw(1, 2, keys, 64, bias=bias), draw(1, 2, keys, 64)
        want = formula(q, k, v, is_causal="is_causal" in call, scale=call.get("sm_scale"))
        kept = k.clone()
        other = stand_in.sageattn_qk_int8_pv_fp16_triton(q, k, v, **call)
        assert torch.equal(kept, k)
        found[of(name)] = figures(real.sageattn(q, k, v, **call), other, want)
        found[of(name)]["keys changed"] = not torch.equal(kept, k)

    ends_q, ends_k = (torch.tensor(ends, dtype=torch.int32) for ends in ([0, 30, 30, 160], [0, 64, 64, 192]))
    q, k, v = draw(160, 2, 64), draw(192, 2, 64), draw(192, 2, 64)
    want = torch.cat([
        formula(*(t[None, a:b].transpose(1, 2) for t, (a, b) in zip((q, k, v), (rows, keys, keys)))).transpose(1, 2)[0]
        for rows, keys in (((0, 30), (0, 64)), ((30, 160), (64, 192)))
    ])
    other = stand_in.sageattn_varlen(q, k, v, ends_q, ends_k, 130, 128)
    found[of("varlen")] = figures(real.sageattn_varlen(q, k.clone(), v, ends_q, ends_k, 130, 128), other, want)

dtype = torch.float16
q, k, v = draw(1, 2, 64, 64), draw(1, 2, 77, 64), draw(1, 2, 77, 64)
want = formula(q, k, v)
shown = torch.nn.functional.pad(k - k.mean(2, keepdim=True), (0, 0, 0, 128 - 77))  # keys with score 0
phantoms = formula(q, shown, torch.nn.functional.pad(v, (0, 0, 0, 128 - 77)))
got = real.sageattn(q, k.clone(), v)
found["end of keys"] = figures(got, stand_in.sageattn_qk_int8_pv_fp16_triton(q, k, v), want)
found["end of keys"]["phantoms"] = figures(got, got, phantoms)["real"]
print(json.dumps(found))
"""


def _missing() -> str:
    try:
        have = version("sageattention")
    except PackageNotFoundError:
        return "sageattention 1.0.6 is not installed"
    wanted = have == "1.0.6" and all(map(importlib.util.find_spec, ("triton", "numpy")))
    return "" if wanted else f"sageattention {have}, not 1.0.6 with triton and numpy"


@pytest.fixture(scope="module")
def figures(fresh_python):
    if reason := _missing():
        pytest.skip(reason)
    done = fresh_python(f"STAND_IN = {str(STAND_IN)!r}\n{SCRIPT}", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


CASES = ("plain", "biased keys", "causal", "scale", "varlen")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_the_stand_in_is_as_far_from_the_formula_as_the_real_kernel(figures, case, dtype):
    found = figures[f"{case}-{dtype}"]
    assert 1e-3 < found["real"] < 0.03  # quantised, and no worse
    assert 0.8 < found["stand_in"] / found["real"] < 1.25
    # The same groups and the same rounding, not only as much of it. Triton interprets casts to bfloat16 as cuts.
    assert found["apart"] < (0.5 if dtype == "bfloat16" else 0.05) * found["real"]


def test_version_1_counts_keys_beyond_the_last(figures):
    """Why ``SageKernelStrategy.load`` looks at signatures: early builds of 2.x have these kernels."""
    found = figures["end of keys"]
    assert found["real"] > 5 * found["stand_in"]
    assert found["phantoms"] < 0.02


def test_version_1_changes_the_callers_keys(figures):
    assert figures["plain-float16"]["keys changed"]
