"""What is right passes, and what is a little wrong does not: answers and gradients, of every kind of call."""

from __future__ import annotations

import pytest
import torch

import heedful
from heedful import AttentionStrategyFactory

CPU = torch.device("cpu")
KINDS = ("d16", "d16-causal", "d24", "d16-padded", "d16-dense", "d16-biased", "d16-packed", "d16-window")
REFERENCE = AttentionStrategyFactory.create_strategy("reference")


@pytest.fixture
def checks(benchmark_module):
    return benchmark_module("kernel_checks")


@pytest.fixture
def judging(benchmark_module, checks):
    """A call, its answer, its gradients and their judge."""
    cases = benchmark_module("kernel_cases")

    def made(name, dtype=torch.float32, grid=cases.TINY):
        (work,) = cases.works(grid, dtype, f"{name}-32-backward")
        one = cases.Drawn.of(work, CPU, 0)
        answer = heedful.attention(*one.tensors, **one.arguments, backend="reference")
        upstream = torch.randn(answer.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
        found = torch.autograd.grad(answer, one.tensors, upstream)
        return one, answer.detach(), found, checks.Gradients(one, upstream)

    return made


@pytest.mark.parametrize("name", KINDS)
def test_right_answers_and_gradients_pass(checks, judging, name):
    one, answer, found, gradients = judging(name)
    assert checks.judged(one, answer, REFERENCE).fault == ""
    judgement = gradients.judged(found, REFERENCE)
    assert judgement.fault == ""
    assert 0 <= judgement.units <= 1


def test_heads_that_share_keys(checks, judging, benchmark_module):
    cases = benchmark_module("kernel_cases")
    case = cases.Case(name="grouped-32", model="none", batch=2, heads=4, kv_heads=2, query_length=32, key_length=48,
                      head_dim=16, value_dim=24, mask="none", source="here")  # fmt: skip
    drawn = cases.Drawn.of(cases.Work("models", case, "backward", torch.float32), CPU, 0)
    answer = heedful.attention(*drawn.tensors, **drawn.arguments, backend="reference")
    upstream = torch.randn(answer.shape)
    gradients = checks.Gradients(drawn, upstream)
    assert gradients.heads == [(0, 0), (1, 1)]
    assert gradients.judged(torch.autograd.grad(answer, drawn.tensors, upstream), REFERENCE).fault == ""


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("name", ["d16-causal", "d16-packed", "d16-window"])
def test_a_gradient_that_is_one_percent_off_is_wrong(judging, name, which):
    _, _, found, gradients = judging(name)
    bad = [tensor * 1.01 if place == which else tensor for place, tensor in enumerate(found)]
    assert ("query", "key", "value")[which] in gradients.judged(tuple(bad), REFERENCE).fault


def test_a_gradient_of_another_dtype_or_with_nan_is_wrong(judging):
    _, _, found, gradients = judging("d16")
    assert "float64" in gradients.judged((found[0].double(), *found[1:]), REFERENCE).fault
    spoiled = found[1].clone()
    spoiled[0, 1, 3, 4] = float("nan")  # whatever head is looked at closely
    assert "NaN" in gradients.judged((found[0], spoiled, found[2]), REFERENCE).fault


def test_parts_of_the_queries_add_up(checks, judging, monkeypatch):
    whole = judging("d16-window")[3]
    monkeypatch.setattr(checks, "SCORES", 5 * 32)  # five queries at a time
    parts = judging("d16-window")[3]
    for one, other in zip(whole.want, parts.want, strict=True):
        for first, second in zip(one, other, strict=True):
            torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_a_wrong_answer_is_told(checks, judging, name):
    one, answer, _, _ = judging(name)
    assert checks.judged(one, answer * 1.01, REFERENCE).fault
    assert "float64" in checks.judged(one, answer.double(), REFERENCE).fault
    assert "tuple" in checks.judged(one, (answer, None), REFERENCE).fault
    spoiled = answer.clone()
    spoiled[..., 5] = float("inf")
    assert checks.judged(one, spoiled, REFERENCE).fault


def test_an_approximate_backend_is_held_to_what_it_declares(checks, judging):
    sage = AttentionStrategyFactory.create_strategy("triton_int8")
    one, answer, found, gradients = judging("d16")
    assert checks.judged(one, answer * 1.05, sage).fault == ""
    assert checks.judged(one, answer * 1.2, sage).fault
    assert gradients.judged(tuple(tensor * 1.05 for tensor in found), sage).fault == ""
    assert gradients.judged(tuple(tensor * 1.2 for tensor in found), sage).fault


def test_half_precision_is_held_to_its_own_rounding(checks, judging):
    one, answer, found, gradients = judging("d16-causal", torch.bfloat16)
    assert checks.judged(one, answer, REFERENCE).fault == ""
    assert gradients.judged(found, REFERENCE).fault == ""
    assert gradients.judged(tuple(tensor * 1.5 for tensor in found), REFERENCE).fault
