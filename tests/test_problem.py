"""The problem: a value that survives JSON, and the shapes that make one."""

import dataclasses
import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from heedful import AttentionProblem, Causal, InvalidArgument, KeyPadding, SlidingWindow, Varlen, attention
from heedful.facts import DeviceFacts
from heedful.masks import MaskFacts, as_mask
from heedful.problem import check_mask_shape, problem_for_shapes, sizes_of

CPU = DeviceFacts("cpu")
SIZES = {"batch": 2, "heads": 8, "kv_heads": 2, "query_length": 77, "key_length": 1024, "head_dim": 72, "value_dim": 64}
small = st.integers(1, 5)
axes = st.none() | st.sampled_from(["", "K", "BK", "QK", "BHQK"])
alignments = st.sampled_from(["top_left", "bottom_right"])
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
numbers = st.none() | st.floats(0.01, 100)
booleans = st.booleans()

mask_facts = st.builds(
    MaskFacts,
    causal=st.none() | alignments,
    window=st.none() | st.tuples(st.none() | small, st.none() | small, alignments),
    key_padding=booleans,
    varlen=booleans,
    dense=axes,
    bias=axes,
    bias_dtype=st.none() | dtypes,
    bias_needs_grad=booleans,
    block=booleans,
    rows_seen=booleans,
    query_padding=booleans,
    noop=booleans,
    side=st.none() | st.sampled_from(["right", "left", "interior"]),
    kept=st.none() | st.integers(0, 8),
    queries_alike=booleans,
    packing=st.sampled_from(["", "tidy", "loose", "unknown"]),
    packed_alike=booleans,
)
FIELDS = dict(
    **dict.fromkeys(SIZES, small),
    dtype=dtypes,
    device=st.sampled_from(["cpu", "cuda", "mps"]),
    capability=st.none() | st.tuples(small, small),
    architecture=st.sampled_from(["", "sm_90", "gfx942"]),
    layout=st.sampled_from(["BHSD", "BSHD", "THD"]),
    mask=mask_facts,
    dropout_p=st.floats(0, 1),
    scale=numbers,
    softcap=numbers,
    max_error=numbers,
    **dict.fromkeys(
        ["sinks", "needs_grad", "needs_lse", "deterministic", "compiling", "autocast", "broadcast"], booleans
    ),
    options=st.sampled_from([(), (("block", 64),), (("a", "x"), ("b", None), ("c", True))]),
)
problems = st.builds(AttentionProblem, **FIELDS)


def test_every_field_is_drawn_above():
    assert set(FIELDS) == {field.name for field in dataclasses.fields(AttentionProblem)}
    drawn = {"causal", "window", "key_padding", "varlen", "dense", "bias", "bias_dtype", "bias_needs_grad", "block"}
    drawn |= {"rows_seen", "query_padding", "noop", "side", "kept", "queries_alike", "packing", "packed_alike"}
    assert drawn == {field.name for field in dataclasses.fields(MaskFacts)}


@given(problems)
def test_a_problem_survives_json(problem):
    again = AttentionProblem.from_dict(json.loads(json.dumps(problem.to_dict())))
    assert again == problem
    assert hash(again) == hash(problem)
    assert str(again) == str(problem)


@given(problems, problems)
def test_problems_are_equal_by_value(one, other):
    assert (one == other) == (one.to_dict() == other.to_dict())
    assert one == one.replace()


@given(problems)
def test_a_problem_prints_its_sizes(problem):
    text = str(problem)
    for letter, size in (("B", problem.batch), ("Q", problem.query_length), ("K", problem.key_length)):
        assert f"{letter}{size} " in text
    assert str(problem.dtype).removeprefix("torch.") in text
    assert problem.architecture in text


def test_a_problem_prints_what_is_special():
    problem = AttentionProblem(
        **SIZES,
        dtype=torch.bfloat16,
        device="cuda",
        architecture="sm_90",
        mask=MaskFacts(causal="top_left"),
        dropout_p=0.1,
        scale=0.125,
        softcap=30.0,
        sinks=True,
        needs_grad=True,
        needs_lse=True,
        deterministic=True,
        compiling=True,
        autocast=True,
        options=(("block", 64),),
    )
    assert str(problem) == (
        "B2 H8/2 Q77 K1024 D72/64 bfloat16 BHSD on cuda sm_90, mask causal top_left, dropout 0.1, scale 0.125, "
        "softcap 30.0, sinks, with gradient, with LSE, deterministic, compiled, autocast, block=64"
    )
    plain = AttentionProblem(**{**SIZES, "kv_heads": 8, "value_dim": 72})
    assert str(plain) == "B2 H8 Q77 K1024 D72 float32 BHSD on cpu"


def test_a_problem_is_frozen_and_hashable():
    problem = AttentionProblem(**SIZES)
    with pytest.raises(dataclasses.FrozenInstanceError):
        problem.batch = 3
    assert {problem: 1}[AttentionProblem(**SIZES)] == 1
    assert problem.replace(batch=3).batch == 3
    assert problem.batch == 2


def test_an_unknown_dtype_is_named():
    data = {**AttentionProblem(**SIZES).to_dict(), "dtype": "float33"}
    with pytest.raises(InvalidArgument, match=r"dtype: got 'float33'; give the name of a floating dtype of torch"):
        AttentionProblem.from_dict(data)


@pytest.mark.parametrize("field", ["batch", "heads", "query_length", "key_length", "value_dim"])
def test_a_zero_size_leaves_nothing_to_compute(field):
    assert not AttentionProblem(**SIZES).is_empty
    assert AttentionProblem(**{**SIZES, field: 0}).is_empty


def test_the_scale_is_that_of_sdpa_unless_given():
    assert AttentionProblem(**SIZES).effective_scale == pytest.approx(72**-0.5)
    assert AttentionProblem(**SIZES, scale=0.5).effective_scale == 0.5


# From shapes


@pytest.mark.parametrize(
    ("layout", "query", "key", "value"),
    [
        ("BHSD", (2, 8, 77, 72), (2, 8, 1024, 72), (2, 8, 1024, 64)),
        ("BSHD", (2, 77, 8, 72), (2, 1024, 8, 72), (2, 1024, 8, 64)),
    ],
)
def test_sizes_are_the_same_in_every_layout(layout, query, key, value):
    sizes, lead, broadcast = sizes_of(query, key, value, layout=layout, enable_gqa=False)
    assert (sizes, lead, broadcast) == ({**SIZES, "kv_heads": 8}, (2, 8), False)


def test_sizes_of_packed_tensors():
    sizes, lead, broadcast = sizes_of((50, 8, 72), (60, 2, 72), (60, 2, 64), layout="THD", enable_gqa=True)
    assert (sizes["query_length"], sizes["key_length"], sizes["heads"], sizes["kv_heads"]) == (50, 60, 8, 2)
    assert (sizes["batch"], lead, broadcast) == (1, (1, 8), False)


@pytest.mark.parametrize(
    ("query", "key", "value", "gqa", "expected"),  # expected: batch, heads, kv heads, lead, whether it broadcasts
    [
        ((3, 8), (5, 8), (5, 8), False, (1, 1, 1, (), True)),
        ((4, 3, 8), (4, 5, 8), (4, 5, 8), False, (1, 4, 4, (4,), True)),
        ((6, 2, 4, 3, 8), (6, 2, 4, 5, 8), (6, 2, 4, 5, 8), False, (12, 4, 4, (6, 2, 4), True)),
        ((1, 4, 3, 8), (2, 4, 5, 8), (2, 4, 5, 8), False, (2, 4, 4, (2, 4), True)),
        ((2, 4, 3, 8), (2, 1, 5, 8), (2, 1, 5, 8), False, (2, 4, 4, (2, 4), True)),
        ((2, 4, 3, 8), (2, 1, 5, 8), (2, 1, 5, 8), True, (2, 4, 1, (2, 4), False)),
        ((2, 4, 3, 8), (2, 2, 5, 8), (2, 2, 5, 8), True, (2, 4, 2, (2, 4), False)),
        ((2, 4, 3, 8), (1, 2, 5, 8), (1, 2, 5, 8), True, (2, 4, 4, (2, 4), True)),
        ((4, 3, 8), (2, 5, 8), (2, 5, 8), True, (1, 4, 4, (4,), True)),
    ],
)
def test_leading_sizes_broadcast_as_in_sdpa(query, key, value, gqa, expected):
    sizes, lead, broadcast = sizes_of(query, key, value, layout="BHSD", enable_gqa=gqa)
    assert (sizes["batch"], sizes["heads"], sizes["kv_heads"], lead, broadcast) == expected
    if not gqa:
        assert tuple(torch.broadcast_shapes(query[:-2], key[:-2], value[:-2])) == lead


Q, K = (2, 4, 3, 8), (2, 4, 5, 8)


@pytest.mark.parametrize(
    ("query", "key", "value", "layout", "gqa", "says"),
    [
        (Q, K, K, "SBHD", False, r"layout: got 'SBHD'; give one of BHSD, BSHD, THD"),
        ((8,), K, K, "BHSD", False, r"query: got shape \(8,\); layout BHSD needs at least 2 dimensions"),
        (Q, (3, 5, 8), K, "BSHD", False, r"key: got shape \(3, 5, 8\); layout BSHD needs 4 dimensions"),
        ((3, 4, 8), (3, 4, 8), K, "THD", False, r"value: got shape \(2, 4, 5, 8\); layout THD needs 3 dimensions"),
        (Q, (2, 4, 5, 16), K, "BHSD", False, r"key: got head dim 16; query has 8"),
        ((2, 4, 3, 0), (2, 4, 5, 0), K, "BHSD", False, r"query: got head dim 0"),
        (Q, K, (2, 4, 6, 8), "BHSD", False, r"value: got length 6; key has 5"),
        (Q, (2, 3, 5, 8), (2, 3, 5, 8), "BHSD", False, r"leading sizes \(2, 3\), \(2, 3\); query has \(2, 4\)"),
        (Q, (2, 2, 5, 8), (2, 2, 5, 8), "BHSD", False, r"pass enable_gqa=True"),
        (Q, (3, 4, 5, 8), (3, 4, 5, 8), "BHSD", False, r"leading sizes \(3, 4\)"),
        (Q, (2, 3, 5, 8), (2, 3, 5, 8), "BHSD", True, r"key: got 3 heads; they must divide query's 4"),
        (Q, (2, 0, 5, 8), (2, 0, 5, 8), "BHSD", True, r"key: got 0 heads"),
        (Q, (2, 8, 5, 8), (2, 8, 5, 8), "BHSD", True, r"key: got 8 heads; they must divide query's 4"),
        (Q, (2, 2, 5, 8), (2, 4, 5, 8), "BHSD", True, r"value: got 4 heads; key has 2"),
        (Q, (3, 2, 5, 8), (3, 2, 5, 8), "BHSD", True, r"leading sizes \(3, 2\)"),
    ],
)
def test_a_shape_that_does_not_fit_is_named_with_its_numbers(query, key, value, layout, gqa, says):
    with pytest.raises(InvalidArgument, match=says):
        sizes_of(query, key, value, layout=layout, enable_gqa=gqa)


# Masks that fit, and that do not

FULL = (2, 4, 3, 5)


@given(st.integers(0, 4), st.lists(st.sampled_from([1, 2, 3, 4, 5]), min_size=4, max_size=4))
def test_a_dense_mask_fits_where_it_broadcasts(rank, sizes):
    shape = tuple(sizes[4 - rank :])
    try:
        fits = torch.broadcast_shapes(shape, FULL) == torch.Size(FULL)
    except RuntimeError:
        fits = False
    if fits:
        check_mask_shape(shape, FULL)
    else:
        with pytest.raises(InvalidArgument, match=r"for a \(batch, keys\) padding mask use KeyPadding"):
            check_mask_shape(shape, FULL)


def problem(mask, layout="BHSD", query=Q, key=K):
    return problem_for_shapes(query, key, key, dtype=torch.float32, device=CPU, mask=mask, layout=layout)


PACK = Varlen(torch.tensor([0, 1, 3]), torch.tensor([0, 2, 5]))


@pytest.mark.parametrize(
    ("mask", "changes", "says"),
    [
        (KeyPadding(torch.ones(2, 4, dtype=torch.bool)), {}, r"KeyPadding of shape \(2, 4\); give \(2, 5\)"),
        (KeyPadding(torch.ones(3, 5, dtype=torch.bool)), {}, r"KeyPadding of shape \(3, 5\); give \(2, 5\)"),
        (as_mask(torch.zeros(2, 5)), {}, r"shape \(2, 5\); it must broadcast to \(2, 4, 3, 5\)"),
        (PACK, {}, r"Varlen with batch 2; pack the sequences"),
        (None, {"layout": "THD", "query": (3, 4, 8), "key": (5, 4, 8)}, r"layout='THD' needs attn_mask=Varlen"),
        (Causal(), {"layout": "THD", "query": (3, 4, 8), "key": (5, 4, 8)}, r"layout='THD' needs attn_mask=Varlen"),
    ],
)
def test_a_mask_that_does_not_fit(mask, changes, says):
    with pytest.raises(InvalidArgument, match=says):
        problem(mask, **changes)


def test_masks_that_fit():
    assert problem(KeyPadding(torch.ones(1, 5, dtype=torch.bool))).mask.kinds == ("key_padding",)
    assert problem(PACK, "THD", (3, 4, 8), (5, 4, 8)).mask.kinds == ("varlen",)
    assert problem(PACK, "BHSD", (1, 4, 3, 8), (1, 4, 5, 8)).mask.kinds == ("varlen",)
    assert set(problem(PACK & Causal(), "BHSD", (1, 4, 3, 8), (1, 4, 5, 8)).mask.kinds) == {"causal", "varlen"}
    assert set(problem(PACK & SlidingWindow(1, 1), "THD", (3, 4, 8), (5, 4, 8)).mask.kinds) == {"window", "varlen"}
    both = KeyPadding(torch.ones(2, 5, dtype=torch.bool), queries=torch.ones(2, 3, dtype=torch.bool))
    assert problem(both).mask.kinds == ("key_padding", "query_padding")


@pytest.mark.parametrize(
    ("rows", "says"),
    [((2, 4), r"KeyPadding with queries of shape \(2, 4\); give \(2, 3\)"), ((3, 3), r"queries of shape \(3, 3\)")],
)
def test_padding_of_queries_that_does_not_fit(rows, says):
    with pytest.raises(InvalidArgument, match=says):
        problem(KeyPadding(torch.ones(2, 5, dtype=torch.bool), queries=torch.ones(rows, dtype=torch.bool)))


# Causality and windows beside a packing count inside each sequence

QUERIES, KEYS = (3, 1, 4, 2, 5), (3, 4, 2, 2, 1)


def packing():
    return Varlen(*(torch.tensor([0, *itertools.accumulate(lengths)]) for lengths in (QUERIES, KEYS)))


def in_each_sequence(alignment, left, right):
    """Bool (Q, K), from a loop over sequences, their queries and their keys."""
    seen = torch.zeros(sum(QUERIES), sum(KEYS), dtype=torch.bool)
    first_query = first_key = 0
    for queries, keys in zip(QUERIES, KEYS, strict=True):
        for i, j in itertools.product(range(queries), range(keys)):
            place = i if alignment == "top_left" else i + keys - queries
            seen[first_query + i, first_key + j] = place - left <= j <= place + right
        first_query, first_key = first_query + queries, first_key + keys
    return seen


@pytest.mark.parametrize("backend", ["reference", "native", "native_math", "flex"])
@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
@pytest.mark.parametrize("kind", ["causal", "window", "causal and window", "is_causal"])
@pytest.mark.parametrize("layout", ["THD", "BHSD"])
def test_packed_causality_and_windows_are_those_of_each_sequence(backend, alignment, kind, layout, naive_attention):
    words: dict = {}
    mask, left, right = packing(), 99, 99
    if "window" in kind:
        mask, left, right = mask & SlidingWindow(1, 1, alignment), 1, 1
    if kind == "is_causal":
        words, right = {"is_causal": True, "causal_alignment": alignment}, 0
    elif "causal" in kind:
        mask, right = mask & Causal(alignment), 0
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, sum(n), 8, generator=draw) for n in (QUERIES, KEYS, KEYS))
    seen = in_each_sequence(alignment, left, right)
    expected, _ = naive_attention(query, key, value, seen=seen)
    tensors = [t.transpose(0, 1) if layout == "THD" else t[None] for t in (query, key, value)]
    out = attention(*tensors, attn_mask=mask, layout=layout, backend=backend, **words)
    out = out.transpose(0, 1) if layout == "THD" else out[0]
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    assert (out[:, ~seen.any(-1)] == 0).all()


@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
def test_the_lse_of_packed_causality_is_that_of_each_sequence(alignment, naive_attention):
    draw = torch.Generator().manual_seed(0)
    query, key = (torch.randn(sum(n), 2, 8, generator=draw) for n in (QUERIES, KEYS))
    seen = in_each_sequence(alignment, 99, 0)
    expected = naive_attention(*(t.transpose(0, 1) for t in (query, key, key)), seen=seen)
    for backend in ("reference", "flex", "auto"):
        mask = packing() & Causal(alignment)
        out, lse = attention(query, key, key, attn_mask=mask, layout="THD", backend=backend, return_lse=True)
        torch.testing.assert_close(out.transpose(0, 1).double(), expected[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse.reshape(2, -1).double(), expected[1], atol=1e-5, rtol=1e-5)


def test_the_device_facts_become_part_of_the_problem():
    made = problem_for_shapes(Q, K, K, dtype=torch.float16, device=DeviceFacts.parse("sm_75"))
    assert (made.device, made.capability, made.architecture) == ("cuda", (7, 5), "sm_75")
