"""What experience says of one problem, as a value: who is fastest, how that is known, how fast, and who was wrong.

A candidate is a strategy with a chain of rewrites; its label is the strategy's name and the optional rewrites in the
chain, such as ``native+gather_keys``. Times belong to labels, faults to strategies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MEASURED = "measured timing"
SHIPPED = "shipped timing table"
LOCKED = "lock"


@dataclass(frozen=True)
class Knowledge:
    """``winner``: the label to choose, by the rung ``source``; "" where none is known.

    ``seconds`` a call by label; ``errors``: the largest relative error seen of a label; ``faults``: why a strategy is
    quarantined for problems of this class. A lock's winner is the only choice: where it cannot run, nothing does;
    ``tuned``: the strategy's own choices under it, such as tiles, by role.
    """

    winner: str = ""
    source: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    faults: Mapping[str, str] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    tuned: Mapping[str, str] = field(default_factory=dict)

    @property
    def locked(self) -> bool:
        """Whether a lock says what runs."""
        return self.source == LOCKED


NOTHING = Knowledge()


def strategy_of(label: str) -> str:
    """The name of a candidate's strategy."""
    return label.partition("+")[0]
