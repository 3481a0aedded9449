"""The pure middle: a problem, a wish and the strategies give a plan. Same inputs, same plan.

The ladder inside ``auto``:

1. an empty problem needs no kernel;
2. the preference table for the device, in its order: the first exact strategy that takes the problem, rewritten if
   need be;
3. exact strategies that the table does not know, by name;
4. the reference.

A single name is obeyed or refused. A list is its own fallback order; "auto" in a list stands for all of the above.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from heedful.errors import Refused
from heedful.lowering import SplitSequences, Step, lower
from heedful.masks import MaskFacts
from heedful.policy import Policy, Wish
from heedful.problem import AttentionProblem
from heedful.refusal import Refusal
from heedful.strategy import AttentionStrategy

_HIDING = {"key_padding", "query_padding", "varlen", "dense", "block"}


@dataclass(frozen=True)
class Verdict:
    """What became of one candidate: the rewrites it would need, and the reasons if it still refuses."""

    name: str
    steps: tuple[Step, ...]
    lowered: AttentionProblem
    refusals: tuple[Refusal, ...]

    @property
    def accepts(self) -> bool:
        """Whether the strategy computes the problem."""
        return not self.refusals

    def drops_hidden_keys(self, problem: AttentionProblem) -> bool:
        """Whether all keys that a padding mask hides are left out before the kernel: not even NaN in them matters."""
        padded = bool(problem.mask.kinds) and set(problem.mask.kinds) <= {"key_padding", "query_padding"}
        dropped = any(step.lowering.drops_keys and step.old.mask != step.new.mask for step in self.steps)
        return padded and dropped and not set(self.lowered.mask.kinds) - {"varlen"}

    def __str__(self) -> str:
        if self.refusals:
            return f"refuses: {'; '.join(map(str, self.refusals))}"
        rewrites = ", ".join(map(str, self.steps))
        return f"takes it after {rewrites}" if rewrites else "takes it as it is"


@dataclass(frozen=True)
class Plan:
    """A decision: the chosen candidate, by which rung of the ladder, and the verdict on every other one.

    ``chosen`` is None for an empty problem, which needs no kernel, and where all candidates refuse (``refused``).
    ``given`` is the mask as it came, where its analysis made a simpler one of it.
    ``str(plan)`` is the explanation.
    """

    problem: AttentionProblem
    wish: Wish
    origin: str
    rung: str
    chosen: Verdict | None
    verdicts: tuple[Verdict, ...]
    given: MaskFacts | None = None

    @property
    def backend(self) -> str:
        """The strategy that runs; "none" where nothing is to be computed, "refused" where nothing takes it."""
        return self.chosen.name if self.chosen else "refused" if self.refused else "none"

    @property
    def refused(self) -> bool:
        """Whether the problem needs a kernel and no wanted candidate takes it."""
        return self.chosen is None and not self.problem.is_empty

    @property
    def note(self) -> str:
        """Whether NaN and inf in keys that the mask hides could reach the output; "" where it hides none."""
        return _of_hidden_keys(self.chosen, self.problem) if self.chosen else ""

    def checked(self) -> Plan:
        """The plan itself; raises Refused, with every candidate's reasons, where nothing takes the problem."""
        if self.refused:
            raise Refused(self.problem, {verdict.name: verdict.refusals for verdict in self.verdicts})
        return self

    @property
    def passed_over(self) -> tuple[Verdict, ...]:
        """The wanted candidates before the chosen one, with their reasons."""
        names = [verdict.name for verdict in self.verdicts]
        end = names.index(self.chosen.name) if self.chosen else 0
        return tuple(verdict for verdict in self.verdicts[:end] if verdict.refusals)

    def __str__(self) -> str:
        wish = self.wish if isinstance(self.wish, str) else " > ".join(self.wish)
        lines = [f"{self.problem}", f"-> {self.backend}: {self.rung} (wish {wish!r} from {self.origin})"]
        if self.given is not None:
            lines.append(f"   the mask came as {self.given} and was read as {self.problem.mask}")
        if self.note:
            lines.append(f"   {self.note}")
        for verdict in self.verdicts:
            sign = "*" if verdict is self.chosen else "+" if verdict.accepts else "-"
            lines.append(f"  {sign} {verdict.name:<17} {verdict}")
        return "\n".join(lines)


def _of_hidden_keys(chosen: Verdict, problem: AttentionProblem) -> str:
    """Whether NaN and inf in keys that a mask hides can reach the output."""
    split = any(step.name == SplitSequences.name for step in chosen.steps)
    packed = split or (chosen.lowered.layout == "THD" and problem.mask.varlen)  # each sequence's own keys are read
    if not set(problem.mask.kinds) & _HIDING or problem.mask.noop or packed:
        return ""
    if chosen.drops_hidden_keys(problem):
        names = ", ".join(step.name for step in chosen.steps if step.lowering.drops_keys)
        return f"hidden keys never reach the kernel ({names}): even NaN in them is harmless"
    return "hidden keys reach the kernel with weight 0: NaN or inf in them would reach the output"


def judge(strategy: AttentionStrategy, problem: AttentionProblem) -> Verdict:
    """Whether a strategy takes the problem, after the rewrites that mend what it refuses."""
    steps, lowered = lower(problem, strategy.limits_for(problem.device))
    return Verdict(strategy.name, steps, lowered, strategy.refusals(lowered))


def candidates(
    wish: Wish, problem: AttentionProblem, strategies: Mapping[str, AttentionStrategy], policy: Policy
) -> tuple[str, ...]:
    """The names that a wish stands for, in order. Approximate strategies are never part of "auto"."""
    exact = [name for name, strategy in strategies.items() if strategy.exactness == "exact"]
    names: list[str] = []
    for word in (wish,) if isinstance(wish, str) else wish:
        names += policy.order(problem.device, exact) if word == "auto" else (word,)
    return tuple(dict.fromkeys(names))


def select(
    problem: AttentionProblem,
    wish: Wish,
    strategies: Mapping[str, AttentionStrategy],
    policy: Policy,
    *,
    origin: str = "call",
    excluded: Mapping[str, tuple[Refusal, ...]] | None = None,
) -> Plan:
    """The plan for a problem. ``wish`` holds strategy names; ``excluded`` are refusals found at the call itself."""
    verdicts = []
    for name in candidates(wish, problem, strategies, policy):
        verdict = judge(strategies[name], problem)
        more = (excluded or {}).get(name, ())
        verdicts.append(Verdict(name, verdict.steps, verdict.lowered, (*verdict.refusals, *more)))
    if problem.is_empty:
        return Plan(problem, wish, origin, "an empty problem needs no kernel", None, tuple(verdicts))
    chosen = next((verdict for verdict in verdicts if verdict.accepts), None)
    rung = "nothing wanted takes it" if chosen is None else _rung(chosen, wish, problem, policy)
    return Plan(problem, wish, origin, rung, chosen, tuple(verdicts))


def _rung(chosen: Verdict, wish: Wish, problem: AttentionProblem, policy: Policy) -> str:
    if wish == chosen.name:
        return "forced by name"
    if chosen.name in (wish if isinstance(wish, tuple) else ()):
        return "the first of the wanted list that takes it"
    if chosen.name == "reference":
        return "nothing faster takes it"
    known = policy.preferences.get(problem.device, policy.preferences["*"])
    return f"preference table for {problem.device}" if chosen.name in known else "an exact strategy beside the table"
