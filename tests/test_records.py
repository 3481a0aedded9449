"""Records as values: who won, what joins, and which data is refused."""

import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heedful.records import MOST_WINDOWS, Record, Window, as_line, settled

QUIET = {"native": 1.2e-3, "native+upcast": 2.4e-3}
BUSY = {"native": 39e-3, "native+upcast": 8e-3}  # measured once, on the same machine


def window(ended, run="run", turns=5, **seconds):
    return Window(float(ended), run, {name.replace("_", "+"): one for name, one in seconds.items()}, turns)


def windows(*rankings, step=60.0):
    return tuple(Window(i * step, "run", ranking, 5) for i, ranking in enumerate(rankings))


# Who won


def test_nothing_and_one_window_settle_nothing():
    assert settled(()) is None
    assert settled(windows(QUIET)) is None


def test_two_windows_that_agree_settle_it():
    assert settled(windows(QUIET, QUIET)) == "native"
    assert settled(windows(BUSY, BUSY)) == "native+upcast"  # agreed on: no window knows better


def test_a_busy_minute_settles_nothing_and_the_next_quiet_window_does():
    assert settled(windows(QUIET, BUSY)) is None
    assert settled(windows(BUSY, QUIET)) is None
    assert settled(windows(BUSY, QUIET, QUIET)) == "native"
    assert settled(windows(QUIET, BUSY, QUIET)) == "native"


def test_windows_of_one_moment_are_one_piece_of_evidence_also_those_of_different_runs():
    assert settled((window(0, a=1, b=2), window(9.9, a=1, b=2))) is None
    assert settled((window(0, a=1, b=2), window(10, a=1, b=2))) == "a"
    assert settled((window(0, a=1, b=2), window(0, "other", a=1, b=2))) is None
    assert settled((window(0, a=1, b=2), window(9.9, a=1, b=2)), apart=5) == "a"


def test_near_equals_agree_both_ways():
    assert settled(windows({"a": 1.0, "b": 1.02}, {"a": 1.019, "b": 1.0})) == "a"  # by a hair, over both
    assert settled(windows({"a": 1.0, "b": 1.02}, {"a": 1.03, "b": 1.0})) == "b"
    assert settled(windows({"a": 1.0, "b": 1.05}, {"a": 1.05, "b": 1.0})) is None
    assert settled(windows({"a": 1.0, "b": 1.02}, {"a": 1.5, "b": 1.0})) is None  # a won, and is far behind now


def test_of_equals_the_fewest_rewrites_win():
    assert settled(windows({"a": 1.009, "a+b": 1.0}, {"a": 1.009, "a+b": 1.0})) == "a"
    assert settled(windows({"a": 1.02, "a+b": 1.0}, {"a": 1.02, "a+b": 1.0})) == "a+b"
    assert settled(windows({"a+b": 1.0, "a+b+c": 0.995}, {"a+b": 1.0, "a+b+c": 0.999})) == "a+b"


def test_a_candidate_that_was_dropped_as_clearly_behind_disagrees():
    assert settled(windows({"a": 1.0}, {"b": 1.0})) is None
    assert settled(windows({"a": 1.0, "b": 3.0}, {"a": 1.0})) == "a"


def test_four_windows_without_agreement_are_decided_by_the_median():
    rankings = ({"a": 1.0, "b": 2.0}, {"a": 1.1, "b": 9.0}, {"a": 1.0, "b": 8.0}, {"a": 9.0, "b": 3.0})
    assert settled(windows(*rankings[2:])) is None
    assert settled(windows(*rankings[1:])) is None
    assert settled(windows(*rankings)) == "a"
    assert settled(windows(*rankings, step=3.0)) is None  # of one moment: two pieces of evidence, not four


def test_what_half_of_the_windows_dropped_does_not_win_by_its_median():
    rankings = ({"a": 1.0, "b": 2.0}, {"b": 2.0}, {"a": 1.0, "b": 2.0}, {"b": 2.0})
    assert settled(windows(rankings[0], rankings[2], rankings[1], {"b": 2.0, "c": 1.5})) == "b"
    alone = ({"a": 1.0}, {"b": 2.0}, {"c": 3.0}, {"d": 0.5})
    assert settled(windows(*alone)) == "d"


times = st.dictionaries(st.sampled_from("abcd"), st.floats(1e-6, 1e3), min_size=1)
some_windows = st.lists(st.builds(Window, st.floats(0, 200), st.sampled_from("xy"), times, st.just(3)), max_size=8)


@given(some_windows, st.randoms())
def test_a_winner_was_measured_and_the_order_of_windows_is_none(found, random):
    winner = settled(tuple(found))
    assert winner is None or any(winner in one.seconds for one in found)
    shuffled = list({(one.ended, one.run): one for one in found}.values())
    expected = settled(tuple(shuffled))
    random.shuffle(shuffled)
    assert settled(tuple(shuffled)) == expected


@given(st.lists(times, min_size=4, max_size=8))
def test_four_separated_windows_always_settle(rankings):
    assert settled(windows(*rankings)) is not None


# Records


def test_a_quarantined_candidate_never_wins():
    record = Record(windows(QUIET, QUIET))
    assert record.winner() == "native"
    assert record.joined(Record((), {"native+upcast": "NaN"})).winner() == "native"
    assert record.joined(Record((), {"native": "NaN"})).winner() is None  # a strategy with all its candidates
    assert record.joined(Record((), dict.fromkeys(QUIET, "NaN"))).winner() is None


def test_the_best_knowledge_is_the_median_over_the_windows_that_have_it():
    record = Record(windows({"a": 1.0, "b": 4.0}, {"a": 9.0}, {"a": 2.0, "b": 5.0}))
    assert record.seconds() == {"a": 2.0, "b": 4.5}
    assert Record().seconds() == {}


def test_the_newest_eight_windows_stay_and_the_same_one_counts_once():
    one, other = Record(windows(*[QUIET] * 6)), Record((window(90, a=1), window(30, "other", a=1), *windows(QUIET)))
    both = one.joined(other)
    assert both == other.joined(one)
    assert [w.ended for w in both.windows] == [0, 30, 60, 90, 120, 180, 240, 300]
    more = both.joined(Record((window(1000, a=1),)))
    assert len(more.windows) == MOST_WINDOWS
    assert more.windows[-1].ended == more.newest == 1000
    assert both.joined(both) == both


def test_the_newer_reason_of_a_fault_counts():
    assert Record((), {"a": "old", "b": "x"}).joined(Record((), {"a": "new"})).faults == {"a": "new", "b": "x"}


def test_a_record_is_what_its_text_says():
    record = Record(windows(QUIET, BUSY), {"flex": "off by 0.3"})
    assert Record.read(json.loads(record.text)) == record


BAD_NUMBERS = (None, "1", True, math.nan, math.inf, -1, 10**400, [], {})


def test_every_field_of_a_window_is_checked():
    good = window(5, native=1.0).to_dict()
    assert Window.read(good) == window(5, native=1.0)
    changes = [{"ended": bad} for bad in BAD_NUMBERS]
    changes += [{"turns": bad} for bad in (*BAD_NUMBERS, 0, 1.5)]
    changes += [{"seconds": {"native": bad}} for bad in (*BAD_NUMBERS, 0, 1e7)]
    changes += [{"seconds": bad} for bad in (None, [], 1, {}, {"": 1.0}, {"a\nb": 1.0}, {3: 1.0})]
    changes += [{"seconds": {f"c{i}": 1.0 for i in range(65)}}]
    changes += [{"run": bad} for bad in (None, 1, "", "\ud800", "\x1b[2J", "x" * 2001)]
    for change in changes:
        with pytest.raises(ValueError, match=r".+"):
            Window.read({**good, **change})
    for left_out in good:
        with pytest.raises(ValueError, match="no table"):
            Window.read({name: one for name, one in good.items() if name != left_out})


def test_every_field_of_a_record_is_checked():
    good = {"windows": [window(5, native=1.0).to_dict()], "faults": {"flex": "wrong"}}
    assert Record.read(good).faults == {"flex": "wrong"}
    bad = [{"windows": one} for one in (None, {}, "text", [None], [[]], [{}])]
    bad += [{"faults": one} for one in (None, [], {"": "x"}, {"a": None}, {"a": ""}, {"a": "\x00"})]
    for one in [None, [], "text", {}, *({**good, **change} for change in bad)]:
        with pytest.raises(ValueError, match=r".+"):
            Record.read(one)


def test_any_text_becomes_a_line():
    assert as_line("CUDA error:\n  an\x1b illegal\tmemory \ud800 access") == "CUDA error: an? illegal memory ? access"
    assert as_line("") == as_line(" \n") == "no reason given"
    assert len(as_line("x " * 100_000)) == 2000


def test_orders_of_joining_give_the_same():
    parts = [Record((window(i * 7 % 5, str(i), a=1 + i),)) for i in range(4)]
    joined = set()
    for order in itertools.permutations(parts):
        made = Record()
        for part in order:
            made = made.joined(part)
        joined.add(made.text)
    assert len(joined) == 1
