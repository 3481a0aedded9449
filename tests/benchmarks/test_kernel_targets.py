"""Targets and what becomes of them in a record."""

from __future__ import annotations

import pytest
import torch

H200 = "NVIDIA H200"


@pytest.fixture
def module(benchmark_module):
    return benchmark_module("kernel_targets")


def row(backend, median_us, tflops=1.0, ours=False, exactness="exact", status="right"):
    return {"backend": backend, "ours": ours, "exactness": exactness, "status": status, "median_us": median_us,
            "tflops": tflops}  # fmt: skip


def record(rows, name="d64-8192-forward", gpu=H200, dtype="bfloat16"):
    return {"machine": {"gpu": gpu}, "calls": [{"name": name, "dtype": dtype, "rows": rows}]}


def of(module, found, step, cell):
    (one,) = [one for one in module.verdicts(found) if (one.step, one.cell) == (step, cell)]
    return one


def test_every_target_names_a_call_that_is_measured(module, benchmark_module):
    cases = benchmark_module("kernel_cases")
    names = {work.name for work in cases.works(cases.Grid(), torch.bfloat16, models=False)}
    wanted = module.targets()
    assert {one["work"] for one in wanted["rates"]} | set(wanted["fastest"]["works"]) <= names
    assert {one["exactness"] for one in wanted["rates"]} == {"exact", "quantised"}


def test_the_issues_rates_are_all_there(module):
    found = [(one["cell"], one["tflops"]) for one in module.targets()["rates"]]
    assert sorted(found) == sorted(
        [("D64", 340), ("D64 causal", 300), ("D128", 450), ("D128 causal", 390), ("D64", 430), ("D64 causal", 380),
         ("D128", 560), ("D128 causal", 510), ("D64", 240), ("D128", 280), ("D64", 430), ("D128", 550)]
    )  # fmt: skip


def test_a_rate_is_judged_by_the_fastest_of_ours(module):
    rows = [row("triton", 2.0, 350.0, ours=True), row("later", 1.5, 420.0, ours=True), row("native_cudnn", 1.0, 600.0)]
    first, second = (of(module, record(rows), step, "D64") for step in ("plain Triton", "beyond plain Triton"))
    assert (first.outcome, first.found, first.by) == ("reached", 420.0, "later")
    assert (second.outcome, second.found) == ("missed", 420.0)
    assert of(module, record(rows), "plain Triton", "D128").outcome == "not measured"
    assert of(module, record(rows), "INT8 scores, the faster form", "D64").outcome == "not measured"


def test_quantised_rows_have_targets_of_their_own(module):
    rows = [row("triton_int8", 1.0, 430.0, ours=True, exactness="quantised"), row("sage", 0.5, 800.0)]
    assert of(module, record(rows), "INT8 scores, the faster form", "D64").outcome == "reached"
    assert of(module, record(rows), "plain Triton", "D64").outcome == "not measured"


@pytest.mark.parametrize("status", ["wrong", "failed", "refused"])
def test_a_kernel_without_a_right_answer_misses(module, status):
    rows = [row("triton", None, None, ours=True, status=status)]
    one = of(module, record(rows), "plain Triton", "D64")
    assert (one.outcome, one.found, one.by) == ("missed", None, f"triton: {status}")
    fastest = of(module, record(rows, "d72-8192-forward"), module.targets()["fastest"]["step"], "d72-8192-forward")
    assert fastest.outcome == "missed"


def test_a_kernel_that_was_skipped_was_not_measured(module):
    rows = [row("triton", None, None, ours=True, status="skipped")]
    assert of(module, record(rows), "plain Triton", "D64").outcome == "not measured"


@pytest.mark.parametrize(
    ("others", "outcome", "times"),
    [
        ([row("flash", 3.0), row("native_efficient", 2.0)], "missed", 0.5),
        ([row("flash", 5.0), row("wrong", None, status="wrong")], "reached", 1.25),
        ([row("sage", 1.0, exactness="quantised")], "reached", None),
        ([], "reached", None),
    ],
)
def test_fastest_counts_exact_right_answers_alone(module, others, outcome, times):
    rows = [row("triton", 4.0, ours=True), *others]
    (one,) = [one for one in module.verdicts(record(rows, "d72-8192-forward")) if one.cell == "d72-8192-forward"]
    assert (one.outcome, one.found) == (outcome, times)


def test_other_devices_and_dtypes_have_no_verdict(module):
    rows = [row("triton", 1.0, 999.0, ours=True)]
    assert module.verdicts(record(rows, gpu="NVIDIA H100 80GB HBM3")) == []
    assert module.verdicts({"machine": {"cpu": "some"}, "calls": []}) == []
    assert of(module, record(rows, dtype="float16"), "plain Triton", "D64").outcome == "not measured"
