"""What became of a backend's checks, added up as they come: cells of the matrix, faults, refusals. Plain JSON data."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from heedful.verify.features import NAMES
from heedful.verify.job import Job

Outcome = Literal["right", "refused", "wrong", "crashed", "hung"]
OUTCOMES: tuple[Outcome, ...] = ("right", "refused", "wrong", "crashed", "hung")
START = "start"  # the aspect of what a worker does before its checks: it may crash there, too
FAULTS = ("wrong", "crashed", "hung")
_LONGEST = 4000  # characters of a fault's text


@dataclass
class Cell:
    """A feature of a backend: how many checks had each outcome, the worst error of the right ones, in units of what is
    allowed and absolute, and the limits that refused, each with its number of checks.
    """

    counts: dict[str, int] = field(default_factory=dict)
    units: float | None = None
    error: float | None = None
    limits: dict[str, int] = field(default_factory=dict)

    def add(self, outcome: str, event: Mapping[str, Any]) -> None:
        """One check more."""
        self.counts[outcome] = self.counts.get(outcome, 0) + 1
        if event.get("units") is not None:
            self.units = max(self.units or 0.0, event["units"])
            self.error = max(self.error or 0.0, event["error"] or 0.0)
        for limit in event.get("limits", ()):
            self.limits[limit] = self.limits.get(limit, 0) + 1

    @property
    def outcome(self) -> str:
        """The worst of all; a cell that is right in part is right, and one without any checks is ``none``."""
        order = ("crashed", "hung", "wrong", "right", "refused")
        return next((word for word in order if self.counts.get(word)), "none")

    def to_dict(self) -> dict[str, Any]:
        """As JSON data; of the limits those that refused most come first."""
        limits = dict(sorted(self.limits.items(), key=lambda one: -one[1]))
        return {"outcome": self.outcome, **self.counts, "units": self.units, "error": self.error, "limits": limits}


@dataclass
class Column:
    """One backend. ``absent``: why it cannot be verified here; "" where it can.

    ``planned``: checks to make, None until it is known; ``made``: those with an outcome; ``unmade``: why some were not.
    """

    job: Job
    name: str
    exactness: str = ""
    version: str = ""
    planned: int | None = None
    made: int = 0
    samples: int = 0
    seconds: float = 0.0
    absent: str = ""
    invalid: str = ""
    unmade: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    cells: dict[str, Cell] = field(default_factory=dict)
    faults: list[dict[str, Any]] = field(default_factory=list)
    refusals: dict[str, list[str]] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """``invalid``, ``wrong``, ``absent``, ``unfinished`` or ``right``."""
        for word, there in (("invalid", self.invalid), ("wrong", self.faults), ("absent", self.absent)):
            if there:
                return word
        return "right" if self.planned == self.made else "unfinished"

    def know(self, event: Mapping[str, Any]) -> None:
        """What a worker says of itself when it is ready."""
        self.planned = event["checks"]
        self.exactness, self.version = event.get("exactness", ""), event.get("version", "")
        self.samples = event.get("samples", 0)

    def add(self, check: Mapping[str, Any], outcome: str, event: Mapping[str, Any]) -> None:
        """One check's outcome. ``event``: the worker's words, or those about its end."""
        self.made += check["aspect"] != START
        self.counts[outcome] = self.counts.get(outcome, 0) + 1
        self.seconds += event.get("seconds", 0.0)
        for name in check["features"]:
            self.cells.setdefault(name, Cell()).add(outcome, event)
        if outcome == "refused":
            self.refusals.setdefault(event["detail"], []).append(check["check"])
            if check["aspect"] == "device":
                self.absent = "; ".join(event["reasons"])
        if outcome in FAULTS:
            self.faults.append(self._fault(check, outcome, event))

    def _fault(self, check: Mapping[str, Any], outcome: str, event: Mapping[str, Any]) -> dict[str, Any]:
        numbers = {name: event.get(name) for name in ("what", "error", "units")}
        return {
            "check": check["check"],
            "sample": check["sample"],
            "aspect": check["aspect"],
            "features": list(check["features"]),
            "outcome": outcome,
            "detail": event["detail"][:_LONGEST],
            **numbers,
            "reproduce": reproduction(self.job, check["check"]),
        }

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "name": self.name,
            "plugin": self.job.plugin or None,
            "status": self.status,
            "exactness": self.exactness,
            "version": self.version,
            "reason": self.absent or self.invalid or self.unmade,
            "planned": self.planned,
            "made": self.made,
            "samples": self.samples,
            "seconds": round(self.seconds, 2),
            "counts": {word: self.counts.get(word, 0) for word in OUTCOMES},
            "cells": {name: self.cells[name].to_dict() for name in NAMES if name in self.cells},
            "faults": self.faults,
            "refusals": self.refusals,
        }


def reproduction(job: Job, check: str) -> dict[str, str]:
    """How to have one check again: as a command, and as a line of Python."""
    whose = ["--plugin", job.plugin] if job.plugin else [job.backend]
    words = ["heedful", "verify", *whose, "--device", job.device]
    words += [word for name in job.dtypes for word in ("--dtype", name)] if job.dtypes else []
    words += ["--seed", str(job.seed)] if job.seed else []
    kind = job.device.partition(":")[0]
    module, _, name = job.plugin.partition(":")
    given = f"{module}.{name}" if job.plugin else repr(job.backend)
    seed = f", seed={job.seed}" if job.seed else ""
    lines = [f"import {module}"] if job.plugin else []
    lines += [f"import heedful.testing as t; print(t.verify({given}, devices=({kind!r},), only=({check!r},){seed}))"]
    return {"command": shlex.join([*words, "--only", check]), "python": "; ".join(lines)}
