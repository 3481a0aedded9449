"""What auto's choice costs beside the best single choice, and what it wins over torch: every mask and dtype, on a CPU.

The named cases whose plain float32 call takes at most 250 ms, each without a mask, causal, with half of the keys padded
and with a dense bool mask, in three dtypes. auto has learnt first, ahead of time, in two windows. Then two windows of
interleaved rounds, in each of which auto, torch's SDPA (given the mask as it broadcasts) and the best candidates take
turns. A candidate is the call that a user has who fixes it: by a lock that holds it alone.

- regret: auto over the best candidate of the same window, which is chosen by the very times that judge it;
- later: auto in the second window over the candidate that was best in the first, without that bias; these two alone
  take turns there.

A call fails where the lower bound of the 95 % interval of its regret, over the rounds, is above 3 %, or that of its
time over torch's above 5 %. Wanted, too: a mean regret of at most 3 %; a geometric mean of at least 1.3 times torch's
speed over the padded, causal, masked and float16 calls, and of at least 0.98 over the plain float32 ones.

    python benchmarks/regret.py [--rounds 7] [--quick] [--json] [--out FOLDER | --no-save] [--case PATTERN]

Shapes: B batch, H heads, Q query length, K key length, D head dim.
"""

from __future__ import annotations

import math
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from measuring import Bar, check_alike, check_by_formula, finish, machine, options, parsed
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import heedful
from heedful.cases import CASES, Case, select
from heedful.factory import AttentionStrategyFactory
from heedful.locks import Lock, LockedPlan
from heedful.measuring import interleaved, seconds_of, spoken
from heedful.select import Plan, Verdict
from heedful.tune.ahead import tune

MASKS = ("none", "causal", "padded", "dense")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LONGEST = 0.25  # seconds of the plain float32 call
MOST_FLOPS = 6e10  # beyond it a case is not even tried
REGRET, SLOWER = 0.03, 0.05
WON, PLAIN = 1.3, 0.98
CPU = torch.device("cpu")
LEARNING_ROUNDS = 3  # in each of the two windows
LATER_ROUNDS = 5  # of the second window that judges
NEAR = 1.25  # times as slow as the best learnt: judged again, the best two of them
SHORT = 5e-3  # seconds: shorter calls are noisier, and have four times the rounds
QUICK = ("clip-l-text", "dit-xl2-self")


@dataclass
class Combination:
    """One call: a case with a mask and a dtype. ``seconds``: by way, the medians of both windows."""

    case: str
    mask: str
    dtype: str
    chosen: str = ""
    best: str = ""
    seconds: list[dict[str, float]] = field(default_factory=list)
    regret: float = 0.0
    regret_bound: float = 0.0
    later: float = 0.0
    over_torch: float = 0.0
    over_torch_bound: float = 0.0

    @property
    def fails(self) -> bool:
        """Whether it is surely worse than wanted."""
        return self.regret_bound > REGRET or self.over_torch_bound > SLOWER


@dataclass(frozen=True)
class Call:
    """The tensors of a combination, and its ways."""

    query: Tensor
    key: Tensor
    value: Tensor
    seen: Tensor | None
    words: dict[str, Any]

    def torch(self) -> Tensor:
        """Plain SDPA."""
        return sdpa(self.query, self.key, self.value, self.seen, **self.words)

    def auto(self) -> Tensor:
        """What heedful makes of it."""
        out: Tensor = heedful.attention(self.query, self.key, self.value, self.seen, **self.words)
        return out

    def candidates(self) -> tuple[Plan, dict[str, Callable[[], Any]]]:
        """The plan, and every single choice by its label."""
        plan, every = _dispatcher().rivals(self.query, self.key, self.value, self.seen, **self.words)
        return plan, {each.label: self.locked(plan, each) for each in plan.contenders if each.label in every}

    def locked(self, plan: Plan, candidate: Verdict) -> Callable[[], Any]:
        """The call under a lock that names a candidate."""
        fixed = replace(plan, chosen=candidate)
        strategy = AttentionStrategyFactory.default().create_strategy(candidate.name)
        dispatcher = heedful.AttentionDispatcher(policy=_dispatcher().policy)
        dispatcher.experience.lock = Lock.of({}, [LockedPlan.of(fixed, strategy, strategy.version())])
        return partial(dispatcher.attention, self.query, self.key, self.value, self.seen, **self.words)


def _dispatcher() -> heedful.AttentionDispatcher:
    from heedful.dispatch import default_dispatcher

    return default_dispatcher


def call_of(case: Case, mask: str, dtype: torch.dtype) -> Call:
    """A combination's call; the dense mask hides 30 % of the pairs, never a row's first."""
    query, key, value, _ = case.tensors(dtype)
    words: dict[str, Any] = {"is_causal": True} if mask == "causal" else {}
    if case.heads != case.kv_heads:
        words["enable_gqa"] = True
    seen = None
    if mask == "padded":
        seen = (torch.arange(case.key_length) < case.key_length // 2).expand(case.batch, 1, 1, -1).contiguous()
    elif mask == "dense":
        draw = torch.Generator().manual_seed(1)
        seen = torch.rand(case.batch, 1, case.query_length, case.key_length, generator=draw) < 0.7
        seen[..., 0] = True
    return Call(query, key, value, seen, words)


def combinations(cases: list[Case]) -> Iterator[tuple[Combination, Case, str, torch.dtype]]:
    """All of them; one query has no causality."""
    for case in cases:
        for mask in MASKS:
            for dtype in DTYPES:
                if mask != "causal" or case.query_length > 1:
                    yield Combination(case.name, mask, str(dtype).removeprefix("torch.")), case, mask, dtype


def short(case: Case) -> bool:
    """Whether its plain float32 call takes at most a quarter of a second here."""
    if case.gpu_only or case.flops > MOST_FLOPS:
        return False
    call = call_of(case, "none", torch.float32)
    call.torch()
    return min(seconds_of(call.torch, CPU) for _ in range(3)) <= LONGEST


def learn(every: list[tuple[Combination, Case, str, torch.dtype]], bar: Bar) -> None:
    """Have auto learn all of them, in two windows."""
    problems = []
    for _, case, mask, dtype in every:
        call = call_of(case, mask, dtype)
        plan = heedful.explain(call.query, call.key, call.value, call.seen, **call.words)
        problems.append(plan.problem)
    bar.expect(2 * len(set(problems)))

    def on_step(what: str) -> None:
        bar.at(f"learning {what.partition(' on ')[0]}")
        bar.step()

    tune(_dispatcher(), problems, CPU, rounds=LEARNING_ROUNDS, on_step=on_step)
    heedful.freeze()


def judge(one: Combination, case: Case, mask: str, dtype: torch.dtype, rounds: int) -> dict[str, list[float]]:
    """One window of interleaved rounds; every way is checked before the first."""
    call = call_of(case, mask, dtype)
    plan, single = call.candidates()
    known = plan.known.seconds
    one.chosen = plan.chosen.label if plan.chosen else ""
    if one.seconds:  # the second window
        singles = {label: seconds for label, seconds in one.seconds[0].items() if label in single}
        best = min(singles, key=singles.__getitem__)
        ways = {"auto": call.auto, best: single[best]}
        return timed(ways, singles[best], min(rounds, LATER_ROUNDS))
    near = [label for label in single if known.get(label, 0.0) <= NEAR * min(known.values(), default=math.inf)]
    near = sorted(near, key=lambda label: known.get(label, 0.0))[:2] or [one.chosen]
    ways = {"torch": call.torch, "auto": call.auto}
    ways |= {label: single[label] for label in near}
    causal = torch.ones(case.query_length, case.key_length, dtype=torch.bool).tril() if mask == "causal" else None
    groups = case.heads // case.kv_heads
    key, value = (t.repeat_interleave(groups, dim=1) for t in (call.key, call.value))
    answers = {way: run() for way, run in ways.items()}
    name = f"{one.case}, {mask}, {one.dtype}"
    check_by_formula(
        f"{name}: torch", answers["torch"], call.query, key, value, call.seen if causal is None else causal
    )
    for way, out in answers.items():
        check_alike(f"{name}: {way}", out, answers["torch"])
    return timed(ways, min(known.values(), default=0.0), rounds)


def timed(ways: dict[str, Callable[[], Any]], least: float, rounds: int) -> dict[str, list[float]]:
    """Interleaved rounds of what takes that long at least; each way is warm after a first call."""
    for run in ways.values():
        run()
    return interleaved(ways, CPU, rounds if least >= SHORT else 4 * rounds, rough=dict.fromkeys(ways, least))


def bound(ratios: list[float]) -> float:
    """The lower end of the 95 % interval of a median, by the bootstrap."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(1000))
    return medians[25]


def conclude(one: Combination, times: dict[str, list[float]]) -> None:
    """The figures of a combination, out of the rounds of one window: the first, then the second."""
    one.seconds.append({way: statistics.median(rounds) for way, rounds in times.items()})
    singles = {way: seconds for way, seconds in one.seconds[-1].items() if way not in ("torch", "auto")}
    best = min(singles, key=singles.__getitem__)
    ratios = [auto / single - 1 for auto, single in zip(times["auto"], times[best], strict=True)]
    if "torch" not in times:
        one.later = statistics.median(ratios)
        return
    one.best, one.regret, one.regret_bound = best, statistics.median(ratios), bound(ratios)
    ratios = [auto / plain - 1 for auto, plain in zip(times["auto"], times["torch"], strict=True)]
    one.over_torch, one.over_torch_bound = statistics.median(ratios), bound(ratios)


def summary(every: list[Combination]) -> dict[str, Any]:
    """What is wanted of all of them together."""
    regrets, later = sorted(one.regret for one in every), sorted(one.later for one in every)
    plain = [one for one in every if one.mask == "none" and one.dtype == "float32"]
    won = [one for one in every if one not in plain and (one.mask != "none" or one.dtype == "float16")]
    return {
        "calls": len(every),
        "failing": [f"{one.case}, {one.mask}, {one.dtype}" for one in every if one.fails],
        "mean_regret": statistics.mean(regrets),
        "p95_regret": regrets[math.ceil(0.95 * len(regrets)) - 1],
        "mean_later": statistics.mean(later),
        "p95_later": later[math.ceil(0.95 * len(later)) - 1],
        "won": _geometric(won),
        "plain": _geometric(plain),
    }


def _geometric(some: list[Combination]) -> float:
    """How many times as fast as torch, in the geometric mean."""
    return math.exp(-statistics.mean(math.log1p(one.over_torch) for one in some))


def tables(every: list[Combination], total: dict[str, Any]) -> list[Table]:
    """A line for each call, then the figures by mask and dtype, then those of all."""
    calls = Table(title="auto beside the best single candidate and torch's SDPA: medians of interleaved rounds")
    for column in ("case", "mask", "dtype", "torch", "auto", "chosen", "best", "regret", "later", "times as fast"):
        calls.add_column(
            column, no_wrap=True, justify="left" if column in ("case", "mask", "dtype", "chosen", "best") else "right"
        )
    for one in every:
        first = one.seconds[0]
        style = "red" if one.fails else ""
        calls.add_row(
            one.case, one.mask, one.dtype, spoken(first["torch"]), spoken(first["auto"]), one.chosen,
            "" if one.best == one.chosen else one.best, f"{one.regret:+.1%}", f"{one.later:+.1%}",
            f"{1 / (1 + one.over_torch):.2f}", style=style,
        )  # fmt: skip
    groups = Table(title="times as fast as torch's SDPA: geometric means", caption=verdict(total))
    groups.add_column("mask")
    for dtype in DTYPES:
        groups.add_column(str(dtype).removeprefix("torch."), justify="right")
    for mask in MASKS:
        cells = []
        for dtype in DTYPES:
            some = [one for one in every if (one.mask, one.dtype) == (mask, str(dtype).removeprefix("torch."))]
            cells.append(f"{_geometric(some):.2f}" if some else "")
        groups.add_row(mask, *cells)
    return [calls, groups]


def verdict(total: dict[str, Any]) -> str:
    """The wanted figures, in words."""
    return (
        f"{total['calls']} calls, {len(total['failing'])} fail; regret {total['mean_regret']:+.1%} in the mean (wanted "
        f"{REGRET:.0%}), {total['p95_regret']:+.1%} at most in 95 %; in a later window {total['mean_later']:+.1%} and "
        f"{total['p95_later']:+.1%}; {total['won']:.2f} times as fast as torch where there is something to win (wanted "
        f"{WON}), {total['plain']:.2f} where not (wanted {PLAIN})"
    )


def main(arguments: list[str] | None = None) -> int:
    """Learn, judge, print, save; the exit status is 1 where a target is missed."""
    parser = options(__doc__, rounds=7)
    parser.add_argument("--case", help="shell pattern of cases")
    wanted = parsed(parser, arguments)
    cases = [case for case in CASES if case.name in QUICK] if wanted.quick else list(select(wanted.case or "*"))
    with Bar() as bar, torch.no_grad():
        bar.at("which cases are short")
        every = list(combinations([case for case in cases if short(case)]))
        learn(every, bar)
        bar.expect(2 * len(every))
        for _ in range(2):
            for one, case, mask, dtype in every:
                bar.at(f"judging {one.case}, {mask}, {one.dtype}")
                conclude(one, judge(one, case, mask, dtype, wanted.rounds))
                bar.step()
    found = [one for one, *_ in every]
    total = summary(found)
    record = {"machine": machine(), "summary": total, "calls": [asdict(one) for one in found]}
    finish("regret", record, tables(found, total), wanted)
    missed = total["failing"] or total["mean_regret"] > REGRET or total["won"] < WON or total["plain"] < PLAIN
    return int(bool(missed) and not wanted.quick)


if __name__ == "__main__":
    sys.exit(main())
