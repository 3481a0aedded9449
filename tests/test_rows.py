"""The check of sampled rows: what it catches, what it lets pass, what it costs and what it leaves alone."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

import heedful
from heedful.call import mask_of_call, problem_of_call
from heedful.errors import InvalidArgument, Refused
from heedful.masks import Mask, as_mask
from heedful.rows import check_rows, choose_rows
from heedful.testing.table import SAMPLES

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MASK_WORDS = ("attn_mask", "is_causal", "causal_alignment", "window")
CHECKED = [s for s in SAMPLES if not s.must_refuse and not s.call.get("dropout_p") and "compile" not in s.aspects]


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Asked:
    """One call, with what a check wants to know of it."""

    def __init__(self, query, key, value, **call):
        self.tensors, self.call = (query, key, value), call
        self.mask = mask_of_call(**{name: call[name] for name in MASK_WORDS if name in call})
        self.problem = problem_of_call(query, key, value, **call)

    def answer(self, backend="reference", **changes):
        """As a right kernel gives it; as one that misreads the call with ``changes``."""
        return heedful.attention(*self.tensors, **{**self.call, **changes}, backend=backend)

    def check(self, answer, **words):
        return check_rows(self.problem, *self.tensors, self.mask, answer, **{"seed": 0, **words})


def asked(batch=2, heads=3, queries=300, keys=300, dim=32, dtype=torch.float32, kv_heads=None, **call):
    kv_heads = heads if kv_heads is None else kv_heads
    sizes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    tensors = [drawn(batch, *size, dim, dtype=dtype, seed=seed) for seed, size in enumerate(sizes)]
    return Asked(*tensors, **call, **({"enable_gqa": True} if kv_heads != heads else {}))


# What it lets pass


@pytest.mark.parametrize("sample", CHECKED, ids=lambda sample: sample.name)
def test_right_answers_pass(sample):
    """Every layout, mask, dtype, grouping and number of the contract, by every backend that takes it."""
    built = sample.build("cpu")
    words = {name: built.arguments[name] for name in MASK_WORDS[1:] if name in built.arguments}
    mask = mask_of_call(attn_mask=built.attn_mask, **words)
    for backend in ("reference", "native_flash", "native_math"):
        with built.surroundings(), contextlib.suppress(Refused):
            answer = heedful.attention(*built.tensors, **built.arguments, backend=backend, return_lse=True)
            problem = problem_of_call(*built.tensors, **built.arguments, return_lse=True)
            assert check_rows(problem, *built.tensors, mask, answer).fault == ""
            assert check_rows(problem, *built.tensors, mask, answer, max_error=0.02).fault == ""
        with built.surroundings(), contextlib.suppress(Refused):
            out = heedful.attention(*built.tensors, **built.arguments, backend=backend)
            assert check_rows(problem, *built.tensors, mask, out, count=4, seed=1).fault == ""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["plain", "large", "outliers", "small values", "far bias", "lost rows"])
def test_hard_numbers_raise_no_alarm(dtype, kind):
    for seed in range(6):
        query, key, value = (drawn(2, 2, 70, 32, dtype=torch.float64, seed=3 * seed + n) for n in range(3))
        call = {}
        if kind == "large":
            query, key, value = query * 30, key * 30, value * 30
        elif kind == "outliers":
            value[:, :, :1] *= 1000
            query[..., 0] *= 50
        elif kind == "small values":
            value = value * 1e-4
        elif kind in ("far bias", "lost rows"):
            bias = torch.where(drawn(2, 1, 70, 70, seed=seed) > 0, 0.0, -1e9)
            bias[:, :, :10] = -1e9 if kind == "lost rows" else 0.0
            call["attn_mask"] = bias.clamp(min=max(-1e9, torch.finfo(dtype).min)).to(dtype)
        case = Asked(query.to(dtype), key.to(dtype), value.to(dtype), **call)
        for backend in ("native", "native_math", "native_flash", "reference"):
            with contextlib.suppress(Refused):
                assert case.check(case.answer(backend), count=70).fault == ""


def test_the_error_is_small_beside_what_is_allowed_and_means_what_it_says():
    case = asked(dtype=torch.float16)
    out = case.answer("native")
    verdict = case.check(out)
    want = case.answer().double()[:, :, list(verdict.rows)]
    got = out.double()[:, :, list(verdict.rows)]
    assert 0 < verdict.error < verdict.allowed < 0.01
    assert verdict.error <= (got - want).abs().max() + 1e-3
    assert verdict.relative < 1e-3
    assert verdict.right


# What it catches: an exact kernel that ...


CALLS = {
    "plain": {},
    "causal": {"is_causal": True},
    "bias": {"attn_mask": drawn(1, 3, 300, 300, seed=9)},
    "padding": {"attn_mask": heedful.KeyPadding.from_lengths(torch.tensor([300, 120]), 300)},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_finite_noise_zeros_and_nan_everywhere(dtype, call):
    case = asked(dtype=dtype, **call)
    right = case.answer()
    assert "is off by" in case.check(torch.randn_like(right)).fault
    assert "is off by" in case.check(torch.zeros_like(right)).fault
    fault = case.check(torch.full_like(right, math.nan)).fault
    assert "is not finite in query 0 of batch 0, head 0 (one of 96 such rows of 96)" in fault
    assert case.check(right * (1.2 if dtype == torch.bfloat16 else 1.05)).fault
    assert case.check(torch.full_like(right, math.inf)).error == math.inf


def test_one_row_of_nan():
    case = asked()
    out = case.answer()
    out[1, 2, 299] = math.nan
    assert case.check(out).fault == "the output is not finite in query 299 of batch 1, head 2"


@pytest.mark.parametrize(
    ("call", "row"),
    [
        ({"is_causal": True, "causal_alignment": "bottom_right"}, 40),
        ({"attn_mask": heedful.KeyPadding(torch.ones(2, 200) > 0, torch.arange(300).ne(123).expand(2, -1))}, 123),
        ({"attn_mask": torch.arange(300).ne(77)[:, None].expand(300, 200)}, 77),
        ({"attn_mask": torch.where(torch.arange(300).ne(211)[:, None], 0.0, -math.inf).expand(300, 200)}, 211),
        ({"attn_mask": heedful.KeyPadding(torch.arange(200).ge(20).expand(2, -1)), "is_causal": True}, 5),
        ({"window": (5, 5)}, 250),
    ],
    ids=["bottom-right", "query padding", "bool", "bias", "padding and causal", "window"],
)
@pytest.mark.parametrize("seed", range(5))
def test_wrong_only_where_a_query_sees_no_key(call, row, seed):
    """Kernels leave the mean of the values there, or noise: those rows are among the chosen ones."""
    case = asked(keys=200, **call)
    out, lse = case.answer(return_lse=True)
    empty = lse == -math.inf
    assert empty[0, 0, row]
    assert case.check(out, seed=seed).right
    fault = case.check(torch.where(empty[..., None], 0.1, out), seed=seed).fault
    assert "which sees no key, is up to 0.1 and not zero" in fault
    assert case.check(torch.where(empty[..., None], 1e-6, out), seed=seed, max_error=0.1).fault
    assert "not finite" in case.check(torch.where(empty[..., None], math.nan, out), seed=seed).fault


def test_wrong_only_in_the_last_block():
    case = asked(queries=1000, keys=200)
    out = case.answer()
    out[:, :, 960:] = out[:, :, 959:960]
    assert case.check(out).fault


@pytest.mark.parametrize("call", [{}, {"is_causal": True}], ids=["plain", "causal"])
def test_keys_behind_the_first_few_are_left_out(call):
    case = asked(**call)
    query, key, value = case.tensors
    out = heedful.attention(query, key[:, :, :256], value[:, :, :256], **call, backend="reference")
    assert case.check(out).fault


def test_off_by_one_alignment():
    case = asked(queries=200, keys=201, is_causal=True)
    assert case.check(case.answer(causal_alignment="bottom_right")).fault
    case = asked(is_causal=True)
    shifted = case.answer(is_causal=False, window=(None, 1))
    assert case.check(shifted).fault


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arguments_that_were_ignored(dtype):
    for call, ignored in (
        ({"scale": 0.1}, {"scale": None}),
        ({"softcap": 1.0}, {"softcap": None}),
        (CALLS["padding"], {"attn_mask": None}),
        ({"window": (20, 0)}, {"window": None}),
        ({"attn_mask": drawn(1, 3, 300, 300, seed=9, dtype=dtype)}, {"attn_mask": None}),
    ):
        case = asked(dtype=dtype, **call)
        assert case.check(case.answer()).right
        assert case.check(case.answer(**ignored)).fault, call


def test_swapped_heads_and_batches_and_the_wrong_kv_head():
    case = asked(dtype=torch.bfloat16)
    out = case.answer()
    assert case.check(out.flip(1)).fault
    assert case.check(out.flip(0)).fault
    grouped = asked(heads=4, kv_heads=2)
    query, key, value = grouped.tensors
    interleaved = [tensor.repeat(1, 2, 1, 1) for tensor in (key, value)]
    assert grouped.check(grouped.answer()).right
    assert grouped.check(heedful.attention(query, *interleaved, backend="reference")).fault


def test_the_lse_alone():
    case = asked(is_causal=True, causal_alignment="bottom_right", keys=200)
    out, lse = case.answer(return_lse=True)
    assert case.check((out, lse)).right
    assert "the LSE is off by" in case.check((out, lse / math.log(2))).fault
    assert "the LSE is off by inf" in case.check((out, torch.where(lse.isinf(), 0.0, lse))).fault
    assert "the LSE is off by" in case.check((out, lse + 0.01)).fault
    assert case.check((out, lse + 0.01), max_error=0.1).right
    assert "the LSE is off by" in case.check((out, lse + 1.0), max_error=0.1).fault


def test_small_values_are_held_to_their_own_size():
    query, key, value = (drawn(1, 2, 80, 32, seed=seed) for seed in range(3))
    case = Asked(query, key, value * 1e-5)
    out = case.answer()
    assert case.check(out).right
    assert case.check(out * 1.01).fault


def test_a_head_of_large_values_excuses_no_other():
    query, key, value = (drawn(1, 2, 80, 32, seed=seed) for seed in range(3))
    value[:, 0] *= 1e6
    case = Asked(query, key, value)
    out = case.answer()
    assert case.check(out).right
    out[:, 1] *= 1.01
    assert "head 1" in case.check(out).fault


def test_a_wrong_form():
    case = asked()
    out, lse = case.answer(return_lse=True)
    assert "the output is of shape (3, 300, 32), not of shape (2, 3, 300, 32)" in case.check(out[0]).fault
    assert "the LSE is of shape (2, 300, 3)" in case.check((out, lse.mT)).fault
    assert "the output is a NoneType" in case.check(None).fault


def test_one_wrong_row_is_found_as_often_as_rows_are_drawn():
    """16 of 400 rows, most of them fixed: a row of no special place is found by those that are drawn at random."""
    case = asked(batch=1, heads=1, queries=400, keys=40)
    out = case.answer()
    out[0, 0, 301] += 1.0
    found = sum(case.check(out, seed=seed).fault != "" for seed in range(300))
    drawn_at_random = 16 - 2 - 6
    expected = 300 * drawn_at_random / 400
    assert expected - 4 * math.sqrt(expected) <= found <= expected + 4 * math.sqrt(expected)
    assert sum(case.check(out, rows=choose_rows(case.problem, None, 200, seed)).fault != "" for seed in range(60)) > 15


# Approximate kernels


def test_an_approximate_kernel_is_held_to_its_own_error():
    case = asked()
    out = case.answer()
    noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)) * out.abs().mean() * 0.05
    verdict = case.check(out + noise, max_error=0.1)
    assert verdict.right
    assert verdict.relative == pytest.approx(0.04, abs=0.005)
    assert "relative error is 0.04; at most 0.01 is allowed" in case.check(out + noise, max_error=0.01).fault.replace(
        f"{verdict.relative:.3g}", "0.04"
    )
    out[0, 0, 0] = math.nan
    assert case.check(out, max_error=0.1).fault
    assert case.check(out, max_error=0.1).relative == math.inf


# What is not finite in the inputs


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["key", "value"])
def test_hidden_keys_that_are_not_finite(bad, place):
    """A kernel may let them through or not: neither is a fault, and what else is wrong still is."""
    padded = {"attn_mask": heedful.KeyPadding.from_lengths(torch.tensor([300, 120]), 300)}
    case = asked(**padded)
    right = case.answer()
    tensor = case.tensors[1 if place == "key" else 2]
    tensor[1, 0, 250] = bad
    assert case.check(right).right
    through = right.clone()
    through[1, 0] = math.nan
    assert case.check(through).right
    through[0, 0] = math.nan
    assert "of batch 0, head 0" in case.check(through).fault
    assert case.check(torch.where(right == right[1, 0], 1.0, right)).fault
    assert case.check((through.nan_to_num(0.0), right[..., 0])).fault


def test_rows_that_see_what_is_not_finite_are_left_out():
    case = asked(is_causal=True)
    out = case.answer()
    case.tensors[2][0, 0, 100] = math.nan
    out[0, 0, 100:] = math.nan
    assert case.check(out).right
    assert case.check(torch.where(out.isnan(), 7.0, out)).right
    out[0, 0, 0] = 7.0
    assert "query 0 of batch 0, head 0" in case.check(out).fault


# Which rows


def test_chosen_rows_are_few_sorted_unique_and_hold_the_ends():
    for length in (1, 2, 3, 15, 16, 17, 100, 1000, 4096):
        for seed in range(5):
            rows = choose_rows(asked(1, 1, length, 3, 8).problem, None, 16, seed).tolist()
            assert rows == sorted(set(rows))
            assert len(rows) == min(16, length)
            assert {0, length - 1} <= set(rows) <= set(range(length))
    for count in range(1, 8):
        assert len(choose_rows(asked(1, 1, 100, 3, 8).problem, None, count)) == count


def test_seams_of_blocks_are_among_them_on_both_sides():
    problem = asked(1, 1, 4096, 3, 8).problem
    for seed in range(20):
        rows = set(choose_rows(problem, None, 16, seed).tolist())
        seams = {row for row in rows if row and row % 64 == 0}
        assert any(row - 1 in rows for row in seams)
        assert any(row % 256 == 0 for row in seams)


def test_ends_of_packed_sequences_are_among_them():
    packing = heedful.Varlen(torch.tensor([0, 333, 700, 1000]))
    tensors = [drawn(1000, 2, 16, seed=seed) for seed in range(3)]
    problem = problem_of_call(*tensors, packing, layout="THD")
    rows = set(choose_rows(problem, packing, 16, 0).tolist())
    assert len(rows & {332, 333, 699, 700}) >= 3


def test_empty_blocks_are_found():
    block = create_block_mask(lambda b, h, q, k: q >= 256, None, None, 512, 256, device="cpu")
    case = asked(1, 1, 512, 256, 16, attn_mask=block)
    rows = choose_rows(case.problem, case.mask, 16, 0)
    assert (rows < 256).sum() >= 4
    out = case.answer("flex")
    assert case.check(out).right
    out[:, :, :256] = 1.0
    assert case.check(out).fault


def test_each_time_other_rows_and_the_same_for_the_same_seed():
    problem = asked(1, 1, 4096, 3, 8).problem
    assert len({tuple(choose_rows(problem, None).tolist()) for _ in range(10)}) == 10
    assert torch.equal(choose_rows(problem, None, seed=3), choose_rows(problem, None, seed=3))


def test_torch_random_state_is_left_alone_and_so_are_the_inputs():
    case = asked(is_causal=True)
    out, before = case.answer(), torch.get_rng_state()
    copies = [tensor.clone() for tensor in case.tensors]
    case.check(out, seed=None)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one, other) for one, other in zip(copies, case.tensors, strict=True))


def test_gradients_and_autocast_do_not_enter():
    query, key, value = (drawn(1, 2, 20, 16, seed=seed).requires_grad_() for seed in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        out = heedful.attention(query, key, value)
        verdict = check_rows(problem_of_call(query, key, value), query, key, value, None, out)
    assert verdict.right
    assert 0 < verdict.allowed < 0.1
    assert query.grad is None


@pytest.mark.parametrize("call", [{"dropout_p": 0.5}, {"sinks": torch.zeros(3)}])
def test_what_no_formula_knows_is_refused(call):
    case = asked()
    problem = problem_of_call(*case.tensors, **call)
    with pytest.raises(InvalidArgument, match="check calls without dropout and sinks"):
        check_rows(problem, *case.tensors, None, case.tensors[0])


# What it costs


class Largest(TorchDispatchMode):
    """The largest tensor that any operator made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        known = {one.untyped_storage().data_ptr() for one in args if isinstance(one, torch.Tensor)}
        for tensor in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return found


@pytest.mark.parametrize(
    "kind", ["plain", "causal", "window", "padding", "bool", "bias", "expanded", "varlen", "block"]
)
def test_nothing_of_queries_times_keys_is_built(kind):
    length = 4096
    call = {
        "causal": {"is_causal": True},
        "window": {"window": (100, 3)},
        "padding": {"attn_mask": heedful.KeyPadding(torch.arange(length).lt(3000)[None])},
        "bool": {"attn_mask": torch.ones(length, length, dtype=torch.bool).tril_()},
        "bias": {"attn_mask": torch.zeros(1, 1, length, length)},
        "expanded": {"attn_mask": torch.zeros(1, 1, 1, length).expand(1, 2, length, length)},
        "varlen": {"attn_mask": heedful.Varlen(torch.tensor([0, 1000, length]))},
    }.get(kind, {})
    if kind == "block":
        call["attn_mask"] = create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, device="cpu")
    case = asked(1, 2, length, length, 16, **call)
    out = torch.zeros(1, 2, length, 16)
    with Largest() as largest:
        assert case.check(out).fault
    assert largest.elements < length * length / 8


@pytest.mark.parametrize("kind", ["plain", "grouped", "padding", "bias", "bshd", "broadcast", "rank 5", "varlen"])
def test_heads_and_rows_in_small_groups_give_the_same(kind, monkeypatch):
    shape, call = (3, 4, 70, 16), {}
    query, key, value = (drawn(*shape, seed=seed) for seed in range(3))
    if kind == "grouped":
        key, value, call = key[:, :2], value[:, :2], {"enable_gqa": True, "is_causal": True}
    elif kind == "padding":
        call = {"attn_mask": heedful.KeyPadding.from_lengths(torch.tensor([70, 3, 0]), 70)}
    elif kind == "bias":
        call = {"attn_mask": drawn(1, 4, 70, 70, seed=8)}
    elif kind == "bshd":
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        call = {"layout": "BSHD"}
    elif kind == "broadcast":
        key, value = key[:1], value[:, :1]
    elif kind == "rank 5":
        query, key, value = query.expand(2, *shape), key[None], value[0]
        call = {"attn_mask": drawn(3, 1, 70, 70, seed=8)}
    elif kind == "varlen":
        query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        call = {"layout": "THD", "attn_mask": heedful.Varlen(torch.tensor([0, 33, 70])), "is_causal": True}
    case = Asked(query, key, value, **call)
    out, lse = case.answer(return_lse=True)
    rows = torch.arange(70)
    wrong = out.clone()
    wrong[(-1,) * (wrong.dim() - 1)] += 1.0
    want, fault = case.check((out, lse), rows=rows), case.check(wrong, rows=rows).fault.partition(";")[0]
    assert want.right
    assert f"batch {case.problem.batch - 1}, head 3" in fault
    monkeypatch.setattr("heedful.rows._MASK", 1)
    for heads in (1, 3, 5, 9):
        most = heads * 70 * 8 * (32 + 5 * 16 * case.problem.heads // case.problem.kv_heads)
        monkeypatch.setattr("heedful.rows._BYTES", most)
        found = case.check((out, lse), rows=rows)
        assert found.right
        assert found.relative == pytest.approx(want.relative, rel=1e-3, abs=1e-12)
        assert case.check(wrong, rows=rows).fault.partition(";")[0] == fault


# The rows of a mask


@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.mask or s.call], ids=lambda sample: sample.name)
def test_visible_rows_are_rows_of_what_is_visible(sample):
    built = sample.build("cpu")
    words = {name: built.arguments[name] for name in MASK_WORDS[1:] if name in built.arguments}
    mask = mask_of_call(attn_mask=built.attn_mask, **words) or Mask()
    lengths = (sample.query_length, sample.key_length)
    rows = torch.arange(sample.query_length)[::2]
    every, some = mask.visible(*lengths, CPU), mask.visible_rows(rows, *lengths, CPU)
    assert (every is None) == (some is None)
    if every is not None:
        every = every.expand(torch.broadcast_shapes(every.shape, lengths))
        some = some.expand(*every.shape[:-2], len(rows), lengths[1])
        assert torch.equal(every[..., rows, :], some)


def test_visible_rows_of_block_masks():
    def sees(batch, head, query, key):
        return ((query - key).abs() < 20 + 30 * head) & (key != 7 * batch)

    block = create_block_mask(sees, 2, 3, 300, 260, device="cpu", BLOCK_SIZE=(64, 32))
    mask, rows = as_mask(block), torch.tensor([0, 1, 63, 64, 150, 299])
    assert torch.equal(mask.visible(300, 260, CPU)[:, :, rows], mask.visible_rows(rows, 300, 260, CPU))
