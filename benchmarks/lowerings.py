"""What each lowering that is taken for speed alone really pays: the same call with it and without it, in one run.

A lowering pays where the ratio (with it over without it) is below 1. Measured are those that some strategy's
``Limits.faster_with`` names for a CPU, and dropped all-True masks:

- ``gather_keys`` by the eighths of keys kept, and by side: where does leaving keys out stop paying?
- ``upcast``, float16 computed in float32: does it pay at every length?
- ``chunk_queries`` of causal calls by length and size of a chunk, for the unfused kernel and for torch's choice;
- ``drop_noop_mask``: it is always on, so 'without' is a policy that leaves masks unread.

The library stays as it is: each side is a registry of its own, with a strategy whose limits name the lowering, or do
not. Whether the plan then has the step is checked before anything is timed, as is the answer.

    python benchmarks/lowerings.py [--rounds 3] [--quick] [--json] [--out FOLDER | --no-save] [--only gather_keys]

Shapes: B batch, H heads, Q query length, K key length, D head dim.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from measuring import Bar, Call, Figures, WrongAnswer, check_ways, finish, machine, measure, options, parsed, ratio
from rich.table import Table
from torch import Tensor

import heedful
from heedful.lowering import chunking
from heedful.strategies.native import NativeAttentionStrategy
from heedful.strategies.native_math import NativeMathAttentionStrategy

Sizes = tuple[int, int, int, int, int]
QUICK: tuple[Sizes, ...] = ((1, 2, 32, 32, 16),)
PADDED: tuple[Sizes, ...] = (
    (1, 2, 32, 32, 16),
    (1, 8, 1, 1024, 64),  # a decoder's step
    (1, 8, 64, 64, 64),
    (1, 8, 128, 128, 64),
    (2, 20, 1024, 77, 64),
    (2, 10, 1024, 1024, 64),
    (1, 4, 4096, 4096, 64),
)
HALVES: tuple[Sizes, ...] = (
    (1, 2, 8, 8, 16),
    (1, 8, 64, 64, 64),
    (1, 8, 1, 1024, 64),
    (1, 8, 256, 256, 64),
    (2, 10, 1024, 1024, 64),
    (1, 4, 4096, 4096, 64),
)
NOOPS = PADDED
LENGTHS, CHUNKS = (512, 1024, 2048, 4096), (128, 256, 512, 1024)


@dataclass(frozen=True)
class Trial:
    """One call with a lowering and without it. ``chunk``: the queries of a chunk, where the lowering has one.

    ``on``, ``off``: where the lowering is taken, and where it is not.
    """

    lowering: str
    setting: str
    sizes: Sizes
    on: heedful.AttentionDispatcher
    off: heedful.AttentionDispatcher
    backend: str = "native"
    dtype: torch.dtype = torch.float32
    call: dict[str, Any] = field(default_factory=dict)
    seen: Tensor | None = None
    chunk: int | None = None


@dataclass(frozen=True)
class Row:
    """What became of a trial. ``ratio``: with the lowering over without it."""

    lowering: str
    backend: str
    setting: str
    sizes: Sizes
    dtype: str
    figures: dict[str, dict[str, float]]
    ratio: float


def alone(strategy: type[heedful.AttentionStrategy], **changes: Any) -> heedful.AttentionDispatcher:
    """A dispatcher that knows this strategy only, with some of its limits for a CPU replaced, and at every size."""
    limits = replace(strategy().limits_for("cpu"), **{"faster_from": 0, **changes})
    factory = heedful.AttentionStrategyFactory(packages=(), plugins=False)
    factory.register_strategy(strategy.name, type(strategy.__name__, (strategy,), {"limits": limits}))
    return heedful.AttentionDispatcher(factory, policy=heedful.Policy(guard="off"))


def switched(strategy: type[heedful.AttentionStrategy], name: str, **changes: Any) -> dict[str, Any]:
    """Where a lowering is taken for speed, and where it is not; ``changes`` of limits hold where it is."""
    named = strategy().limits_for("cpu").faster_with
    on, off = alone(strategy, faster_with=named | {name}, **changes), alone(strategy, faster_with=named - {name})
    return {"lowering": name, "on": on, "off": off, "backend": strategy.name}


def gathered(shapes: tuple[Sizes, ...]) -> Iterator[Trial]:
    """By eighths kept. Limits without masks have it taken at every share, also where it does not pay."""
    bare = NativeAttentionStrategy().limits_for("cpu").masks - {"dense", "bias"}
    sides = switched(NativeAttentionStrategy, "gather_keys", masks=bare)
    for sizes in shapes:
        length = sizes[3]
        places = torch.arange(length)
        for side in ("right", "interior"):
            for eighths in range(1, 9):
                count = min(max(1, length * eighths // 8), length - 1)
                mixed = torch.randperm(length, generator=torch.Generator().manual_seed(0))
                keep = places < count if side == "right" else mixed < count
                padding = heedful.KeyPadding(keep.expand(sizes[0], -1).contiguous())
                setting = f"{eighths}/8 kept, {side}" if eighths < 8 else f"all but one kept, {side}"
                yield Trial(setting=setting, sizes=sizes, call={"attn_mask": padding}, seen=keep, **sides)


def upcast(shapes: tuple[Sizes, ...]) -> Iterator[Trial]:
    """Without a mask and with an arbitrary one."""
    sides = switched(NativeAttentionStrategy, "upcast")
    for sizes in shapes:
        yield Trial(setting="no mask", sizes=sizes, dtype=torch.float16, **sides)
        seen = torch.rand(sizes[2:4], generator=torch.Generator().manual_seed(0)) < 0.7
        seen[:, 0] = True
        yield Trial(setting="bool mask", sizes=sizes, dtype=torch.float16, call={"attn_mask": seen}, seen=seen, **sides)


def chunked(lengths: tuple[int, ...], chunks: tuple[int, ...]) -> Iterator[Trial]:
    """The unfused kernel computes all scores, torch's choice skips hidden blocks by itself."""
    for strategy, heads in ((NativeMathAttentionStrategy, 2), (NativeAttentionStrategy, 4)):
        sides = switched(strategy, "chunk_queries")
        for length in lengths:
            seen = torch.ones(length, length, dtype=torch.bool).tril()
            for chunk in chunks:
                if 2 * chunk <= length:
                    sizes, setting = (1, heads, length, length, 64), f"chunks of {chunk}"
                    yield Trial(setting=setting, sizes=sizes, call={"is_causal": True}, seen=seen, chunk=chunk, **sides)


def dropped(shapes: tuple[Sizes, ...]) -> Iterator[Trial]:
    """A mask that hides nothing, in the two forms that models give."""
    read, unread = (heedful.AttentionDispatcher(policy=heedful.Policy(analyse=on, guard="off")) for on in (True, False))
    for sizes in shapes:
        batch, _, queries, keys, _ = sizes
        for setting, shape in {"(B, 1, 1, K)": (batch, 1, 1, keys), "(Q, K)": (queries, keys)}.items():
            call = {"attn_mask": torch.ones(shape, dtype=torch.bool)}
            yield Trial("drop_noop_mask", f"all True {setting}", sizes, read, unread, call=call)


TRIALS: dict[str, Callable[[bool], Iterator[Trial]]] = {
    "gather_keys": lambda quick: gathered(QUICK if quick else PADDED),
    "upcast": lambda quick: upcast(QUICK if quick else HALVES),
    "chunk_queries": lambda quick: chunked((32,) if quick else LENGTHS, (16,) if quick else CHUNKS),
    "drop_noop_mask": lambda quick: dropped(QUICK if quick else NOOPS),
}


def declared() -> set[str]:
    """The lowerings that some strategy's limits for a CPU say are faster."""
    every = heedful.AttentionStrategyFactory(plugins=False).strategies().values()
    tuples = (one.limits if isinstance(one.limits, tuple) else (one.limits,) for one in every)
    return {name for limits in tuples for one in limits if one.covers("cpu") for name in one.faster_with}


def row(trial: Trial, rounds: int, bar: Bar) -> Row:
    """Check that only one side takes the lowering, and that both are right; then time them."""
    bar.at(f"{trial.lowering}: {trial.setting} at {trial.sizes}")
    torch.manual_seed(0)
    batch, heads, queries, keys, dim = trial.sizes
    query = torch.randn(batch, heads, queries, dim).to(trial.dtype)
    key, value = (torch.randn(batch, heads, keys, dim).to(trial.dtype) for _ in range(2))
    sides = {"with": trial.on, "without": trial.off}

    def way(dispatcher: heedful.AttentionDispatcher) -> Call:
        return lambda: dispatcher.attention(query, key, value, **trial.call, backend=trial.backend)

    chunk = mock.patch.object(chunking, "CHUNK", trial.chunk or chunking.CHUNK)
    with chunk, mock.patch.object(chunking, "MOST_BYTES", 1 << 40):  # chunks for speed alone
        for side, dispatcher in sides.items():
            plan = dispatcher.explain(query, key, value, **trial.call, backend=trial.backend).checked()
            assert plan.chosen is not None
            if (trial.lowering in [step.name for step in plan.chosen.steps]) != (side == "with"):
                raise WrongAnswer(f"{trial.lowering}, {trial.setting}: {side} it, the plan is\n{plan}")
        calls = {side: way(dispatcher) for side, dispatcher in sides.items()}
        check_ways(calls, query, key, value, trial.seen, of=f"{trial.lowering}, {trial.setting}")
        times = measure(calls, rounds, bar=bar)
    return Row(
        trial.lowering,
        trial.backend,
        trial.setting,
        trial.sizes,
        str(trial.dtype).removeprefix("torch."),
        {side: Figures.of(figures)._asdict() for side, figures in times.items()},
        ratio(times, "with", "without"),
    )


def table(lowering: str, rows: list[Row]) -> Table:
    """The rows of one lowering, as one reads them."""
    title = f"{lowering}: median ± half the quartile gap, {rows[0].dtype}"
    drawn = Table("backend", "setting", "(B, H, Q, K, D)", "with", "without", "with / without", title=title)
    for one in rows:
        figures = [str(Figures(**each)) for each in one.figures.values()]
        drawn.add_row(one.backend, one.setting, str(one.sizes), *figures, f"{one.ratio:.2f}")
    return drawn


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, save; the exit status is 1 where limits name a lowering that is not measured here."""
    parser = options(__doc__, rounds=3)
    parser.add_argument("--only", choices=list(TRIALS), help="this lowering alone; nothing is saved without --out")
    wanted = parsed(parser, arguments)
    wanted.no_save |= wanted.only is not None and wanted.out is None
    names = list(TRIALS) if wanted.only is None else [wanted.only]
    missing = sorted(declared() - set(TRIALS))

    found: dict[str, list[Row]] = {}
    with Bar() as bar, torch.no_grad():
        trials = {name: list(TRIALS[name](wanted.quick)) for name in names}
        bar.expect(wanted.rounds * sum(map(len, trials.values())))
        for name in names:
            found[name] = [row(trial, wanted.rounds, bar) for trial in trials[name]]
    rows = [asdict(one) for each in found.values() for one in each]
    record = {"machine": machine(), "declared": sorted(declared()), "not_measured": missing, "rows": rows}
    finish("lowerings", record, [table(name, each) for name, each in found.items()], wanted)
    if missing:
        print(f"declared as faster on a CPU, and not measured here: {', '.join(missing)}", file=sys.stderr)
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
