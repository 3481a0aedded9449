"""Each lowering alone: the rewritten problem is that of the tensors, output, LSE and gradients the formula's."""

import pytest
from hypothesis import HealthCheck, assume, given, settings

from heedful import Limits, lowering
from heedful.lowering import Step, chunking
from heedful.strategy import ALL_MASKS

ANY = {"scale": True, "gqa": True, "value_dim_may_differ": True, "lse": True, "masks": ALL_MASKS, "mixed_masks": True}
BOTH = ("top_left", "bottom_right")
THD = {"layouts": ("BSHD", "THD"), "masks": frozenset({"causal", "window", "varlen"})}
CASES = {
    "drop_noop_mask": (lowering.DropNoop(), Limits(**ANY), {"masks": ("dense", "bias")}),
    "trim_causal": (lowering.TrimCausal(), Limits(**ANY), {"masks": ("band",), "square": False}),
    "align to the start": (lowering.AlignCausal(), Limits(**ANY), {"masks": ("band", "padding and band")}),
    "align to the end": (
        lowering.AlignCausal(),
        Limits(**ANY, causal_alignments=("bottom_right",)),
        {"masks": ("band", "padding and band")},
    ),
    "align packed": (lowering.AlignCausal(), Limits(**ANY), {"masks": ("pack",)}),
    "gather_keys": (
        lowering.GatherKeys(),
        Limits(**ANY, faster_with=frozenset({"gather_keys"})),
        {"masks": ("padding", "padding", "padding and band")},
    ),
    "pack": (lowering.PackPadding(), Limits(**{**ANY, **THD}), {"masks": ("padding", "padding and band")}),
    "pack, the end": (
        lowering.PackPadding(),
        Limits(**{**ANY, **THD}, causal_alignments=("bottom_right",)),
        {"masks": ("padding and band",), "square": True},
    ),
    "pack all": (lowering.PackPadding(), Limits(**{**ANY, **THD, "layouts": ("THD",)}), {"masks": ("none", "band")}),
    "tidy_pack": (lowering.TidyPacked(), Limits(**ANY), {"masks": ("pack",)}),
    "layout": (lowering.ChangeLayout(), Limits(**ANY, layouts=("BSHD",)), {"layouts": ("BHSD",)}),
    "layout BHSD": (lowering.ChangeLayout(), Limits(**ANY), {"layouts": ("BSHD", "THD")}),
    "layout THD": (
        lowering.ChangeLayout(),
        Limits(**{**ANY, **THD}),
        {"masks": ("pack",), "layouts": ("BHSD", "BSHD")},
    ),
    "chunk_queries": (lowering.ChunkQueries(), Limits(**ANY, scores_in_memory=True), {"layouts": ("BHSD", "BSHD")}),
    "split_sequences": (
        lowering.SplitSequences(),
        Limits(**{**ANY, "masks": frozenset({"causal", "window", "dense"})}),
        {"masks": ("pack",), "layouts": ("BHSD", "BSHD")},
    ),
    "split_batch": (lowering.SplitBatch(), Limits(**ANY, max_batch=2), {}),
    "expand_kv_heads": (lowering.ExpandKVHeads(), Limits(**ANY), {}),
    "block_mask": (
        lowering.BlockOfMask(),
        Limits(**ANY),
        {"masks": ("padding", "padding and band", "pack"), "layouts": ("BHSD", "BSHD")},
    ),
    "materialise_mask": (lowering.MaterialiseMask(), Limits(**ANY), {"layouts": ("BHSD", "BSHD")}),
    "materialise as bias": (
        lowering.MaterialiseMask(),
        Limits(**{**ANY, "masks": frozenset({"bias"})}),
        {"layouts": ("BHSD", "BSHD")},
    ),
    "zero_empty_rows": (
        lowering.ZeroEmptyRows(),
        Limits(**ANY, empty_rows=frozenset({"output"})),
        {"masks": ("dense", "bias", "band", "pack")},
    ),
    "pad_head_dim": (lowering.PadHeadDim(), Limits(**{**ANY, "value_dim_may_differ": False}, head_dim_multiple=16), {}),
    "fold_scale": (lowering.FoldScale(), Limits(), {}),
    "fold sign": (lowering.FoldScale(), Limits(scale=True), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_lowering_and_the_way_back_give_the_formula(case, tools, monkeypatch):
    one, limits, drawn = CASES[case]
    monkeypatch.setattr(chunking, "CHUNK", 3)
    monkeypatch.setattr(chunking, "MOST_BYTES", 400)
    taken = []

    @settings(
        max_examples=30,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
    )
    @given(tools.calls(**drawn))
    def check(call):
        problem = call.problem()
        if case == "drop_noop_mask":
            assume(one.improves(problem, limits))
        if case.startswith("align"):
            assume(
                {problem.mask.causal, problem.mask.window and problem.mask.window[2]}
                - {None, *limits.causal_alignments}
            )
        if case == "zero_empty_rows":
            assume(problem.may_hide_rows)
        if case.startswith("materialise"):
            assume(problem.mask.kinds)
        if case.startswith("fold"):
            assume(problem.scale is not None)
        new = one.rewrite(problem, limits)
        assume(new is not None)
        taken.append(call)
        tools.check_steps(call, [Step(one, (), problem, new)], new, None, gradients=case != "block_mask")

    check()
    assert len(taken) >= 10
