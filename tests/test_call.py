"""Reading a call: each malformed argument is named with its value and remedy, by every way in."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import heedful
from heedful import Causal, Dense, Facts, InvalidArgument, KeyPadding, SlidingWindow, Varlen
from heedful.call import computed_dtype, mask_of_call, problem_of_call
from heedful.dispatch import default_dispatcher
from heedful.masks import facts_of

Q, K = torch.randn(2, 4, 3, 8), torch.randn(2, 4, 5, 8)
META = torch.empty(2, 4, 5, 8, device="meta")


@pytest.fixture(params=[heedful.attention, heedful.explain, problem_of_call], ids=["attention", "explain", "problem"])
def read(request):
    """Every public way by which a call's arguments come in."""
    return request.param


MALFORMED = [
    ({"query": [1.0]}, r"query: got list; give a torch.Tensor"),
    ({"value": np.zeros((2, 4, 5, 8))}, r"value: got ndarray; give a torch.Tensor"),
    ({"key": None}, r"key: got NoneType"),
    ({"query": Q.to_sparse()}, r"query: got torch.sparse_coo; give a dense"),
    ({"query": Q.int()}, r"query: got torch.int32; give a floating dtype"),
    ({"key": K.to(torch.complex64)}, r"key: got torch.complex64; give a floating dtype"),
    ({"key": K.double()}, r"key: got torch.float64; query has torch.float32"),
    ({"value": K.half()}, r"value: got torch.float16; query has torch.float32; .* or use autocast"),
    ({"key": META}, r"key: got device meta; query is on cpu"),
    ({"value": META}, r"value: got device meta; query is on cpu"),
    ({"query": Q[0, 0, 0]}, r"query: got shape \(8,\); layout BHSD needs at least 2 dimensions"),
    ({"key": K[..., :7]}, r"key: got head dim 7; query has 8"),
    ({"value": K[:, :, :4]}, r"value: got length 4; key has 5"),
    ({"key": K[:, :3], "value": K[:, :3]}, r"leading sizes \(2, 3\).*enable_gqa=True"),
    ({"key": K[:, :3], "value": K[:, :3], "enable_gqa": True}, r"key: got 3 heads; they must divide query's 4"),
    ({"layout": "SBHD"}, r"layout: got 'SBHD'; give one of BHSD, BSHD, THD"),
    ({"layout": ["BHSD"]}, r"layout: got \['BHSD'\]"),
    ({"layout": "THD"}, r"query: got shape \(2, 4, 3, 8\); layout THD needs 3 dimensions"),
    ({"is_causal": 1}, r"is_causal: got 1; give True or False"),
    ({"enable_gqa": None}, r"enable_gqa: got None; give True or False"),
    ({"return_lse": "yes"}, r"return_lse: got 'yes'; give True or False"),
    ({"dropout_p": 1.5}, r"dropout_p: got 1.5; give a number from 0.0 to 1.0"),
    ({"dropout_p": -0.1}, r"dropout_p: got -0.1"),
    ({"dropout_p": math.nan}, r"dropout_p: got nan"),
    ({"dropout_p": None}, r"dropout_p: got None"),
    ({"dropout_p": True}, r"dropout_p: got True"),
    ({"scale": math.nan}, r"scale: got nan; give a finite number"),
    ({"scale": math.inf}, r"scale: got inf; give a finite number"),
    ({"scale": "0.1"}, r"scale: got '0.1'; give a finite number"),
    ({"softcap": 0.0}, r"softcap: got 0.0; give a finite number above 0"),
    ({"softcap": math.inf}, r"softcap: got inf; give a finite number above 0"),
    ({"max_error": -1}, r"max_error: got -1; give a number from 0.0"),
    ({"options": [("block", 1)]}, r"options: got \[\('block', 1\)\]; give a mapping"),
    ({"options": {1: 2}}, r"options: got \{1: 2\}; give a mapping"),
    ({"causal_alignment": "left"}, r"causal_alignment: got 'left'; give one of top_left, bottom_right"),
    ({"window": 2.5}, r"window: got 2.5; give \(left, right\)"),
    ({"window": (1, 2, 3)}, r"window: got \(1, 2, 3\)"),
    ({"attn_mask": [[True]]}, r"attn_mask: got list; give a tensor"),
    ({"attn_mask": torch.ones(3, 5, dtype=torch.int32)}, r"attn_mask: got torch.int32; give bool"),
    ({"attn_mask": torch.ones(2, 5, dtype=torch.bool)}, r"shape \(2, 5\); .* padding mask use KeyPadding"),
    ({"attn_mask": torch.zeros(4, 3, 3)}, r"shape \(4, 3, 3\); it must broadcast to \(2, 4, 3, 5\)"),
    ({"attn_mask": torch.ones(3, 5, dtype=torch.bool, device="meta")}, r"attn_mask: got device meta; query is on cpu"),
    ({"attn_mask": KeyPadding(torch.ones(2, 5, dtype=torch.bool, device="meta"))}, r"attn_mask: got device meta"),
    ({"attn_mask": Varlen(torch.tensor([0, 3]))}, r"Varlen with batch 2"),
    ({"attn_mask": Causal(), "is_causal": True, "causal_alignment": "bottom_right"}, r"two different causal align"),
    ({"attn_mask": causal_upper_left(3, 5)}, r"got torch's CausalBias \(UPPER_LEFT\); give heedful.Causal\(\)"),
    ({"attn_mask": causal_lower_right(3, 5)}, r"CausalBias \(LOWER_RIGHT\); give heedful.Causal\('bottom_right'\)"),
]


@pytest.mark.parametrize(
    ("wrong", "says"), MALFORMED, ids=[f"{next(iter(wrong))}-{says[:24]}" for wrong, says in MALFORMED]
)
def test_a_malformed_argument_is_named_with_value_and_remedy(read, wrong, says):
    with pytest.raises(InvalidArgument, match=says) as caught:
        read(**{"query": Q, "key": K, "value": K, **wrong})
    assert caught.value.argument in str(caught.value)


@pytest.mark.parametrize("way", [heedful.attention, heedful.explain])
def test_an_unknown_argument_is_a_type_error_that_names_it(way):
    with pytest.raises(TypeError, match="attention_mask"):
        way(Q, K, K, attention_mask=None)


# Nested tensors: the remedy in the error is run as it is printed


def _nested(layout, heads_first):
    sequences = [torch.randn(length, 2, 8, generator=torch.Generator().manual_seed(length)) for length in (3, 5)]
    if layout == torch.jagged:
        nested = torch.nested.nested_tensor(sequences, layout=layout)
        return sequences, nested.transpose(1, 2) if heads_first else nested
    ordered = [one.transpose(0, 1) for one in sequences] if heads_first else sequences
    return sequences, torch.nested.nested_tensor(ordered)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("heads_first", [True, False], ids=["BHSD", "BSHD"])
@pytest.mark.parametrize("kind", [torch.strided, torch.jagged], ids=["strided", "jagged"])
def test_the_remedy_for_a_nested_tensor_works(kind, heads_first, naive_attention):
    sequences, query = _nested(kind, heads_first)
    layout = "BHSD" if heads_first else "BSHD"
    with pytest.raises(InvalidArgument, match="query: got a nested tensor; pack the sequences") as caught:
        heedful.attention(query, query, query, layout=layout)
    remedy = str(caught.value).partition("pack the sequences: ")[2]
    packed, _, arguments = remedy.partition(", with layout='THD' and attn_mask=")
    known = {"torch": torch, "heedful": heedful, "query": query}
    tensor, mask = (eval(text, dict(known)) for text in (packed, arguments))
    out = heedful.attention(tensor, tensor, tensor, layout="THD", attn_mask=mask)
    expected = [naive_attention(*[one.transpose(0, 1)[None]] * 3)[0][0].transpose(0, 1) for one in sequences]
    torch.testing.assert_close(out.double(), torch.cat(expected), atol=1e-5, rtol=1e-5)


# What a well-formed call means


def test_a_scale_may_be_a_tensor_with_one_number_as_for_sdpa():
    want = F.scaled_dot_product_attention(Q, K, K, scale=0.3)
    torch.testing.assert_close(heedful.attention(Q, K, K, scale=torch.tensor(0.3)), want)
    kinds = len(default_dispatcher._runs)
    torch.testing.assert_close(heedful.attention(Q, K, K, scale=torch.tensor(0.3)), want)
    assert len(default_dispatcher._runs) == kinds
    assert heedful.explain(Q, K, K, scale=torch.tensor(0.5)).problem.scale == 0.5
    for scale in (torch.tensor(0.3, requires_grad=True), torch.ones(1), torch.tensor(math.inf)):
        with pytest.raises(InvalidArgument, match=r"scale: got .*; give a finite number"):
            heedful.attention(Q, K, K, scale=scale)


def test_mask_arguments_are_joined():
    keep = torch.ones(3, 5, dtype=torch.bool)
    mask = mask_of_call(attn_mask=keep, is_causal=True, window=(2, 0), causal_alignment="bottom_right")
    assert (mask.causal, mask.window, mask.dense is keep) == ("bottom_right", (2, 0, "bottom_right"), True)


@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
@pytest.mark.parametrize("kind", ["bool", "float", "padding"])
def test_a_mask_and_causality_both_apply(kind, alignment, naive_attention):
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8)
    keep = torch.rand(2, 1, 5, 7) < 0.7
    bias = torch.randn(4, 5, 7)
    padding = torch.arange(7) < torch.tensor([[7], [4]])
    shift = 2 if alignment == "bottom_right" else 0
    band = torch.tensor([[k <= q + shift for k in range(7)] for q in range(5)])
    mask, seen, added = {
        "bool": (keep, band & keep, None),
        "float": (bias, band, bias),
        "padding": (KeyPadding(padding), band & padding[:, None, None, :], None),
    }[kind]
    out = heedful.attention(query, key, key, mask, is_causal=True, causal_alignment=alignment)
    expected, _ = naive_attention(query, key, key, seen=seen, bias=added)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


def test_a_call_becomes_its_problem():
    problem = problem_of_call(
        Q.half(),
        K[:, :2].half(),
        K[:, :2].half(),
        Dense(torch.ones(3, 5, dtype=torch.bool)),
        0.25,
        True,
        0.5,
        True,
        softcap=30,
        window=SlidingWindow(1, 1).window[:2],
        sinks=torch.zeros(4),
        max_error=0.1,
        options={"b": 1, "a": 2},
        return_lse=True,
    )
    assert (problem.batch, problem.heads, problem.kv_heads, problem.query_length, problem.key_length) == (2, 4, 2, 3, 5)
    assert problem.mask.kinds == ("causal", "window", "dense")
    assert (problem.dtype, problem.dropout_p, problem.scale, problem.softcap) == (torch.float16, 0.25, 0.5, 30.0)
    assert (problem.sinks, problem.max_error, problem.needs_lse, problem.needs_grad) == (True, 0.1, True, False)
    assert problem.options == (("a", 2), ("b", 1))


@pytest.mark.parametrize("which", ["query", "key", "value", "attn_mask"])
def test_a_gradient_is_needed_where_any_input_wants_one(which):
    tensors = {"query": Q, "key": K, "value": K, "attn_mask": torch.zeros(3, 5)}
    assert not problem_of_call(**tensors).needs_grad
    tensors[which] = tensors[which].clone().requires_grad_()
    assert problem_of_call(**tensors).needs_grad
    with torch.no_grad():
        assert not problem_of_call(**tensors).needs_grad


def test_determinism_is_read_from_torch():
    assert not problem_of_call(Q, K, K).deterministic
    torch.use_deterministic_algorithms(True)
    try:
        assert problem_of_call(Q, K, K).deterministic
    finally:
        torch.use_deterministic_algorithms(False)


def test_under_autocast_mixed_dtypes_are_computed_in_its_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        problem = problem_of_call(Q, K.half(), K)
        assert (problem.dtype, problem.autocast) == (torch.bfloat16, True)
        assert computed_dtype(*[torch.float64] * 3, "cpu") == (torch.float64, False)
        with pytest.raises(InvalidArgument, match=r"key: got torch.float32; query has torch.float64"):
            problem_of_call(Q.double(), K, K)


def test_the_machine_is_what_one_says_it_is():
    problem = problem_of_call(META, META, META, facts=Facts.pretend("sm_75"))
    assert problem.device == "meta"
    assert problem_of_call(Q, K, K, facts=Facts.pretend("sm_75")).device == "cpu"


def test_a_call_on_meta_tensors_gives_shapes():
    assert heedful.attention(META, META, META, is_causal=True).shape == META.shape
    assert not heedful.explain(META, META, META).refused


def test_a_mask_made_of_nothing_is_no_mask():
    assert mask_of_call() is None
    assert facts_of(mask_of_call(window=(None, -1))).kinds == ()
    assert problem_of_call(Q, K, K, window=(-1, -1)) == problem_of_call(Q, K, K)
