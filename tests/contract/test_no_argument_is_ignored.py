"""No argument is ever ignored: flipped, it changes the answer as it changes the definition's, or is refused by name.

Hypothesis draws a call for each strategy and each pinned name, on its machine (a stand-in's where the package cannot
run here), then every argument of ``heedful.attention`` is flipped, one at a time. The oracle is the fp64 formula of
``heedful.testing``, which shares no code with the strategies. That a dropped argument is found is shown below: with a
dispatcher that is deaf to one argument of the call, and a strategy that is deaf to one keyword of its kernel.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from stand_in_sites import installed, machine
from torch import Tensor

import heedful
from heedful import AttentionDispatcher, AttentionStrategyFactory, Policy, masks
from heedful.errors import InvalidArgument, Refused
from heedful.facts import probe
from heedful.problem import problem_for_shapes
from heedful.strategies.reference import ReferenceAttentionStrategy
from heedful.strategy import Pin
from heedful.testing import ContractBroken, Sample, Tolerance
from heedful.testing.checks import check_answer, examine_dropout
from heedful.testing.parts import Block, Bool, Float, Made, Packed, Padding, Part, Room, Structured
from heedful.testing.samples import Built
from heedful.testing.subject import Subject
from heedful.testing.tolerance import largest

PROBLEMS = 2000  # drawn in CI, over all strategies
QUANTISED = Tolerance(cosine=0.98, relative=0.2, lse=0.2)
IN_FOUR_BITS = Tolerance(cosine=0.9, relative=0.5, lse=0.5)  # on two or three keys no errors cancel
SITES = {  # strategy: site of its stand-in, machine
    "flash": ("flash_attn_2", "sm_80"),
    "flash_3": ("flash_attn_3", "sm_90"),
    "flash_4": ("flash_attn_4", "sm_100"),
    "xformers": ("xformers_op", "sm_80"),
    "aiter": ("aiter", "gfx942"),
    "native_varlen": ("torch_varlen", "sm_80"),
    "native_npu": ("torch_npu", "npu"),
    "native_xla": ("torch_xla", "xla"),
    "sage": ("sageattention_2", "sm_89"),
    "sage_qk_int8_pv_fp8_cuda": ("sageattention_2", "sm_89"),
    "sage_qk_int8_pv_fp8_cuda_sm90": ("sageattention_2", "sm_90"),
    "sage_qk_int8_pv_fp16_cuda": ("sageattention_2", "sm_80"),
    "sage_qk_int8_pv_fp16_triton": ("sageattention_2", "sm_80"),
    "sage_blackwell": ("sage_blackwell", "sm_120"),
}


def _names() -> list[str]:
    factory = AttentionStrategyFactory(plugins=False)
    every = factory.strategies()
    return [*every, *(alias for one in every.values() for alias, pin in one.pins().items() if pin != Pin())]


def _of(name: str) -> str:
    """The strategy that a name belongs to."""
    return type(AttentionStrategyFactory.create_strategy(name)).name


def _elsewhere(name: str) -> bool:
    """Whether it can compute nothing here: its kernel is of a GPU, and has no stand-in, or lies on the Hub."""
    strategy = AttentionStrategyFactory.create_strategy(name)
    plain = problem_for_shapes(*[(1, 1, 2, 16)] * 3, dtype=torch.float16, device=probe().device(torch.device("cpu")))
    no_cpu = any(refusal.field == "device" for refusal in strategy.refusals(plain))
    return strategy.pin.source == "hub" or (no_cpu and _of(name) not in SITES)


NAMES = _names()
HERE = [name for name in NAMES if not _elsewhere(name)]
SHARE = dict.fromkeys(HERE, -(-PROBLEMS // len(HERE)))
ARGUMENTS = [*list(inspect.signature(heedful.attention).parameters)[3:], "deterministic"]
PHASES = (Phase.generate, Phase.shrink)
SETTINGS = settings(
    derandomize=True,
    database=None,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


# Calls and their flips


@dataclass(frozen=True)
class Touched(Part):
    """A part with one element of its tensor changed, or one token moved to the next sequence."""

    part: Part
    place: int

    def make(self, room: Room) -> Made:
        """See the base class."""
        if isinstance(self.part, Packed):
            return replace(self.part, query_lengths=_moved(self.part.query_lengths, self.place)).make(room)
        made = self.part.make(room)
        if isinstance(self.part, Padding):
            keep = touched(made.mask.padding, self.place)
            rows = made.mask.rows
            seen = keep[:, None, None] if rows is None else keep[:, None, None] & rows[:, None, :, None]
            value = masks.KeyPadding(keep, rows)
            return Made(value, value, seen=seen)
        tensor = touched(made.argument, self.place)
        if tensor.dtype == torch.bool:
            return Made(tensor, masks.Dense(tensor), seen=tensor)
        return Made(tensor, masks.Bias(tensor), bias=tensor)


def touched(tensor: Tensor, place: int) -> Tensor:
    changed = tensor.detach().clone(memory_format=torch.contiguous_format)
    touch(changed, place)
    return changed.requires_grad_(tensor.requires_grad)


def touch(tensor: Tensor, place: int) -> None:
    """One element of a mask: shown if it was hidden, hidden if it was shown; a bias of a seen key grows."""
    flat = tensor.view(-1)
    one = flat[place % flat.numel()]
    if tensor.dtype == torch.bool:
        one.logical_not_()
    else:
        one.copy_(one + 1.5 if one > -1e3 else torch.zeros_like(one))


def _moved(lengths: tuple[int, ...], place: int) -> tuple[int, ...]:
    at = place % (len(lengths) - 1)
    changed = list(lengths)
    step = 1 if changed[at] > 1 else -1
    changed[at], changed[at + 1] = changed[at] - step, changed[at + 1] + step
    return tuple(changed)


@dataclass(frozen=True)
class Call:
    """One call of a drawn problem, with what a ``Sample`` leaves to the aspect that is looked at."""

    sample: Sample
    lse: bool = False
    grad: bool = False
    sinks: bool = False

    def built(self) -> tuple[Built, dict[str, Any]]:
        """What the answer is judged by, and the arguments: a packing's own causality is said by the call here."""
        judge = _judged(self.sample).build("cpu", needs_grad=self.grad)
        asked = judge if judge.sample is self.sample else self.sample.build("cpu")
        more: dict[str, Any] = {"return_lse": True} if self.lse else {}
        more |= {"sinks": torch.linspace(-1, 1, self.sample.lead[-1])} if self.sinks else {}
        return judge, asked.arguments | more

    def calling(self, **words: Any) -> Call:
        """With other arguments; None leaves one out."""
        call = {name: value for name, value in {**self.sample.call, **words}.items() if value is not None}
        return replace(self, sample=replace(self.sample, call=call))


def _judged(sample: Sample) -> Sample:
    part = sample.mask[0] if len(sample.mask) == 1 else None
    inner = part.part if isinstance(part, Touched) else part
    if not isinstance(inner, Packed) or not {"is_causal", "window"} & set(sample.call):
        return sample
    call = dict(sample.call)
    left, right = call.pop("window", (None, None))
    if call.pop("is_causal", False):
        right = 0 if right is None else min(right, 0)
    banded = replace(inner, band=(left, right, call.pop("causal_alignment", "top_left")))
    return replace(sample, call=call, mask=(replace(part, part=banded) if isinstance(part, Touched) else banded,))


LENGTHS = st.integers(1, 9)
WINDOWS = st.sampled_from([(2, 1), (0, 2), (3, None), (None, 1), (1, 0)])
FLAGS = st.booleans()
RARELY = st.sampled_from([False, False, False, True])
SELDOM = st.sampled_from([False] * 11 + [True])


def _parts() -> st.SearchStrategy[Part]:
    axes = st.sampled_from(["BHQK", "BK", "QK", "HQK", "K", "BQK", "Q"])
    kinds = st.sampled_from(["padding", "both", "causal", "band", "blocks", "all"])
    sides = st.sampled_from(["right", "left", "interior", "none"])
    return st.one_of(
        st.builds(Padding, kind=sides),
        st.builds(Padding, kind=sides, queries=st.sampled_from(["right", "left", "interior"])),
        st.builds(Bool, axes=axes, empty_row=FLAGS),
        st.builds(Float, axes=axes, hidden=st.sampled_from([0.0, 0.4]), needs_grad=RARELY),
        st.builds(Float, axes=axes, hidden=st.just(0.4), lowest=st.just(-1e4)),
        st.builds(Structured, kind=kinds, axes=st.just("BQK"), lowest=st.sampled_from([None, -math.inf])),
        st.builds(Structured, kind=st.sampled_from(["padding", "causal", "band"]), lowest=st.just(-1e4)),
        st.just(Block()),
    )


def _packs(queries: int, keys: int) -> st.SearchStrategy[Part]:
    def cut(at: tuple[int, int]) -> Packed:
        first = 1 + at[0] % (queries - 1), 1 + at[1] % (keys - 1)
        return Packed((first[0], queries - first[0]), (first[1], keys - first[1]))

    return st.tuples(st.integers(0, 9), st.integers(0, 9)).map(cut)


@st.composite
def bases(draw: Any, subject: Subject) -> tuple[Call, Part, int]:
    """A call, another mask that it might have, and a number for whatever else is to be chosen."""
    heads, kv_heads = draw(st.sampled_from([(1, None), (2, None), (2, 1), (4, 2), (3, None)]))
    layout = draw(st.sampled_from(["BHSD", "BSHD", "BHSD", "BSHD", "THD"]))
    packed = layout == "THD"
    queries, keys = draw(LENGTHS) + packed, draw(LENGTHS) + packed
    queries = draw(st.sampled_from([queries, queries, keys]))
    parts = _packs(queries, keys) if packed else _parts()
    mask: tuple[Part, ...] = (draw(parts),) if packed or draw(FLAGS) else ()
    if isinstance(mask[0] if mask else None, Float) and draw(RARELY):
        mask = (*mask, Bool("BK"))
    words = {
        "scale": st.sampled_from([0.2, 0.5, -0.3]),
        "softcap": st.just(2.0),
        "is_causal": st.just(True),
        "window": WINDOWS,
        "causal_alignment": st.just("bottom_right"),
    }
    often = {"is_causal": FLAGS, "causal_alignment": FLAGS, "scale": RARELY, "window": RARELY}
    limits = subject.limits
    if limits.softcap:
        often["softcap"] = RARELY
    call = {name: draw(values) for name, values in words.items() if draw(often.get(name, SELDOM))}
    dtypes = limits.dtypes
    sample = Sample(
        lead=(1 if packed else draw(st.integers(1, 2)), heads),
        kv_heads=kv_heads,
        query_length=queries,
        key_length=keys,
        head_dim=draw(st.sampled_from([8, 16, 40, 5])),
        value_dim=draw(st.sampled_from([None, None, 8, 24])),
        dtype=draw(st.sampled_from(dtypes)),
        layout=layout,
        mask=mask,
        call=call,
        wants_grad=draw(st.sampled_from([("query", "key", "value"), ("value",), ("query",)])),
    )
    grad = draw(RARELY if limits.backward else SELDOM)
    learnt = any(isinstance(part, Float) and part.needs_grad for part in mask)
    lse = draw(RARELY if limits.lse else SELDOM)
    return Call(sample, lse, grad or learnt), draw(parts), draw(st.integers(0, 10**6))


@dataclass(frozen=True)
class Flip:
    """One argument changed. ``fields``: what a refusal that comes of it may name."""

    argument: str
    call: Call
    fields: frozenset[str]


_BANDS = {"causal alignment", "causality", "window"}
_MASK = frozenset({"mask", "mask mix", "packing", "empty rows", "operator", "layout", *_BANDS})
FIELDS = {
    "attn_mask": _MASK | {"bias gradient", "bias dtype", "gradient"},  # the other mask may be one that learns
    "is_causal": _MASK,
    "causal_alignment": _MASK,
    "window": _MASK,
    "dropout_p": frozenset({"dropout_p", "dropout"}),
    "return_lse": frozenset({"return_lse", "empty rows", "LSE beside a gradient or dropout"}),
    "deterministic": frozenset({"deterministic gradient"}),
}


def flips(call: Call, other: Part, number: int) -> Iterator[Flip]:
    """Every argument of a call, changed."""
    sample = call.sample
    for argument, changed in _flips(call, other, number):
        yield Flip(argument, changed, FIELDS.get(argument, frozenset({argument})))
    dropping = _for_dropout(sample, number)
    yield Flip("dropout_p", replace(call, sample=dropping, lse=False), FIELDS["dropout_p"])


def _flips(call: Call, other: Part, number: int) -> Iterator[tuple[str, Call]]:
    sample = call.sample
    learnt = isinstance(other, Float) and other.needs_grad
    masked = replace(call, sample=replace(sample, mask=(other,)), grad=call.grad or learnt)
    if not sample.mask:
        yield "attn_mask", masked
    else:
        if sample.layout != "THD":
            yield "attn_mask", replace(call, sample=replace(sample, mask=()))
        yield "attn_mask", masked
        if not isinstance(sample.mask[0], Block):
            touched_part = Touched(sample.mask[0], number)
            yield "attn_mask", replace(call, sample=replace(sample, mask=(touched_part, *sample.mask[1:])))
    words = sample.call
    yield "is_causal", call.calling(is_causal=None if "is_causal" in words else True)
    aligned = "causal_alignment" in words
    yield "causal_alignment", call.calling(causal_alignment=None if aligned else "bottom_right")
    left, right = words.get("window", (1, 1))
    if "window" not in words:
        yield "window", call.calling(window=(left, right))
    elif left is not None:
        yield "window", call.calling(window=(left + 1, right))
    else:
        yield "window", call.calling(window=(left, right + 1))
    scales = [0.0, -0.4, 0.35]
    yield "scale", call.calling(scale=scales[number % 3])
    yield "softcap", call.calling(softcap=None if "softcap" in words else 1.5)
    heads = sample.lead[-1]
    fewer = {1: 1, 2: 1, 3: 1, 4: 1}[heads] if sample.kv_heads is None or number % 2 else heads
    yield "enable_gqa", replace(call, sample=replace(sample, kv_heads=fewer))
    layouts = {"BHSD": "BSHD", "BSHD": "BHSD", "THD": ("BHSD", "BSHD")[number % 2]}
    yield "layout", replace(call, sample=replace(sample, layout=layouts[sample.layout]))
    yield "return_lse", replace(call, lse=not call.lse)
    yield "sinks", replace(call, sinks=True)
    yield "options", call.calling(options={"no_such_option": 1})
    yield "max_error", call.calling(max_error=1e-5)
    yield "deterministic", replace(call, sample=replace(sample, deterministic=True))


def _for_dropout(sample: Sample, number: int) -> Sample:
    """Large enough for statistics, and with as many value features as keys, so that the output shows the weights."""
    heads = 4 if sample.kv_heads else 2
    sizes = {"query_length": 14, "key_length": 16, "value_dim": 16, "lead": (*sample.lead[:-1], heads)}
    kv_heads = 2 if sample.kv_heads else None
    call = {**sample.call, "dropout_p": (0.5, 0.2, 0.8, 1.0)[number % 4]}
    mask = (Packed((6, 8), (9, 7)),) if sample.layout == "THD" else sample.mask
    asked = replace(sample, **sizes, kv_heads=kv_heads, call=call, mask=mask, aspects=("dropout",))
    return _judged(asked)


# Judging


@dataclass
class Hunt:
    """What was found over all draws: how many there were, and how often a flip changed the answer."""

    drawn: int = 0
    answered: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    moved: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Reply:
    """An answer, with the oracle's, or what it was refused for."""

    out: Tensor | None = None
    want: Tensor | None = None
    refusals: tuple[heedful.Refusal, ...] = ()


def ask(subject: Subject, call: Call) -> Reply:
    """The reply to one call, once it was judged by the formula; a refusal must be the one that explain foretells."""
    built, arguments = call.built()
    return _ask(subject, built, arguments)


def _ask(subject: Subject, built: Built, arguments: dict[str, Any]) -> Reply:
    with built.surroundings():
        try:
            plan = subject.dispatcher.explain(*built.tensors, **arguments, backend=subject.name)
            answer = subject.dispatcher.attention(*built.tensors, **arguments, backend=subject.name)
        except Refused as refused:
            return Reply(refusals=refused.refusals[subject.name])
        except InvalidArgument as error:
            raise ContractBroken(f"a well-formed call is called malformed: {error}") from error
        if plan.refused:
            raise ContractBroken(f"explain says that {subject.name} refuses the call, and it answers: {plan}")
        if isinstance(answer, tuple) != ("return_lse" in arguments):
            raise ContractBroken("return_lse was not obeyed")
        sinks = arguments.get("sinks")
        if sinks is not None:
            raise ContractBroken("sinks are in no formula of this version, so they must be refused")
        check_answer(subject, built, arguments, answer)
        if built.sample.deterministic and built.leaves:
            _check_repeats(subject, built, arguments)
    out = answer[0] if isinstance(answer, tuple) else answer
    want = built.answer(torch.float64)[0].detach()
    out = heedful.testing.samples.logical(out.detach(), built.sample.layout).double()
    limit = built.sample.call.get("max_error")
    if limit is not None and not subject.is_exact and _share(out - want, want) > limit:
        raise ContractBroken(f"an error of {_share(out - want, want):.3g} where {limit} was the most")
    if "no_such_option" in (built.sample.call.get("options") or {}):
        raise ContractBroken("an option that no backend has was taken without a word")
    return Reply(out, want)


def _check_repeats(subject: Subject, built: Built, arguments: dict[str, Any]) -> None:
    """Deterministic means the same bits each time, by a strategy that says so."""
    if not subject.limits.deterministic_backward:
        raise ContractBroken(f"{subject.name} does not say that its gradient is deterministic")
    every = []
    for _ in range(2):
        answer = subject.dispatcher.attention(*built.tensors, **arguments, backend=subject.name)
        out = answer[0] if isinstance(answer, tuple) else answer
        every.append(torch.autograd.grad(out, built.leaves, torch.ones_like(out)))
    if not all(map(torch.equal, *every)):
        raise ContractBroken("two deterministic gradients differ")


def _share(part: Tensor, whole: Tensor) -> float:
    return (part.norm() / whole.norm()).item() if whole.norm() else 0.0


def examine(subject: Subject, base: Call, other: Part, number: int, hunt: Hunt) -> None:
    """One drawn problem with every third of its flips; which ones is drawn as well."""
    hunt.drawn += 1
    before = ask(subject, base)
    for flip in islice(flips(base, other, number), number // 4 % 3, None, 3):
        if flip.argument == "dropout_p":
            check_flip(subject, flip, *_with_dropout(subject, flip.call.sample), hunt)
        else:
            check_flip(subject, flip, before, ask(subject, flip.call), hunt)
    _touched_in_place(subject, base, number, hunt)


def _with_dropout(subject: Subject, sample: Sample) -> tuple[Reply, Reply]:
    """The replies without and with dropout: the share of dropped weights, and the answer of the very weights kept."""
    call = {name: value for name, value in sample.call.items() if name != "dropout_p"}
    built = replace(sample, call=call).build("cpu")
    try:
        plan = subject.dispatcher.explain(*built.tensors, **built.arguments, backend=subject.name)
        outcome = examine_dropout(subject, sample)
    except InvalidArgument as error:
        raise ContractBroken(f"a well-formed call is called malformed: {error}") from error
    return Reply(refusals=plan.verdicts[0].refusals), Reply(refusals=outcome.refused)


def _touched_in_place(subject: Subject, base: Call, number: int, hunt: Hunt) -> None:
    """The very same mask tensor, written to between two calls: what was read of it before must be forgotten."""
    built, arguments = base.built()
    tensor = built.attn_mask
    if not isinstance(tensor, Tensor) or base.grad:
        return
    before = _ask(subject, built, arguments)
    touch(tensor, number)
    flip = Flip("attn_mask", base, FIELDS["attn_mask"])
    check_flip(subject, flip, before, _ask(subject, built, arguments), hunt)


def check_flip(subject: Subject, flip: Flip, before: Reply, after: Reply, hunt: Hunt) -> None:
    """A refusal must name what was flipped; an answer must move where the formula's does, and as far."""
    if after.refusals:
        hunt.refused[flip.argument] += 1
        known, word = {one.field for one in before.refusals}, flip.argument.partition("_p")[0]
        new = [one for one in after.refusals if one.field not in known]
        if new and not any(one.field in flip.fields or word in str(one) for one in new):
            raise ContractBroken(f"{flip.argument} was flipped, and the call refused for {'; '.join(map(str, new))}")
        return
    hunt.answered[flip.argument] += 1
    if before.out is None or after.out is None or before.want.shape != after.want.shape:
        return
    meant, made = after.want - before.want, after.out - before.out
    unit = torch.finfo(flip.call.sample.dtype).eps
    if largest(meant) <= 8 * unit * max(1.0, largest(before.want)):
        return
    hunt.moved[flip.argument] += 1
    if torch.equal(before.out, after.out):
        raise ContractBroken(f"{flip.argument} was flipped: the answer stays, and should move by {largest(meant):.3g}")
    along = ((made * meant).sum() / (meant * meant).sum()).item()
    if _share(meant, before.want) > 0.3 and not 0.5 < along < 1.5:
        raise ContractBroken(f"{flip.argument} was flipped: the answer moves {along:.2f} times as far as it should")


def hunt_through(subject: Subject, problems: int, *, shrinking: bool = True) -> Hunt:
    """Draw the problems and examine each."""
    hunt = Hunt()

    @settings(SETTINGS, max_examples=problems, phases=PHASES if shrinking else PHASES[:1])
    @given(drawn=bases(subject))
    def run(drawn: tuple[Call, Part, int]) -> None:
        examine(subject, *drawn, hunt)

    run()
    return hunt


def at_home(name: str) -> tuple[contextlib.AbstractContextManager[None], Subject]:
    """A strategy's stand-in, and the strategy as its machine's subject."""
    site, device = SITES.get(_of(name), ("", ""))
    facts = machine(device) if device else None
    tolerance = IN_FOUR_BITS if name == "sage_blackwell" else QUANTISED
    return installed(site) if site else contextlib.nullcontext(), Subject.of(name, "cpu", tolerance, facts)


def test_there_are_two_thousand_problems_and_all_names() -> None:
    assert sum(SHARE.values()) >= PROBLEMS
    assert set(NAMES) >= {"native", "reference", "flash_varlen", "sage_varlen", "flash_hub", *SITES}


@pytest.mark.parametrize("name", HERE)
def test_every_argument_counts(name: str) -> None:
    site, subject = at_home(name)
    with site:
        hold_to_account(hunt_through(subject, SHARE[name]), SHARE[name])


def hold_to_account(hunt: Hunt, problems: int) -> None:
    """That a hunt looked at every argument, often enough for a dropped one to show."""
    assert hunt.drawn >= problems
    for argument in ARGUMENTS:
        if argument != "backend":
            assert hunt.answered[argument] + hunt.refused[argument] >= problems // 10, argument
    for argument in ("attn_mask", "is_causal", "window", "scale", "softcap", "enable_gqa"):
        assert hunt.moved[argument] or hunt.answered[argument] < 5, f"no flip of {argument} changed an answer"
    assert hunt.moved["scale"], "most calls were refused: nothing was learnt"


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(HERE)))
def test_a_name_that_cannot_run_here_says_what_is_lacking(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []
    monkeypatch.setitem(sys.modules, "kernels", SimpleNamespace(get_kernel=lambda repo, **more: fetched.append(repo)))
    site, subject = at_home(name)
    plain = Call(Sample(dtype=subject.limits.dtypes[0]))
    with site:
        fields = {one.field for one in ask(subject, plain).refusals}
    assert fields & {"device", "download", "package", "import"}
    assert not fetched, "nobody allowed a download"


# What a hunt must find: each argument of the call, and each keyword of a kernel, dropped without a word


class Deaf(AttentionDispatcher):
    """A dispatcher that drops one argument of every call."""

    def __init__(self, argument: str, kind: type[ReferenceAttentionStrategy]) -> None:
        factory = AttentionStrategyFactory(packages=(), plugins=False)
        factory.register_strategy("fake", kind)
        super().__init__(factory, policy=Policy())
        self.argument = argument

    def attention(self, *operands: Any, **call: Any) -> Any:
        with self._hearing(call):
            return super().attention(*operands, **call)

    def explain(self, *operands: Any, **call: Any) -> Any:
        with self._hearing(call):
            return super().explain(*operands, **call)

    @contextlib.contextmanager
    def _hearing(self, call: dict[str, Any]) -> Iterator[None]:
        call.pop(self.argument, None)
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(before and self.argument != "deterministic")
        yield
        torch.use_deterministic_algorithms(before)


class Fake(ReferenceAttentionStrategy):
    """The reference, without one keyword."""

    name = "fake"
    aliases = ()
    forgets = ""

    def compute_attention(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Any:
        kwargs.pop(self.forgets, None)
        return super().compute_attention(query, key, value, **kwargs)


class Hasty(Fake):
    """Gradients in another order of summing each time, unless it is told to be deterministic."""

    def compute_attention(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Any:
        if not torch.are_deterministic_algorithms_enabled() and query.dtype == torch.float32:
            query, key, value = (tensor * (1 + 4e-7 * torch.rand(()).item()) for tensor in (query, key, value))
        return super().compute_attention(query, key, value, **kwargs)


class Rough(Fake):
    """Rounds its input to a few bits."""

    exactness = "quantised"
    relative_error = 0.5
    limits = replace(ReferenceAttentionStrategy.limits, backward=False)

    def compute_attention(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Any:
        query, key = ((tensor * 32).round() / 32 for tensor in (query, key))
        return super().compute_attention(query, key, value, **kwargs)


FAKES: dict[str, type[Fake]] = {"deterministic": Hasty, "max_error": Rough}
KEYWORDS = [
    *("attn_mask", "attn_bias", "key_padding", "query_padding", "varlen", "block_mask", "is_causal", "window"),
    *("causal_alignment", "window_alignment", "scale", "softcap", "dropout_p", "enable_gqa", "return_lse"),
]


def _subject(kind: type[Fake], argument: str = "") -> Subject:
    subject = Subject.of(kind, "cpu", QUANTISED)
    return replace(subject, dispatcher=Deaf(argument, kind)) if argument else subject


@pytest.mark.parametrize("kind", [Fake, *FAKES.values()])
def test_nothing_is_found_in_fakes_that_drop_nothing(kind: type[Fake]) -> None:
    hunt_through(_subject(kind), 60, shrinking=False)


@pytest.mark.parametrize("argument", [name for name in ARGUMENTS if name != "backend"])
def test_a_dropped_argument_of_the_call_is_found(argument: str) -> None:
    kind = FAKES.get(argument, Fake)
    with pytest.raises(ContractBroken):
        hunt_through(_subject(kind, argument), 80, shrinking=False)


@pytest.mark.parametrize("keyword", KEYWORDS)
def test_a_dropped_keyword_of_a_kernel_is_found(keyword: str) -> None:
    kind = type("Forgetful", (Fake,), {"forgets": keyword, "__doc__": "Forgets."})
    with pytest.raises((ContractBroken, RuntimeError, ValueError)):  # some break what stands behind the kernel
        hunt_through(_subject(kind), 150, shrinking=False)
