"""What ran: one tally for each plan of each exact problem, counted at every call and read by reports, locks and traces.

A tally counts down, so that counting and asking whether the guard is due are one step: 0.06 us a call.
"""

from __future__ import annotations

from dataclasses import dataclass

from heedful.select import Plan

NEVER = 1 << 62  # calls
_TELLING = 1e-3  # a relative error above it is that of an approximate kernel, or of 16-bit numbers


@dataclass
class Trust:
    """What the guard knows of one strategy with one chain, for one class of problems.

    ``error`` is the largest relative error seen, ``share`` the largest part of the allowed absolute one; ``seconds`` of
    a call, and ``cost`` of a check, as last measured. ``fault`` is why it is not trusted. ``carried``: calls since the
    last check that other kinds of calls made than the ``newest``, whose tally that is.
    """

    checks: int = 0
    error: float = 0.0
    share: float = 0.0
    seconds: float | None = None
    cost: float = 0.0
    fault: str = ""
    carried: int = 0
    newest: Tally | None = None

    def carry(self, tally: Tally) -> int:
        """A new kind of calls is the newest; how many calls there were since the last check."""
        if self.newest is not None:
            self.carried += self.newest.since
        self.newest = tally
        return self.carried

    def __str__(self) -> str:
        if self.fault:
            return f"WRONG: {self.fault}"
        if not self.checks:
            return "not checked"
        return f"right in {self.checks}" + (f", error {self.error:.2g}" if self.error > _TELLING else "")


class Tally:
    """Calls of one plan: ``left`` until the guard looks again, of ``span``; ``before`` those of earlier spans.

    Where kinds of calls grow without end, as lengths do when tokens are decoded, tallies of one class are folded into
    one, their ``home``.
    """

    __slots__ = ("before", "folded", "home", "left", "plan", "span", "trust")

    def __init__(self, plan: Plan, trust: Trust) -> None:
        self.plan, self.trust = plan, trust
        self.before = 0
        self.left = self.span = NEVER
        self.home = self
        self.folded: list[Tally] = []

    @property
    def calls(self) -> int:
        """How many calls there were, with those of tallies that were folded into it."""
        return self.before + self.span - self.left + sum(tally.calls for tally in self.folded)

    @property
    def since(self) -> int:
        """How many calls there were since the guard last looked."""
        return self.span - self.left

    def fold(self, other: Tally) -> None:
        """Count the other's calls here from now on; it goes on counting, for as long as somebody calls."""
        other.home, other.plan = self, self.plan
        self.folded.append(other)

    @property
    def by_auto(self) -> bool:
        """Whether auto decided about it, and nobody's name or list."""
        words = (self.plan.wish,) if isinstance(self.plan.wish, str) else self.plan.wish
        return "auto" in words and self.plan.backend not in words

    @property
    def lowerings(self) -> tuple[str, ...]:
        """The names of the rewrites, in order."""
        return tuple(step.name for step in self.plan.chosen.steps) if self.plan.chosen else ()

    def time_of(self, calls: int) -> float:
        """The seconds that so many of its calls take, by the times that the guard and learning measured; else 0."""
        label = self.plan.chosen.label if self.plan.chosen else ""
        return calls * (self.trust.seconds or self.plan.known.seconds.get(label, 0.0))

    def wait(self, calls: int) -> None:
        """Have the guard look again at so manieth a call from now."""
        self.before += self.span - self.left
        self.left = self.span = max(1, calls)

    def count(self) -> None:
        """One more call, at which the guard does not look."""
        self.before += 1


def joined_guard(tallies: list[Tally]) -> str:
    """What the guard says of several tallies: each fault, or how many checks were right."""
    trusts = list({id(tally.trust): tally.trust for tally in tallies}.values())
    faults = [str(trust) for trust in trusts if trust.fault]
    if faults or not trusts:
        return "; ".join(faults)
    joint = Trust(sum(trust.checks for trust in trusts), max(trust.error for trust in trusts))
    return str(joint)
