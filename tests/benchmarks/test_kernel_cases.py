"""The calls that kernels.py measures: their order, their arguments, and what their operations count."""

from __future__ import annotations

import pytest
import torch

from heedful.cases import CASES

CPU = torch.device("cpu")


@pytest.fixture
def cases(benchmark_module):
    return benchmark_module("kernel_cases")


def drawn(cases, name, grid=None, dtype=torch.float32):
    (work,) = cases.works(grid or cases.TINY, dtype, name)
    return cases.Drawn.of(work, CPU, 0)


def test_targets_come_first_then_what_tells_most(cases):
    every = cases.works(cases.Grid(), torch.bfloat16)
    groups = [work.group for work in every]
    in_order = list(dict.fromkeys(groups))
    assert in_order == ["dense", "odd head dims", "masks", "lengths", "models"]
    assert [work.name for work in every[:8]] == [
        f"{name}-8192-{direction}"
        for direction in ("forward", "backward")
        for name in ("d64", "d64-causal", "d128", "d128-causal")
    ]
    assert all(work.case.batch * work.case.heads == 64 for work in every if work.group != "models")
    assert {work.case for work in every if work.group == "models"} == set(CASES)
    assert len({work.name for work in every}) == len(every)


def test_every_wanted_kind_is_there(cases):
    every = cases.works(cases.Grid(), torch.bfloat16)
    for direction in cases.DIRECTIONS:
        longest = [work for work in every if work.direction == direction and work.case.query_length == 8192]
        assert {72, 80, 96, 160} <= {work.case.head_dim for work in longest}
        assert {work.mask for work in longest} >= {"none", "causal", "padded", "dense", "biased", "packed", "window"}
        plain = {
            (work.case.query_length, work.case.head_dim, work.mask) for work in every if work.direction == direction
        }
        assert {(length, dim, mask) for length in (512, 2048, 8192) for dim in (64, 128) for mask in ("none", "causal")
                } <= plain  # fmt: skip


def test_a_pattern_chooses_and_models_can_be_left_out(cases):
    chosen = cases.works(cases.Grid(), torch.bfloat16, "sdxl-*")
    assert chosen
    assert all(work.name.startswith("sdxl-") for work in chosen)
    assert cases.works(cases.Grid(), torch.bfloat16, "sdxl-*", models=False) == []


def test_flops_are_counted_as_papers_do(cases):
    grid = cases.Grid(2, 3, (64,), (16,), (24,), 16)
    dense = 4 * 2 * 3 * 64 * 64 * 16
    assert drawn(cases, "d16-64-forward", grid).flops == dense
    assert drawn(cases, "d16-causal-64-forward", grid).flops == dense // 2
    assert drawn(cases, "d16-64-backward", grid).flops == dense * 5 // 2
    assert drawn(cases, "d16-dense-64-forward", grid).flops == dense
    assert drawn(cases, "d16-biased-64-forward", grid).flops == dense
    padded = drawn(cases, "d16-padded-64-forward", grid)
    assert padded.flops == 4 * 3 * 16 * 64 * int(padded.arguments["attn_mask"].sum())
    assert 0 < padded.flops < dense


@pytest.mark.parametrize("name", ["d16-window-64-forward", "d16-packed-64-forward"])
def test_pairs_are_those_of_the_mask(cases, name):
    one = drawn(cases, name, cases.Grid(2, 1, (64,), (16,), (24,), 16))
    length = one.query.shape[0] if one.work.extra == "packed" else one.query.shape[-2]
    seen = one.mask.visible(length, length, CPU)
    times = 1 if one.work.extra == "packed" else 2
    assert one.pairs == int(seen.sum()) * times


def test_the_values_dim_counts_by_itself(cases):
    model = next(case for case in CASES if not case.gpu_only and case.mask == "none")
    work = cases.Work("models", model, "forward", torch.float32)
    assert cases.Drawn.of(work, CPU, 0).flops == model.flops


def test_copies_differ_and_share_their_mask(cases):
    (work,) = cases.works(cases.TINY, torch.float32, "d16-dense-32-backward")
    first = cases.Drawn.of(work, CPU, 0)
    second = cases.Drawn.of(work, CPU, 1, first)
    assert second.arguments is first.arguments
    assert not any(torch.equal(one, other) for one, other in zip(first.tensors, second.tensors, strict=True))
    assert all(tensor.requires_grad and tensor.is_leaf for tensor in second.tensors)
    assert bool(first.arguments["attn_mask"].any(-1).all())


def test_bytes_are_read_and_written_once(cases):
    one = drawn(cases, "d16-32-forward")
    size = one.query.numel() * 4
    assert one.input_bytes == 3 * size
    assert one.moved == 4 * size
    assert drawn(cases, "d16-32-backward").moved == 8 * size
    assert drawn(cases, "d16-biased-32-forward").moved == 4 * size + 32 * 32 * 4
