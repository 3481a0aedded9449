"""The pure middle: a problem, a wish and the strategies give a plan. Same inputs, same plan.

The ladder inside ``auto``:

1. an empty problem needs no kernel;
2. a lock in use: what it says, or nothing;
3. measured timing: the fastest candidate for problems of this class, as measured on this machine;
4. the shipped timing table for this device, where there is one;
5. the preference table for the device, in its order: the first exact strategy that takes the problem, rewritten if
   need be;
6. exact strategies that the table does not know, by name;
7. the reference.

A candidate is a strategy with a chain of rewrites: beside its usual chain a strategy has one for every optional rewrite
more, or less. Approximate strategies are candidates only where the call's ``max_error`` allows an error, and then
behind all exact ones, or by measured timing. A single name is obeyed or refused. A list is its own fallback order;
"auto" in a list stands for all of the above.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from heedful.errors import Refused
from heedful.knowledge import NOTHING, Knowledge, strategy_of
from heedful.lowering import SplitSequences, Step, chains, lower
from heedful.masks import MaskFacts
from heedful.measuring import spoken
from heedful.policy import Policy, Wish
from heedful.problem import AttentionProblem
from heedful.refusal import Refusal
from heedful.strategy import AttentionStrategy

_HIDING = {"key_padding", "query_padding", "varlen", "dense", "block"}
_MOST_CONTENDERS = 8  # exact ones that are timed against each other: each strategy's usual chain before other chains
_MOST_APPROXIMATE = 8  # by name: one package's many forms must not keep the others from being timed
_WORTH_TIMING = 1 << 20  # flops; below it a kernel runs for some 50 us, as long as what is around it


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

    @property
    def label(self) -> str:
        """The candidate's name in timings and locks: the strategy and the optional rewrites in its chain."""
        return "+".join([self.name, *(step.name for step in self.steps if step.lowering.optional)])

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
    ``given`` is the mask as it came, where its analysis made a simpler one of it. ``contenders`` are the candidates
    that may be timed against each other, the one chosen without timing first. ``known`` is what experience says,
    ``tuned`` what was measured of the chosen strategy's own choices, such as tiles.
    ``str(plan)`` is the explanation.
    """

    problem: AttentionProblem
    wish: Wish
    origin: str
    rung: str
    chosen: Verdict | None
    verdicts: tuple[Verdict, ...]
    given: MaskFacts | None = None
    contenders: tuple[Verdict, ...] = ()
    known: Knowledge = field(default=NOTHING, hash=False)
    tuned: Mapping[str, str] = field(default_factory=dict, hash=False)

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

    @property
    def won(self) -> str:
        """What measuring won over the choice without it: how many times as fast, and with an error of how much."""
        usual = self.contenders[0].label if self.contenders else ""
        if self.chosen is None or self.chosen.label == usual or not self.known.seconds:
            return ""
        seconds, before = (self.known.seconds.get(label) for label in (self.chosen.label, usual))
        error, most = self.known.errors.get(self.chosen.label), self.problem.max_error
        told = [f"{before / seconds:.3g} times as fast as {usual}"] if seconds and before else []
        told += [f"error {error:.2g} of at most {most:g}"] if error and most else []
        return ", ".join(told)

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
        measured = ", ".join(f"{role} by {label}" for role, label in self.tuned.items())
        lines += [f"   {text}" for text in (self.note, self.won, measured) if text]
        for verdict in self.rows:
            sign = "*" if verdict is self.chosen else "+" if verdict.accepts else "-"
            lines.append(f"  {sign} {self.name_of(verdict):<17} {verdict}{self._time_of(verdict)}")
        return "\n".join(lines)

    @property
    def rows(self) -> tuple[Verdict, ...]:
        """The verdicts, each followed by the strategy's other candidates that were measured or chosen."""
        return tuple(row for verdict in self.verdicts for row in (verdict, *self._others_of(verdict)))

    def name_of(self, verdict: Verdict) -> str:
        """The strategy's name; the candidate's label where several rows are of one strategy."""
        alike = [row for row in self.rows if row.name == verdict.name]
        return verdict.label if len(alike) > 1 else verdict.name

    def seconds_of(self, verdict: Verdict) -> float | None:
        """The measured time of a candidate's calls; None where there is none."""
        return self.known.seconds.get(verdict.label) if verdict.accepts else None

    def _others_of(self, verdict: Verdict) -> Iterator[Verdict]:
        every = [*self.contenders, *([self.chosen] if self.chosen else [])]
        told = {verdict.label: verdict}
        for other in every:
            measured = other is self.chosen or other.label in self.known.seconds
            if other.name == verdict.name and measured and other.label not in told:
                told[other.label] = other
                yield other

    def _time_of(self, verdict: Verdict) -> str:
        seconds = self.seconds_of(verdict)
        return "" if seconds is None else f"; {spoken(seconds)} a call"


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


def variants(strategy: AttentionStrategy, problem: AttentionProblem) -> Iterator[Verdict]:
    """The strategy's candidates: its usual chain first, then those with one optional rewrite more or less."""
    for steps, lowered in chains(problem, strategy.limits_for(problem.device)):
        yield Verdict(strategy.name, steps, lowered, strategy.refusals(lowered))


def candidates(
    wish: Wish, problem: AttentionProblem, strategies: Mapping[str, AttentionStrategy], policy: Policy
) -> tuple[str, ...]:
    """The names that a wish stands for, in order. "auto" has approximate strategies only where an error is allowed."""
    exact = [name for name, strategy in strategies.items() if strategy.exactness == "exact"]
    order = policy.order(problem.device, exact)
    if problem.max_error and policy.watches(problem):
        order = (*order, *sorted(set(strategies) - set(exact)))
    names: list[str] = []
    for word in (wish,) if isinstance(wish, str) else wish:
        names += order if word == "auto" else (word,)
    return tuple(dict.fromkeys(names))


def select(
    problem: AttentionProblem,
    wish: Wish,
    strategies: Mapping[str, AttentionStrategy],
    policy: Policy,
    *,
    origin: str = "call",
    excluded: Mapping[str, tuple[Refusal, ...]] | None = None,
    known: Knowledge = NOTHING,
) -> Plan:
    """The plan for a problem. ``wish`` holds strategy names; ``excluded`` are refusals found at the call itself.

    ``known`` is what experience says of the problem: it counts where "auto" decides.
    """
    words = (wish,) if isinstance(wish, str) else wish
    verdicts = []
    for name in candidates(wish, problem, strategies, policy):
        verdict = judge(strategies[name], problem)
        more = (*(excluded or {}).get(name, ()), *_doubts(strategies[name], problem, policy))
        if name in known.faults and wish != name:
            more = (*more, _quarantine(known.faults[name]))
        verdicts.append(Verdict(name, verdict.steps, verdict.lowered, (*verdict.refusals, *more)))
    if problem.is_empty:
        return Plan(problem, wish, origin, "an empty problem needs no kernel", None, tuple(verdicts))
    chosen = next((verdict for verdict in verdicts if verdict.accepts), None)
    rung = "nothing wanted takes it" if chosen is None else _rung(chosen, wish, problem, policy)
    if chosen is not None and chosen.name not in words and strategies[chosen.name].exactness != "exact":
        rung = "within max_error; no exact strategy takes it"
    contenders: tuple[Verdict, ...] = ()
    if chosen is not None and "auto" in words and chosen.name not in words:
        contenders = _contenders(chosen, verdicts, problem, strategies) if known.winner or worth_timing(problem) else ()
        winner = next((each for each in contenders if each.label == known.winner), None)
        if known.locked and winner is None:
            winner = _locked(known, verdicts, problem, strategies)
        if winner is not None:
            chosen, rung = winner, known.source
        elif known.locked:
            chosen, rung = None, f"the lock's {known.winner} does not take it"
    return Plan(problem, wish, origin, rung, chosen, tuple(verdicts), contenders=contenders, known=known)


def worth_timing(problem: AttentionProblem) -> bool:
    """Whether the kernel counts: a problem is not so small that what surrounds it takes as long."""
    scores = problem.batch * problem.heads * problem.query_length * problem.key_length
    return 2 * scores * (problem.head_dim + problem.value_dim) >= _WORTH_TIMING


def _contenders(
    chosen: Verdict,
    verdicts: list[Verdict],
    problem: AttentionProblem,
    strategies: Mapping[str, AttentionStrategy],
) -> tuple[Verdict, ...]:
    """The candidates that may be timed, what is chosen without timing first."""
    usual = [one for one in verdicts if one.accepts and strategies[one.name].limits_for(problem.device).contends]
    approximate = [one for one in usual if strategies[one.name].exactness != "exact"][:_MOST_APPROXIMATE]
    exact = [one for one in usual if strategies[one.name].exactness == "exact"]
    others = [each for one in exact for each in variants(strategies[one.name], problem) if each.accepts]
    unique: dict[str, Verdict] = {}
    for each in (chosen, *exact, *others):
        unique.setdefault(each.label, each)
    return (*list(unique.values())[:_MOST_CONTENDERS], *approximate)


def _locked(
    known: Knowledge,
    verdicts: list[Verdict],
    problem: AttentionProblem,
    strategies: Mapping[str, AttentionStrategy],
) -> Verdict | None:
    """The candidate that a lock names, contending or not."""
    name = strategy_of(known.winner)
    usual = next((verdict for verdict in verdicts if verdict.name == name and verdict.accepts), None)
    if usual is None:
        return None
    return next((each for each in (usual, *variants(strategies[name], problem)) if each.label == known.winner), None)


def _doubts(strategy: AttentionStrategy, problem: AttentionProblem, policy: Policy) -> tuple[Refusal, ...]:
    """An error that is allowed only up to a bound must be measured: nobody else knows it."""
    if strategy.exactness == "exact" or problem.max_error is None or problem.max_error == math.inf:
        return ()
    if policy.watches(problem):
        return ()
    remedy = "turn the guard on, call it eagerly without dropout, or leave max_error out"
    return (Refusal("max_error", f"{problem.max_error:g}", "a guard that measures the error", remedy),)


def _quarantine(reason: str) -> Refusal:
    return Refusal("guard", reason, "right answers", "name it to have it checked again, or `heedful tune --forget`")


def _rung(chosen: Verdict, wish: Wish, problem: AttentionProblem, policy: Policy) -> str:
    if wish == chosen.name:
        return "forced by name"
    if chosen.name in (wish if isinstance(wish, tuple) else ()):
        return "the first of the wanted list that takes it"
    if chosen.name == "reference":
        return "nothing faster takes it"
    known = policy.preferences.get(problem.device, policy.preferences["*"])
    return f"preference table for {problem.device}" if chosen.name in known else "an exact strategy beside the table"
