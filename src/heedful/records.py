"""What was measured of a class of problems, as values: windows of measuring, faults, and who won.

Pure. ``Record.read`` takes data that may come from anywhere, checks every field of it, and raises ValueError.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from heedful.knowledge import strategy_of

MOST_WINDOWS = 8
APART = 10.0  # seconds between windows that are evidence of their own
_MOST_LABELS = 64
_LONGEST_NAME = 2000  # of a class of problems, a candidate, a run, a reason
_LONGEST_TIME = 1e6  # seconds a call
_LAST_MOMENT = 1e11  # unix seconds
_EQUAL = 0.01  # a difference that two windows cannot tell
_BOUND = 4  # separated windows, after which the median decides


@dataclass(frozen=True)
class Window:
    """One bout of measuring of one class of problems.

    ``ended``: unix seconds. ``run``: which process it was. ``seconds``: the median a call, by candidate
    (``native+upcast+gather_keys``). ``turns``: timed turns behind each median.
    """

    ended: float
    run: str
    seconds: Mapping[str, float] = field(hash=False)
    turns: int

    @classmethod
    def read(cls, data: Any) -> Window:
        """A window out of JSON data that may come from anywhere. Raises ValueError."""
        table = _table(data, "ended", "run", "seconds", "turns")
        seconds = {name_of(label): _number(one, _LONGEST_TIME) for label, one in _table(table["seconds"]).items()}
        if not 0 < len(seconds) <= _MOST_LABELS or not all(seconds.values()):
            raise ValueError("a window without times, with too many, or with a time of zero")
        turns = _number(table["turns"], 1e9)
        if turns != int(turns) or turns < 1:
            raise ValueError(f"turns: got {turns}")
        return cls(_number(table["ended"], _LAST_MOMENT), name_of(table["run"]), seconds, int(turns))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {"ended": self.ended, "run": self.run, "seconds": dict(self.seconds), "turns": self.turns}

    def separated(self, other: Window, apart: float) -> bool:
        """Whether what disturbed the one is unlikely to have disturbed the other."""
        return abs(self.ended - other.ended) >= apart

    def best(self) -> str:
        """The candidate of the least time; of equals the first by name."""
        return min(sorted(self.seconds), key=self.seconds.__getitem__)

    def agrees(self, other: Window, within: float) -> bool:
        """Whether the best here is among the best there, and the other way round.

        A candidate without a time was dropped as clearly behind.
        """
        pairs = ((self, other), (other, self))
        return all(b.seconds.get(a.best(), math.inf) <= (1 + within) * b.seconds[b.best()] for a, b in pairs)


@dataclass(frozen=True)
class Record:
    """All that is known of one class of problems.

    ``windows``: newest last, the last eight. ``faults``: why a candidate is quarantined for this class.
    """

    windows: tuple[Window, ...] = ()
    faults: Mapping[str, str] = field(default_factory=dict, hash=False)

    @classmethod
    def read(cls, data: Any) -> Record:
        """A record out of JSON data that may come from anywhere. Raises ValueError."""
        table = _table(data, "windows", "faults")
        if not isinstance(table["windows"], (list, tuple)):
            raise ValueError("windows: not a list")
        faults = {name_of(label): name_of(reason) for label, reason in _table(table["faults"]).items()}
        return cls().joined(cls(tuple(map(Window.read, table["windows"])), faults))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, of which ``read`` makes the equal record."""
        return {"windows": [window.to_dict() for window in self.windows], "faults": dict(self.faults)}

    @functools.cached_property
    def text(self) -> str:
        """Its JSON, made once: a store writes every record whenever one changes."""
        return json.dumps(self.to_dict(), separators=(",", ":"), allow_nan=False)

    def joined(self, newer: Record) -> Record:
        """Both: windows united by run and moment, of which the newest eight stay, and the faults of both."""
        windows = {(one.ended, one.run): one for one in (*self.windows, *newer.windows)}
        faults = {**self.faults, **newer.faults}
        newest = tuple(windows[moment] for moment in sorted(windows)[-MOST_WINDOWS:])
        return Record(newest, dict(list(faults.items())[-_MOST_LABELS:]))

    def winner(self) -> str | None:
        """The settled winner among the candidates that are not quarantined: see ``settled``."""
        sound = ({label: s for label, s in w.seconds.items() if not self._is_out(label)} for w in self.windows)
        pairs = zip(self.windows, sound, strict=True)
        return settled(tuple(Window(w.ended, w.run, seconds, w.turns) for w, seconds in pairs if seconds))

    def _is_out(self, label: str) -> bool:
        """Whether a candidate, or its strategy, is quarantined."""
        return label in self.faults or strategy_of(label) in self.faults

    def seconds(self) -> dict[str, float]:
        """The best knowledge of each candidate: the median over the windows that have it."""
        labels = dict.fromkeys(label for window in self.windows for label in window.seconds)
        return {label: _median(label, self.windows) for label in labels}

    @property
    def newest(self) -> float:
        """When it was last measured, in unix seconds; 0 where it never was."""
        return self.windows[-1].ended if self.windows else 0.0


def settled(windows: tuple[Window, ...], *, apart: float = APART, within: float = 0.03) -> str | None:
    """The winner that two windows, separated in time, agree on; None while there is none.

    A busy minute can invert a ranking (fp16, native against upcast, once took 39 ms against 8, quiet 1.2 against 2.4),
    so no single window settles anything, nor do windows that disagree, nor those of several processes in one minute.
    Separated are windows ``apart`` seconds apart. They agree where each one's best is within ``within`` of the other's.
    What counts is the newest window, and the latest earlier one that agrees: the least median of the two wins. Of four
    separated windows without agreement the least median of all wins, so that measuring comes to an end. Of medians
    within one per cent that of the fewest rewrites wins.
    """
    newest_first = sorted(windows, key=lambda window: (window.ended, window.run), reverse=True)
    if not newest_first:
        return None
    newest = newest_first[0]
    for other in newest_first[1:]:
        if newest.separated(other, apart) and newest.agrees(other, within):
            return _least_median([newest, other])
    separated: list[Window] = []
    for window in newest_first:
        if all(window.separated(other, apart) for other in separated):
            separated.append(window)
    return _least_median(separated) if len(separated) >= _BOUND else None


def _least_median(windows: list[Window]) -> str:
    """Over all windows first: a candidate that half of them dropped as clearly behind is no winner while others are."""
    labels = sorted({label for window in windows for label in window.seconds})
    overall = {label: statistics.median(w.seconds.get(label, math.inf) for w in windows) for label in labels}
    least = min(overall.values())
    if least < math.inf:
        labels = [label for label in labels if overall[label] <= (1 + _EQUAL) * least]
    return min(labels, key=lambda label: (label.count("+"), overall[label], _median(label, windows)))


def _median(label: str, windows: list[Window] | tuple[Window, ...]) -> float:
    return statistics.median(window.seconds[label] for window in windows if label in window.seconds)


def name_of(value: Any) -> str:
    """A name as it came: a line of printable characters. Raises ValueError."""
    if not isinstance(value, str) or not 0 < len(value) <= _LONGEST_NAME or not value.isprintable():
        raise ValueError(f"a name that is no line of up to {_LONGEST_NAME} printable characters")
    return value


def as_line(text: str) -> str:
    """Any text as such a line."""
    words = " ".join(text.split())[:_LONGEST_NAME]
    return "".join(letter if letter.isprintable() else "?" for letter in words) or "no reason given"


def _table(data: Any, *fields: str) -> Mapping[Any, Any]:
    if not isinstance(data, Mapping) or not data.keys() >= set(fields):
        raise ValueError(f"no table of {', '.join(fields) or 'names'}")
    return data


def _number(value: Any, most: float) -> float:
    """A number from 0 to ``most``; compared before it is converted, as integers may have any length."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= most:
        raise ValueError(f"a number that is not one from 0 to {most:g}")
    return float(value)
