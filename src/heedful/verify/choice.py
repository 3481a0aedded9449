"""Which of a strategy's checks are made. Pure: the same checks and the same wishes give the same choice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

import torch

from heedful.testing.contract import Check
from heedful.testing.samples import Sample
from heedful.verify.features import features_of

Size = Literal["quick", "usual", "all"]
_OF_EACH = 3  # checks of every feature in a quick run
_LONG = ("declaration", "coverage")  # checks of the strategy as a whole that go through every sample
_UNCROSSED = ("dropout", "compile")  # aspects whose samples the table has in few dtypes


@dataclass(frozen=True)
class Choice:
    """``quick``: a few checks of every feature; ``usual``: every sample as it stands in the table; ``all``: every
    sample in every dtype, and in both layouts.

    ``dtypes``: every sample in these dtypes, and in no other. ``only``: the checks of these names or shell patterns,
    out of all.
    """

    size: Size = "usual"
    dtypes: tuple[torch.dtype, ...] = ()
    only: tuple[str, ...] = ()

    def of(self, every: Iterable[Check]) -> tuple[Check, ...]:
        """The chosen ones, in their order."""
        checks = tuple(every)
        if self.dtypes:
            checks = tuple(_in_dtypes(checks, self.dtypes, both_layouts=self.size == "all"))
        if self.only:
            names = {one.name for one in checks}
            return tuple(one for one in checks if any(_matches(one.name, word, names) for word in self.only))
        if self.size == "all":
            return checks
        usual = tuple(one for one in checks if self.dtypes or not one.slow)
        return tuple(_few(usual)) if self.size == "quick" else usual


def _matches(name: str, word: str, names: set[str]) -> bool:
    """A word that is a name stands for that check alone: names of crossed samples hold a star."""
    return name == word if word in names else fnmatchcase(name, word)


def _in_dtypes(checks: tuple[Check, ...], dtypes: tuple[torch.dtype, ...], *, both_layouts: bool) -> Iterator[Check]:
    """The checks of a strategy as a whole, and those of the samples in these dtypes."""
    for check in checks:
        sample = check.sample
        if sample is None:
            yield check
        elif check.aspect in _UNCROSSED and "dtype" not in sample.name:
            for dtype in dtypes:
                yield replace(check, sample=_cast(sample, dtype))
        elif sample.dtype in dtypes and (both_layouts or not sample.name.endswith("*bshd")):
            yield check


def _cast(sample: Sample, dtype: torch.dtype) -> Sample:
    if sample.dtype == dtype:
        return sample
    return replace(sample, name=f"{sample.name}*{str(dtype).removeprefix('torch.')}", dtype=dtype)


def _few(checks: tuple[Check, ...]) -> Iterator[Check]:
    """So many that every feature has a few, if there are as many; and the short ones of the strategy as a whole."""
    had: Counter[str] = Counter()
    for check in checks:
        names = features_of(check)
        if check.sample is None and check.aspect not in _LONG:
            yield check
        elif check.sample is not None and any(had[name] < _OF_EACH for name in names):
            had.update(names)
            yield check
