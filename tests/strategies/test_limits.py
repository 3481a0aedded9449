"""What torch's kernels take, on machines that one need not own: the rules of SDPA as declared limits.

Each table reads: on this device this backend takes this problem after these rewrites, or refuses it in these words.
"""

import pytest
import torch

from heedful import AttentionDispatcher, AttentionStrategyFactory, Facts, Policy
from heedful.masks import MaskFacts
from heedful.problem import problem_for_shapes

HALF, BF16, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
CAUSAL, DENSE, PADDING = MaskFacts(causal="top_left"), MaskFacts(dense="QK"), MaskFacts(key_padding=True)
BIAS = MaskFacts(bias="QK", bias_dtype=HALF)
WINDOW = MaskFacts(window=(64, 0, "top_left"))
ON_CUDA = ("sm_50", "sm_75", "sm_80", "sm_90", "gfx942")


def plan(device, backend, *, head_dim=64, value_dim=None, kv_heads=8, dtype=HALF, gqa=True, **fields):
    """The plan of (2, 8, 512, head dim) for one backend, or "auto", on a machine with that device."""
    facts = Facts.pretend(device)
    made = facts.device(torch.device("cuda" if device in ON_CUDA else device))
    shapes = (2, 8, 512, head_dim), (2, kv_heads, 512, head_dim), (2, kv_heads, 512, value_dim or head_dim)
    problem = problem_for_shapes(*shapes, dtype=dtype, device=made, enable_gqa=gqa)
    dispatcher = AttentionDispatcher(AttentionStrategyFactory(plugins=False), facts, Policy())
    return dispatcher.plan(problem.replace(**fields), backend)


TAKEN = [
    # device, backend, problem, rewrites
    ("sm_80", "native_flash", {}, []),
    ("sm_90", "native_flash", {"dtype": BF16, "head_dim": 256, "mask": CAUSAL}, []),
    ("sm_80", "native_flash", {"kv_heads": 2}, []),
    ("sm_80", "native_flash", {"head_dim": 72}, []),  # a multiple of 8
    ("sm_80", "native_flash", {"head_dim": 77}, ["pad_head_dim"]),
    ("sm_80", "native_flash", {"head_dim": 64, "value_dim": 80}, ["pad_head_dim"]),
    ("sm_80", "native_flash", {"layout": "BSHD"}, ["layout"]),
    ("sm_90", "native_flash", {"dropout_p": 0.1, "needs_grad": True, "deterministic": True, "scale": 1.0}, []),
    ("gfx942", "native_flash", {"needs_lse": True}, []),
    ("cpu", "native_flash", {"dtype": DOUBLE}, []),
    ("cpu", "native_flash", {"dtype": FLOAT, "mask": DENSE}, ["materialise_mask"]),
    ("cpu", "native_flash", {"dtype": FLOAT, "value_dim": 40}, ["pad_head_dim"]),
    ("cpu", "native_flash", {"dtype": FLOAT, "kv_heads": 2}, ["expand_kv_heads"]),
    ("sm_50", "native_efficient", {"dtype": FLOAT}, []),
    ("sm_50", "native_efficient", {"mask": BIAS}, ["zero_empty_rows"]),
    ("sm_75", "native_efficient", {"mask": DENSE}, ["materialise_mask", "zero_empty_rows"]),
    ("sm_75", "native_efficient", {"mask": PADDING}, ["materialise_mask", "zero_empty_rows"]),
    ("sm_75", "native_efficient", {"mask": WINDOW}, ["trim_causal", "materialise_mask"]),
    ("sm_75", "native_efficient", {"head_dim": 512}, []),  # a VAE's one head
    ("sm_75", "native_efficient", {"kv_heads": 2}, ["expand_kv_heads"]),
    ("gfx942", "native_efficient", {"mask": CAUSAL}, []),
    ("sm_80", "native_cudnn", {"head_dim": 128}, []),
    ("sm_90", "native_cudnn", {"head_dim": 256}, []),
    ("sm_90", "native_cudnn", {"head_dim": 250}, ["pad_head_dim"]),
    ("sm_90", "native_cudnn", {"head_dim": 128, "needs_grad": True}, []),
    ("sm_90", "native_cudnn", {"mask": PADDING}, ["materialise_mask", "zero_empty_rows"]),
    ("sm_90", "native_cudnn", {"kv_heads": 1}, []),
    ("mps", "native_math", {}, []),
    ("mps", "native_math", {"mask": PADDING}, ["materialise_mask"]),
    ("sm_50", "native_math", {"dtype": DOUBLE, "dropout_p": 0.5, "needs_grad": True, "deterministic": True}, []),
    ("mps", "native", {"mask": DENSE}, ["zero_empty_rows"]),
    ("cpu", "native", {"dtype": FLOAT, "mask": DENSE}, []),
    ("sm_75", "flex", {"softcap": 30.0, "mask": WINDOW}, []),
    ("sm_90", "flex", {"head_dim": 8}, ["pad_head_dim"]),
    ("cpu", "flex", {"dtype": FLOAT, "softcap": 30.0, "needs_lse": True}, []),
]

REFUSED = [
    # device, backend, problem, what is said
    ("sm_75", "native_flash", {}, ["compute capability is 7.5, it takes at least 8.0"]),
    ("sm_50", "native_flash", {}, ["compute capability is 5.0, it takes at least 8.0"]),
    ("sm_80", "native_flash", {"dtype": FLOAT}, ["dtype is float32, it takes float16/bfloat16"]),
    ("sm_90", "native_flash", {"head_dim": 257}, ["head dim is 264, it takes at most 256"]),
    ("sm_90", "native_flash", {"mask": DENSE}, ["mask is dense, it takes causal (use native or reference)"]),
    ("sm_90", "native_flash", {"mask": BIAS}, ["mask is bias, it takes causal (use native or reference)"]),
    ("sm_90", "native_flash", {"mask": PADDING}, ["mask is key_padding, it takes causal", "empty rows"]),
    ("sm_90", "native_flash", {"softcap": 30.0}, ["softcap is 30.0, it takes none"]),
    ("mps", "native_flash", {}, ["device is mps, it takes cpu or cuda"]),
    ("cpu", "native_flash", {"dtype": FLOAT, "dropout_p": 0.1}, ["dropout_p is 0.1, it takes 0.0"]),
    ("sm_75", "native_efficient", {"dtype": DOUBLE}, ["dtype is float64, it takes float32/float16/bfloat16"]),
    (
        "sm_75",
        "native_efficient",
        {"needs_grad": True, "deterministic": True},
        ["deterministic gradient is wanted, it takes nondeterministic ones only"],
    ),
    ("cpu", "native_efficient", {}, ["device is cpu, it takes cuda"]),
    ("sm_75", "native_cudnn", {}, ["compute capability is 7.5, it takes at least 8.0"]),
    ("sm_80", "native_cudnn", {"head_dim": 256}, ["head dim is 256, it takes at most 128"]),
    ("sm_90", "native_cudnn", {"head_dim": 256, "needs_grad": True}, ["head dim is 256, it takes at most 128"]),
    ("sm_90", "native_cudnn", {"head_dim": 512}, ["head dim is 512, it takes at most 256"]),
    ("gfx942", "native_cudnn", {}, ["architecture is gfx942, it takes NVIDIA devices only"]),
    ("sm_50", "flex", {}, ["compute capability is 5.0, it takes at least 7.5"]),
    ("cpu", "flex", {"needs_grad": True}, ["gradient is wanted, it takes calls without it"]),
    ("cpu", "flex", {"compiling": True}, ["torch.compile is tracing, it takes eager calls"]),
    ("sm_90", "flex", {"dropout_p": 0.1}, ["dropout_p is 0.1, it takes 0.0"]),
    ("sm_90", "native", {"needs_lse": True}, ["return_lse is wanted, it takes calls without it"]),
    ("sm_90", "native_math", {"needs_lse": True}, ["return_lse is wanted, it takes calls without it"]),
]

AUTO = [
    # device, problem, what auto takes
    ("cpu", {"dtype": FLOAT}, "native"),
    ("cpu", {"dtype": FLOAT, "needs_lse": True}, "native_flash"),
    ("cpu", {"dtype": FLOAT, "needs_lse": True, "dropout_p": 0.1}, "reference"),
    ("cpu", {"dtype": FLOAT, "softcap": 30.0}, "flex"),
    ("cpu", {"dtype": FLOAT, "softcap": 30.0, "needs_grad": True}, "reference"),
    ("sm_90", {}, "native"),
    ("sm_90", {"needs_lse": True}, "native_flash"),
    ("sm_90", {"needs_lse": True, "mask": DENSE}, "native_cudnn"),
    ("sm_75", {"needs_lse": True}, "native_efficient"),
    ("sm_75", {"needs_lse": True, "dtype": DOUBLE}, "reference"),
    ("gfx942", {"needs_lse": True, "mask": DENSE}, "native_efficient"),
    ("sm_90", {"softcap": 30.0}, "triton"),
    ("mps", {}, "native"),
    ("mps", {"needs_lse": True}, "reference"),
]


def _named(table):
    return [f"{device}-{backend}-{'-'.join(map(str, problem))}" for device, backend, problem, _ in table]


@pytest.mark.parametrize(("device", "backend", "problem", "rewrites"), TAKEN, ids=_named(TAKEN))
def test_taken(device, backend, problem, rewrites):
    made = plan(device, backend, **problem)
    assert not made.refused, str(made)
    assert [step.name for step in made.chosen.steps] == rewrites


@pytest.mark.parametrize(("device", "backend", "problem", "says"), REFUSED, ids=_named(REFUSED))
def test_refused_with_the_numbers(device, backend, problem, says):
    made = plan(device, backend, **problem)
    assert made.refused
    refusals = made.verdicts[0].refusals
    assert len(refusals) == len(says), [str(refusal) for refusal in refusals]
    for refusal, words in zip(refusals, says, strict=True):
        assert str(refusal).startswith(words)


@pytest.mark.parametrize(("device", "problem", "backend"), AUTO)
def test_what_auto_takes(device, problem, backend):
    assert plan(device, "auto", **problem).backend == backend


@pytest.mark.parametrize("device", ["cpu", "mps", *ON_CUDA])
def test_whatever_the_device_something_takes_every_mask(device):
    for mask in (CAUSAL, DENSE, BIAS, PADDING, WINDOW, MaskFacts(causal="bottom_right", dense="BHQK", bias="K")):
        assert not plan(device, "auto", mask=mask).refused


@pytest.mark.parametrize("device", ["cpu", "mps", *ON_CUDA])
def test_nothing_takes_sinks(device):
    made = plan(device, "auto", sinks=True)
    assert made.refused
    for verdict in made.verdicts:
        assert {refusal.field for refusal in verdict.refusals} & {"sinks", "device"}, verdict.name


@pytest.mark.parametrize("device", ["sm_50", "sm_75", "sm_80", "sm_90", "gfx942", "mps"])
def test_the_table_of_backends_is_of_the_pretended_device(device):
    facts = Facts.pretend(device)
    table = AttentionDispatcher(AttentionStrategyFactory(plugins=False), facts, Policy()).list_backends()
    assert table.problem.dtype == HALF
    for row in table:
        expected = plan(device, row.name, head_dim=64)
        assert row.available is not expected.refused, row.name


def test_a_head_dim_of_77_keeps_its_own_scale_when_padded():
    chosen = plan("sm_80", "native_flash", head_dim=77).chosen
    assert (chosen.lowered.head_dim, chosen.lowered.value_dim) == (80, 80)
    assert chosen.lowered.scale == pytest.approx(77**-0.5)
