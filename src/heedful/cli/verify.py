"""``heedful verify``: the contract suite on this machine, as a matrix that can be sent with a bug report."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from heedful.cli.machines import packages_of, torch_device
from heedful.cli.output import Bar, check_writable, json_text, write_text
from heedful.cli.problems import DTYPES
from heedful.dispatch import AttentionDispatcher
from heedful.errors import UnknownBackend
from heedful.measuring import machine_record, spoken
from heedful.policy import Policy

if TYPE_CHECKING:
    from heedful.verify.choice import Size
    from heedful.verify.run import Run

_SHOWN = 10  # faults of a backend that the terminal shows; all are in --json and --html
_TOGETHER = 4  # workers at a time on a CPU; a GPU is one worker's alone, whose crash is then nobody else's
_STYLES = {"right": "green", "wrong": "bold red", "refused": "dim", "none": "dim"}


def verify(
    backend: Annotated[
        list[str] | None, typer.Argument(metavar="[BACKEND]...", help="Only these; all of `heedful list` by default.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Torch device. The GPU if there is one.")] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help=f"Every sample in {', '.join(DTYPES)}; may be repeated. As they are else.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few checks of every feature.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Every sample in every dtype and layout; this is long.")] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="Checks by their name or a shell pattern; may be repeated.")
    ] = None,
    plugin: Annotated[
        list[str] | None, typer.Option(metavar="MODULE:CLASS", help="A strategy of your own; may be repeated.")
    ] = None,
    bench: Annotated[bool, typer.Option("--bench", help="Time what was right, too: see heedful bench.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the tensors that are drawn.")] = 0,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that one check may take.")] = 120.0,
    threads: Annotated[
        int, typer.Option(min=1, help="Threads of a CPU's kernels. The samples are small: more take longer.")
    ] = 1,
    html: Annotated[Path | None, typer.Option(help="Write a page, in one file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the tables.")] = False,
) -> None:
    """Hold every backend to its contract here: right, or refused for a limit.

    Each backend runs in a process of its own: a kernel that crashes or hangs is a result like others. Exit status: 1
    where something is wrong, 2 where a plug-in cannot be verified, 3 where no wanted backend can run here, 130 after
    Ctrl-C, which prints what was found.
    """
    from heedful.verify.run import is_wrong

    if quick and every:
        raise typer.BadParameter("got --quick and --all; give one of both", param_hint="--quick")
    place = torch_device(device)
    if html is not None:
        check_writable(html, "--html")
    dispatcher = AttentionDispatcher(policy=Policy(downloads=Policy.from_environment().downloads))
    size: Size = "quick" if quick else "all" if every else "usual"
    dtypes = tuple(map(_dtype, dtype or ()))
    choice: dict[str, Any] = {
        "size": size,
        "dtypes": dtypes,
        "only": tuple(only or ()),
        "seed": seed,
        "threads": threads,
    }
    run = _planned(backend, plugin or (), place, choice, timeout, dispatcher)
    machine = machine_record(place, packages_of([column.name for column in run.columns], dispatcher))
    machine |= {"system": platform.platform(), "threads": threads}
    with Bar(0) as bar:
        run.on_step, run.on_plan = bar.step, bar.more
        run.go()
    settings = {
        "device": str(place),
        "timeout": timeout,
        **choice,
        "dtypes": list(choice["dtypes"]),
        "only": only or [],
    }
    record = run.record(machine, settings)
    _check_any(record, only)
    if not as_json:
        _print(record)
    if bench and not run.interrupted:
        record["bench"] = _speed(record, str(place), plugin or (), as_json)
    if html is not None:
        from heedful.verify.page import page

        write_text(html, page(record))
        print(f"written: {html}", file=sys.stderr if as_json else sys.stdout)
    if as_json:
        print(json_text(record), end="")
    if run.interrupted:
        print("interrupted: this is partial", file=sys.stderr)
    if is_wrong(record):
        raise typer.Exit(1)
    if any(column["status"] == "invalid" for column in record["backends"]):
        print("a plug-in could not be verified: see its reason above", file=sys.stderr)
        raise typer.Exit(2)
    if all(column["status"] == "absent" for column in record["backends"]):
        print("nothing was verified: no wanted backend can run here", file=sys.stderr)
        raise typer.Exit(3)
    if run.interrupted:
        raise typer.Exit(130)


def _dtype(word: str) -> str:
    full = DTYPES.get(word, word.removeprefix("torch."))
    if full not in DTYPES.values():
        raise typer.BadParameter(f"got {word!r}; give one of {', '.join(DTYPES)}", param_hint="--dtype")
    return full


def _planned(
    names: list[str] | None,
    plugins: Sequence[str],
    place: torch.device,
    choice: Mapping[str, Any],
    timeout: float,
    dispatcher: AttentionDispatcher,
) -> Run:
    """The run: backends that this machine lacks something for are left out of it at once. Raises BadParameter."""
    from heedful.verify.job import Job
    from heedful.verify.run import Run, lacking

    wanted = list(names or ([] if plugins else dispatcher.factory.strategies()))
    jobs, absent = [], []
    for name in dict.fromkeys(wanted):
        try:
            reasons = lacking(dispatcher, dispatcher.factory.resolve(name), place)
        except UnknownBackend as error:
            raise typer.BadParameter(str(error), param_hint="BACKEND") from error
        job = Job(backend=name, device=str(place), **choice)
        if reasons:
            absent.append((job, reasons))
        else:
            jobs.append(job)
    jobs += [Job(plugin=text, device=str(place), **choice) for text in dict.fromkeys(plugins)]
    cores = torch.multiprocessing.cpu_count()
    together = max(1, min(_TOGETHER, cores // int(choice["threads"]))) if place.type == "cpu" else 1
    run = Run(tuple(jobs), timeout, together)
    for job, reasons in absent:
        run.leave_out(job, reasons)
    return run


def _check_any(record: Mapping[str, Any], only: Iterable[str] | None) -> None:
    """Raise BadParameter where --only names nothing: no check at all is no success."""
    planned = [column["planned"] for column in record["backends"] if column["planned"] is not None]
    if only and planned and not any(planned):
        remedy = "checks are called by sample and aspect, such as 'plain-forward'; '*' stands for any letters"
        raise typer.BadParameter(f"got {', '.join(only)}, and no check is called so; {remedy}", param_hint="--only")


def _speed(record: Mapping[str, Any], device: str, plugins: Sequence[str], quiet: bool) -> dict[str, Any] | None:
    """The record of a bench of what was right; None where there is none, which is told."""
    from heedful.verify.speed import measured

    right = [column["name"] for column in record["backends"] if column["status"] == "right"]
    speed = measured(right, device, plugins)
    if speed.record is None:
        print(f"no times: {speed.fault}", file=sys.stderr)
    elif not quiet:
        _print_speed(speed.record)
    return speed.record


def _print(record: Mapping[str, Any]) -> None:
    """The machine, the matrix, what is wrong with how to have it again, and what is not here."""
    from heedful.verify.page import settings_text

    console = Console(highlight=False)
    facts = Table.grid(padding=(0, 2, 0, 0))
    facts.add_column(no_wrap=True, style="dim")
    facts.add_column(overflow="fold")
    for name, value in record["machine"].items():
        if value is not None and name != "load":
            facts.add_row(name, Text(str(value)))
    facts.add_row("checks", Text(f"{settings_text(record['settings'])}, on {record['settings']['device']}"))
    console.print(facts)
    columns = [column for column in record["backends"] if column["status"] != "absent"]
    for part in _parts(columns, record["features"], console.width):
        console.print()
        console.print(_matrix(part, record["features"]))
    for column in columns:
        _print_faults(column, console)
    absent = [column for column in record["backends"] if column["status"] == "absent"]
    if absent:
        console.print()
        for column in absent:
            console.print(Text(f"not here: {column['name']}: {column['reason']}", style="dim"), soft_wrap=True)
    console.print()
    console.print(Text(_CAPTION, style="dim"))
    console.print(Text(_summary(record, columns), style="bold"), soft_wrap=True)


_CAPTION = (
    "A number is the worst error of a row's checks in units of what the rule allows (at most 1 is right), beside it "
    "the largest difference from the formula in float64. *: in part refused, for the backend's limits. A check may "
    "count in several rows."
)


def _summary(record: Mapping[str, Any], columns: Sequence[Mapping[str, Any]]) -> str:
    counts = record["counts"]
    told = [f"{counts[word]} {word}" for word in ("right", "refused", "wrong", "crashed", "hung") if counts[word]]
    made = sum(column["made"] for column in columns)
    seconds = spoken(sum(column["seconds"] for column in columns))
    return (
        f"{len(columns)} backends, {record['samples']} samples, {made} checks in {seconds}: {', '.join(told) or 'none'}"
        + (" (partial: interrupted)" if record["interrupted"] else "")
    )


def _text(column: Mapping[str, Any], feature: str) -> tuple[str, str]:
    """A cell's text and style."""
    from heedful.verify.page import cell_of

    cell = cell_of(column, feature)
    if cell["kind"] == "right" and column["cells"][feature]["units"] is not None:
        error = cell["small"].partition(",")[0]
        refused = "*" if column["cells"][feature].get("refused") else ""
        return f"{cell['text']} {error}{refused}", "green"
    if cell["kind"] == "refused":
        limits = list(column["cells"][feature]["limits"])
        return f"refused: {limits[0]}{', …' if limits[1:] else ''}", "dim"
    return f"{cell['text']} {cell['small']}".strip() if cell["kind"] == "wrong" else cell["text"], _STYLES[cell["kind"]]


def _parts(
    columns: Sequence[Mapping[str, Any]], features: Sequence[str], width: int
) -> Iterable[Sequence[Mapping[str, Any]]]:
    """The backends in as many tables, one below the other, as the screen needs."""
    room = width - max(map(len, features), default=0)
    part: list[Mapping[str, Any]] = []
    used = 0
    for column in columns:
        wide = 2 + max([len(column["name"]), *(len(_text(column, name)[0]) for name in features)])
        if part and used + wide > room:
            yield part
            part, used = [], 0
        part.append(column)
        used += wide
    if part:
        yield part


def _matrix(columns: Sequence[Mapping[str, Any]], features: Sequence[str]) -> Table:
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column("feature", no_wrap=True)
    for column in columns:
        made.add_column(Text(column["name"]), overflow="fold")
    for name in features:
        cells = [_text(column, name) for column in columns]
        made.add_row(Text(name), *(Text(text, style=style) for text, style in cells))
    return made


def _print_faults(column: Mapping[str, Any], console: Console) -> None:
    if column["reason"]:
        console.print()
        console.print(Text(f"{column['name']}: {column['reason']}", style="bold red"), soft_wrap=True)
    for fault in column["faults"][:_SHOWN]:
        console.print()
        head = f"{fault['outcome'].upper()} {column['name']}, {fault['check']}: "
        console.print(Text.assemble((head, "bold red"), fault["detail"]), soft_wrap=True)
        for how in fault["reproduce"].values():
            console.print(Text(f"  again: {how}"), soft_wrap=True)
    if more := column["faults"][_SHOWN:]:
        console.print(Text(f"and {len(more)} more of {column['name']}: see --json or --html", style="red"))


def _print_speed(record: Mapping[str, Any]) -> None:
    """The median of a call, a line for each case."""
    console = Console(highlight=False)
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    names = record["settings"]["backends"]
    for name in ("case", "mask", "dtype", *names):
        made.add_column(Text(name), justify="left" if name in {"case", "mask", "dtype"} else "right", no_wrap=True)
    for group in record["groups"]:
        rows = {row["backend"]: row for row in group["rows"]}
        times = [_time(rows[name]) for name in names]
        made.add_row(group["case"], group["mask"], group["dtype"], *times)
    console.print()
    console.print(made)


def _time(row: Mapping[str, Any]) -> str:
    return str(row["status"]) if row["median_ms"] is None else spoken(row["median_ms"] / 1e3)
