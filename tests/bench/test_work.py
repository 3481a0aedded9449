"""Works: the masks they put on a case, the flops they count, and the judge that knows wrong answers."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from heedful.bench.work import CHECKED_ROWS, MASKS, Judge, Work
from heedful.cases import by_name

CPU = torch.device("cpu")


def test_a_case_has_its_own_mask_unless_another_is_asked_for():
    own = {
        name: Work.of(by_name(name), None, torch.float32).mask for name in ("clip-l-text", "sana-cross", "sdxl-self-32")
    }
    assert own == {"clip-l-text": "causal", "sana-cross": "padded", "sdxl-self-32": "none"}
    assert Work.of(by_name("sana-cross"), "padded", torch.float32).case.kept_keys == 0.2
    assert Work.of(by_name("sdxl-self-32"), "padded", torch.float32).case.kept_keys == 0.5
    assert Work.of(by_name("sana-cross"), "none", torch.float32).drawn(CPU).mask is None


@pytest.mark.parametrize("mask", MASKS)
def test_useful_flops_are_those_of_the_pairs_that_count(small, mask):
    drawn = small(mask).drawn(CPU)
    pair = 2 * 4 * (16 + 16)
    if mask == "causal":
        pairs = 2 * int(torch.ones(70, 40).tril().sum())
    elif mask == "padded":
        pairs = 70 * int(drawn.mask.sum())
    else:
        pairs = 2 * 70 * 40
    assert drawn.useful_flops() == pair * pairs
    assert drawn.work.expected_flops == pytest.approx(pair * pairs, rel=0.2)


def test_masks_are_given_unexpanded_and_let_every_query_see_a_key(small):
    assert small("padded").drawn(CPU).mask.shape == (2, 1, 1, 40)
    dense = small("dense").drawn(CPU).mask
    assert dense.shape == (1, 1, 70, 40)
    assert dense.any(-1).all()
    assert 0.4 < dense.float().mean() < 0.6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("mask", MASKS)
def test_sdpa_is_right(small, mask, dtype):
    drawn = small(mask, dtype, kv_heads=2).drawn(CPU)
    judged = Judge(drawn)(sdpa(**drawn.arguments))
    assert judged.fault == ""
    assert 0 < judged.error <= judged.allowed


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        (lambda out: out * 1.01, "off by"),
        (lambda out: out.clone().index_fill_(2, torch.tensor([69]), 0.0), "off by"),
        (lambda out: out.clone().index_fill_(1, torch.tensor([3]), math.nan), "NaN or inf"),
        (lambda out: out[:, :2], "its shape is (2, 2, 70, 16), not (2, 4, 70, 16)"),
        (lambda out: out.double(), "its dtype is torch.float64, not torch.float32"),
        (lambda out: (out, out), "it is a tuple, no tensor"),
    ],
)
def test_wrong_answers_are_known(small, broken, fault):
    drawn = small("causal").drawn(CPU)
    assert fault in Judge(drawn)(broken(sdpa(**drawn.arguments))).fault


def test_another_masks_answer_is_wrong(small):
    judge = Judge(small("padded").drawn(CPU))
    for mask in ("none", "causal", "dense"):
        assert "off by" in judge(sdpa(**small(mask).drawn(CPU).arguments)).fault


def test_nan_in_a_row_that_is_not_checked_is_found(small):
    drawn = small(query_length=300).drawn(CPU)
    judge = Judge(drawn)
    assert len(judge.rows) == len(set(judge.rows.tolist())) == CHECKED_ROWS
    assert {0, 299} <= set(judge.rows.tolist())
    answer = sdpa(**drawn.arguments)
    answer[:, :, next(row for row in range(300) if row not in judge.rows)] = math.nan
    assert judge(answer).fault == "NaN or inf where numbers must be"


def test_approximate_backends_are_held_to_the_coarser_rule(small):
    drawn = small().drawn(CPU)
    judge, out = Judge(drawn), sdpa(**drawn.arguments)
    assert judge(out * 1.01).fault
    assert not judge(out * 1.01, exact=False).fault
    assert "relative error" in judge(out * 1.5, exact=False).fault
