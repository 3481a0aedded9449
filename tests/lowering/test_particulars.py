"""What single lowerings promise beside the same answer: what they drop, keep, copy and remember."""

import gc
import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from heedful import Bias, Causal, Dense, KeyPadding, Limits, SlidingWindow, Varlen
from heedful.analysis import MaskCache, analyse
from heedful.call import problem_of_call
from heedful.lowering import (
    LOWERINGS,
    BlockOfMask,
    GatherKeys,
    MaterialiseMask,
    Operands,
    PackPadding,
    causality,
    chunking,
    lower,
)
from heedful.lowering.base import Memory, lasting
from heedful.masks import as_mask

GOOD = {"scale": True, "gqa": True, "value_dim_may_differ": True, "lse": True, "backward": True}
GATHERS = Limits(**GOOD, masks=frozenset({"causal"}))
PACKS = Limits(
    **GOOD,
    layouts=("BSHD", "THD"),
    masks=frozenset({"causal", "window", "varlen"}),
    mixed_masks=True,
    causal_alignments=("bottom_right",),
    empty_rows=frozenset({"output"}),
)
TAKES_DENSE = Limits(**GOOD, masks=frozenset({"dense"}))
BLOCKS = Limits(**GOOD, masks=frozenset({"block", "dense"}), faster_with=frozenset({"block_mask"}), mixed_masks=True)

PAST = torch.arange(6)
PADDINGS = {
    "right": torch.tensor([[4], [2], [0]]) > PAST,
    "left": torch.tensor([[4], [2], [6]]) <= PAST,
    "interior": (torch.tensor([[0], [1], [1]]) == PAST % 2) & torch.tensor([[True], [True], [False]]),
    "all empty": torch.zeros(3, 6, dtype=torch.bool),
    "for all rows": PAST[None] < 3,
}


def tensors(*shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def lowered(query, key, mask, limits, **words):
    return lower(problem_of_call(query, key, key, attn_mask=mask, return_lse=True, **words), limits)


# Dropped keys


@pytest.mark.parametrize("limits", [GATHERS, PACKS], ids=["gather", "pack"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("queries", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_what_hidden_keys_hold_has_no_effect(limits, padding, queries, bad, tools):
    keep = PADDINGS[padding]
    mask = analyse(KeyPadding(keep, keep if queries else None))
    query, key = tensors((3, 4, 6, 8), (3, 2, 6, 8))
    steps, problem = lowered(query, key, mask, limits, enable_gqa=True)
    assert not list(limits.refusals(problem))
    assert any(step.lowering.drops_keys for step in steps)
    spoilt = key.masked_fill(~keep[:, None, :, None], bad)
    out, lse = tools.run_steps(steps, problem, limits, Operands(query, spoilt, spoilt, mask))
    wanted, wanted_lse = tools.formula(query, key, key, mask, "BHSD")
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse, wanted_lse.float())


def test_keys_past_a_band_and_tokens_of_no_sequence_have_no_effect(tools):
    query, key = tensors((2, 4, 3, 8), (2, 4, 6, 8))
    steps, problem = lowered(query, key, Causal(), PACKS)
    assert steps[0].name == "trim_causal"
    spoilt = key.clone()
    spoilt[:, :, 3:] = math.nan
    out, _ = tools.run_steps(steps, problem, PACKS, Operands(query, spoilt, spoilt, Causal()))
    torch.testing.assert_close(out, tools.formula(query, key, key, Causal(), "BHSD")[0])

    query, key = tensors((9, 2, 8), (9, 2, 8))
    ends = torch.tensor([0, 3, 3, 5, 7]), torch.tensor([0, 2, 5, 5, 8])
    mask = Varlen(*ends).with_lengths((3, 0, 2, 2), (2, 3, 0, 3))
    steps, problem = lowered(query, key, mask, PACKS, layout="THD")
    assert [step.name for step in steps] == ["tidy_pack"]
    spoilt = key.clone()
    spoilt[2:5] = spoilt[8:] = math.nan
    out, lse = tools.run_steps(steps, problem, PACKS, Operands(query, spoilt, spoilt, mask))
    wanted, wanted_lse = tools.formula(query, key, key, mask, "THD")
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse, wanted_lse.float())


def test_an_answer_without_any_key_hangs_on_its_inputs_and_is_finite_in_float16(tools):
    mask = analyse(KeyPadding(PADDINGS["all empty"]))
    query, key = (t.requires_grad_() for t in tensors((3, 4, 6, 8), (3, 4, 6, 8), dtype=torch.float16))
    with torch.no_grad():
        query += 60000.0
    for limits in (GATHERS, PACKS):
        steps, problem = lowered(query, key, mask, limits)
        out, lse = tools.run_steps(steps, problem, limits, Operands(query, key, key, mask))
        assert (out == 0).all()
        assert (lse == -math.inf).all()
        grads = torch.autograd.grad(out.sum(), (query, key))
        assert all((grad == 0).all() for grad in grads)


# Bands that must not move


@pytest.mark.parametrize(
    ("mask", "queries", "keys"),
    [
        (Causal(), 4, 6),  # the right end would be negative, which kernels read as open
        (SlidingWindow(None, 1), 4, 6),
        (SlidingWindow(1, None), 6, 4),
        (Causal("bottom_right") & SlidingWindow(2, 1, "top_left"), 4, 6),
    ],
)
def test_a_band_that_cannot_be_said_is_left(mask, queries, keys):
    other = {"top_left": "bottom_right", "bottom_right": "top_left"}[mask.causal or mask.window[2]]
    limits = Limits(masks=frozenset({"causal", "window"}), mixed_masks=True, causal_alignments=(other,))
    problem = problem_of_call(*tensors((1, 1, queries, 4), (1, 1, keys, 4), (1, 1, keys, 4)), attn_mask=mask)
    assert causality.AlignCausal().rewrite(problem, limits) is None


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
@pytest.mark.parametrize("band", [Causal, lambda alignment: SlidingWindow(3, 3, alignment)], ids=["causal", "window"])
@pytest.mark.parametrize("lengths", [(5, 7), (7, 5)], ids=str)
def test_padding_alike_moves_the_places_of_what_is_packed(side, alignment, band, lengths, tools):
    """Kept queries and keys lie at the starts or the ends of rows that differ in length."""
    count = torch.tensor([[3], [5], [0]])
    place = [torch.arange(n) for n in lengths]
    rows, keep = (p < count if side == "right" else p >= len(p) - count for p in place)
    mask = analyse(KeyPadding(keep, rows) & band(alignment))
    call = tools.Call(*tensors((3, 2, lengths[0], 4), *((3, 2, lengths[1], 4),) * 2), mask)
    assert call.problem().mask.queries_alike
    steps, problem = lower(call.problem(), PACKS)
    if any(step.name == "pack" for step in steps):
        tools.check_steps(call, steps, problem, PACKS)
    else:
        assert list(PACKS.refusals(problem))


def test_a_window_that_sees_ahead_keeps_the_queries_at_left_padding(tools):
    """With causality such queries see padding only, and are left out with the keys; here some see a key."""
    keep = PADDINGS["left"]
    call = tools.Call(*tensors(*((3, 2, 6, 4),) * 3), KeyPadding(keep) & SlidingWindow(2, 1))
    assert not any(step.name == "pack" for step in lower(call.problem(), PACKS)[0])
    call.mask = KeyPadding(keep) & SlidingWindow(2, 0)
    steps, problem = lower(call.problem(), PACKS)
    assert any(step.name == "pack" for step in steps)
    tools.check_steps(call, steps, problem, PACKS)


# Costs


def test_right_padding_alike_in_all_rows_is_cut_without_a_copy():
    mask = analyse(KeyPadding(PAST[None].expand(3, -1) < 4))
    query, key = tensors((3, 4, 6, 8), (3, 4, 6, 8))
    problem = problem_of_call(query, key, key, attn_mask=mask)
    new = GatherKeys().rewrite(problem, GATHERS)
    met = []

    def kernel(x):
        met.append(x)
        return x.query, None

    GatherKeys().around(problem, new, kernel)(Operands(query, key, key, mask))
    (x,) = met
    assert [t.data_ptr() for t in x[:3]] == [query.data_ptr(), key.data_ptr(), key.data_ptr()]
    assert x.key.shape == (3, 4, 4, 8)
    assert x.mask is None


def test_packing_what_has_no_padding_copies_nothing():
    (query,) = tensors((3, 6, 4, 8))
    for mask in (None, analyse(KeyPadding(torch.ones(3, 6, dtype=torch.bool)))):
        problem = problem_of_call(query, query, query, attn_mask=mask, layout="BSHD")
        limits = Limits(layouts=("THD",), masks=frozenset({"varlen"}))
        new = PackPadding().rewrite(problem, limits)
        met = []
        PackPadding().around(problem, new, lambda x, met=met: (met.append(x), (x.query, None))[1])(
            Operands(query, query, query, mask)
        )
        assert {t.data_ptr() for t in met[0][:3]} == {query.data_ptr()}


def test_padding_that_the_kernel_takes_is_not_packed_for_its_layout():
    limits = Limits(
        layouts=("BSHD", "THD"), masks=frozenset({"key_padding", "varlen"}), empty_rows=frozenset({"output"})
    )
    query, key = tensors((3, 4, 6, 8), (3, 4, 6, 8))
    mask = analyse(KeyPadding(PADDINGS["interior"]))
    steps, _ = lower(problem_of_call(query, key, key, attn_mask=mask), limits)
    assert [step.name for step in steps] == ["layout"]


def test_gathering_gives_way_to_a_mask_where_it_was_not_measured_to_pay():
    query, key = tensors((3, 4, 6, 8), (3, 4, 6, 8))
    mask = analyse(KeyPadding(PADDINGS["interior"]))
    assert [step.name for step in lowered(query, key, mask, TAKES_DENSE)[0]] == ["materialise_mask", "zero_empty_rows"]


@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (9, 7), (7, 9), (8, 2), (2, 8)])
@pytest.mark.parametrize("layout", ["BHSD", "BSHD"])
def test_causal_attention_in_chunks(queries, keys, layout, tools, monkeypatch):
    """Short chunks, so that some have fewer keys than queries before them, as where padded keys were cut."""
    monkeypatch.setattr(chunking, "CHUNK", 4)
    shapes = [(2, 2, n, 4) if layout == "BHSD" else (2, n, 2, 4) for n in (queries, keys, keys)]
    call = tools.Call(*tensors(*shapes), Causal(), layout)
    limits = Limits(**GOOD, masks=frozenset({"causal", "dense"}), faster_with=frozenset({"chunk_queries"}))
    limits = replace(limits, layouts=(layout,))
    steps, problem = lower(call.problem(), limits)
    assert [step.name for step in steps] == (["chunk_queries"] if queries >= 8 else [])
    tools.check_steps(call, steps, problem, limits)


def test_chunks_of_gathered_keys(tools, monkeypatch):
    monkeypatch.setattr(chunking, "CHUNK", 2)
    limits = Limits(
        **GOOD, masks=frozenset({"causal", "dense"}), faster_with=frozenset({"chunk_queries", "gather_keys"})
    )
    keep = torch.arange(8) < torch.tensor([[7], [5], [0]])
    call = tools.Call(*tensors((3, 2, 4, 4), (3, 2, 8, 4), (3, 2, 8, 4)), KeyPadding(keep) & Causal())
    steps, problem = lower(call.problem(), limits)
    assert [step.name for step in steps] == ["gather_keys", "chunk_queries"]
    tools.check_steps(call, steps, problem, limits)


# Numbers


@pytest.mark.parametrize("bias", [False, True])
def test_float16_is_computed_in_float32_and_rounded_once(bias, tools):
    limits = Limits(**GOOD, dtypes=(torch.float32,), masks=frozenset({"bias"}), bias_backward=True)
    mask = Bias(tensors((2, 1, 5, 7), dtype=torch.float16)[0]) if bias else None
    call = tools.Call(*tensors((2, 4, 5, 8), *((2, 4, 7, 8),) * 2, dtype=torch.float16), mask)
    steps, problem = lower(call.problem(), limits)
    assert [step.name for step in steps][: 1 + bias] == ["upcast", "cast_bias"][: 1 + bias]
    tools.check_steps(call, steps, problem, limits, tolerance=2e-3)


@pytest.mark.parametrize("word", ["upcast", "upcast_bfloat16"])
def test_upcasting_is_for_16_bits_on_a_cpu_only_each_by_its_word(word):
    limits, wanted = Limits(faster_with=frozenset({word})), {"upcast": torch.float16}.get(word, torch.bfloat16)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        (query,) = tensors((1, 2, 3, 8), dtype=dtype)
        problem = problem_of_call(query, query, query)
        assert [step.name for step in lower(problem, limits)[0]] == ["upcast"] * (dtype == wanted)
        assert lower(problem.replace(device="cuda"), limits)[0] == ()


# Those that may be taken or left


OPTIONAL = {
    "gather_keys": lambda query: problem_of_call(
        query, query, query, attn_mask=analyse(KeyPadding(torch.arange(600)[None] != 7))
    ),
    "upcast": lambda query: problem_of_call(query.half(), query.half(), query.half()),
    "upcast_bfloat16": lambda query: problem_of_call(*[query.bfloat16()] * 3),
    "chunk_queries": lambda query: problem_of_call(query, query, query, is_causal=True),
}


@pytest.mark.parametrize("word", OPTIONAL)
def test_an_optional_lowering_is_switched_by_its_word(word):
    problem = OPTIONAL[word](tensors((1, 2, 600, 8))[0])
    (one,) = [one for one in LOWERINGS if one.optional and one.switch(problem) == word]
    for limits in (TAKES_DENSE, replace(TAKES_DENSE, faster_from=1 << 40, faster_with=frozenset(OPTIONAL))):
        for named in (set(OPTIONAL) - {word}, {word}, set(OPTIONAL)):
            steps, _ = lower(problem, replace(limits, faster_with=frozenset(named), faster_from=0))
            assert (one.name in [step.name for step in steps]) == (word in named)


def test_which_are_optional():
    assert {one.name for one in LOWERINGS if one.optional} == {"gather_keys", "upcast", "chunk_queries"}


# Words


def test_steps_say_what_they_are_for():
    query, key = tensors((3, 4, 6, 8), (3, 4, 6, 8))
    fast = Limits(masks=frozenset({"causal", "dense", "bias"}), faster_with=frozenset({"gather_keys", "upcast"}))
    said = {
        "gather_keys (leaves padded keys out)": (
            KeyPadding(PADDINGS["left"]),
            replace(fast, masks=frozenset({"key_padding"})),
        ),
        "gather_keys (mends mask)": (KeyPadding(PADDINGS["left"]), fast),
        "drop_noop_mask (it hides nothing)": (Dense(torch.ones(6, 6, dtype=torch.bool)), fast),
        "pack (mends layout, mask)": (KeyPadding(PADDINGS["left"]), PACKS),
    }
    for text, (mask, limits) in said.items():
        steps, _ = lower(problem_of_call(query, key, key, attn_mask=analyse(mask)), limits)
        assert text in map(str, steps)


def test_a_step_names_what_it_mended_and_not_what_is_left():
    limits = Limits(**GOOD, masks=frozenset({"window"}), causal_alignments=("bottom_right",))
    query, key = tensors((1, 1, 6, 4), (1, 1, 9, 4))
    steps, problem = lowered(query, key, SlidingWindow(1, 1), limits)
    assert [str(step) for step in steps] == ["trim_causal (mends empty rows)", "align_causal (mends causal alignment)"]
    assert not list(limits.refusals(problem))


def test_only_a_mask_found_to_hide_nothing_is_dropped():
    query, key = tensors((3, 4, 6, 8), (3, 4, 6, 8))
    for mask in (torch.ones(6, 6, dtype=torch.bool), torch.zeros(6, 6, dtype=torch.float64)):
        assert lowered(query, key, mask, TAKES_DENSE)[1].mask.kinds != ()
        assert lowered(query, key, analyse(as_mask(mask)), TAKES_DENSE)[1].mask.kinds == ()


# What is remembered


def joined(mask, lowering, limits, query):
    problem = problem_of_call(query, query, query, attn_mask=mask)
    new = lowering.rewrite(problem, limits)
    assert new is not None
    return lowering.before(problem, new)(Operands(query, query, query, mask)).mask


def test_an_analysed_mask_is_joined_once_and_forgotten_with_it():
    cache, (query,) = MaskCache(), tensors((2, 4, 6, 8))
    tensor = torch.ones(6, 6, dtype=torch.bool).tril()
    mask = cache.simplest(tensor, 2)
    assert mask.causal
    once, again = (joined(cache.simplest(tensor, 2), MaterialiseMask(), TAKES_DENSE, query) for _ in range(2))
    assert once.dense is again.dense
    assert torch.equal(once.dense, tensor)
    for keep in PADDINGS.values():
        padded = analyse(KeyPadding(keep[:2].clone()))
        with torch.inference_mode():
            once = joined(padded, MaterialiseMask(), TAKES_DENSE, query)
        again = joined(padded & Causal(), MaterialiseMask(), TAKES_DENSE, query)
        assert once.dense is joined(padded, MaterialiseMask(), TAKES_DENSE, query).dense
        assert not once.dense.is_inference()
        assert again.dense is joined(padded & Causal(), MaterialiseMask(), TAKES_DENSE, query).dense
        assert again.dense is not once.dense


def test_a_tensor_of_the_user_is_read_anew():
    """Its contents may change; only what analysis made never does."""
    (query,) = tensors((2, 4, 6, 8))
    keep = torch.ones(2, 6, dtype=torch.bool)
    mask = KeyPadding(keep) & Causal()
    before = joined(mask, MaterialiseMask(), TAKES_DENSE, query)
    keep[:, 3:] = False
    after = joined(mask, MaterialiseMask(), TAKES_DENSE, query)
    assert not torch.equal(before.dense, after.dense)
    assert lasting(mask) is lasting(Dense(keep[:, None, None])) is None
    for one in (mask, Dense(keep[:, None, None])):
        problem = problem_of_call(query, query, query, attn_mask=one)
        assert BlockOfMask().rewrite(problem, BLOCKS) is None


def test_a_block_mask_is_made_once_for_an_analysed_mask():
    (query,) = tensors((2, 4, 6, 8))
    mask = analyse(KeyPadding(PADDINGS["right"][:2].clone()) & Causal())
    once, again = (joined(mask, BlockOfMask(), BLOCKS, query) for _ in range(2))
    assert once.block is again.block
    seen = once.visible(6, 6, query.device)
    assert torch.equal(seen.expand(2, 1, 6, 6), mask.visible(6, 6, query.device).expand(2, 1, 6, 6))


def test_memory_ends_with_the_part_and_keeps_nothing_for_others():
    class Part:
        pass

    memory, part, made = Memory(), Part(), []
    device = torch.device("cpu")

    def make():
        made.append(torch.zeros(2))
        return made[-1]

    assert memory.get(part, 1, make, device) is memory.get(part, 1, make, device)
    assert memory.get(part, 2, make, device) is not memory.get(part, 1, make, device)
    assert memory.get(None, 1, make, device) is not memory.get(None, 1, make, device)
    assert len(made) == 4
    for size in range(9):
        memory.get(part, size, make, device)
    assert len(memory._made[part]) == 4
    with FlopCounterMode(display=False):
        assert memory.get(part, 1, make, device) is not memory.get(part, 1, make, device)
    assert len(memory._made) == 1
    del part
    gc.collect()
    assert len(memory._made) == 0


def test_interior_padding_is_sorted_once_and_gives_gradients_after_inference(tools):
    keep = PADDINGS["interior"]
    mask = analyse(KeyPadding(keep, keep))
    for limits in (GATHERS, PACKS):
        query, key = tensors((3, 4, 6, 8), (3, 4, 6, 8))
        steps, problem = lowered(query, key, mask, limits)
        with torch.inference_mode():
            tools.run_steps(steps, problem, limits, Operands(query, key, key, mask))
        query.requires_grad_()
        steps, problem = lowered(query, key, mask, limits)
        out, _ = tools.run_steps(steps, problem, limits, Operands(query, key, key, mask))
        out.sum().backward()
        assert query.grad.isfinite().all()
