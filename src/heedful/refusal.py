"""One reason why a call cannot be computed as it stands: a sentence with the numbers in it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """One reason why a strategy cannot compute a problem: ``field`` is what lowerings look at to mend it."""

    field: str
    observed: str
    required: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.field} is {self.observed}, it takes {self.required}" + (
            f" ({self.remedy})" if self.remedy else ""
        )
