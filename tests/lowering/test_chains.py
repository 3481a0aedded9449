"""Chains: whatever its limits, a kernel is given what they allow, and the way back leads to the formula's answer."""

import inspect
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from heedful import Bias, Causal, Dense, KeyPadding, Limits, SlidingWindow, Varlen, lowering
from heedful.analysis import analyse
from heedful.call import mask_of_call, problem_of_call
from heedful.lowering import LOWERINGS, OPTIONAL, Lowering, Operands, chains, chunking, lower
from heedful.lowering.numbers import cast_bias
from heedful.masks import replace_part
from heedful.strategy import ALL_MASKS, static_arguments

ANY = {"scale": True, "gqa": True, "value_dim_may_differ": True, "backward": True, "lse": True}
ALL_ROWS = frozenset({"output", "lse"})
KERNELS = {
    "short form": Limits(lse=True),
    "dense only": Limits(**ANY, masks=frozenset({"dense"})),
    "bias only": Limits(**ANY, masks=frozenset({"bias"}), head_dim_multiple=16),
    "bias, no scale": Limits(masks=frozenset({"causal", "bias"}), head_dim_multiple=8, lse=True),
    "bottom right": Limits(
        **ANY, masks=frozenset({"causal", "window", "dense", "bias"}), causal_alignments=("bottom_right",)
    ),
    "heads third": Limits(layouts=("BSHD",), masks=frozenset({"dense", "bias"}), min_head_dim=32, lse=True),
    "packed only": Limits(**ANY, layouts=("THD",), masks=ALL_MASKS, mixed_masks=True, empty_rows=ALL_ROWS),
    "flash": Limits(
        **ANY,
        layouts=("BSHD", "THD"),
        masks=frozenset({"causal", "window", "varlen"}),
        mixed_masks=True,
        causal_alignments=("bottom_right",),
        empty_rows=frozenset({"output"}),
        head_dim_multiple=8,
    ),
    "flash, packed": Limits(
        **ANY,
        layouts=("THD",),
        masks=frozenset({"causal", "window", "varlen"}),
        mixed_masks=True,
        causal_alignments=("bottom_right",),
        empty_rows=frozenset({"output"}),
    ),
    "xformers": Limits(
        **ANY,
        layouts=("BSHD", "THD"),
        masks=frozenset({"causal", "window", "varlen", "bias"}),
        mixed_masks=True,
        causal_alignments=("top_left", "bottom_right"),
        empty_rows=frozenset({"output"}),
        bias_backward=True,
        head_dim_multiple=8,
    ),
    "sage": Limits(
        layouts=("BHSD", "BSHD"), masks=frozenset({"causal"}), head_dim_multiple=16, lse=True, backward=True
    ),
    "native": Limits(
        **ANY,
        masks=frozenset({"causal", "dense", "bias"}),
        empty_rows=frozenset({"output"}),
        bias_backward=True,
        faster_with=frozenset({"gather_keys", "upcast", "chunk_queries"}),
    ),
    "holds scores": Limits(
        **ANY, masks=frozenset({"causal", "key_padding", "dense", "bias"}), bias_backward=True, scores_in_memory=True
    ),
    "one row": Limits(**ANY, masks=frozenset({"key_padding", "dense", "causal", "window"}), max_batch=1),
    "blocks": Limits(
        **ANY,
        masks=ALL_MASKS,
        mixed_masks=True,
        bias_backward=True,
        empty_rows=ALL_ROWS,
        causal_alignments=("top_left", "bottom_right"),
        faster_with=frozenset({"block_mask", "gather_keys"}),
    ),
    "everything": Limits(
        **ANY,
        masks=ALL_MASKS,
        mixed_masks=True,
        causal_alignments=("top_left", "bottom_right"),
        bias_in_query_dtype=False,
        empty_rows=ALL_ROWS,
        softcap=True,
    ),
}


def tensors(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def keep(*shape, empty=False):
    """Random bool; some rows see no key where ``empty``, else every row sees one."""
    seen = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    seen[..., 0] = True
    if empty:
        seen[..., 1, :] = False
    return seen


PLAIN = ((2, 4, 5, 12), (2, 4, 7, 12), (2, 4, 7, 12))
SQUARE = ((2, 4, 6, 12),) * 3
CALLS = {
    "plain": (PLAIN, {}),
    "scale": (PLAIN, {"scale": 0.3}),
    "value dim": ((*PLAIN[:2], (2, 4, 7, 20)), {}),
    "grouped": ((PLAIN[0], *((2, 2, 7, 12),) * 2), {"enable_gqa": True}),
    "one kv head": ((PLAIN[0], *((2, 1, 7, 12),) * 2), {"enable_gqa": True}),
    "grouped, 3 dims": (((4, 5, 12), *((2, 7, 12),) * 2), {"enable_gqa": True}),
    "grouped, broadcast": ((PLAIN[0], *((1, 2, 7, 12),) * 2), {"enable_gqa": True}),
    "2 dims": (((5, 12), (7, 12), (7, 12)), {"attn_mask": keep(5, 7)}),
    "3 dims": (((4, 5, 12), (4, 7, 12), (4, 7, 12)), {"attn_mask": keep(4, 5, 7)}),
    "5 dims": (((3, 2, 4, 5, 12), (1, 2, 4, 7, 12), (3, 1, 4, 7, 12)), {"attn_mask": keep(3, 1, 4, 5, 7)}),
    "5 dims, 4-D mask": (((3, 2, 4, 5, 12), *((3, 2, 4, 7, 12),) * 2), {"attn_mask": keep(2, 1, 5, 7)}),
    "broadcast batch": (((1, 4, 5, 12), *((2, 4, 7, 12),) * 2), {"is_causal": True}),
    "heads third": (((2, 5, 4, 12), *((2, 7, 4, 12),) * 2), {"layout": "BSHD", "attn_mask": keep(2, 1, 5, 7)}),
    "heads third, grouped": (
        ((2, 5, 4, 12), *((2, 7, 2, 12),) * 2),
        {"layout": "BSHD", "enable_gqa": True, "is_causal": True},
    ),
    "heads third, broadcast": (((1, 5, 4, 12), *((2, 7, 4, 12),) * 2), {"layout": "BSHD"}),
    "packed": (
        ((5, 4, 12), (7, 4, 12), (7, 4, 12)),
        {"layout": "THD", "attn_mask": Varlen(torch.tensor([0, 2, 5]), torch.tensor([0, 3, 7]))},
    ),
    "packed, grouped": (
        ((5, 4, 12), (7, 2, 12), (7, 2, 12)),
        {"layout": "THD", "enable_gqa": True, "attn_mask": Varlen(torch.tensor([0, 2, 5]), torch.tensor([0, 3, 7]))},
    ),
    "causal": (PLAIN, {"is_causal": True}),
    "causal square": (SQUARE, {"is_causal": True}),
    "causal bottom right": (PLAIN, {"is_causal": True, "causal_alignment": "bottom_right"}),
    "causal bottom right square": (SQUARE, {"is_causal": True, "causal_alignment": "bottom_right"}),
    "causal bottom right, more queries": (
        ((2, 4, 9, 12), *((2, 4, 7, 12),) * 2),
        {"is_causal": True, "causal_alignment": "bottom_right"},
    ),
    "window": (PLAIN, {"window": (1, 2)}),
    "causal window square": (SQUARE, {"window": (2, None), "is_causal": True}),
    "mask values": (PLAIN, {"attn_mask": Causal() & SlidingWindow(3, 3) & KeyPadding(keep(2, 7))}),
    "key padding": (PLAIN, {"attn_mask": KeyPadding(keep(2, 7))}),
    "all padded": (PLAIN, {"attn_mask": KeyPadding(keep(2, 7, empty=True) & torch.tensor([[True], [False]]))}),
    "dense": (PLAIN, {"attn_mask": keep(2, 4, 5, 7)}),
    "empty rows": (PLAIN, {"attn_mask": keep(2, 1, 5, 7, empty=True)}),
    "1-D mask": (PLAIN, {"attn_mask": keep(7)}),
    "bias": (PLAIN, {"attn_mask": tensors((4, 5, 7))[0]}),
    "hiding bias": (PLAIN, {"attn_mask": torch.zeros(5, 7).masked_fill(~keep(5, 7, empty=True), -math.inf)}),
    "wide bias": (PLAIN, {"attn_mask": tensors((5, 7), dtype=torch.float64)[0]}),
    "bias and dense": (PLAIN, {"attn_mask": Dense(keep(5, 7)) & Bias(tensors((2, 1, 1, 7))[0]), "scale": 0.1}),
}


MASK_WORDS = ("attn_mask", "is_causal", "causal_alignment", "window")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("call", CALLS)
def test_a_lowered_call_gives_the_same_answer(call, kernel, naive_attention, tools):
    shapes, arguments = CALLS[call]
    limits = KERNELS[kernel]
    query, key, value = tensors(*shapes)
    layout, scale = arguments.get("layout", "BHSD"), arguments.get("scale")
    mask = mask_of_call(**{name: arguments[name] for name in MASK_WORDS if name in arguments})
    steps, lowered = lower(problem_of_call(query, key, value, **arguments, return_lse=True), limits)
    if list(limits.refusals(lowered)):
        return  # a kernel that refuses is never run
    out, lse = tools.run_steps(steps, lowered, limits, Operands(query, key, value, mask))
    views = (query, key, value)
    views = tuple(t[None] for t in views) if layout == "THD" else views
    views = tuple(t if layout == "BHSD" else t.transpose(1, 2) for t in views)
    seen = None if mask is None else mask.visible(views[0].shape[-2], views[1].shape[-2], query.device)
    bias = None if mask is None else mask.bias
    wanted, wanted_lse = naive_attention(*views, seen=seen, bias=bias, scale=scale)
    wanted = wanted if layout == "BHSD" else wanted.transpose(1, 2)
    wanted, wanted_lse = (wanted[0], wanted_lse[0]) if layout == "THD" else (wanted, wanted_lse)
    torch.testing.assert_close(out.double(), wanted, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(lse.double(), wanted_lse, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_whatever_is_lowered_gives_the_formula(kernel, tools):
    limits, run = KERNELS[kernel], []

    @settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(tools.calls())
    def check(call):
        steps, lowered = lower(call.problem(), limits)
        if not list(limits.refusals(lowered)):
            run.append(call)
            gradients = limits.backward and not any(step.name == "block_mask" for step in steps)
            tools.check_steps(call, steps, lowered, limits, gradients=gradients)

    check()
    assert len(run) > 10


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("most", [1, 400])
def test_so_it_does_in_chunks_that_keep_memory_small(kernel, most, tools, monkeypatch):
    """A bound so low that every mask and all scores are too large for it: chunks of one query, or of a few."""
    limits, run = KERNELS[kernel], []
    monkeypatch.setattr(chunking, "MOST_BYTES", most)
    monkeypatch.setattr(chunking, "CHUNK", 3)

    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(tools.calls())
    def check(call):
        steps, lowered = lower(call.problem(needs_grad=False), limits)
        if not list(limits.refusals(lowered)):
            run.append([step.name for step in steps])
            tools.check_steps(call, steps, lowered, limits, gradients="block_mask" not in run[-1])

    check()
    whole = limits.layouts == ("THD",) or kernel in {"short form", "sage", "flash", "xformers", "everything", "blocks"}
    assert any("chunk_queries" in names for names in run) or whole


BIASES = {"bias", "hiding bias", "wide bias", "bias and dense"}
UNREAD = {"packed", "packed, grouped"}  # how long the sequences are is known once the mask is analysed
PADDED = {"key padding", "all padded", "mask values"}
DENSE = {"2 dims", "3 dims", "5 dims", "5 dims, 4-D mask", "heads third", "dense", "empty rows", "1-D mask"}
DENSE = DENSE | BIASES | PADDED


@pytest.mark.parametrize(
    ("kernel", "refused"),
    [
        ("dense only", BIASES),
        ("bias only", set()),
        ("bias, no scale", set()),
        ("everything", UNREAD),
        ("blocks", UNREAD),
        ("xformers", UNREAD),
        ("heads third", set()),
        ("bottom right", set()),
        ("native", set()),
        ("holds scores", set()),
        ("one row", BIASES),
        ("flash", DENSE | UNREAD),
        ("flash, packed", DENSE | UNREAD),
    ],
)
def test_which_calls_no_rewrite_helps(kernel, refused):
    found = set()
    for name, (shapes, arguments) in CALLS.items():
        problem = problem_of_call(*tensors(*shapes), **arguments, return_lse=True)
        if list(KERNELS[kernel].refusals(lower(problem, KERNELS[kernel])[1])):
            found.add(name)
    assert found == refused


# Chains


def test_what_is_not_refused_is_not_rewritten():
    for name, (shapes, arguments) in CALLS.items():
        if name in {"plain", "scale", "dense", "causal", "mask values", "bias and dense", "empty rows"}:
            problem = problem_of_call(*tensors(*shapes), **arguments)
            assert lower(problem, KERNELS["everything"]) == ((), problem)


def test_a_chain_is_in_the_declared_order_and_names_what_it_mends():
    query, key = tensors((1, 6, 4, 12), (2, 6, 2, 12), dtype=torch.float16)
    problem = problem_of_call(query, key, key, layout="BSHD", enable_gqa=True, attn_mask=torch.zeros(6, 6), scale=0.5)
    steps, lowered = lower(problem, KERNELS["bias, no scale"])
    assert [(step.name, step.mended) for step in steps] == [
        ("broadcast", ("leading sizes",)),
        ("layout", ("layout",)),
        ("pad_head_dim", ("head dim padding",)),
        ("cast_bias", ("bias dtype",)),
        ("zero_empty_rows", ("empty rows",)),
        ("fold_scale", ("scale",)),
    ]
    assert list(KERNELS["bias, no scale"].refusals(lowered)) == []
    assert [step.old for step in steps] == [problem, *(step.new for step in steps[:-1])]


def test_every_lowering_is_declared_once():
    made = {
        kind
        for _, kind in inspect.getmembers(lowering, inspect.isclass)
        if issubclass(kind, Lowering) and not inspect.isabstract(kind)
    }
    assert {type(one) for one in LOWERINGS} == made
    assert len({one.name for one in LOWERINGS}) == len(LOWERINGS) == len(made)


@pytest.mark.parametrize(("head_dim", "multiple", "padded"), [(72, 8, 72), (77, 8, 80), (12, 16, 16), (1, 8, 8)])
def test_head_dims_are_padded_to_the_next_multiple_and_keep_their_scale(head_dim, multiple, padded):
    (query,) = tensors((1, 2, 3, head_dim))
    _steps, lowered = lower(problem_of_call(query, query, query), Limits(scale=True, head_dim_multiple=multiple))
    assert (lowered.head_dim, lowered.value_dim) == (padded, padded)
    assert lowered.effective_scale == pytest.approx(head_dim**-0.5)
    assert list(static_arguments(lowered)) == ([] if padded == head_dim else ["scale"])


SHAPES_ALIKE = [((5, 7), (11, 13)), ((7, 5), (13, 11)), ((6, 6), (9, 9))]
COMPILED = {
    "plain": lambda _q, _k: {},
    "causal": lambda _q, _k: {"is_causal": True},
    "causal bottom right": lambda _q, _k: {"is_causal": True, "causal_alignment": "bottom_right"},
    "window": lambda _q, _k: {"window": (1, 2)},
    "key padding": lambda _q, k: {"attn_mask": KeyPadding(keep(2, k))},
    "dense": lambda q, k: {"attn_mask": keep(2, 1, q, k, empty=True)},
    "analysed": lambda q, k: {"attn_mask": analyse(KeyPadding(torch.arange(k) < torch.tensor([[2], [3]])))},
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("made", COMPILED)
@pytest.mark.parametrize("layout", ["BHSD", "BSHD"])
def test_what_is_bound_for_a_compiler_serves_every_length(made, kernel, layout, tools):
    """Of lengths that compare alike: torch.compile traces one binding for symbols."""
    limits = KERNELS[kernel]
    for traced, met in SHAPES_ALIKE:
        words = COMPILED[made](*traced)
        query, key = (t if layout == "BHSD" else t.transpose(1, 2) for t in tensors(*((2, 4, n, 8) for n in traced)))
        problem = problem_of_call(query, key, key, **words, layout=layout, return_lse=True).replace(compiling=True)
        steps, lowered = lower(problem, replace(limits, compile=True))
        if list(replace(limits, compile=True).refusals(lowered)):
            continue
        words = COMPILED[made](*met)
        query, key = (
            t if layout == "BHSD" else t.transpose(1, 2).contiguous() for t in tensors(*((2, 4, n, 8) for n in met))
        )
        mask = mask_of_call(**{name: words[name] for name in MASK_WORDS if name in words})
        through = tools.strict_kernel(lowered, None)
        for step in reversed(steps):
            through = step.lowering.around(step.old, step.new, through)
        out, lse = through(Operands(query, key, key, mask))
        wanted, wanted_lse = tools.formula(query, key, key, mask, layout)
        torch.testing.assert_close(out.double(), wanted, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(lse.double(), wanted_lse, atol=1e-6, rtol=1e-6)


# Casting a bias


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_finite_bias_stays_finite_and_an_infinite_one_infinite(dtype):
    bias = torch.tensor([-math.inf, -1e300, -1e9, 0.5, 1e300, math.inf], dtype=torch.float64)
    cast = cast_bias(bias, dtype)
    assert cast.dtype == dtype
    assert cast.isinf().tolist() == [True, False, False, False, False, True]
    assert cast[3] == 0.5
    assert cast[1] == torch.finfo(dtype).min


def test_a_bias_that_fits_is_cast_plainly():
    bias = torch.tensor([-65504.0, -math.inf, 1.5], dtype=torch.float16)
    assert torch.equal(cast_bias(bias, torch.float32), bias.float())
    assert cast_bias(bias, torch.float16) is bias


def test_replacing_a_part_keeps_the_others():
    padding = KeyPadding(keep(2, 7))
    replaced = replace_part(padding & Causal(), causal="bottom_right")
    assert (replaced.causal, replaced.padding) == ("bottom_right", padding.padding)


# Candidates: the usual chain, and those with one optional rewrite more or less

NATIVE = Limits(
    masks=frozenset({"causal", "dense", "bias"}), scale=True, empty_rows=frozenset({"output"}), lse=True,
    faster_with=frozenset({"gather_keys", "upcast", "chunk_queries"}), faster_from=1 << 20,
)  # fmt: skip


def optional(chain):
    return frozenset(step.name for step in chain[0]) & OPTIONAL


def problem_of(length=2048, dtype=torch.float32, kept=None, **words):
    seen = None if kept is None else analyse(KeyPadding((torch.arange(length) < kept).expand(1, -1)))
    query = torch.empty(1, 4, length, 16, dtype=dtype)
    return problem_of_call(query, query, query, seen, **words)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ({}, [""]),
        ({"dtype": torch.float16}, ["upcast", ""]),
        ({"dtype": torch.bfloat16}, ["", "upcast"]),  # its word is ``upcast_bfloat16``
        ({"is_causal": True}, ["chunk_queries", ""]),
        ({"kept": 300}, ["gather_keys", ""]),
        (
            {"dtype": torch.float16, "is_causal": True},
            ["chunk_queries+upcast", "upcast", "chunk_queries"],
        ),
        ({"length": 128, "dtype": torch.float16}, ["", "upcast"]),  # below ``faster_from``
    ],
    ids=str,
)
def test_the_usual_chain_comes_first_then_one_rewrite_more_or_less(words, names):
    problem = problem_of(**words)
    made = chains(problem, NATIVE)
    assert made[0] == lower(problem, NATIVE)
    assert ["+".join(sorted(optional(chain))) for chain in made] == names


@pytest.mark.parametrize("limits", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize(
    "words",
    [{}, {"dtype": torch.float16, "is_causal": True}, {"dtype": torch.bfloat16, "window": (64, 0)}, {"kept": 300}],
    ids=str,
)
def test_chains_differ_in_their_optional_rewrites_by_one_and_refuse_no_more_than_the_usual_one(limits, words):
    problem = problem_of(**words)
    usual, *others = chains(problem, limits)
    assert usual == lower(problem, limits)
    assert len({optional(chain) for chain in (usual, *others)}) == 1 + len(others)
    for chain in others:
        differ = optional(chain) ^ optional(usual)
        assert len(differ - {"chunk_queries"}) <= 1 <= len(differ)  # which bounds memory, after the other, too
        assert {refusal.field for refusal in limits.refusals(chain[1])} <= {
            refusal.field for refusal in limits.refusals(usual[1])
        }
    assert chains(problem, limits) == (usual, *others)


def test_a_rewrite_that_mends_a_refusal_is_in_every_chain():
    """Optional is what no refusal asks for: a kernel without float16 is given float32 in each of them."""
    only_float = replace(NATIVE, dtypes=(torch.float32,), faster_with=frozenset())
    assert [optional(chain) for chain in chains(problem_of(dtype=torch.float16), only_float)] == [{"upcast"}]
