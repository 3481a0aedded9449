"""What heedful would run on machines that nobody here has: the tables word for word, and the rules that they obey.

The tables are in ``tests/golden``, a file for each machine. ``HEEDFUL_UPDATE_GOLDEN=1 pytest tests/cli/test_golden.py``
writes them anew; read the difference before it is committed.
"""

import difflib
import functools
import os
import shlex
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from heedful import AttentionDispatcher, AttentionStrategyFactory, Policy
from heedful.cases import CASES
from heedful.cli import app
from heedful.cli.problems import mask_of, shapes_of_case, words_of_case
from heedful.facts import Facts
from heedful.problem import problem_for_shapes

GOLDEN = Path(__file__).parent.parent / "golden"
MACHINES = ("sm_75", "sm_86", "sm_89", "sm_90", "sm_100", "gfx942", "cpu", "mps")
COMMANDS = (
    "list",
    "explain --case sdxl-self-64",
    "explain --case pixart-sigma-cross",
    "explain --case llama3-8b-prefill-4k --dtype bf16",
    "explain --shape 1,16,8192,128 --mask window:512,0 --softcap 50",
    "explain --shape 1,32,16,128 --key-shape 1,8,4096,128 --mask causal-bottom-right --lse",
    "explain --shape 2,16,1024,72 --dropout 0.1 --grad",
)
PLAIN = {"COLUMNS": "120", "NO_COLOR": "1", "FORCE_COLOR": None, "TTY_COMPATIBLE": None, "TERM": "dumb"}
UNSET = dict.fromkeys(("HEEDFUL_BACKEND", "HEEDFUL_DOWNLOADS", "HEEDFUL_ANALYSE", "LOCAL_KERNELS"))


@pytest.fixture(autouse=True)
def no_plugins(monkeypatch):
    """The commands ask the default registry; a plug-in of the developer's is no part of the tables."""
    monkeypatch.setattr(AttentionStrategyFactory, "_default", AttentionStrategyFactory(plugins=False))


def tables(machine):
    """Every command and what it prints."""
    parts = []
    for command in COMMANDS:
        line = f"{command} --device {machine}"
        if machine == "mps" and command != "list" and "--dtype" not in command:
            line += " --dtype fp32"
        answer = CliRunner().invoke(app, shlex.split(line), env={**PLAIN, **UNSET})
        assert answer.exit_code == 0, answer.output
        printed = "\n".join(row.rstrip() for row in answer.stdout.splitlines())
        parts.append(f"$ heedful {line}\n{printed}\n")
    return "\n".join(parts)


@pytest.mark.parametrize("machine", MACHINES)
def test_the_tables_are_as_they_were(machine):
    file, made = GOLDEN / f"{machine}.txt", tables(machine)
    if os.environ.get("HEEDFUL_UPDATE_GOLDEN") == "1":
        file.write_text(made, "utf-8")
    known = file.read_text("utf-8") if file.exists() else ""
    changes = difflib.unified_diff(known.splitlines(), made.splitlines(), str(file.name), "now", n=1, lineterm="")
    remedy = "if that is meant: HEEDFUL_UPDATE_GOLDEN=1 pytest tests/cli/test_golden.py"
    assert made == known, "\n".join([*changes, remedy])


def test_there_is_a_table_for_each_machine_and_no_other():
    assert {file.name for file in GOLDEN.glob("*.txt")} == {f"{machine}.txt" for machine in MACHINES}


# The rules

FLASH = ("flash", "flash_hub", "flash_varlen", "flash_varlen_hub", "_flash_3", "_flash_varlen_3", "_flash_3_hub")
FLASH += ("_flash_3_varlen_hub", "flash_4", "flash_4_hub", "native_flash", "_native_flash", "native_varlen")
SAGE = ("sage", "sage_hub", "sage_varlen", "sage_blackwell", "sage_blackwell_hub")
SAGE += ("sage_qk_int8_pv_fp8_cuda", "sage_qk_int8_pv_fp8_cuda_sm90")
SAGE += ("sage_qk_int8_pv_fp16_cuda", "sage_qk_int8_pv_fp16_triton")
OURS = ("triton_int8", "triton_int8_pv_fp8")
NVIDIA = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120")
EVERYWHERE = (*NVIDIA, "gfx90a", "gfx942", "gfx950", "gfx1100", "cpu", "mps", "xpu", "npu", "xla")


@functools.cache
def dispatcher_of(machine):
    return AttentionDispatcher(AttentionStrategyFactory(plugins=False), Facts.pretend(machine), Policy())


def problem_of(case, machine, dtype=torch.float16, **fields):
    """A real model's call there; ``fields`` are those of the problem."""
    shapes = shapes_of_case(case, "BHSD")
    mask = mask_of(words_of_case(case), case.kept_keys, shapes, dtype, analysed=True)
    device = next(iter(dispatcher_of(machine).facts.devices.values()))
    sizes = (shapes.query, shapes.key, shapes.value)
    gqa = shapes.enable_gqa
    return problem_for_shapes(*sizes, dtype=dtype, device=device, mask=mask, enable_gqa=gqa, **fields)


def takers(name, dtype=torch.float16, cases=CASES, machines=EVERYWHERE):
    """The machines where a backend takes any of the cases."""
    return {
        machine
        for machine in machines
        if any(not dispatcher_of(machine).plan(problem_of(case, machine, dtype), name).refused for case in cases)
    }


@pytest.mark.parametrize("name", FLASH)
def test_no_flash_attention_on_turing(name):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert takers(name, dtype, machines=("sm_75",)) == set()
    plan = dispatcher_of("sm_75").plan(problem_of(CASES[0], "sm_75"), name)
    assert plan.chosen is None
    assert plan.verdicts[0].refusals[0].field == "compute capability"
    assert plan.verdicts[0].refusals[0].observed == "7.5"


def test_each_generation_of_flash_attention_keeps_to_its_gpus():
    assert takers("flash") >= {"sm_80", "sm_86", "sm_89", "sm_90"}
    assert takers("flash") <= {*NVIDIA} - {"sm_75"}
    assert takers("_flash_3") == {"sm_90"}
    assert takers("flash_4") >= {"sm_90", "sm_100"}
    assert takers("native_flash") >= {"sm_80", "sm_86", "sm_89", "sm_90", "gfx942", "cpu"}


def test_the_fp8_forms_of_sage_attention_keep_to_gpus_with_fp8():
    assert takers("_sage_qk_int8_pv_fp8_cuda") >= {"sm_89"}
    assert takers("_sage_qk_int8_pv_fp8_cuda") <= {"sm_89", "sm_90", "sm_100", "sm_103", "sm_120"}
    assert takers("_sage_qk_int8_pv_fp8_cuda_sm90") == {"sm_90"}
    assert takers("sage_blackwell_hub") <= {"sm_120"}
    assert takers("sage") >= {"sm_80", "sm_86", "sm_89", "sm_90"}
    assert takers("sage") <= {*NVIDIA} - {"sm_75"}


def test_aiter_is_for_amd_instinct_alone():
    for name in ("aiter", "aiter_fa2_hub"):
        assert takers(name, torch.bfloat16) == {"gfx942", "gfx950"}
    assert takers("aiter") == {"gfx942", "gfx950"}


def test_kernels_of_one_kind_of_device_stay_there():
    assert takers("_native_npu") == {"npu"}
    assert takers("_native_xla", torch.bfloat16) == {"xla"}
    assert takers("_native_cudnn") == {*NVIDIA} - {"sm_75"}
    assert takers("xformers") <= {*NVIDIA}


@pytest.mark.parametrize("name", [*FLASH, *SAGE, "native_cudnn", "aiter"])
def test_half_precision_kernels_take_no_other(name):
    elsewhere = [machine for machine in EVERYWHERE if machine not in {"cpu", "mps", "xpu"}]
    assert takers(name, torch.bfloat16, machines=elsewhere)
    assert takers(name, torch.float32, machines=elsewhere) == set()
    assert takers(name, torch.float64, machines=elsewhere) == set()


def test_bfloat16_needs_ampere():
    for name in ("xformers", *FLASH, *SAGE, "native_cudnn"):
        assert takers(name, torch.bfloat16, machines=("sm_75",)) == set(), name


@pytest.mark.parametrize("machine", EVERYWHERE)
def test_auto_is_exact_and_always_finds_one(machine):
    dispatcher = dispatcher_of(machine)
    strategies = dispatcher.factory.strategies()
    assert {name for name, strategy in strategies.items() if strategy.exactness != "exact"} <= {*SAGE, *OURS}
    for case in CASES:
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for fields in ({}, {"needs_grad": True}, {"needs_lse": True}):
                plan = dispatcher.plan(problem_of(case, machine, dtype, **fields), "auto")
                assert not plan.refused
                assert all(strategies[verdict.name].exactness == "exact" for verdict in plan.verdicts)


@pytest.mark.parametrize("machine", EVERYWHERE)
def test_every_verdict_is_a_sentence(machine):
    """Numbers and what would be taken, of every backend and every other name."""
    dispatcher = dispatcher_of(machine)
    problem = problem_of(CASES[0], machine)
    for row in dispatcher.factory.strategies().values():
        for name in (row.name, *row.pins()):
            for verdict in dispatcher.plan(problem, name).verdicts:
                assert all(refusal.observed and refusal.required for refusal in verdict.refusals)
