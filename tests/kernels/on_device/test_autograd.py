"""The kernels through autograd and as operators: what a compiler is told is true, and what has no gradient is refused.

Shapes: B batch, H heads, Q query length, K key length, D head dim, E value dim, T packed tokens.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import forward_ad

import heedful
from heedful.kernels import operators  # noqa: F401 - registers them
from heedful.kernels.autograd import attend
from heedful.masks import KeyPadding, Varlen

OPERATOR = torch.ops.heedful.attention.default


@pytest.fixture
def draw(device):
    """``draw(2, 3)``: N(0, 1), which wants a gradient."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator).to(device).requires_grad_()


@pytest.fixture
def flags(device):
    """``flags(0.5, 2, 3)``: bool, True with that probability."""
    generator = torch.Generator().manual_seed(1)
    return lambda share, *shape: (torch.rand(*shape, generator=generator) < share).to(device)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def plain(draw, dim=16):
    return draw(1, 2, 9, dim), draw(1, 2, 12, dim), draw(1, 2, 12, dim)


# Autograd


def test_the_gradients_of_a_call_and_of_its_form(draw, device):
    """Packed tensors get gradients of their own form; the LSE has none."""
    tensors = draw(9, 4, 16), draw(9, 2, 16), draw(9, 2, 8)
    ends = torch.tensor([0, 4, 9], dtype=torch.int32, device=device)
    out, lse = attend(*tensors, varlen=Varlen(ends), return_lse=True)
    want = heedful.attention(*tensors, layout="THD", attn_mask=Varlen(ends), enable_gqa=True, backend="reference")
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(device)
    for got, right in zip(
        torch.autograd.grad(out, tensors, dout), torch.autograd.grad(want, tensors, dout), strict=True
    ):
        torch.testing.assert_close(got, right)
    assert not lse.requires_grad


@pytest.mark.parametrize("wants", [(0,), (1,), (2,), (3,)])
def test_only_what_wants_a_gradient_gets_one(draw, wants):
    every = [t.detach() for t in (*plain(draw), draw(1, 2, 1, 12))]
    leaf = every[wants[0]].requires_grad_()
    out, _ = attend(*every[:3], attn_mask=every[3])
    out.sum().backward()
    assert [t.grad is not None for t in every] == [t is leaf for t in every]


def test_a_call_without_gradient_goes_through_no_autograd(draw):
    out, lse = attend(*(t.detach() for t in plain(draw)))
    assert out.grad_fn is None
    assert lse is None
    with torch.no_grad():
        assert not attend(*plain(draw))[0].requires_grad


def test_an_input_that_was_written_to_is_noticed(draw):
    query, key, value = plain(draw)
    key = key * 1.0
    out, _ = attend(query, key, value)
    key.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_what_is_kept_for_the_gradient_is_linear(draw):
    sizes = []
    tensors = plain(draw)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        attend(*tensors, is_causal=True)
    assert sum(sizes) == sum(t.numel() for t in tensors) + tensors[0].numel() + 2 * 9  # and out, and the LSE


def test_there_is_no_gradient_of_a_gradient(draw):
    tensors = plain(draw)
    out, _ = attend(*tensors)
    (first,) = torch.autograd.grad(out.sum(), tensors[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="no gradient of a gradient"):
        (out.mean() + first.pow(2).mean()).backward()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch scripts its decompositions at the first dual level
def test_transforms_are_refused_rather_than_lost(draw):
    query, key, value = (t.detach() for t in plain(draw))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        attend(forward_ad.make_dual(query, torch.ones_like(query)), key, value)
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.vmap(lambda q: attend(q, key, value)[0])(query[None])


# Operators


def flat(tensors, mask=None, bias=None, keep=None, rows=None, ends=(None, None), longest=(0, 0), causal=False,
         alignment="top_left", sides=(None, None), scale=None, softcap=None):  # fmt: skip
    """The operator's arguments."""
    return (*tensors, mask, bias, keep, rows, *ends, *longest, causal, alignment, *sides, "top_left", scale, softcap)


def test_the_operator_is_what_it_says(draw, flags):
    bias, mask = draw(1, 4, 1, 12), flags(0.7, 1, 1, 9, 12)
    tensors = draw(1, 4, 9, 16), draw(1, 2, 12, 16), draw(1, 2, 12, 8)
    torch.library.opcheck(OPERATOR, flat(tensors, mask, bias, flags(0.8, 1, 12), softcap=2.0))


def test_the_operator_is_what_it_says_of_packs_and_other_strides(draw, device):
    tensors = [draw(9, 2, 16).detach().transpose(0, 1)[None].requires_grad_() for _ in range(3)]
    ends = torch.tensor([0, 4, 9], dtype=torch.int32, device=device)
    arguments = flat(tensors, draw(1, 2, 9, 9), ends=(ends, ends), longest=(5, 5), causal=True, sides=(3, None))
    torch.library.opcheck(OPERATOR, arguments)


def compiled(call, tensors, backend="aot_eager", **words):
    """Out and gradients of a call under a compiler, which must trace it whole, and those of the call itself."""
    answers = []
    for run in (call, torch.compile(call, backend=backend, fullgraph=True, **words)):
        out = run(*tensors)
        answers.append([out, *torch.autograd.grad(out.sin().sum(), tensors)])
    return zip(*answers, strict=True)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_call_and_its_gradients(draw, backend):
    def call(query, key, value, bias):
        return heedful.attention(query, key, value, bias, is_causal=True, window=(5, None), backend="triton")

    for want, got in compiled(call, (*plain(draw), draw(1, 2, 9, 12)), backend):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_a_compiled_call_of_grouped_heads_with_padding(draw, flags):
    keep = flags(0.7, 2, 12)

    def call(query, key, value):
        out, lse = heedful.attention(query, key, value, KeyPadding(keep), layout="BSHD", enable_gqa=True, scale=0.3,
                                     return_lse=True, backend="triton")  # fmt: skip
        assert not lse.requires_grad
        return out

    for want, got in compiled(call, (draw(2, 9, 4, 16), draw(2, 12, 2, 16), draw(2, 12, 2, 8))):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_compiled_packs_read_nothing_from_the_device(draw, device):
    """One graph for packs of other lengths and of other sequences."""
    from torch._dynamo.testing import CompileCounterWithBackend

    def call(query, key, value, ends):
        return heedful.attention(query, key, value, Varlen(ends), layout="THD", is_causal=True, backend="triton")

    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
    frames = []
    for lengths in ((0, 4, 9), (0, 7, 11), (0, 1, 12)):
        ends = torch.tensor(lengths, dtype=torch.int32, device=device)
        tensors = [draw(lengths[-1], 2, 16) for _ in range(3)]
        want = call(*tensors, ends)
        torch.testing.assert_close(run(*tensors, ends), want, rtol=1e-6, atol=1e-6)
        frames.append(counter.frame_count)
    assert len(set(frames)) == 1


def test_a_compiled_row_that_sees_nothing(draw, flags):
    mask = flags(0.5, 1, 1, 9, 12)
    mask[..., 4, :] = False

    def call(query, key, value):
        out, lse = heedful.attention(query, key, value, mask, return_lse=True, backend="triton")
        assert lse.shape == out.shape[:-1]
        return out

    results = list(compiled(call, plain(draw)))
    assert not results[0][1][:, :, 4].any()
    for want, got in results:
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        assert math.isfinite(got.detach().sum())
