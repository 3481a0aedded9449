"""The same pictures by every backend, from the same noise: what ran, how fast, and how far from the judge's pictures.

Shapes: B pictures, Y rows, X columns, C channels.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import heedful
from heedful.errors import Refused

Draw = Callable[[Callable[[], None]], np.ndarray]


@dataclass(frozen=True)
class Drawn:
    """What one backend drew: pictures (B, Y, X) or (B, Y, X, C) in [0, 1], or the reason why there are none.

    ``kernels`` are the backends that really ran, ``seconds_per_step`` is the median over the steps after the first,
    ``difference`` the largest of any pixel from the judge's pictures.
    """

    backend: str
    pictures: np.ndarray | None = None
    kernels: tuple[str, ...] = ()
    coverage: str = ""
    seconds_per_step: float | None = None
    difference: float | None = None
    refused: str = ""

    def row(self) -> dict[str, Any]:
        """The figures as JSON data, without the pictures."""
        return {
            "backend": self.backend,
            "kernels": list(self.kernels),
            "coverage": self.coverage,
            "seconds_per_step": self.seconds_per_step,
            "largest_difference": self.difference,
            "refused": self.refused or None,
        }


def runnable_backends() -> tuple[list[str], dict[str, str]]:
    """The backends to draw with, "auto" first, and the reasons of those that this machine cannot run."""
    table = heedful.list_backends()
    refused = {row.name: "; ".join(map(str, row.refusals)) for row in table if not row.available}
    return ["auto", *(row.name for row in table if row.available)], refused


def compare(
    pipeline: Any, draw: Draw, backends: Iterable[str], judge: str, on_step: Callable[[str], None]
) -> list[Drawn]:
    """Draw with the judge first, then with each backend, and measure each against the judge.

    ``draw(tick)`` makes the pictures with the pipeline and calls ``tick`` after every step. The pipeline is left as it
    was found. A backend that refuses is part of the answer; a judge that refuses raises Refused.
    """
    judged = _drawn(pipeline, draw, judge, on_step)
    drawn = [judged if name == judge else _drawn_or_refused(pipeline, draw, name, on_step) for name in backends]
    return [_measured(each, judged) for each in drawn]


def _drawn_or_refused(pipeline: Any, draw: Draw, backend: str, on_step: Callable[[str], None]) -> Drawn:
    try:
        return _drawn(pipeline, draw, backend, on_step)
    except Refused as error:
        return Drawn(backend, refused=str(error))


def _drawn(pipeline: Any, draw: Draw, backend: str, on_step: Callable[[str], None]) -> Drawn:
    ticks: list[float] = []

    def tick() -> None:
        ticks.append(time.perf_counter())
        on_step(backend)

    heedful.set_attention_backend(pipeline, backend)
    try:
        pictures = draw(tick)
        report = heedful.attention_report(pipeline)
    finally:
        heedful.reset_attention_backend(pipeline)
    steps = [after - before for before, after in itertools.pairwise(ticks)]
    kernels = tuple(sorted({name for layer in report for name, _ in layer.ran}))
    coverage = f"{report.covered} of {report.total}"
    return Drawn(backend, pictures, kernels, coverage, statistics.median(steps) if steps else None)


def _measured(drawn: Drawn, judge: Drawn) -> Drawn:
    if drawn.pictures is None or judge.pictures is None:
        return drawn
    apart = np.abs(drawn.pictures.astype(np.float64) - judge.pictures)
    return replace(drawn, difference=float(apart.max()))
