"""The problems of a run, written down: what ``heedful tune`` measures elsewhere, or later."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heedful.files import read_json, write_json
from heedful.problem import AttentionProblem
from heedful.tally import Tally

FORMAT, KIND = 1, "trace"


@dataclass(frozen=True)
class Trace:
    """Problems, each with how many calls of it there were, the most called first."""

    calls: Mapping[AttentionProblem, int]

    @classmethod
    def of(cls, tallies: Iterable[Tally]) -> Trace:
        """Of what was counted."""
        calls: dict[AttentionProblem, int] = {}
        for tally in tallies:
            calls[tally.plan.problem] = calls.get(tally.plan.problem, 0) + tally.calls
        return cls(
            {problem: calls[problem] for problem in sorted(calls, key=lambda one: -calls[one]) if calls[problem]}
        )

    def save(self, path: Path) -> None:
        """Write it whole, or leave what was there. Raises OSError."""
        problems = [{"calls": calls, "problem": problem.to_dict()} for problem, calls in self.calls.items()]
        write_json(path, {"format": FORMAT, "kind": KIND, "problems": problems})

    @classmethod
    def load(cls, path: Path) -> Trace:
        """A trace from its file. Raises InvalidArgument."""

        def made(data: dict[str, Any]) -> Trace:
            read = [(AttentionProblem.from_dict(each["problem"]), each["calls"]) for each in data["problems"]]
            if not all(isinstance(calls, int) and calls > 0 for _, calls in read):
                raise ValueError("calls are no numbers")
            return cls(dict(read))

        return read_json(path, KIND, FORMAT, made)
