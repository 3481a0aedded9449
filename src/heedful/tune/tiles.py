"""Which tile of our own kernels is fastest, measured on request: a few for each kind of call, each checked first.

What is measured are whole calls of a strategy that is told one tile; in the passes for gradients, these passes alone.
Tiles are kept in the store of times, by the name of their kind (``kernels.tiles.Kind``). One that does not compile,
wants more than the device has, or answers wrongly is quarantined there. Candidates: ``kernels.candidates``.

An answer is held to the formula on some of its rows, as ever. Gradients are held to those of the formula in float64 on
the same problem cut to 250 queries and keys: the same machine code, several tiles of it, and memory for it.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from heedful.call import mask_of_call
from heedful.dispatch import AttentionDispatcher
from heedful.problem import AttentionProblem
from heedful.records import Record, Window
from heedful.rows import check_rows
from heedful.strategy import Tuning
from heedful.timings import this_run
from heedful.tolerance import allowed, largest
from heedful.tune.ahead import Call, in_windows, near, times_of
from heedful.tune.inputs import Inputs, inputs_for

_LONGEST = 250  # of the problems on which gradients are checked: several tiles, the last one not full
PREFIX = "tiles "  # of the names of kinds
FORWARD = "forward"
_WANTED = {FORWARD: (), "keys": ("key", "value"), "queries": ("query",)}  # inputs whose gradient makes a pass run


class CannotRun(RuntimeError):
    """A tile that is tried cannot run."""


@dataclass
class TunedTile:
    """What was found for one kind of call. ``usual`` is the table's tile; ``winner`` what is used from now on.

    ``role`` is the pass: ``forward``, ``keys`` or ``queries``. ``out``: why a tile is quarantined; it cannot run, or
    ``wrong``. ``refused`` says why nothing was measured, ``failed`` that this is a fault. ``seconds``: the medians of
    ``windows``, this search's own.
    """

    key: str
    strategy: str
    role: str
    problem: AttentionProblem
    usual: str = ""
    winner: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    out: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    refused: str = ""
    measured_at: float = 0.0
    settled: bool = False
    failed: bool = False
    windows: tuple[Window, ...] = ()

    @property
    def gain(self) -> float:
        """How many times as fast the winner is as the table's tile."""
        there = {self.usual, self.winner} <= self.seconds.keys()
        return self.seconds[self.usual] / self.seconds[self.winner] if there else 1.0


def tune_tiles(
    dispatcher: AttentionDispatcher,
    problems: Iterable[AttentionProblem],
    device: torch.device,
    *,
    backends: Iterable[str] = (),
    rounds: int = 7,
    on_step: Callable[[str], None] = lambda _text: None,
    wait: Callable[[float], None] = time.sleep,
) -> list[TunedTile]:
    """Measure the tiles of each kind of call that these problems make, and keep them where the dispatcher keeps times.

    ``backends``: whose; by default of the exact ones that have tiles. A kind is measured on the largest of its
    problems. Calls are planned anew afterwards. ``on_step`` is told each window of each kind; ``wait`` sleeps so many
    seconds.
    """
    tuned = kinds_of(dispatcher, problems, backends)
    in_windows(
        tuned, lambda one: _measure(dispatcher, one, device, rounds), lambda one: on_step(f"{one.strategy} {one.key}"),
        wait,
    )  # fmt: skip
    dispatcher.experience.finish()
    dispatcher.forget_plans()
    return tuned


def kinds_of(
    dispatcher: AttentionDispatcher, problems: Iterable[AttentionProblem], backends: Iterable[str] = ()
) -> list[TunedTile]:
    """The kinds of call that these problems make, not measured yet; with the reason where a backend refuses one."""
    found: dict[tuple[str, str], TunedTile] = {}
    for problem in sorted(problems, key=_work, reverse=True):
        for name in tuple(backends) or _with_tiles(dispatcher, problem):
            for one in _of(dispatcher, problem, name):
                found.setdefault((one.strategy, one.key), one)
    return list(found.values())


def _with_tiles(dispatcher: AttentionDispatcher, problem: AttentionProblem) -> list[str]:
    strategies = dispatcher.factory.strategies().items()
    return [name for name, one in strategies if one.exactness == "exact" and one.tunable(problem)]


def _of(dispatcher: AttentionDispatcher, problem: AttentionProblem, name: str) -> Iterator[TunedTile]:
    plan = dispatcher.plan(problem, name)
    if plan.chosen is None:
        reasons = "; ".join(str(reason) for verdict in plan.verdicts for reason in verdict.refusals)
        yield TunedTile(str(problem), name, "", problem, refused=reasons or "it needs no kernel")
        return
    strategy = plan.chosen.name
    classes = dispatcher.factory.create_strategy(strategy).tunable(plan.chosen.lowered)
    for role, key in classes.items():
        yield TunedTile(key, strategy, role, problem)
    if not classes:
        yield TunedTile(str(problem), strategy, "", problem, refused="it has no tiles")


def _measure(dispatcher: AttentionDispatcher, one: TunedTile, device: torch.device, rounds: int) -> None:
    labels = _labels(dispatcher, one, device)
    one.usual = one.usual or labels[0]
    store = dispatcher.experience.store(device)
    known = store.get(one.key) or Record()
    one.out = {label: reason for label, reason in known.faults.items() if label in labels}
    given = inputs_for(one.problem.replace(needs_grad=False), device)
    calls: dict[str, Call] = {}
    for label in near({label: None for label in labels if label not in one.out}, one.seconds):
        fault = "" if one.seconds else _fault(dispatcher, one, given, label, device)
        if fault:
            one.out[label] = fault
            store.add_fault(one.key, label, fault)
        else:
            calls[label] = _call(dispatcher, one, given, label)
    if not calls:
        one.refused, one.failed = "every tile fails", True
        return
    times = times_of(calls, device, rounds)
    one.measured_at = time.time()
    one.windows += (Window(ended=one.measured_at, run=this_run(), seconds=times, turns=rounds),)
    record = store.add_window(one.key, one.windows[-1])
    one.seconds = Record(one.windows).seconds()  # earlier searches may have measured another problem of this kind
    one.settled = record.winner() is not None
    one.winner = record.winner() or min(times, key=times.__getitem__)


def _labels(dispatcher: AttentionDispatcher, one: TunedTile, device: torch.device) -> tuple[str, ...]:
    """The candidates, the table's first. Raises Refused where the backend's kernels do not work."""
    plan = dispatcher.plan(one.problem, one.strategy, device=device).checked()
    assert plan.chosen is not None
    return dispatcher.factory.create_strategy(one.strategy).choices(one.role, plan.chosen.lowered, device)


def _fault(dispatcher: AttentionDispatcher, one: TunedTile, given: Inputs, label: str, device: torch.device) -> str:
    """Why a tile is not to be used; "" where it runs and is right."""
    tuning = _only(one, label)
    try:
        wrong = (_of_answer if one.role == FORWARD else _of_gradients)(dispatcher, one, given, tuning, device)
    except CannotRun as error:
        return str(error)
    if one.role not in tuning.asked:  # it would be timed, and trusted, without having run
        return "these calls go by no tile of their own"
    one.wrong += [label] * bool(wrong)
    return wrong


def _of_answer(
    dispatcher: AttentionDispatcher, one: TunedTile, given: Inputs, tuning: Tuning, _device: torch.device
) -> str:
    strategy = dispatcher.factory.create_strategy(one.strategy)
    mask = mask_of_call(
        attn_mask=given.attn_mask, **{name: given.words[name] for name in ("is_causal", "causal_alignment", "window")}
    )
    exact = strategy.exactness == "exact"
    bound = None if exact else one.problem.max_error or strategy.relative_error
    answer = _forward(dispatcher, one.strategy, given, tuning)()
    return check_rows(one.problem.replace(needs_grad=False), *given[:3], mask, answer, max_error=bound).fault


def _of_gradients(
    dispatcher: AttentionDispatcher, one: TunedTile, _given: Inputs, tuning: Tuning, device: torch.device
) -> str:
    lengths = {name: min(getattr(one.problem, name), _LONGEST) for name in ("query_length", "key_length")}
    problem = one.problem.replace(needs_grad=False, **lengths)
    given = inputs_for(problem, device)
    exact = given._replace(**{name: getattr(given, name).double() for name in ("query", "key", "value")})
    wanted = _gradients(dispatcher, "reference", exact, one, None)()
    found = _gradients(dispatcher, one.strategy, given, one, tuning)()
    terms = max(lengths.values()) * max(1, problem.heads // max(1, problem.kv_heads))
    for name, want, gradient in zip(_WANTED[one.role], wanted, found, strict=True):
        most = allowed(want, want.to(problem.dtype), problem.dtype, terms=terms)
        error = largest(gradient.double() - want)
        if not error <= most:
            return f"the gradient of {name} is off by {error:.2g}, of at most {most:.2g}"
    return ""


def _call(dispatcher: AttentionDispatcher, one: TunedTile, given: Inputs, label: str) -> Call:
    """What is timed: a call, or the pass alone that computes some of its gradients."""
    if one.role == FORWARD:
        return _forward(dispatcher, one.strategy, given, _only(one, label))
    return _gradients(dispatcher, one.strategy, given, one, _only(one, label))  # type: ignore[return-value]


def _only(one: TunedTile, label: str) -> Tuning:
    return Tuning({one.role: label}, _refuse)


def _refuse(_role: str, _label: str, reason: str) -> None:
    raise CannotRun(reason)


def _forward(dispatcher: AttentionDispatcher, name: str, given: Inputs, tuning: Tuning | None) -> Call:
    plan, calls = dispatcher.rivals(*given[:4], backend=name, tuning=tuning, **given.words)
    assert plan.chosen is not None
    return calls[plan.chosen.label]


def _gradients(
    dispatcher: AttentionDispatcher, name: str, given: Inputs, one: TunedTile, tuning: Tuning | None
) -> Callable[[], tuple[Tensor, ...]]:
    """The gradients that a pass gives, of a call that was made already; what goes back is the same each time."""
    with torch.enable_grad():
        leaves = {each: getattr(given, each).detach().requires_grad_() for each in _WANTED[one.role]}
        answer = _forward(dispatcher, name, given._replace(**leaves), tuning)()
    out = answer[0] if isinstance(answer, tuple) else answer
    draw = torch.Generator().manual_seed(1)
    dout = torch.randn(out.shape, generator=draw, dtype=torch.float32).to(out.device)
    back = dout.to(one.problem.dtype).to(out.dtype)
    return functools.partial(torch.autograd.grad, out, tuple(leaves.values()), back, retain_graph=True)


def _work(problem: AttentionProblem) -> int:
    return math.prod((problem.batch, problem.heads, problem.query_length, problem.key_length))
