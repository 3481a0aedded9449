"""The guard: wrong answers caught, replaced or raised, told once, remembered; right ones never; and what it costs."""

import logging
import math

import pytest
import torch
import torch.nn.functional as F

from heedful import (
    AttentionDispatcher,
    AttentionStrategy,
    AttentionStrategyFactory,
    KeyPadding,
    Limits,
    Policy,
    WrongAnswer,
)
from heedful.bundle import read_bundle
from heedful.guard import Guard, _period
from heedful.rows import check_rows
from heedful.strategy import ALL_MASKS
from heedful.tally import NEVER, Tally, Trust
from heedful.testing import SAMPLES

DRAW = torch.Generator().manual_seed(0)
QUERY, KEY, VALUE = (torch.randn(1, 2, 96, 16, generator=DRAW) for _ in range(3))
LIMITS = Limits(
    masks=frozenset({"causal", "dense"}), scale=True, gqa=True, empty_rows=frozenset({"output"}), backward=True,
    dropout=True,
)  # fmt: skip


class Right(AttentionStrategy):
    """SDPA, counted."""

    limits = LIMITS

    def __init__(self):
        self.computed = 0

    def compute_attention(self, query, key, value, **kwargs):
        self.computed += 1
        out = F.scaled_dot_product_attention(query, key, value, **kwargs)
        if kwargs.get("attn_mask") is not None:
            out = out.masked_fill(~kwargs["attn_mask"].any(-1, keepdim=True), 0.0)
        return out


class AllNaN(Right):
    def compute_attention(self, query, key, value, **kwargs):
        return super().compute_attention(query, key, value, **kwargs) * math.nan


class Noise(Right):
    def compute_attention(self, query, key, value, **kwargs):
        return torch.randn_like(super().compute_attention(query, key, value, **kwargs))


class LeaksIntoMaskedRows(Right):
    """Wrong only for a row that sees no key: it averages all values there."""

    def compute_attention(self, query, key, value, **kwargs):
        out = super().compute_attention(query, key, value, **kwargs)
        mask = kwargs.get("attn_mask")
        return out if mask is None else torch.where(mask.any(-1, keepdim=True), out, value.mean(-2, keepdim=True))


class ForgetsFarKeys(Right):
    """Wrong only past 64 keys: 32-bit offsets, scaled down."""

    def compute_attention(self, query, key, value, **kwargs):
        return super().compute_attention(query, key[..., :64, :], value[..., :64, :], **kwargs)


class OneWrongRow(Right):
    """Wrong in one row alone, which no rule of the guard singles out."""

    def compute_attention(self, query, key, value, **kwargs):
        out = super().compute_attention(query, key, value, **kwargs)
        out[..., 41, :] += 1
        return out


WRONG = (AllNaN, Noise, LeaksIntoMaskedRows, ForgetsFarKeys)


def guarded(first, *others, **policy):
    """A dispatcher whose auto asks these strategies in this order."""
    factory = AttentionStrategyFactory(packages=(), plugins=False)
    kinds = (first, *others)
    for kind in kinds:
        factory.register_strategy(kind.__name__, kind)
    names = tuple(kind.__name__ for kind in kinds)
    return AttentionDispatcher(factory, policy=Policy({"*": names}, **policy))


def call_for(kind):
    """A call at which this strategy is wrong: most at any."""
    if kind is not LeaksIntoMaskedRows:
        return {}
    seen = torch.rand(1, 1, 96, 96, generator=DRAW) < 0.7
    seen[..., 50, :] = False
    return {"attn_mask": seen}


def want(**call):
    mask = call.get("attn_mask")
    out = F.scaled_dot_product_attention(QUERY, KEY, VALUE, **call)
    return out if mask is None else out.masked_fill(~mask.any(-1, keepdim=True), 0.0)


# Caught at first sight


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_answer_is_replaced_told_once_and_remembered(kind, caplog):
    dispatcher, call = guarded(kind, Right), call_for(kind)
    with caplog.at_level(logging.WARNING, "heedful"):
        for _ in range(3):
            torch.testing.assert_close(dispatcher.attention(QUERY, KEY, VALUE, **call), want(**call))
    wrong, right = (dispatcher.factory.create_strategy(one.__name__) for one in (kind, Right))
    assert (wrong.computed, right.computed) == (1, 3)
    told = [record.getMessage() for record in caplog.records if "quarantined" in record.getMessage()]
    assert len(told) == 1
    assert kind.__name__ in told[0]
    plan = dispatcher.explain(QUERY, KEY, VALUE, **call)
    assert plan.backend == "Right"
    (refusal,) = plan.verdicts[0].refusals
    assert refusal.field == "guard"


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize(("guard", "backend"), [("replace", "forced"), ("raise", None), ("raise", "list")])
def test_it_raises_where_nobody_else_may_compute_it_or_where_that_is_wanted(kind, guard, backend):
    dispatcher, call = guarded(kind, Right, guard=guard), call_for(kind)
    name = {"forced": kind.__name__, "list": [kind.__name__, "Right"], None: None}[backend]
    for _ in range(2):  # whoever asks again has it checked again
        with pytest.raises(WrongAnswer, match=f"{kind.__name__} gave a wrong answer: .*use another backend"):
            dispatcher.attention(QUERY, KEY, VALUE, **call, backend=name)
    assert dispatcher.factory.create_strategy("Right").computed == 0


@pytest.mark.parametrize("kind", WRONG)
def test_a_list_is_a_permission_to_replace(kind):
    dispatcher, call = guarded(kind, Right), call_for(kind)
    out = dispatcher.attention(QUERY, KEY, VALUE, **call, backend=[kind.__name__, "Right"])
    torch.testing.assert_close(out, want(**call))


def test_nobody_is_watched_when_it_is_off():
    dispatcher = guarded(AllNaN, Right, guard="off")
    assert dispatcher.attention(QUERY, KEY, VALUE).isnan().all()


def test_the_second_candidate_is_checked_as_well():
    dispatcher = guarded(AllNaN, Noise, Right)
    torch.testing.assert_close(dispatcher.attention(QUERY, KEY, VALUE), want())
    refused = {verdict.name for verdict in dispatcher.explain(QUERY, KEY, VALUE).verdicts if verdict.refusals}
    assert refused == {"AllNaN", "Noise"}


def test_where_all_are_wrong_the_call_is_refused_with_the_reasons():
    dispatcher = guarded(AllNaN, Noise)
    with pytest.raises(RuntimeError, match=r"(?s)AllNaN refuses: guard.*Noise refuses: guard"):
        dispatcher.attention(QUERY, KEY, VALUE)


def test_one_class_is_quarantined_and_no_other():
    dispatcher = guarded(ForgetsFarKeys, Right)
    dispatcher.attention(QUERY, KEY, VALUE)
    assert dispatcher.explain(QUERY, KEY, VALUE).backend == "Right"
    short = (QUERY, KEY[..., :32, :], VALUE[..., :32, :])
    dispatcher.attention(*short)
    assert dispatcher.explain(*short).backend == "ForgetsFarKeys"


def test_a_quarantine_outlives_the_process_until_it_is_forgotten(tmp_path):
    dispatcher = guarded(AllNaN, Right, cache=tmp_path)
    dispatcher.attention(QUERY, KEY, VALUE)
    dispatcher.experience.finish()
    later = guarded(AllNaN, Right, cache=tmp_path)
    later.attention(QUERY, KEY, VALUE)
    assert later.factory.create_strategy("AllNaN").computed == 0
    problem = later.explain(QUERY, KEY, VALUE).problem
    later.experience.forget(problem, torch.device("cpu"))
    assert later.explain(QUERY, KEY, VALUE).backend == "AllNaN"


def test_the_lse_is_held_to_the_formula(factory):
    class Base2(Right):
        limits = Limits(lse=True)

        def compute_attention(self, query, key, value, **kwargs):
            scores = query @ key.mT * query.shape[-1] ** -0.5
            return torch.softmax(scores, -1) @ value, torch.logsumexp(scores, -1) * math.log2(math.e)

    with pytest.raises(WrongAnswer, match=r"(?i)lse"):
        guarded(Base2).attention(QUERY, KEY, VALUE, return_lse=True, backend="Base2")


def test_gradients_flow_through_a_checked_and_a_replaced_call():
    for kinds in ((Right,), (AllNaN, Right)):
        query = QUERY.clone().requires_grad_()
        guarded(*kinds).attention(query, KEY, VALUE).square().sum().backward()
        plain = QUERY.clone().requires_grad_()
        F.scaled_dot_product_attention(plain, KEY, VALUE).square().sum().backward()
        torch.testing.assert_close(query.grad, plain.grad)


# Later, by budget


def test_what_breaks_later_is_found_when_a_check_is_paid_for(monkeypatch):
    class BreaksLater(Right):
        def compute_attention(self, query, key, value, **kwargs):
            out = super().compute_attention(query, key, value, **kwargs)
            return out * math.nan if self.computed > 5 else out

    monkeypatch.setattr("heedful.guard._period", lambda _trust: 10)
    dispatcher = guarded(BreaksLater, Right)
    outs = [dispatcher.attention(QUERY, KEY, VALUE) for _ in range(30)]
    broken = [place for place, out in enumerate(outs) if out.isnan().any()]
    assert broken == list(range(5, broken[-1] + 1))
    assert 5 <= broken[-1] <= 15
    assert dispatcher.explain(QUERY, KEY, VALUE).backend == "Right"


def test_a_single_wrong_row_is_found_with_the_odds_of_its_rows():
    found = 0
    for _ in range(200):
        try:
            guarded(OneWrongRow).attention(QUERY, KEY, VALUE, backend="OneWrongRow")
        except WrongAnswer:
            found += 1
    drawn = 16 / 96  # at least a quarter of them at random, at most all
    assert 200 * drawn / 4 * 0.4 < found < 200 * drawn * 1.9


def test_a_check_is_due_when_one_per_cent_of_the_time_covers_it():
    assert _period(Trust(checks=1, seconds=1e-3, cost=1e-4)) == 10
    assert _period(Trust(checks=1, seconds=1e-5, cost=1e-3)) == 10_000
    assert _period(Trust(checks=1)) == 1  # the second call is timed: the first one compiles


def test_the_first_call_of_another_kind_in_a_class_is_not_checked_again(monkeypatch):
    looked = []
    look = Guard._look
    monkeypatch.setattr(Guard, "_look", lambda self, *args: looked.append(args) or look(self, *args))
    monkeypatch.setattr("heedful.guard._period", lambda _trust: 1000)
    dispatcher = guarded(Right)
    for length in (96, 88):
        dispatcher.attention(QUERY, KEY[..., :length, :], VALUE[..., :length, :])
    assert len(looked) == 1


def test_checks_draw_no_numbers_and_leave_grad_and_autocast_as_they_are():
    dispatcher = guarded(Right)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    dispatcher.attention(QUERY, KEY, VALUE)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.is_grad_enabled()


# What it cannot look at


def test_calls_with_dropout_are_left_alone():
    guarded(Right).attention(QUERY, KEY, VALUE, dropout_p=0.5)


def test_transforms_modes_and_meta_tensors_are_put_off_and_not_broken():
    class Formula(Right):
        def compute_attention(self, query, key, value, **kwargs):
            return torch.softmax(query @ key.mT * query.shape[-1] ** -0.5, -1) @ value

    dispatcher = guarded(Formula)
    batched = torch.stack([QUERY, QUERY])
    out = torch.vmap(lambda one: dispatcher.attention(one, KEY, VALUE))(batched)
    torch.testing.assert_close(out[0], want())
    meta = torch.empty(1, 2, 8, 16, device="meta")
    assert dispatcher.attention(meta, meta, meta).shape == meta.shape


def test_nan_that_the_call_brings_is_no_fault():
    value = VALUE.clone()
    value[..., 3, :] = math.nan
    out = guarded(Right).attention(QUERY, KEY, value, backend="Right")
    assert out.isnan().all()


def test_padding_is_checked_against_the_mask(factory):
    class IgnoresPadding(Right):
        limits = Limits(masks=ALL_MASKS, mixed_masks=True, empty_rows=frozenset({"output", "lse"}))

        def compute_attention(self, query, key, value, key_padding=None, **kwargs):
            return super().compute_attention(query, key, value, **kwargs)

    keep = torch.arange(96)[None] < 90
    with pytest.raises(WrongAnswer):
        guarded(IgnoresPadding).attention(QUERY, KEY, VALUE, KeyPadding(keep), backend="IgnoresPadding")


# Approximate strategies, and the error that a call allows


class Coarse(Right):
    """Off by one per cent."""

    exactness = "quantised"
    limits = Limits()

    def compute_attention(self, query, key, value, **kwargs):
        return super().compute_attention(query, key, value, **kwargs) * 1.01


class Sloppy(Coarse):
    """Off by half, and says that it is off by at most a tenth."""

    def compute_attention(self, query, key, value, **kwargs):
        return super().compute_attention(query, key, value, **kwargs) * 1.5


def test_an_approximate_strategy_is_held_to_what_it_declares_or_the_call_allows():
    guarded(Coarse).attention(QUERY, KEY, VALUE, backend="Coarse")
    guarded(Coarse).attention(QUERY, KEY, VALUE, backend="Coarse", max_error=0.02)
    with pytest.raises(WrongAnswer, match="relative"):
        guarded(Coarse).attention(QUERY, KEY, VALUE, backend="Coarse", max_error=0.002)
    with pytest.raises(WrongAnswer, match="relative"):
        guarded(Sloppy).attention(QUERY, KEY, VALUE, backend="Sloppy")


def test_a_bound_on_the_error_needs_a_guard_to_hold_it():
    with pytest.raises(RuntimeError, match=r"max_error is 0\.02, it takes a guard that measures the error"):
        guarded(Coarse, guard="off").attention(QUERY, KEY, VALUE, backend="Coarse", max_error=0.02)


def slow(kind):
    """The same, slower."""

    def compute_attention(self, *args, **kwargs):
        torch.randn(400, 400).mm(torch.randn(400, 400))
        return kind.compute_attention(self, *args, **kwargs)

    return type(f"Slow{kind.__name__}", (kind,), {"compute_attention": compute_attention})


def test_auto_takes_an_approximate_strategy_only_within_the_error_that_is_allowed():
    long = torch.randn(1, 2, 128, 32, generator=DRAW)
    for max_error, winner in ((None, "SlowRight"), (0.002, "SlowRight"), (0.05, "Coarse")):
        dispatcher = guarded(slow(Right), Coarse, tune="live")
        for _ in range(40):
            out = dispatcher.attention(long, long, long, max_error=max_error)
        plan = dispatcher.explain(long, long, long, max_error=max_error)
        assert plan.backend == winner, max_error
        exact = F.scaled_dot_product_attention(long, long, long)
        error = ((out - exact).abs().sum() / exact.abs().sum()).item()
        assert error <= (max_error or 1e-5)
    assert "error 0.01 of at most 0.05" in str(plan)
    assert "times as fast as SlowRight" in str(plan)


# Tallies


def test_a_tally_counts_down_and_counts_all():
    tally = Tally(None, Trust())
    assert (tally.calls, tally.left) == (0, NEVER)
    for _ in range(3):
        tally.left -= 1
    tally.wait(10)
    tally.left -= 1
    tally.count()
    assert tally.calls == 5


def test_kinds_that_grow_without_end_are_folded_and_no_call_is_lost(monkeypatch):
    monkeypatch.setattr("heedful.experience._MOST_TALLIES", 8)
    dispatcher = guarded(Right)
    for length in range(40, 90):
        dispatcher.attention(QUERY, KEY[..., :length, :], VALUE[..., :length, :])
        dispatcher.attention(QUERY, KEY[..., :41, :], VALUE[..., :41, :])
    tallies = dispatcher.experience.tallies.values()
    assert len(tallies) < 30
    assert sum(tally.calls for tally in tallies) == 100 == dispatcher.factory.create_strategy("Right").computed


def test_calls_in_inference_mode_are_checked():
    with torch.inference_mode():
        fresh = QUERY.clone()
        torch.testing.assert_close(guarded(Noise, Right).attention(fresh, KEY, VALUE), want())


# No false alarm: the contract's own samples, right answers all of them


@pytest.mark.parametrize("backend", ["native", "native_flash", "native_math", "flex", "auto"])
def test_right_answers_raise_no_alarm(backend, factory):
    dispatcher = AttentionDispatcher(factory, policy=Policy(guard="raise"))
    for sample in SAMPLES:
        built = sample.build("cpu")
        with built.surroundings(), torch.no_grad():
            arguments = {**built.arguments, "backend": backend, "return_lse": backend == "native_flash"}
            if not dispatcher.explain(*built.tensors, **arguments).refused:
                dispatcher.attention(*built.tensors, **arguments)
    checked = sum(trust.checks for trust in dispatcher.experience.trusts)
    assert checked > 150


def test_lengths_that_grow_are_checked_as_often_as_one_length(monkeypatch):
    monkeypatch.setattr("heedful.guard._period", lambda _trust: 4)
    looked = []
    monkeypatch.setattr(
        "heedful.guard.check_rows", lambda *args, **words: looked.append(1) or check_rows(*args, **words)
    )
    dispatcher = guarded(Right)
    for length in (84, 85, 86, 87, 89, 90, 91, 92, 93, 94, 95):  # of one class
        dispatcher.attention(QUERY, KEY[..., :length, :], VALUE[..., :length, :])
    assert 3 <= len(looked) <= 5


def test_numbers_that_overflow_are_nobodys_fault(factory):
    dispatcher = AttentionDispatcher(factory, policy=Policy(guard="raise"))
    for dtype, number in ((torch.float32, 1e20), (torch.float16, 6e4)):
        huge = torch.full((1, 2, 8, 8), number, dtype=dtype)
        for backend in ("native", "native_math", "native_flash", "flex", "auto"):
            dispatcher.attention(huge, huge, huge, backend=backend)


def test_a_call_that_raises_is_no_check():
    class RaisesOnce(Noise):
        def compute_attention(self, query, key, value, **kwargs):
            if not self.computed:
                self.computed += 1
                raise KeyboardInterrupt
            return super().compute_attention(query, key, value, **kwargs)

    dispatcher = guarded(RaisesOnce, Right)
    with pytest.raises(KeyboardInterrupt):
        dispatcher.attention(QUERY, KEY, VALUE)
    torch.testing.assert_close(dispatcher.attention(QUERY, KEY, VALUE), want())


def test_a_check_that_cannot_be_made_costs_no_answer(monkeypatch, caplog):
    def no_memory(*args, **words):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("heedful.guard.check_rows", no_memory)
    torch.testing.assert_close(guarded(Right).attention(QUERY, KEY, VALUE), want())
    assert "could not be checked" in caplog.text


class Breaks(Right):
    def compute_attention(self, query, key, value, **kwargs):
        raise ZeroDivisionError("of a kernel")


@pytest.mark.parametrize("kind", [Noise, Breaks])
def test_a_wrong_answer_and_an_error_write_one_bundle_that_can_be_read(kind, tmp_path):
    dispatcher = guarded(kind, guard="raise", bundles=tmp_path)
    for _ in range(3):
        with pytest.raises((WrongAnswer, ZeroDivisionError)):
            dispatcher.attention(QUERY, KEY, VALUE, is_causal=True)
    (path,) = tmp_path.iterdir()
    bundle = read_bundle(path)
    assert torch.equal(bundle.query, QUERY)
    assert bundle.call["is_causal"] is True


def test_a_list_that_ends_in_auto_obeys_its_names_under_a_lock(tmp_path):
    dispatcher = guarded(Right, Noise)
    dispatcher.lock(tmp_path / "empty.lock")
    with dispatcher.use_lock(tmp_path / "empty.lock"):
        dispatcher.attention(QUERY, KEY, VALUE, backend=["Right", "auto"])
