"""The judge itself: the oracle against sums by hand and against torch, and the rule against errors of known size."""

from __future__ import annotations

import math

import pytest
import torch

from heedful.testing.oracle import Meaning, attend, band
from heedful.testing.tolerance import ContractBroken, Tolerance, allowed, check_close, check_similar, largest

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]


def test_the_oracle_by_hand() -> None:
    """Two keys with scores log 1 and log 3: weights 1/4 and 3/4, LSE log 4."""
    key = torch.tensor([[0.0], [math.log(3.0)]], dtype=torch.float64)
    value = torch.tensor([[8.0], [4.0]], dtype=torch.float64)
    out, lse = attend(torch.ones(1, 1, dtype=torch.float64), key, value, None, Meaning(scale=1.0))
    assert out.item() == pytest.approx(8 / 4 + 4 * 3 / 4)
    assert lse.item() == pytest.approx(math.log(4.0))


def test_the_oracle_agrees_with_torch() -> None:
    query, key, value, bias = _tensors((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 3), (4, 5, 7))
    out, lse = attend(query, key, value, bias, Meaning(scale=0.3, groups=2))
    want = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(out, want)
    scores = query @ key.repeat_interleave(2, 1).mT * 0.3 + bias
    torch.testing.assert_close(lse, scores.logsumexp(-1))


def test_the_oracle_of_a_row_that_sees_nothing_is_zero_without_gradient() -> None:
    query, key, value = (tensor.requires_grad_() for tensor in _tensors((2, 3), (4, 3), (4, 3)))
    seen = torch.tensor([[True] * 4, [False] * 4])
    out, lse = attend(query, key, value, None, Meaning(scale=1.0, seen=seen))
    out.sum().backward()
    assert out[1].tolist() == [0, 0, 0]
    assert lse[1].item() == -math.inf
    assert query.grad is not None
    assert query.grad[1].tolist() == [0, 0, 0]
    assert all(tensor.grad.isfinite().all() for tensor in (query, key, value))  # type: ignore[union-attr]


def test_the_oracle_without_keys() -> None:
    query, key, value = _tensors((2, 3), (0, 3), (0, 5))
    out, lse = attend(query, key, value, None, Meaning(scale=1.0))
    assert out.tolist() == [[0.0] * 5] * 2
    assert lse.tolist() == [-math.inf] * 2


def test_soft_cap_and_known_dropout() -> None:
    query, key, value = _tensors((2, 3), (4, 3), (4, 3))
    drop = torch.tensor([2.0, 0.0, 2.0, 0.0])
    out, _ = attend(query, key, value, None, Meaning(scale=1.0, softcap=0.5, drop=drop))
    weights = (0.5 * torch.tanh(query @ key.mT / 0.5)).softmax(-1)
    torch.testing.assert_close(out, (weights * drop) @ value)


def test_bands_by_hand() -> None:
    device = torch.device("cpu")
    assert band(2, 4, 0, 1, "top_left", device).int().tolist() == [[1, 1, 0, 0], [0, 1, 1, 0]]
    assert band(2, 4, None, 0, "bottom_right", device).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert band(3, 1, None, 0, "bottom_right", device).int().tolist() == [[0], [0], [1]]
    assert band(0, 4, 1, 1, "top_left", device).shape == (0, 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_naive_kernel_passes_its_own_rule(dtype: torch.dtype) -> None:
    tensors = [tensor.to(dtype) for tensor in _tensors((2, 30, 16), (2, 40, 16), (2, 40, 16))]
    wide = attend(*(t.double() for t in tensors), None, Meaning(scale=0.25))[0]  # type: ignore[misc]
    narrow = torch.float32 if dtype == torch.float64 else dtype
    naive = attend(*(t.to(narrow) for t in tensors), None, Meaning(scale=0.25))[0]  # type: ignore[misc]
    check_close("it", naive.to(dtype) if dtype != torch.float64 else wide, wide, naive, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_error_beyond_the_rule_is_broken_contract(dtype: torch.dtype) -> None:
    (want,) = _tensors((4, 5))
    naive = want.to(torch.float32 if dtype == torch.float64 else dtype)
    limit = allowed(want, naive, dtype)
    assert 0 < limit < 40 * torch.finfo(dtype).eps * largest(want)
    wrong = want.clone()
    wrong[2, 3] += 1.1 * limit
    assert check_close("it", want + 0.9 * limit, want, naive, dtype).units == pytest.approx(0.9, rel=0.1)
    with pytest.raises(ContractBroken, match="it is off by"):
        check_close("it", wrong, want, naive, dtype)


def test_a_soft_cap_widens_the_rule() -> None:
    (want,) = _tensors((4, 5))
    naive = want.half()
    assert allowed(want, naive, torch.float16, 3.0) > allowed(want, naive, torch.float16)


@pytest.mark.parametrize(
    ("got", "says"),
    [
        ([1.0, math.nan], "off by nan"),
        ([1.0, math.inf], "off by inf"),
        ([1.0], "has shape"),
        ([[1.0, 2.0]], "has shape"),
    ],
)
def test_nan_infinity_and_shape_are_broken_contract(got: list[float], says: str) -> None:
    want = torch.tensor([1.0, 2.0], dtype=torch.float64)
    with pytest.raises(ContractBroken, match=says):
        check_close("it", torch.tensor(got), want, want.float(), torch.float32)


@pytest.mark.parametrize("got", [math.inf, 0.0, -1e38, math.nan])
def test_infinities_are_exact(got: float) -> None:
    want = torch.tensor([-math.inf, 2.0], dtype=torch.float64)
    check_close("it", want.float(), want, want.float(), torch.float32)
    with pytest.raises(ContractBroken, match="where it must be"):
        check_close("it", torch.tensor([got, 2.0]), want, want.float(), torch.float32)


def test_nothing_is_close_to_nothing() -> None:
    nothing = torch.zeros(0, 3)
    check_close("it", nothing, nothing.double(), nothing, torch.float32)
    check_similar("it", nothing, nothing.double(), Tolerance())


def test_similarity() -> None:
    (want,) = _tensors((40, 50))
    found = check_similar("it", want * 1.05, want, Tolerance())
    assert found.units == pytest.approx(0.5)  # of the relative error that is allowed
    assert found.error == pytest.approx(0.05 * largest(want))
    for wrong in (want * 1.2, -want, want.roll(1), want * math.nan, want * 0):
        with pytest.raises(ContractBroken, match="relative error"):
            check_similar("it", wrong, want, Tolerance())
    with pytest.raises(ContractBroken, match="must be zero"):
        check_similar("it", want, want * 0, Tolerance())
