"""``heedful tune --tiles``: measure which tile of our own Triton kernels is fastest for each kind of call."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from heedful.cli.tables import table
from heedful.dispatch import AttentionDispatcher
from heedful.facts import INTERPRETED
from heedful.measuring import spoken
from heedful.problem import AttentionProblem
from heedful.tune.tiles import PREFIX, TunedTile, kinds_of, tune_tiles

measure = tune_tiles


def check_device(dispatcher: AttentionDispatcher, place: torch.device) -> None:
    """Raises BadParameter where no kernel with tiles runs."""
    if place.type != "cuda" and dispatcher.facts.device(place).architecture != INTERPRETED:
        raise typer.BadParameter(
            f"tiles are of Triton kernels on a GPU, and this is {place.type}; run it on the machine with the GPU "
            "(TRITON_INTERPRET=1 is for tests)",
            param_hint="--tiles",
        )


def forget_every_tile(dispatcher: AttentionDispatcher, place: torch.device) -> None:
    """Drop what is known of tiles on a device, and nothing else."""
    keys = [key for key in dispatcher.experience.store(place).records() if key.startswith(PREFIX)]
    dispatcher.experience.forget_choices(keys, place)
    print(f"{len(keys)} kinds of call on {place.type} forgotten: the shipped table of tiles decides")


def search(
    dispatcher: AttentionDispatcher,
    problems: Iterable[AttentionProblem],
    place: torch.device,
    *,
    backends: Sequence[str],
    rounds: int,
    forget: bool,
) -> list[TunedTile]:
    """Measure the tiles for these problems under a bar; ``forget`` what is known of them first."""
    problems = list(problems)
    kinds = kinds_of(dispatcher, problems, backends)
    if forget:
        dispatcher.experience.forget_choices([one.key for one in kinds if not one.refused], place)
    with measuring_bar(2 * len(kinds)) as on_step:
        return measure(dispatcher, problems, place, backends=backends, rounds=rounds, on_step=on_step)


@contextmanager
def measuring_bar(total: int) -> Iterator[Callable[[str], None]]:
    """A bar of so many steps on stderr; what it gives is told each one."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("measuring", total=total)
        yield lambda what: progress.update(bar, advance=1, description=what)


def print_tiles(tuned: list[TunedTile], dispatcher: AttentionDispatcher, place: torch.device, as_json: bool) -> None:
    """The table, or JSON."""
    store = dispatcher.experience.store(place)
    where = str(store.path) if store.path else "memory only"
    if as_json:
        rows = [{**asdict(replace(one, windows=())), "problem": str(one.problem), "gain": one.gain} for one in tuned]
        print(json.dumps({"machine": str(store.fingerprint), "store": where, "tiles": rows}, indent=2))
        return
    console = Console(highlight=False)
    styles = ["dim" if one.refused else "" for one in tuned]
    columns = ("winner", "a call", "table's", "a call ", "gain", "kind of call")
    console.print(table(columns, list(map(_cells, tuned)), console.width, wraps=True, styles=styles))
    console.print(f"{sum(not one.refused for one in tuned)} of {len(tuned)} kinds measured, kept in {where}")
    if any(one.winner not in ("", one.usual) for one in tuned):
        console.print("what auto compares was measured with other tiles: run heedful tune on the same targets next")


def _cells(one: TunedTile) -> tuple[Any, ...]:
    told = "".join(
        f"\n{label} {'is wrong' if label in one.wrong else 'is out'}: {why}" for label, why in one.out.items()
    )
    name = f"{one.strategy}: {one.key}"
    if one.refused:
        return "not measured", "", one.usual, "", "", f"{name}: {one.refused}{told}"
    now, before = (spoken(one.seconds[label]) if label in one.seconds else "" for label in (one.winner, one.usual))
    return one.winner, now, one.usual, before, f"{one.gain:.2f}x", f"{name}{told}"
