"""What the tests of lowerings share: calls drawn at random, a kernel that holds its limits to the letter, the formula.

Shapes: B batch, H heads, N kv heads, Q query length, K key length, D head dim, E value dim, T packed tokens.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from heedful import Bias, Causal, Dense, KeyPadding, SlidingWindow, Varlen
from heedful.analysis import analyse
from heedful.call import problem_of_call
from heedful.lowering import Operands
from heedful.masks import Mask
from heedful.testing.oracle import Meaning, attend

ROUGH = {
    "gather_keys",
    "pack",
    "tidy_pack",
    "split_sequences",
    "chunk_queries",
    "split_batch",
}  # their sizes are those of a typical part
AXIS = {"BHSD": -2, "BSHD": -3, "THD": -3}


@dataclass(repr=False)
class Call:
    """Tensors, and the words of a call on them; ``analysed``: the mask's contents were looked at."""

    query: Any
    key: Any
    value: Any
    mask: Mask | None = None
    layout: str = "BHSD"
    words: dict = field(default_factory=dict)
    analysed: bool = True

    def __repr__(self):
        shapes = [tuple(t.shape) for t in (self.query, self.key, self.value)]
        return f"Call({shapes} {self.query.dtype}, {self.layout}, {self.mask}, {self.words}, analysed={self.analysed})"

    @property
    def lengths(self):
        return self.query.shape[AXIS[self.layout]], self.key.shape[AXIS[self.layout]]

    @property
    def simplest(self):
        """The mask as a dispatcher would have it."""
        if self.mask is None or not self.analysed:
            return self.mask
        mask = analyse(self.mask, 1 if self.layout == "THD" else self.query.shape[0])
        varlen = mask.varlen
        if varlen is None or varlen.lengths is not None:
            return mask
        read = [tuple(cu.diff().tolist()) for cu in (varlen.cu_seqlens_q, varlen.cu_seqlens_k)]
        return Mask(**{**vars_of(mask), "varlen": varlen.with_lengths(*read)})

    def problem(self, **changes):
        heads = 1 if self.layout == "BHSD" else -2
        grouped = self.query.dim() > 2 and self.query.shape[heads] != self.key.shape[heads]
        made = problem_of_call(
            self.query,
            self.key,
            self.value,
            attn_mask=self.simplest,
            layout=self.layout,
            enable_gqa=grouped,
            return_lse=True,
            **self.words,
        )
        return made.replace(**changes)


def vars_of(mask):
    names = ("causal", "window", "padding", "varlen", "dense", "bias", "block", "rows", "profile", "noop")
    return {name: getattr(mask, name) for name in names}


def formula(query, key, value, mask, layout, scale=None):
    """Out and LSE by the definition, in float64 and the layout of the tensors."""
    views = [t.double() for t in (query, key, value)]
    views = [t[None] for t in views] if layout == "THD" else views
    views = [t if layout == "BHSD" else t.transpose(1, 2) for t in views]
    lengths = (views[0].shape[-2], views[1].shape[-2])
    seen = None if mask is None else mask.visible(*lengths, query.device)
    bias = None if mask is None else mask.bias
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    groups = views[0].shape[1] // views[1].shape[1] if views[0].dim() == 4 else 1
    bias = None if bias is None else bias.double()
    out, lse = attend(*views, bias, Meaning(scale, seen, groups=max(1, groups)))
    out = out if layout == "BHSD" else out.transpose(1, 2)
    return (out[0], lse[0]) if layout == "THD" else (out, lse)


def rows_without_keys(x, layout):
    """Bool, broadcastable to (B, H, Q): from what the mask shows."""
    if x.mask is None:
        return torch.zeros(1, 1, 1, dtype=torch.bool)
    seen = x.mask.visible(x.query.shape[AXIS[layout]], x.key.shape[AXIS[layout]], x.query.device)
    seen = torch.ones(1, 1, 1, 1, dtype=torch.bool) if seen is None else seen
    hidden = ~seen if x.mask.bias is None else ~seen | (x.mask.bias == -math.inf)
    hidden = hidden.expand((1,) * (4 - hidden.dim()) + hidden.shape)
    return hidden.all(-1)


def assert_described(x, problem, rough):
    """The problem says of the operands what reading them would; gives the problem that was read."""
    heads = 1 if problem.layout == "BHSD" else -2
    read = problem_of_call(
        *x[:3],
        attn_mask=x.mask,
        enable_gqa=x.query.dim() > 2 and x.query.shape[heads] != x.key.shape[heads],
        layout=problem.layout,
        scale=problem.scale,
        return_lse=problem.needs_lse,
    )
    said, have = problem.mask, read.mask
    for axes in ("dense", "bias"):
        assert set(getattr(have, axes) or "") <= set(getattr(said, axes) or ""), "an upper bound"
    if said.rows_seen and x.empty is None:  # else they are set right afterwards
        assert not rows_without_keys(x, problem.layout).any()
    if said.packing == "tidy":
        assert have.packing == "tidy"
    mask = replace(have, dense=said.dense, bias=said.bias, rows_seen=said.rows_seen)
    assert have.packed_alike or not said.packed_alike
    mask = replace(mask, bias_needs_grad=said.bias_needs_grad, packed_alike=said.packed_alike)
    if rough:
        mask = replace(mask, side=said.side, kept=said.kept, queries_alike=said.queries_alike)
        read = read.replace(batch=problem.batch, query_length=problem.query_length, key_length=problem.key_length)
    elif have.packing != said.packing:
        assert rough
    if said.block:
        mask = said
    read = read.replace(
        mask=mask,
        needs_grad=problem.needs_grad,
        compiling=problem.compiling,
        device=problem.device,
    )
    assert read == problem
    return read


def strict_kernel(problem, limits, seen_keys=None):
    """The formula, wrong wherever the limits say that the kernel is."""

    def run(x):
        if limits is not None:
            assert list(limits.refusals(problem)) == []
            assert limits.max_batch is None or problem.layout == "THD" or x.query.shape[0] <= limits.max_batch
            assert x.query.layout == torch.strided
            assert 0 not in x.query.shape
            assert 0 not in x.key.shape
        if seen_keys is not None:
            seen_keys.append(x)
        out, lse = formula(*x[:4], problem.layout, problem.scale)
        out, lse = out.to(x.query.dtype), lse.float()
        empty = rows_without_keys(x, problem.layout)
        if limits is not None and empty.any():
            full = empty.expand(empty.shape[0], lse.shape[-2], lse.shape[-1])
            full = full[0] if problem.layout == "THD" else full.expand(lse.shape)
            if "output" not in limits.empty_rows:
                out = out.masked_fill((full if problem.layout == "BHSD" else full.mT)[..., None], math.nan)
            if "lse" not in limits.empty_rows:
                lse = lse.masked_fill(full, 12345.0)
        varlen = None if x.mask is None else x.mask.varlen
        if varlen is not None and limits is not None and not limits.loose_packs:
            lengths = (x.query.shape[AXIS[problem.layout]], x.key.shape[AXIS[problem.layout]])
            lost = ~varlen.visible(*lengths, x.query.device)
            assert not lost.all(-1).any(), "packed tokens of no sequence, or without keys, would stay unwritten"
        return out, lse

    return run


def run_steps(steps, problem, limits, x, seen_keys=None):
    """Operands through a chain, each stage held to its description."""
    through = strict_kernel(problem, limits, seen_keys)
    names = [step.name for step in steps]

    def described(at, run):
        rough = bool(ROUGH & set(names[: at + 1]))

        def check(x):
            assert_described(x, steps[at].new, rough)
            return run(x)

        return check

    for at in reversed(range(len(steps))):
        through = steps[at].lowering.around(steps[at].old, steps[at].new, described(at, through))
    return through(x)


def check_steps(call, steps, problem, limits, *, gradients=True, tolerance=1e-9):
    """Out, LSE and gradients are those of the formula."""
    mask, simplest = call.mask, call.simplest
    inputs = [call.query, call.key, call.value]
    learned = mask is not None and mask.bias is not None and simplest is mask  # who learns a bias keeps it unread
    inputs += [mask.bias] if learned else []
    leaves = [t.detach().requires_grad_(gradients) for t in inputs]
    if learned:
        mask = simplest = Mask(**{**vars_of(mask), "bias": leaves[3]})
    out, lse = run_steps(steps, problem, limits, Operands(*leaves[:3], simplest))
    scale = call.words.get("scale")
    wanted, wanted_lse = formula(*leaves[:3], mask, call.layout, scale)
    assert out.dtype == call.query.dtype
    assert lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), wanted, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), wanted_lse, atol=1e-5 + tolerance, rtol=1e-5)
    if not gradients:
        return
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    got = torch.autograd.grad((out.double() * weight).sum(), leaves, allow_unused=True)
    want = torch.autograd.grad((wanted * weight).sum(), leaves, allow_unused=True)
    for one, other in zip(got, want, strict=True):
        one, other = (torch.zeros(()) if g is None else g for g in (one, other))
        torch.testing.assert_close(one.expand(other.shape).double(), other.double(), atol=tolerance, rtol=tolerance)


# Calls at random


def _flags(draw, rows, length, side):
    counts = [draw(st.integers(0, length)) for _ in range(rows)]
    place = torch.arange(length)
    count = torch.tensor(counts)[:, None]
    if side == "right":
        return place < count
    if side == "left":
        return place >= length - count
    return torch.tensor([[draw(st.booleans()) for _ in range(length)] for _ in range(rows)])


@st.composite
def padding_masks(draw, batch, queries, keys):
    side = draw(st.sampled_from(["right", "left", "interior"]))
    rows = draw(st.sampled_from([1, batch]))
    keep = _flags(draw, rows, keys, side)
    kind = draw(st.sampled_from(["none", "alike", "own"]))
    if kind == "none":
        return KeyPadding(keep)
    if kind == "alike" and queries == keys:
        return KeyPadding(keep, keep)
    if kind == "alike" and side != "interior":
        counts = keep.sum(-1).clamp(max=queries)[:, None]
        place = torch.arange(queries)
        return KeyPadding(keep, place < counts if side == "right" else place >= queries - counts)
    return KeyPadding(
        keep,
        _flags(draw, draw(st.sampled_from([1, batch])), queries, draw(st.sampled_from(["right", "left", "interior"]))),
    )


@st.composite
def bands(draw):
    alignment = draw(st.sampled_from(["top_left", "bottom_right"]))
    kind = draw(st.sampled_from(["causal", "window", "both"]))
    side = st.one_of(st.none(), st.integers(0, 6))
    sides = (draw(side), draw(side))
    window = None if sides == (None, None) else SlidingWindow(*sides, alignment)
    if kind == "causal" or window is None:
        return Causal(alignment)
    if kind == "window":
        return window
    return Causal(draw(st.sampled_from([alignment, "top_left"]))) & window


@st.composite
def packs(draw, alike=None):
    count = draw(st.integers(1, 4))
    lengths = st.integers(0, 4)
    queries = [draw(lengths) for _ in range(count)]
    alike = draw(st.booleans()) if alike is None else alike
    keys = queries if alike else [draw(lengths) for _ in range(count)]
    ends = [torch.tensor([0, *n], dtype=torch.int32).cumsum(0, dtype=torch.int32) for n in (queries, keys)]
    more = [draw(st.integers(0, 2)) for _ in range(2)]
    more = [more[0]] * 2 if alike else more
    mask = Varlen(ends[0]) if alike else Varlen(*ends)
    mask = mask & draw(bands()) if draw(st.booleans()) else mask
    return mask, max(1, sum(queries) + more[0]), max(1, sum(keys) + more[1])


MASKS = ("none", "padding", "band", "padding and band", "dense", "bias", "pack")


@st.composite
def calls(draw, masks=MASKS, layouts=("BHSD", "BSHD", "THD"), dtype=torch.float64, square=None):
    batch, heads = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))
    kv_heads = draw(st.sampled_from([n for n in (1, 2, 4) if heads % n == 0]))
    queries, keys = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    queries = keys if square or (square is None and draw(st.booleans())) else queries
    kind = draw(st.sampled_from(masks))
    layout = draw(st.sampled_from([one for one in layouts if one != "THD" or kind == "pack"]))
    mask, words = None, {}
    if kind == "pack":
        mask, queries, keys = draw(packs())
        batch = 1
    elif kind == "padding":
        mask = draw(padding_masks(batch, queries, keys))
    elif kind == "band":
        mask = draw(bands())
    elif kind == "padding and band":
        mask = draw(padding_masks(batch, queries, keys)) & draw(bands())
    elif kind in ("dense", "bias"):
        shape = (draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads])), queries, keys)
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        seen = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.3, 0.8, 2.0]))
        mask = Dense(seen)
        if kind == "bias":
            full = torch.randn(shape, generator=generator, dtype=dtype)
            full = full if draw(st.booleans()) else torch.zeros_like(full)
            mask = Bias(full.masked_fill(~seen, -math.inf))
    if draw(st.booleans()):
        words["scale"] = draw(st.sampled_from([0.3, -0.7]))
    head_dim = draw(st.sampled_from([4, 5, 8]))
    value_dim = draw(st.sampled_from([head_dim, 3]))
    generator = torch.Generator().manual_seed(0)
    shapes = {"BHSD": lambda n, s, d: (batch, n, s, d), "BSHD": lambda n, s, d: (batch, s, n, d)}
    shape = shapes.get(layout, lambda n, s, d: (s, n, d))
    sizes = (shape(heads, queries, head_dim), shape(kv_heads, keys, head_dim), shape(kv_heads, keys, value_dim))
    tensors = [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]
    return Call(*tensors, mask, layout, words, draw(st.sampled_from([True, True, True, False])))


class Tools:
    """The helpers, for test files, which cannot import each other."""

    Call = Call
    calls = staticmethod(calls)
    formula = staticmethod(formula)
    check_steps = staticmethod(check_steps)
    run_steps = staticmethod(run_steps)
    strict_kernel = staticmethod(strict_kernel)


@pytest.fixture(scope="session")
def tools():
    """Calls drawn at random, the strict kernel, the formula."""
    return Tools
