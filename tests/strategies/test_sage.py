"""What the contract suite cannot see of SageAttention: what reaches the kernels, and which builds are let in."""

from __future__ import annotations

import inspect
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import heedful
from heedful import AttentionDispatcher, Policy
from heedful.errors import CannotLoad
from heedful.facts import DeviceFacts, Facts
from heedful.masks import MaskFacts

SITES = Path(__file__).parent.parent / "stand_ins"
FORMS = {
    "sage": "sageattn",
    "sage_qk_int8_pv_fp16_triton": "sageattn_qk_int8_pv_fp16_triton",
    "sage_qk_int8_pv_fp16_cuda": "sageattn_qk_int8_pv_fp16_cuda",
    "sage_qk_int8_pv_fp8_cuda": "sageattn_qk_int8_pv_fp8_cuda",
    "sage_qk_int8_pv_fp8_cuda_sm90": "sageattn_qk_int8_pv_fp8_cuda_sm90",
}
VERSIONS = {"sageattention": "2.2.0", "sageattn3": "1.0.0"}
PROBLEM = heedful.AttentionProblem(
    batch=1,
    heads=2,
    kv_heads=2,
    query_length=64,
    key_length=64,
    head_dim=64,
    value_dim=64,
    layout="BSHD",
    dtype=torch.float16,
    device="cuda",
)


def machine(capability=(9, 0), packages=VERSIONS):
    name = f"sm_{capability[0]}{capability[1]}"
    device = DeviceFacts("cuda", name, capability, name)
    return Facts(torch.__version__, "3.11", "Linux", {"cpu": device}, packages)


@pytest.fixture
def sage(monkeypatch):
    """The stand-in, in place of what is installed."""
    ours = ("sageattention", "sageattn3")
    for name in [name for name in sys.modules if name.partition(".")[0] in ours]:
        monkeypatch.delitem(sys.modules, name)
    for site in ("sageattention_2", "sage_blackwell"):
        monkeypatch.syspath_prepend(SITES / site)
    import sageattention.core

    monkeypatch.setattr(sageattention.core, "get_cuda_arch_versions", lambda: ["sm90"])
    yield sageattention
    for name in [name for name in sys.modules if name.partition(".")[0] in ours]:
        del sys.modules[name]


@pytest.fixture
def calls(sage, monkeypatch):
    """Every call of a function of the package: its name, its positional and its keyword arguments."""
    seen = []

    def recorded(name, function):
        def record(*args, **kwargs):
            seen.append((name, args, kwargs))
            return function(*args, **kwargs)

        record.__signature__ = inspect.signature(function)
        return record

    for name in [*FORMS.values(), "sageattn_varlen"]:
        monkeypatch.setattr(sage, name, recorded(name, getattr(sage, name)))
    return seen


@pytest.fixture
def attend(sage, factory):
    def run(query, key, value, *, capability=(9, 0), **call):
        dispatcher = AttentionDispatcher(factory, machine(capability), Policy())
        return dispatcher.attention(query, key, value, **call)

    return run


def draw(*shape, dtype=torch.float16, bias=0.0):
    return (
        torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float32).add(bias).to(dtype)
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_lse_is_natural_and_of_the_true_scores(attend, naive_attention, form, dtype):
    bias = torch.linspace(-4, 6, 64)
    query, key, value = (draw(2, 3, length, 64, dtype=dtype) for length in (40, 77, 77))
    key = (key.float() + bias).to(dtype)
    out, lse = attend(query, key, value, backend=form, return_lse=True)
    want, want_lse = naive_attention(query, key, value)
    assert lse.dtype == torch.float32
    assert (lse - want_lse).abs().max() < 0.1  # the smoothed scores alone are off by 3, base 2 by 40 %
    assert torch.cosine_similarity(out.double().flatten(), want.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("form", FORMS)
def test_what_a_kernel_is_given(attend, calls, form):
    query, key, value = (draw(2, 3, 40, 48) for _ in range(3))
    attend(query, key, value, backend=form, is_causal=True, scale=0.3, return_lse=True)
    name, (given, *_), kwargs = calls[-1] if form != "sage" else next(c for c in calls[::-1] if c[0] == "sageattn")
    assert name == FORMS[form]
    assert torch.equal(given, query.transpose(1, 2))  # heads third; the package pads head dims itself
    assert kwargs == {"tensor_layout": "NHD", "is_causal": True, "sm_scale": 0.3, "return_lse": True}


@pytest.mark.parametrize("form", [*FORMS, "sage_varlen", "sage_blackwell"])
def test_a_mask_is_refused_and_never_reaches_a_kernel(attend, calls, form):
    tensors = [draw(2, 3, 64, 64) for _ in range(3)]
    at = (12, 0) if form == "sage_blackwell" else (9, 0)
    mask = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for each in (mask > 0.5, mask):
        with pytest.raises(heedful.Refused, match=r"mask|bias"):
            attend(*tensors, backend=form, capability=at, attn_mask=each)
    assert not any("attn_mask" in kwargs for _, _, kwargs in calls)


@pytest.mark.parametrize("form", [*FORMS, "sage_blackwell"])
@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
def test_causality_wants_as_many_queries_as_keys(attend, form, alignment):
    at = (12, 0) if form == "sage_blackwell" else (9, 0)
    query, key, value = (draw(1, 2, length, 64) for length in (32, 48, 48))
    with pytest.raises(heedful.Refused, match=r"32 queries and 48 keys|causal alignment"):
        attend(query, key, value, backend=form, capability=at, is_causal=True, causal_alignment=alignment)
    attend(query, key[:, :, :32], value[:, :, :32], backend=form, capability=at, is_causal=True)


@pytest.mark.parametrize(
    ("form", "capability", "taken"),
    [
        ("sage", (8, 6), True),
        ("sage", (8, 7), False),
        ("sage", (10, 0), False),
        ("sage", (7, 5), False),
        ("sage_varlen", (10, 0), True),
        ("sage_qk_int8_pv_fp8_cuda", (8, 6), False),
        ("sage_qk_int8_pv_fp8_cuda", (8, 9), True),
        ("sage_qk_int8_pv_fp8_cuda_sm90", (8, 9), False),
        ("sage_qk_int8_pv_fp8_cuda_sm90", (12, 0), False),
        ("sage_blackwell", (9, 0), False),
        ("sage_blackwell", (12, 1), True),
    ],
)
def test_which_gpu_takes_which_form(factory, form, capability, taken):
    strategy = factory.create_strategy(form)
    problem = PROBLEM.replace(capability=capability, layout=strategy.limits_for("cuda").layouts[0])
    assert [refusal.field for refusal in strategy.refusals(problem)] == ([] if taken else ["compute capability"])


@pytest.mark.parametrize("form", ["sage", "sage_qk_int8_pv_fp8_cuda"])
def test_keys_beyond_the_longest_clean_run_are_refused_where_values_have_8_bits(factory, form):
    strategy = factory.create_strategy(form)
    problem = PROBLEM.replace(key_length=170_000, capability=(12, 0))
    assert [refusal.field for refusal in strategy.refusals(problem)] == ["key length"]
    assert strategy.refusals(problem.replace(key_length=150_000)) == ()
    if form == "sage":
        assert strategy.refusals(problem.replace(capability=(8, 0))) == ()


@pytest.fixture
def early_build(sage, monkeypatch):
    """A build of 2.2.0 from July 2025: its fp16 Triton form has no ``attn_mask``."""

    def early(q, k, v, tensor_layout="HND", quantization_backend="triton", is_causal=False, sm_scale=None, **kwargs):
        raise AssertionError("called")

    monkeypatch.setattr(sage, "sageattn_qk_int8_pv_fp16_triton", early)


@pytest.mark.usefixtures("early_build")
@pytest.mark.parametrize(
    ("form", "capability"), [("sage_qk_int8_pv_fp16_triton", (9, 0)), ("sage_varlen", (9, 0)), ("sage", (8, 6))]
)
def test_builds_that_count_keys_beyond_the_last_are_not_loaded(factory, form, capability):
    strategy = factory.create_strategy(form)
    for _ in range(2):
        with pytest.raises(CannotLoad, match=r"multiple of 64.*pip install"):
            strategy.load(machine(capability))


@pytest.mark.usefixtures("early_build")
def test_such_builds_are_used_where_cuda_kernels_compute(attend):
    tensors = [draw(1, 2, 77, 64) for _ in range(3)]
    attend(*tensors, backend="sage")
    attend(*tensors, backend="sage_qk_int8_pv_fp16_cuda")


@pytest.mark.parametrize("form", [*FORMS, "sage_varlen"])
def test_version_1_is_refused_with_what_to_install(factory, form):
    (lack,) = factory.create_strategy(form).lacks(machine(packages={"sageattention": "1.0.6"}))[:1]
    assert "sageattention 1.0.6" in str(lack)
    assert "2.1.1 or newer" in str(lack)
    assert "pip install git+https" in str(lack)


def test_packed_sequences(factory, calls, naive_attention):
    strategy = factory.create_strategy("sage_varlen")
    strategy.load(machine())
    lengths, key_lengths = (5, 0, 70, 4), (64, 3, 90, 0)
    query, key, value = (draw(sum(each), 2, 40) for each in (lengths, key_lengths, key_lengths))
    ends = [torch.tensor([0, *each]).cumsum(0) for each in (lengths, key_lengths)]
    out = strategy.compute_attention(query, key, value, varlen=heedful.Varlen(*ends))
    name, _, kwargs = calls[-1]
    assert name == "sageattn_varlen"
    ends_and_longest = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"}
    assert set(kwargs) == {"is_causal", "sm_scale"} | ends_and_longest
    assert (kwargs["max_seqlen_q"], kwargs["max_seqlen_k"]) == (70, 90)
    for (q_from, q_to), (k_from, k_to) in (((0, 5), (0, 64)), ((5, 75), (67, 157))):
        parts = query[q_from:q_to], key[k_from:k_to], value[k_from:k_to]
        want, _ = naive_attention(*(part.transpose(0, 1) for part in parts))
        got = out[q_from:q_to].transpose(0, 1).double()
        assert torch.cosine_similarity(got.flatten(), want.flatten(), dim=0) > 0.999
    assert torch.equal(out[75:], torch.zeros(4, 2, 40, dtype=torch.float16))


def test_what_packed_sequences_are_refused(factory):
    packed = PROBLEM.replace(layout="THD", mask=MaskFacts(varlen=True, packing="tidy"), capability=(9, 0))
    strategy = factory.create_strategy("sage_varlen")
    causal = packed.replace(mask=replace(packed.mask, causal="top_left"))
    assert strategy.refusals(packed) == ()
    assert [refusal.field for refusal in strategy.refusals(causal)] == ["causality"]
    assert strategy.refusals(causal.replace(mask=replace(causal.mask, packed_alike=True))) == ()
    assert [refusal.field for refusal in strategy.refusals(packed.replace(needs_lse=True))] == ["return_lse"]


def test_rows_that_start_between_two_loads_are_copied(attend, calls):
    wide = draw(1, 65, 2, 2 * 67)  # rows of 67 numbers
    query, key, value = (wide[..., :64], wide[..., 67 : 67 + 64], wide[:, 1:, :, 3:67])
    attend(query, key[:, 1:], value, layout="BSHD", backend="sage_qk_int8_pv_fp16_cuda")
    for given in calls[-1][1]:
        assert not any(stride % 8 for stride in given.stride()[:-1])
        assert given.stride(-1) == 1
        assert given.storage_offset() % 8 == 0


def test_blackwell_leaves_the_keys_as_they_are(attend, naive_attention):
    query, key, value = (draw(1, 1, 64, 48, dtype=torch.bfloat16, bias=bias) for bias in (0.0, 3.0, 0.0))
    kept = key.clone()
    out = attend(query, key, value, backend="sage_blackwell", capability=(12, 0))
    want, _ = naive_attention(query, key, value)
    assert torch.equal(key, kept)
    assert torch.cosine_similarity(out.double().flatten(), want.flatten(), dim=0) > 0.97  # four bits
