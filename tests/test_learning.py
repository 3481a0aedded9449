"""Learning from live calls: turns on real calls, bounded, agreed on by two windows, and off wherever it must be."""

import itertools
import logging
import threading

import pytest
import torch
import torch.nn.functional as F

from heedful import AttentionDispatcher, AttentionStrategy, AttentionStrategyFactory, Limits, Policy, WrongAnswer
from heedful import learning as module
from heedful.knowledge import MEASURED
from heedful.learning import BEHIND, TIMED_TURNS, Course, fastest
from heedful.records import APART

LABELS = ("usual", "other", "third")


class Clock:
    """Seconds that pass when told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def take(course, seconds, calls):
    """So many calls, each candidate taking its seconds; who had the turns, None where the best one had it."""
    turns = []
    for _ in range(calls):
        turn = course.turn()
        turns.append(None if turn is None else turn[0])
        if turn is not None and turn[1]:
            course.took(turn[0], lambda label=turn[0]: seconds[label])
    return turns


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def course(clock, monkeypatch):
    moments = itertools.count(1e9, 2 * APART)
    monkeypatch.setattr(module.time, "time", lambda: next(moments))
    kept = []
    made = Course(LABELS, kept.append, clock=clock)
    made.kept = kept  # by ``keep``
    return made


# A course


def test_each_candidate_has_one_untimed_turn_then_timed_ones_and_the_usual_one_begins(course):
    turns = take(course, {"usual": 1e-3, "other": 1.1e-3, "third": 1.2e-3}, 100)
    assert turns[:2] == ["usual", "usual"]
    assert {label: turns.count(label) for label in LABELS} == dict.fromkeys(LABELS, 1 + TIMED_TURNS)
    assert turns[3 * (1 + TIMED_TURNS) :] == [None] * (100 - 3 * (1 + TIMED_TURNS))


def test_who_is_clearly_behind_is_dropped_after_the_first_timed_turn(course):
    turns = take(course, {"usual": 1e-3, "other": BEHIND * 1.01e-3, "third": 0.9e-3}, 100)
    assert turns.count("other") == 2
    assert turns.count("third") == turns.count("usual") == 1 + TIMED_TURNS
    assert course.kept[0].seconds == {"usual": 1e-3, "other": BEHIND * 1.01e-3, "third": 0.9e-3}


def test_the_winner_holds_after_one_window_and_is_fixed_when_a_later_one_agrees(course, clock):
    seconds = {"usual": 2e-3, "other": 1e-3, "third": 9e-3}
    take(course, seconds, 100)
    assert (course.best, course.over, len(course.kept)) == ("other", False, 1)
    assert take(course, seconds, 10) == [None] * 10
    clock.now += APART
    take(course, seconds, 100)
    assert (course.best, course.over, len(course.kept)) == ("other", True, 2)
    assert take(course, seconds, 10) == [None] * 10


def test_a_busy_minute_settles_nothing(course, clock):
    take(course, {"usual": 39e-3, "other": 30e-3, "third": 90e-3}, 100)
    assert course.best == "other"
    for seconds in ({"usual": 1.2e-3, "other": 1.7e-3}, {"usual": 1.2e-3, "other": 1.7e-3}):
        assert not course.over
        clock.now += APART
        take(course, seconds, 100)
    assert (course.best, course.over) == ("usual", True)


def test_it_ends_after_a_bounded_number_of_windows_even_if_none_agree(course, clock):
    kept, labels = course.kept, tuple("abcdef")
    course = Course(labels, kept.append, clock=clock)
    for fast in labels:
        take(course, {label: 1e-3 if label == fast else 1.3e-3 for label in labels}, 100)
        clock.now += APART
    assert course.over
    assert len(kept) == 4


def test_windows_of_another_process_count(clock, course):
    take(course, {"usual": 2e-3, "other": 1e-3, "third": 9e-3}, 100)
    later = Course(LABELS, lambda _window: None, tuple(course.kept), clock=clock)
    take(later, {"usual": 2e-3, "other": 1e-3, "third": 9e-3}, 100)
    assert (later.best, later.over) == ("other", True)


def test_slow_calls_are_put_off_and_then_left_alone(course, clock):
    seconds = dict.fromkeys(LABELS, 0.11)
    for _ in range(3):
        assert not course.over
        turns = take(course, seconds, 50)
        assert set(turns) == {"usual", None}
        assert turns.count("usual") == 2
        clock.now += APART
    assert course.over
    assert course.kept == []


def test_times_may_become_known_long_after_the_call(course):
    readings = []
    for _ in range(100):
        turn = course.turn()
        if turn is not None and turn[1]:
            readings.append([None])
            course.took(turn[0], lambda cell=readings[-1]: cell[0])
    assert course.kept == []
    for cell in readings:
        cell[0] = 1e-3
    course.turn()
    assert len(course.kept) == 1


def test_a_wrong_strategy_is_out(clock):
    course = Course(("usual", "usual+upcast", "other"), lambda _window: None, clock=clock)
    course.drop("usual")
    assert course.over
    course = Course(("usual", "other", "third"), lambda _window: None, clock=clock)
    course.drop("third")
    assert "third" not in take(course, dict.fromkeys(LABELS, 1e-3), 50)


def test_the_usual_one_stays_unless_another_is_faster_by_more_than_noise():
    assert fastest({"usual": 1.0, "other": 0.98}, "usual") == "usual"
    assert fastest({"usual": 1.0, "other": 0.96}, "usual") == "other"
    assert fastest({"other": 1.0}, "usual") == "other"


def test_many_threads_take_turns_without_losing_any(course):
    def work():
        for _ in range(200):
            turn = course.turn()
            if turn is not None and turn[1]:
                course.took(turn[0], lambda: 1e-3)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(course.kept) == 1


# Live calls


class Counted(AttentionStrategy):
    """SDPA, counted; as slow as it is told to be."""

    limits = Limits(masks=frozenset({"causal", "dense"}), scale=True, backward=True, dropout=True)
    slower = 0.0

    def __init__(self):
        self.computed = 0

    def compute_attention(self, query, key, value, **kwargs):
        self.computed += 1
        if self.slower:
            threading.Event().wait(self.slower)
        return F.scaled_dot_product_attention(query, key, value, **kwargs)


QUERY = torch.randn(1, 4, 128, 64, generator=torch.Generator().manual_seed(0))


def live(tmp_path=None, names=("slow", "fast"), **policy):
    """A dispatcher whose usual candidate is the first, by a table, and slow; and its strategies."""
    factory = AttentionStrategyFactory(packages=(), plugins=False)
    for name in names:
        slower = 0.005 if name == "slow" else 0.0
        factory.register_strategy(name, type(name, (Counted,), {"slower": slower}))
    given = {"tune": "live", "cache": tmp_path, **policy}
    dispatcher = AttentionDispatcher(factory, policy=Policy({"*": names}, **given))
    return dispatcher, {name: factory.create_strategy(name) for name in names}


@pytest.fixture
def soon(monkeypatch):
    """Windows follow each other at once, and still count as apart."""
    moments = itertools.count(1e9, 2 * APART)
    monkeypatch.setattr(module.time, "time", lambda: next(moments))
    monkeypatch.setattr(module, "APART", 0.0)


def test_every_call_is_computed_once_while_candidates_take_turns(soon):
    dispatcher, made = live()
    for calls in range(1, 41):
        dispatcher.attention(QUERY, QUERY, QUERY)
        assert sum(one.computed for one in made.values()) == calls
    assert made["slow"].computed <= 2 * (1 + TIMED_TURNS)
    assert min(one.computed for one in made.values()) >= 2


def test_the_fastest_is_found_explained_and_used(soon):
    dispatcher, made = live()
    assert dispatcher.explain(QUERY, QUERY, QUERY).backend == "slow"
    for _ in range(40):
        dispatcher.attention(QUERY, QUERY, QUERY)
    plan = dispatcher.explain(QUERY, QUERY, QUERY)
    assert (plan.backend, plan.rung) == ("fast", MEASURED)
    assert plan.known.seconds["slow"] > plan.known.seconds["fast"]
    assert "a call" in str(plan)
    before = made["slow"].computed
    for _ in range(20):
        dispatcher.attention(QUERY, QUERY, QUERY)
    assert made["slow"].computed == before


def test_what_was_learnt_is_kept_for_the_next_process(soon, tmp_path):
    dispatcher, _ = live(tmp_path)
    for _ in range(60):
        dispatcher.attention(QUERY, QUERY, QUERY)
    dispatcher.experience.finish()
    for tune in ("live", "ahead"):
        later, made = live(tmp_path, tune=tune)
        assert later.explain(QUERY, QUERY, QUERY).rung == MEASURED
        later.attention(QUERY, QUERY, QUERY)
        assert (made["slow"].computed, made["fast"].computed) == (0, 1)
    off, _ = live(tmp_path, tune="off")
    assert off.explain(QUERY, QUERY, QUERY).rung == "preference table for cpu"


@pytest.mark.parametrize("policy", [{"tune": "off"}, {"tune": "ahead"}])
def test_nothing_is_tried_unless_the_policy_is_live(policy):
    dispatcher, made = live(**policy)
    for _ in range(20):
        dispatcher.attention(QUERY, QUERY, QUERY)
    assert made["fast"].computed == 0


def test_nothing_is_tried_where_it_must_not_be():
    dispatcher, made = live()
    wanted = QUERY.clone().requires_grad_()
    small = QUERY[..., :2, :]
    dispatcher.freeze()
    for _ in range(8):
        dispatcher.attention(QUERY, QUERY, QUERY)
    dispatcher.thaw()
    for _ in range(8):
        dispatcher.attention(small, small, small)
        dispatcher.attention(QUERY, QUERY, QUERY, dropout_p=0.5)
        dispatcher.attention(wanted, QUERY, QUERY)
        dispatcher.attention(QUERY, QUERY, QUERY, backend="slow")
        dispatcher.attention(QUERY, QUERY, QUERY, backend=["slow", "fast"])
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(8):
            dispatcher.attention(QUERY, QUERY, QUERY)
    finally:
        torch.use_deterministic_algorithms(False)
    assert made["fast"].computed == 0


def test_freezing_keeps_what_is_known_and_thawing_goes_on(soon):
    dispatcher, made = live()
    for _ in range(14):
        dispatcher.attention(QUERY, QUERY, QUERY)
    dispatcher.freeze()
    known = dispatcher.explain(QUERY, QUERY, QUERY).backend
    before = {name: one.computed for name, one in made.items()}
    outs = [dispatcher.attention(QUERY, QUERY, QUERY) for _ in range(10)]
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert made[known].computed == before[known] + 10


def test_it_is_announced_once(caplog, monkeypatch):
    monkeypatch.setattr(module, "_told", itertools.count())
    with caplog.at_level(logging.INFO, "heedful"):
        for _ in range(2):
            dispatcher, _ = live()
            dispatcher.attention(QUERY, QUERY, QUERY)
    told = [record.getMessage() for record in caplog.records if "tries its candidates" in record.getMessage()]
    assert len(told) == 1


def test_lowerings_are_candidates_too(factory):
    dispatcher = AttentionDispatcher(factory, policy=Policy(tune="live"))
    half = QUERY.half()
    labels = [verdict.label for verdict in dispatcher.explain(half, half, half).contenders]
    assert labels == ["native+upcast", "native"]
    for _ in range(60):
        out = dispatcher.attention(half, half, half)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(half, half, half), atol=2e-3, rtol=2e-3)
    ran = {label for _, _, label in dispatcher.experience.tallies}
    assert {"native", "native+upcast"} <= ran


def test_turns_count_in_the_report():
    dispatcher, made = live()
    for _ in range(30):
        dispatcher.attention(QUERY, QUERY, QUERY)
    counted = {label: tally.calls for (_, _, label), tally in dispatcher.experience.tallies.items()}
    assert counted == {name: one.computed for name, one in made.items()}


class Raises(Counted):
    """A kernel that breaks when it is called."""

    def compute_attention(self, query, key, value, **kwargs):
        self.computed += 1
        raise RuntimeError("no kernel image is available")


class Wrong(Counted):
    """SDPA and one."""

    def compute_attention(self, query, key, value, **kwargs):
        return super().compute_attention(query, key, value, **kwargs) + 1


def three(middle, **policy):
    """A dispatcher with a strategy between two right ones; and its registry."""
    factory = AttentionStrategyFactory(packages=(), plugins=False)
    for name, kind in (("fine", Counted), ("middle", middle), ("other", Counted)):
        factory.register_strategy(name, type(name, (kind,), {}))
    given = {"tune": "live", **policy}
    return AttentionDispatcher(factory, policy=Policy({"*": ("fine", "middle", "other")}, **given)), factory


def test_a_candidate_that_raises_at_its_turn_is_out_and_the_call_is_computed(soon, caplog):
    dispatcher, factory = three(Raises)
    for _ in range(40):
        out = dispatcher.attention(QUERY, QUERY, QUERY)
        torch.testing.assert_close(out, F.scaled_dot_product_attention(QUERY, QUERY, QUERY))
    assert factory.create_strategy("middle").computed == 1
    assert [record.levelname for record in caplog.records if "no kernel image" in record.getMessage()] == ["WARNING"]
    assert dispatcher.explain(QUERY, QUERY, QUERY).rung == MEASURED


def test_no_turn_is_timed_before_the_guard_found_the_candidate_right(soon):
    dispatcher, factory = three(Wrong, guard="raise")
    raised = 0
    for _ in range(40):
        try:
            out = dispatcher.attention(QUERY, QUERY, QUERY)
        except WrongAnswer:
            raised += 1
        else:
            torch.testing.assert_close(out, F.scaled_dot_product_attention(QUERY, QUERY, QUERY))
    assert raised == factory.create_strategy("middle").computed == 1


def test_another_strategy_under_a_known_name_is_checked_anew():
    dispatcher, _ = live(names=("fast",), tune="off")
    for _ in range(3):
        dispatcher.attention(QUERY, QUERY, QUERY)
    dispatcher.factory.register_strategy("fast", Wrong, replace=True)
    with pytest.raises(WrongAnswer):
        dispatcher.attention(QUERY, QUERY, QUERY, backend="fast")
