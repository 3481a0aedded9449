"""What became of the contract on this machine's GPU, as one JSON file: what ran, what was refused, what was wrong.

Outcomes are those of ``heedful.testing``, right, refused and wrong, and ``absent``: a package that is not here. The
file is written anew every few seconds, each time as a whole: whatever kills the run, the last one names what ran then.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

Outcome = Literal["right", "refused", "wrong", "absent"]
SECONDS_BETWEEN = 5.0
MOST_CHARACTERS = 4000  # of an error: the end is the telling part


class Record:
    """The outcomes of one run. ``about`` is what they depend on; ``clock`` counts seconds.

    ``wanted``: how many checks the run is going to make, once that is known.
    """

    def __init__(self, path: Path, about: dict[str, Any], clock: Callable[[], float] = time.monotonic) -> None:
        self.path, self.about = path, about
        self.wanted: int | None = None
        self._clock, self._written = clock, clock()
        self._backends: dict[str, dict[str, Any]] = {}
        self._outcomes: dict[tuple[str, str], Outcome] = {}
        self._running: set[str] = set()

    def start(self, test: str) -> None:
        """A test begins."""
        self._running.add(test)
        if self._clock() - self._written >= SECONDS_BETWEEN:
            self.write("unfinished")

    def stop(self, test: str) -> None:
        """A test is over."""
        self._running.discard(test)

    def add(self, backend: str, check: str, outcome: Outcome, detail: str = "") -> None:
        """One outcome; what was wrong once stays wrong, such as a right answer with an error in its tear-down."""
        known = self._outcomes.get((backend, check))
        if known == "wrong" or (known is not None and outcome != "wrong"):
            return
        kept = self._backends.setdefault(backend, {"right": [], "refused": {}, "wrong": {}, "absent": ""})
        if known is not None:
            _take_back(kept, known, check)
        self._outcomes[backend, check] = outcome
        if outcome == "right":
            kept["right"].append(check)
        elif outcome == "refused":
            kept["refused"].setdefault(detail, []).append(check)
        elif outcome == "wrong":
            kept["wrong"][check] = detail[-MOST_CHARACTERS:]
        else:
            kept["absent"] = detail

    @property
    def counts(self) -> dict[str, int]:
        """How many checks had each outcome."""
        every = list(self._outcomes.values())
        return {word: every.count(word) for word in ("right", "refused", "wrong", "absent")}

    def write(self, ended: str) -> None:
        """Put the file in its place as a whole. ``ended``: "completed", "interrupted", …; "unfinished" until then."""
        content = {
            **self.about,
            "ended": ended,
            "wanted": self.wanted,
            "counts": self.counts,
            "running": sorted(self._running),
            "backends": dict(sorted(self._backends.items())),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        try:
            beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            beside.replace(self.path)
        finally:
            with suppress(FileNotFoundError):
                beside.unlink()
        self._written = self._clock()


def _take_back(kept: dict[str, Any], outcome: Outcome, check: str) -> None:
    if outcome == "right":
        kept["right"].remove(check)
    elif outcome == "refused":
        for reason, checks in list(kept["refused"].items()):
            kept["refused"][reason] = [one for one in checks if one != check]
            if not kept["refused"][reason]:
                del kept["refused"][reason]
    else:
        kept["absent"] = ""
