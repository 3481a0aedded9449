"""Runs: what is right gets figures, what is not gets its reason."""

import json
import time

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from heedful import AttentionDispatcher, Policy
from heedful.bench import measure
from heedful.bench.measure import Run
from heedful.strategy import AttentionStrategy

CPU = torch.device("cpu")


@pytest.fixture
def rows_of(factory, small):
    """``rows_of(compute)``: the rows of a run of torch, native and a strategy ``mine`` that computes so."""
    dispatcher = AttentionDispatcher(factory, policy=Policy(guard="off"))  # as the command has it: the bench judges

    def measured(compute, works=None, **settings):
        mine = type(
            "Mine", (AttentionStrategy,), {"compute_attention": staticmethod(compute), **settings.pop("data", {})}
        )
        factory.register_strategy("mine", mine)
        settings = {"rounds": 3, "most_seconds": 5.0, **settings}
        run = Run(CPU, ("torch", "native", "mine"), dispatcher=dispatcher, **settings)
        groups = list(run.groups(works or [small()]))
        json.dumps(run.record(groups, {}), allow_nan=False)
        return run, [{row.backend: row for row in group.rows} for group in groups]

    return measured


def test_right_answers_have_figures(rows_of):
    _, [rows] = rows_of(sdpa)
    for row in rows.values():
        assert row.status == "right"
        assert row.figures.median > 0
        assert row.rounds == 3
        assert row.rate > 0
        assert row.share > 0
        assert row.peak_bytes >= 2 * 4 * 70 * 16 * 4
        assert 0 <= row.error <= row.allowed
    assert rows["torch"].faster == 1.0
    assert (rows["mine"].ran, rows["native"].ran, rows["torch"].ran) == ("mine", "native", "SDPA")


def test_the_fastest_comes_first(rows_of, small):
    run, _ = rows_of(sdpa)
    [group] = run.groups([small("causal")])
    medians = [row.figures.median for row in group.rows if row.figures]
    assert medians == sorted(medians)
    assert group.rows[-1].backend == "mine"
    assert group.rows[-1].status == "refused"
    assert "mask is causal" in group.rows[-1].reason


def nothing_measured(row):
    return row.figures is row.rate is row.share is row.faster is row.peak_bytes is None


def test_a_wrong_answer_has_no_time(rows_of):
    _, [rows] = rows_of(lambda *tensors: sdpa(*tensors) * 1.01)
    assert rows["mine"].status == "wrong"
    assert nothing_measured(rows["mine"])
    assert "off by" in rows["mine"].reason
    assert rows["mine"].error > rows["mine"].allowed
    assert rows["native"].status == "right"


def test_an_answer_that_turns_wrong_in_the_rounds_loses_its_time(rows_of):
    made = []

    def first_right(*tensors):
        made.append(1)
        return sdpa(*tensors) * (1.0 if len(made) < 3 else 1.01)

    _, [rows] = rows_of(first_right)
    assert rows["mine"].status == "wrong"
    assert nothing_measured(rows["mine"])
    assert rows["mine"].reason.startswith("after the rounds: off by")


def raising(error, after=0):
    made = []

    def compute(*tensors):
        made.append(1)
        if len(made) > after:
            raise error
        return sdpa(*tensors)

    return compute


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (RuntimeError("the kernel\nbroke"), "failed", "RuntimeError: the kernel"),
        (torch.OutOfMemoryError("CUDA: 80 GiB"), "skipped", "out of memory: OutOfMemoryError: CUDA: 80 GiB"),
        (RuntimeError("DefaultCPUAllocator: no"), "skipped", "out of memory: RuntimeError: DefaultCPUAllocator: no"),
        (TypeError(), "failed", "TypeError: no text"),
    ],
)
def test_what_a_kernel_raises_is_its_rows_text(rows_of, error, status, reason):
    _, [rows] = rows_of(raising(error))
    assert (rows["mine"].status, rows["mine"].reason) == (status, reason)
    assert nothing_measured(rows["mine"])
    assert rows["native"].status == "right"


def test_a_kernel_that_breaks_in_the_rounds_ends_them_aloud(rows_of):
    _, [rows] = rows_of(raising(RuntimeError("late"), after=2))
    assert rows["mine"].status == "failed"
    assert rows["mine"].reason == "the rounds ended early: RuntimeError: late"


def test_slow_backends_are_skipped_and_not_tried_on_more(rows_of, small):
    made = []

    def slow(*tensors):
        made.append(1)
        time.sleep(0.3)
        return sdpa(*tensors)

    works = [small(), small(batch=4), small(batch=1)]
    _, groups = rows_of(slow, works, most_seconds=0.2)
    reasons = [rows["mine"].reason for rows in groups]
    assert "one call takes" in reasons[0]
    assert "and --max-seconds is 0.2" in reasons[0]
    assert reasons[1] == f"not tried: on small, which has no more flops, {reasons[0]}"
    assert "one call takes" in reasons[2]
    assert all(nothing_measured(rows["mine"]) for rows in groups)
    assert len(made) == 4  # the first call might have compiled


def test_what_would_take_far_too_long_is_not_tried(rows_of, small):
    run, _ = rows_of(sdpa)
    work = small()
    run._seen = [(torch.float32, 10**6, work.expected_flops / 30), (torch.float32, 10**6, 1.0)]
    assert run._hopeless("mine", work).startswith("not tried: at the best rate seen, ")
    assert run._hopeless("mine", work).endswith(" TFLOP/s, a call would take 30 s, and --max-seconds is 5")
    run._seen = [(torch.float32, 10**6, work.expected_flops / 15)]  # too long, but not by far
    assert run._hopeless("mine", work) == ""
    run._seen = [(torch.float32, 10, 1.0), (torch.float16, 10**6, 1.0)]  # too small to tell, another dtype
    assert run._hopeless("mine", work) == ""


def test_a_case_for_gpus_is_not_drawn_on_a_cpu(rows_of, small):
    _, [rows] = rows_of(sdpa, [small(gpu_only=True)])
    assert {row.reason for row in rows.values()} == {"it is for GPUs: over 2e12 flops, or over 2 GB in float32"}


def test_an_interruption_keeps_what_was_measured(rows_of, small):
    run, groups = rows_of(raising(KeyboardInterrupt()), [small(), small(batch=1)])
    assert run.interrupted
    [rows] = groups
    assert {row.status for row in rows.values()} == {"skipped"}
    assert rows["mine"].reason == "interrupted before its turn"


def test_an_interruption_in_the_rounds_keeps_the_rounds(rows_of, small):
    def told(doing, steps):
        if doing.endswith("timing") or (rounds and steps):
            rounds.append(steps)
        if len(rounds) == 4:
            raise KeyboardInterrupt

    rounds = []
    run, [rows] = rows_of(sdpa, [small()], rounds=9, on_step=told)
    assert run.interrupted
    assert {(row.status, row.rounds) for row in rows.values()} == {("right", 3)}


def test_out_of_memory_while_drawing_skips_the_work(rows_of, monkeypatch):
    def no_room(self, device):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(measure.Work, "drawn", no_room)
    _, [rows] = rows_of(sdpa)
    assert {row.reason for row in rows.values()} == {"out of memory: OutOfMemoryError: no room"}


def test_a_record_tells_all(rows_of, small):
    run, _ = rows_of(lambda *tensors: sdpa(*tensors) * 1.01)
    record = run.record(run.groups([small("padded"), small()]), {"cpu": "this"})
    assert (record["wrong"], record["failed"], record["interrupted"]) == (2, 0, False)
    assert [group["mask"] for group in record["groups"]] == ["padded", "none"]
    for group in record["groups"]:
        [wrong] = [row for row in group["rows"] if row["status"] == "wrong"]
        assert wrong["median_ms"] is wrong["tflops"] is wrong["times_as_fast_as_torch"] is None
