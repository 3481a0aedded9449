"""``heedful bench``: every backend on real models' calls, side by side; no time before the answer is right."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from heedful.cases import CASES, Case, select
from heedful.cli.machines import packages_of, torch_device
from heedful.cli.output import Bar, check_writable, json_text, write_text
from heedful.cli.problems import DTYPES
from heedful.dispatch import AttentionDispatcher, default_dispatcher
from heedful.errors import UnknownBackend
from heedful.measuring import busy, machine_record, sized, spoken
from heedful.policy import Tune

if TYPE_CHECKING:
    from heedful.bench.measure import Group, Row
    from heedful.bench.work import MaskName, Work

# Two minutes on two CPU cores, or one on a GPU; every kind of call.
_USUAL = {
    "cpu": ("clip-l-text", "dit-xl2-self", "sdxl-cross-32", "sana-cross", "llama3-8b-decode-4k", "sdxl-self-32"),
    "gpu": (
        "clip-l-text",
        "sdxl-cross-64",
        "pixart-sigma-cross",
        "llama3-8b-decode-4k",
        "sdxl-self-64",
        "sd3-medium-joint",
        "llama3-8b-prefill-4k",
        "flux1-joint",
    ),
}
_UNTIMED = {"wrong": "WRONG", "failed": "FAILED", "refused": "refused", "skipped": "skipped"}
_STYLES = {"wrong": "bold red", "failed": "red", "refused": "dim", "skipped": "dim"}


def bench(
    case: Annotated[
        list[str] | None, typer.Option(help="Cases by a shell pattern (see heedful explain --cases); may be repeated.")
    ] = None,
    mask: Annotated[
        list[str] | None, typer.Option(help="none, causal, padded, dense, with commas; the case's own by default.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(DTYPES)}; fp16 and bf16, or fp32 on a CPU; may be repeated.")
    ] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="Only these beside torch; may be repeated. All that run here by default.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=3, max=1000, help="Rounds of each measurement.")] = 9,
    max_seconds: Annotated[
        float, typer.Option(min=0.001, help="A backend with a longer call is skipped, and a slow one has fewer rounds.")
    ] = 1.0,
    device: Annotated[str | None, typer.Option(help="Torch device. The GPU if there is one.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with charts, in one file.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the tables.")] = False,
) -> None:
    """Time every backend side by side, after holding its answer to the formula; exit with 1 where one is wrong."""
    from heedful.bench.measure import Run

    place = torch_device(device)
    # auto by what was measured before: nothing is tried while it is timed, and every answer is judged here anyway.
    known: Tune = "off" if default_dispatcher.policy.tune == "off" else "ahead"
    dispatcher = AttentionDispatcher(policy=replace(default_dispatcher.policy, tune=known, guard="off"))
    works = _works(case, mask, dtype, place)
    for path, option in ((html, "--html"), (out, "--out")):
        if path is not None:
            check_writable(path, option)
    run = Run(place, _backends(backend, place, dispatcher), rounds, max_seconds, dispatcher)
    machine = machine_record(place, packages_of(run.backends, dispatcher))  # before the run, for the load
    with Bar(run.steps_of_a_work * len(works)) as bar:
        run.on_step = bar.step
        groups = list(run.groups(works))
    record = run.record(groups, machine)
    if out is not None:
        write_text(out, json_text(record))
    if html is not None:
        from heedful.bench.page import page

        write_text(html, page(record))
    print(json_text(record), end="") if as_json else _print(groups, [path for path in (out, html) if path is not None])
    if busy(machine):
        print(
            f"the machine was busy, load {machine['load']} on {machine['cores']} cores: figures are noisy",
            file=sys.stderr,
        )
    if run.interrupted:
        print(f"interrupted: {len(groups)} of {len(works)} begun, the last perhaps in part", file=sys.stderr)
    if record["wrong"] or record["failed"]:
        raise typer.Exit(1)
    if run.interrupted:
        raise typer.Exit(130)


def _works(
    patterns: list[str] | None, masks: list[str] | None, dtypes: list[str] | None, place: torch.device
) -> list[Work]:
    """Cases, masks and dtypes, crossed, each once. Raises BadParameter."""
    from heedful.bench.work import Work

    cases = _cases(patterns, place)
    words = _masks(masks)
    usual = ["fp32"] if place.type == "cpu" else ["fp16", "bf16"]
    numbers = [_dtype(word) for word in dtypes or usual]
    works = (Work.of(case, mask, dtype) for case in cases for mask in words for dtype in numbers)
    return list(dict.fromkeys(works))


def _cases(patterns: list[str] | None, place: torch.device) -> list[Case]:
    if not patterns:
        names = _USUAL["cpu" if place.type == "cpu" else "gpu"]
        return sorted((case for case in CASES if case.name in names), key=lambda case: names.index(case.name))
    found: list[Case] = []
    for pattern in patterns:
        matching = select(pattern)
        if not matching:
            close = difflib.get_close_matches(pattern, [case.name for case in CASES], cutoff=0.4)
            hint = f"closest: {', '.join(close)}; " if close else ""
            remedy = f"{hint}`heedful explain --cases` prints all, and '*' stands for any letters"
            raise typer.BadParameter(f"got {pattern!r}, and no case is called so; {remedy}", param_hint="--case")
        found += matching
    return list(dict.fromkeys(found))


def _masks(given: list[str] | None) -> list[MaskName | None]:
    from heedful.bench.work import MASKS

    names: dict[str, MaskName] = {name: name for name in MASKS}
    words = [word.strip() for text in given or () for word in text.split(",")]
    for word in words:
        if word not in names:
            raise typer.BadParameter(f"got {word!r}; give some of {', '.join(names)}", param_hint="--mask")
    return [names[word] for word in words] or [None]


def _dtype(word: str) -> torch.dtype:
    full = DTYPES.get(word, word.removeprefix("torch."))
    if full not in DTYPES.values():
        raise typer.BadParameter(f"got {word!r}; give one of {', '.join(DTYPES)}", param_hint="--dtype")
    dtype: torch.dtype = getattr(torch, full)
    return dtype


def _backends(given: list[str] | None, place: torch.device, dispatcher: AttentionDispatcher) -> tuple[str, ...]:
    """Torch first, because ratios are to it; then auto and all that are available, or those that are given."""
    from heedful.bench.measure import BASE_LINE

    if not given:
        available = [row.name for row in dispatcher.list_backends(place.type) if row.available]
        return (BASE_LINE, "auto", *available)
    for name in given:
        if name not in (BASE_LINE, "auto"):
            try:
                dispatcher.factory.resolve(name)
            except UnknownBackend as error:
                text = f"{error}; besides, auto and {BASE_LINE}"
                raise typer.BadParameter(text, param_hint="--backend") from error
    return tuple(dict.fromkeys((BASE_LINE, *given)))


def _print(groups: list[Group], written: list[Path]) -> None:
    """A table for each work, and below it why some backends are not in it."""
    console = Console(highlight=False)
    for group in groups:
        console.print(_title(group))
        if any(row.figures for row in group.rows):
            console.print(_table(group))
        for names, status, reason in _reasons(group.rows):
            console.print(
                Text.assemble((f"{_UNTIMED[status]} ", _STYLES[status]), f"{names}: {reason}"), soft_wrap=True
            )
        console.print()
    if groups:
        console.print(Text(_CAPTION, style="dim"))
    for path in written:
        console.print(f"written: {path}", markup=False, soft_wrap=True)


_CAPTION = (
    "Median of the rounds ± half the quartile gap, dispatch included; only right answers have a time. TFLOP/s count "
    "useful flops, without what causality hides and padded keys; matmul: their share of a plain matmul's best rate in "
    "the same rounds. Memory: what a call holds beyond its inputs. Error: the largest difference from the formula in "
    "float64, on up to 64 queries a head."
)


def _title(group: Group) -> Text:
    case = group.work.case
    sizes = {
        "B": case.batch,
        "H": case.heads,
        **({"N": case.kv_heads} if case.kv_heads != case.heads else {}),
        "Q": case.query_length,
        "K": case.key_length,
        "D": case.head_dim,
    }
    matmul = "" if group.matmul is None else f"; matmul {group.matmul / 1e12:.3g} TFLOP/s"
    return Text.assemble(
        (str(group.work), "bold"), f" ({' '.join(f'{name} {size}' for name, size in sizes.items())}{matmul})"
    )


def _table(group: Group) -> Table:
    """Of the rows that have figures, the fastest first; the fastest exact one stands out."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("backend", "time", "±", "torch", "TFLOP/s", "matmul", "memory", "error"):
        made.add_column(name, no_wrap=True, justify="left" if name == "backend" else "right")
    made.add_column("what ran", overflow="fold")
    timed = [row for row in group.rows if row.figures]
    best = next((row for row in timed if row.exactness == "exact"), None)
    for row in timed:
        made.add_row(*_cells(row), style="bold green" if row is best else "")
    return made


def _cells(row: Row) -> list[str]:
    assert row.figures is not None
    assert row.rate is not None
    ran = ", ".join((row.ran, *row.steps))
    return [
        row.backend,
        spoken(row.figures.median),
        spoken(row.figures.spread),
        "" if row.faster is None else f"{row.faster:.2f}x",
        f"{row.rate / 1e12:.3g}",
        "" if row.share is None else f"{row.share:.0%}",
        "" if row.peak_bytes is None else sized(row.peak_bytes),
        "" if row.error is None else f"{row.error:.1e}",
        ran if row.exactness == "exact" else f"{row.exactness}: {ran}",
    ]


def _reasons(rows: Iterable[Row]) -> list[tuple[str, str, str]]:
    """Backends, status and reason of the rows without figures; those of one reason together."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.figures is None:
            found.setdefault((row.status, row.reason), []).append(row.backend)
    return [(", ".join(names), status, reason) for (status, reason), names in found.items()]
