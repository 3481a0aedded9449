"""Packed sequences one by one: what the kernel is given, and which kernels are left their own way."""

import math
from dataclasses import replace

import pytest
import torch

from heedful import Causal, Limits, SlidingWindow, Varlen
from heedful.call import problem_of_call
from heedful.lowering import Operands, lower

GOOD = {"scale": True, "gqa": True, "value_dim_may_differ": True, "lse": True, "backward": True}
PLAIN = Limits(**GOOD, masks=frozenset({"causal", "dense"}), empty_rows=frozenset({"output", "lse"}))


def tensors(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def pack(queries, keys=None):
    ends = [torch.tensor([0, *n]).cumsum(0).int() for n in (queries, keys or queries)]
    made = Varlen(ends[0]) if keys is None else Varlen(*ends)
    return made.with_lengths(tuple(queries), tuple(keys or queries))


def chain(mask, limits, tokens, layout="THD"):
    query, key = tensors((tokens[0], 4, 8), (tokens[1], 2, 8))
    problem = problem_of_call(query, key, key, attn_mask=mask, layout=layout, enable_gqa=True, return_lse=True)
    return query, key, *lower(problem, limits)


def names(steps):
    return [step.name for step in steps]


def test_neighbours_of_one_length_are_one_batch_and_nothing_is_copied(tools):
    mask, seen = pack([3, 3, 3, 2, 5, 5]), []
    query, key, steps, problem = chain(mask, PLAIN, (21, 21))
    assert names(steps) == ["layout", "split_sequences"]
    out, lse = tools.run_steps(steps, problem, PLAIN, Operands(query, key, key, mask), seen)
    assert [tuple(x.query.shape) for x in seen] == [(3, 4, 3, 8), (1, 4, 2, 8), (2, 4, 5, 8)]
    assert {x.key.untyped_storage().data_ptr() for x in seen} == {key.untyped_storage().data_ptr()}
    assert all(x.mask is None for x in seen)
    wanted, wanted_lse = tools.formula(query, key, key, mask, "THD")
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse, wanted_lse.float())


@pytest.mark.parametrize("band", [Causal("bottom_right"), SlidingWindow(1, 1, "bottom_right"), Causal()], ids=str)
@pytest.mark.parametrize("limits", [PLAIN, replace(PLAIN, empty_rows=frozenset())], ids=["exact", "rough"])
def test_bands_count_within_each_sequence(band, limits, tools):
    """The second has more queries than keys, so that its first queries see none where the ends are aligned."""
    mask = pack([2, 5, 3], [4, 2, 3]) & band
    query, key, steps, problem = chain(mask, limits, (10, 9))
    assert "split_sequences" in names(steps)
    out, lse = tools.run_steps(steps, problem, limits, Operands(query, key, key, mask))
    wanted, wanted_lse = tools.formula(query, key, key, mask, "THD")
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse, wanted_lse.float())


def test_sequences_of_one_packing_keep_causality_for_the_kernel():
    """Queries and keys are packed alike: each sequence is square, and both alignments are one."""
    _, _, steps, problem = chain(pack([2, 5]) & Causal("bottom_right"), PLAIN, (7, 7))
    assert names(steps) == ["align_causal", "layout", "split_sequences"]
    assert problem.mask.kinds == ("causal",)
    assert not problem.may_hide_rows


def test_a_loose_pack_is_tidied_first_and_its_lost_tokens_have_no_effect(tools):
    mask = pack([3, 0, 2, 2], [2, 3, 0, 3])
    query, key, steps, problem = chain(mask, PLAIN, (9, 9))
    assert names(steps) == ["tidy_pack", "layout", "split_sequences"]
    spoilt = key.clone()
    spoilt[2:5] = spoilt[8:] = math.nan
    out, lse = tools.run_steps(steps, problem, PLAIN, Operands(query, spoilt, spoilt, mask))
    wanted, wanted_lse = tools.formula(query, key, key, mask, "THD")
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse, wanted_lse.float())


def test_other_kernels_are_left_their_own_way():
    mask = pack([3, 4])
    for limits in (
        replace(PLAIN, masks=frozenset({"varlen", "dense"})),
        replace(PLAIN, masks=frozenset({"dense", "block"}), faster_with=frozenset({"block_mask"})),
        replace(PLAIN, max_batch=1),
    ):
        assert "split_sequences" not in names(chain(mask, limits, (7, 7))[2])
    unread = Varlen(mask.cu_seqlens_q)
    assert "split_sequences" not in names(chain(unread, PLAIN, (7, 7))[2])


def test_a_plan_says_that_a_sequence_reads_its_own_keys_only(dispatcher):
    (query,) = tensors((7, 2, 8))
    plan = dispatcher.explain(query, query, query, attn_mask=Varlen(torch.tensor([0, 3, 7])), layout="THD")
    assert "split_sequences" in names(plan.chosen.steps)
    assert plan.note == ""
