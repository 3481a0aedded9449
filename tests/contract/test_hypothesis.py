"""Hypothesis draws problems in any combination: each strategy computes them rightly or refuses with honest reasons.

Derandomised and without a database, so that a run is the same everywhere; ``slow`` looks at many more.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from heedful import AttentionStrategyFactory
from heedful.testing import Sample, Tolerance, drawn_samples
from heedful.testing.checks import examine
from heedful.testing.subject import Subject

NAMES = sorted(AttentionStrategyFactory.strategies())
SUBJECTS = {name: Subject.of(name, "cpu", Tolerance()) for name in NAMES}
HERE = [name for name in NAMES if SUBJECTS[name].limits.covers("cpu")]
SETTINGS = settings(
    derandomize=True,
    database=None,
    deadline=None,  # the first call of a backend imports what it needs
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow],  # so do the first draws
)


def _examine(name: str, sample: Sample) -> None:
    for aspect in sample.aspects:
        examine(SUBJECTS[name], sample, aspect)


@pytest.mark.parametrize("name", HERE)
@settings(SETTINGS, max_examples=150)
@given(sample=drawn_samples())
def test_right_or_refused(name: str, sample: Sample) -> None:
    _examine(name, sample)


@pytest.mark.slow
@pytest.mark.parametrize("name", HERE)
@settings(SETTINGS, max_examples=3000)
@given(sample=drawn_samples())
def test_right_or_refused_for_longer(name: str, sample: Sample) -> None:
    _examine(name, sample)
