"""``heedful explain``: what a call of some shape would run, on this machine or another, and why nothing else."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from heedful.call import checked_numbers
from heedful.cases import CASES, by_name
from heedful.cli.machines import HELP, Machine, machine
from heedful.cli.problems import (
    DTYPES,
    MASKS,
    as_option,
    dtype_of,
    layout_of,
    mask_of,
    shapes_of,
    shapes_of_case,
    words_of_case,
)
from heedful.cli.tables import table
from heedful.dispatch import AttentionDispatcher
from heedful.errors import UnknownBackend
from heedful.layer_report import wish_text
from heedful.measuring import spoken
from heedful.problem import problem_for_shapes
from heedful.select import Plan, Verdict


@dataclass(frozen=True)
class _Row:
    """One candidate's verdict; ``answer`` is runs, yes, by name (it was not asked, and would take it), or no.

    ``name``: the strategy's, or the candidate's label where it differs from another row in its rewrites. ``seconds`` a
    call, where they were measured.
    """

    name: str
    verdict: Verdict
    answer: str
    exactness: str
    seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        steps = [{"name": step.name, "mends": list(step.mended), "why": step.why} for step in self.verdict.steps]
        refusals = [{**asdict(refusal), "text": str(refusal)} for refusal in self.verdict.refusals]
        return {
            "name": self.verdict.name,
            "candidate": self.verdict.label,
            "seconds": self.seconds,
            "answer": self.answer,
            "exactness": self.exactness,
            "accepts": self.verdict.accepts,
            "steps": steps,
            "refusals": refusals,
        }


def explain(
    shape: Annotated[
        str | None, typer.Option(help="Query's sizes in the order of --layout, such as 2,10,4096,64.")
    ] = None,
    key_shape: Annotated[str | None, typer.Option(help="Key's sizes; query's by default.")] = None,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="Heads of key and value.")] = None,
    value_dim: Annotated[int | None, typer.Option(min=0, help="Value's head dim.")] = None,
    case: Annotated[str | None, typer.Option(help="The shapes and mask of a real model's call, see --cases.")] = None,
    layout: Annotated[str, typer.Option(help="BHSD, BSHD or THD.")] = "BHSD",
    dtype: Annotated[str | None, typer.Option(help=f"{', '.join(DTYPES)}; fp16, or fp32 on a CPU.")] = None,
    mask: Annotated[list[str] | None, typer.Option(help=f"{MASKS}; repeat it to join several.")] = None,
    kept: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Share of keys that padding keeps.")] = None,
    device: Annotated[str | None, typer.Option(help=f"{HELP} This one by default.")] = None,
    backend: Annotated[
        str | None, typer.Option(help="A name, several with commas for a fallback order, or auto.")
    ] = None,
    scale: Annotated[float | None, typer.Option(help="Factor of the scores; 1/sqrt(D) by default.")] = None,
    softcap: Annotated[float | None, typer.Option(help="Soft cap of the scores.")] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Relative error that is allowed: approximate backends count for auto.")
    ] = None,
    dropout: Annotated[float, typer.Option(help="Probability of dropping a weight.")] = 0.0,
    grad: Annotated[bool, typer.Option("--grad", help="With a gradient.")] = False,
    lse: Annotated[bool, typer.Option("--lse", help="With the log-sum-exp.")] = False,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="Only deterministic gradients.")] = False,
    compiling: Annotated[bool, typer.Option("--compile", help="Under torch.compile.")] = False,
    cases: Annotated[bool, typer.Option("--cases", help="Print the real models' calls, and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print what a call would run, and why every other backend would not; exit with 1 where nothing takes it."""
    if cases:
        _print_cases(as_json)
        return
    place, layout = machine(device), layout_of(layout)
    computed = place.dtype if dtype is None else dtype_of(dtype)
    if case is not None:
        if given := [
            option for option, value in _of_shapes(shape, key_shape, kv_heads, value_dim) if value is not None
        ]:
            raise typer.BadParameter(f"got {case!r} beside {', '.join(given)}; give one of both", param_hint="--case")
        try:
            known = by_name(case)
        except ValueError as error:
            raise typer.BadParameter(f"{error}; --cases prints all", param_hint="--case") from error
        shapes = shapes_of_case(known, layout)
        kept = known.kept_keys if mask is None and kept is None else kept
        mask = words_of_case(known) if mask is None else mask
    elif shape is not None:
        shapes = shapes_of(shape, key_shape, kv_heads, value_dim, layout)
    else:
        raise typer.BadParameter("it is missing; give query's sizes, or --case (see --cases)", param_hint="--shape")
    dispatcher = AttentionDispatcher(facts=place.facts)
    fields = as_option(
        lambda: checked_numbers(
            dropout_p=dropout,
            is_causal=False,
            scale=scale,
            enable_gqa=shapes.enable_gqa,
            softcap=softcap,
            max_error=max_error,
            options=None,
            return_lse=lse,
        )
    )
    value = mask_of(mask or (), kept, shapes, computed, analysed=dispatcher.policy.analyse and not compiling)
    problem = as_option(
        lambda: problem_for_shapes(
            shapes.query,
            shapes.key,
            shapes.value,
            dtype=computed,
            device=place.device,
            mask=value,
            layout=layout,
            enable_gqa=shapes.enable_gqa,
            needs_grad=grad,
            deterministic=deterministic,
            compiling=compiling,
            **fields,
        )
    )
    loaded_on = None if place.supposed else torch.device(place.device.type)
    try:
        plan = as_option(lambda: dispatcher.plan(problem, _names(backend), device=loaded_on))
    except UnknownBackend as error:
        if backend is None:
            raise  # HEEDFUL_BACKEND names it, and the text says so
        raise typer.BadParameter(str(error), param_hint="--backend") from error
    rows = _rows(plan, dispatcher)
    print(json.dumps(_data(plan, rows, place), indent=2)) if as_json else _print(plan, rows, place)
    if plan.refused:
        raise typer.Exit(1)


def _of_shapes(*values: object) -> tuple[tuple[str, object], ...]:
    return tuple(zip(("--shape", "--key-shape", "--kv-heads", "--value-dim"), values, strict=True))


def _names(backend: str | None) -> str | list[str] | None:
    if backend is None or "," not in backend:
        return None if backend is None else backend.strip()
    return [name for word in backend.split(",") if (name := word.strip())]


def _rows(plan: Plan, dispatcher: AttentionDispatcher) -> list[_Row]:
    """The wanted candidates in their order, then all others by name."""
    strategies = dispatcher.factory.strategies()
    wanted = {verdict.name for verdict in plan.verdicts}
    rest = [name for name in strategies if name not in wanted]
    others = dispatcher.plan(plan.problem, rest).verdicts if rest else ()
    rows = []
    for verdict in (*plan.rows, *others):
        answer = "yes" if verdict.name in wanted else "by name"
        answer = "runs" if verdict is plan.chosen else answer if verdict.accepts else "no"
        rows.append(
            _Row(plan.name_of(verdict), verdict, answer, strategies[verdict.name].exactness, plan.seconds_of(verdict))
        )
    return rows


def _print(plan: Plan, rows: list[_Row], place: Machine) -> None:
    """The decision, then a line a backend: all of them under auto, else those that were asked."""
    console = Console(highlight=False)
    facts = Table.grid(padding=(0, 2, 0, 0))
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    asked = {verdict.name for verdict in plan.verdicts}
    auto = "auto" in (plan.wish if isinstance(plan.wish, tuple) else (plan.wish,))
    others = [row.verdict.name for row in rows if row.verdict.name not in asked and row.verdict.accepts]
    decision = plan.rung if plan.refused else f"{plan.backend}: {plan.rung}"
    for name, text in (
        ("problem", str(plan.problem)),
        ("machine", str(place)),
        ("wish", f"{wish_text(plan.wish)} (from {plan.origin})"),
        ("refused" if plan.refused else "runs", decision),
        ("won", plan.won),
        ("note", plan.note),
        ("others", "" if auto else f"{', '.join(others) or 'none'} would take it"),
    ):
        if text:
            facts.add_row(Text(name, style="dim"), Text(text, style="bold" if text is decision else ""))
    console.print(facts)
    console.print()
    shown = rows if auto else [row for row in rows if row.verdict.name in asked]
    columns = ["backend", "takes it", "a call", "after what, or why not"]
    times = ["" if row.seconds is None else spoken(row.seconds) for row in shown]
    cells = [[row.name, row.answer, time, _how(row, wholly=not auto)] for row, time in zip(shown, times, strict=True)]
    if not any(times):
        columns, cells = columns[:2] + columns[3:], [cell[:2] + cell[3:] for cell in cells]
    styles = [{"runs": "bold green", "no": "dim"}.get(row.answer, "") for row in shown]
    console.print(table(columns, cells, console.width, wraps=True, styles=styles))


def _how(row: _Row, *, wholly: bool) -> str:
    """A line for each rewrite, or for each reason; what the wrong machine lacks besides is told only ``wholly``."""
    kind = "" if row.exactness == "exact" else f"{row.exactness}: "
    reasons = row.verdict.refusals
    if not wholly and reasons and reasons[0].field in {"device", "architecture", "compute capability"}:
        reasons = reasons[:1]
    if reasons:
        return kind + "\n".join(map(str, reasons))
    return kind + ("\n".join(map(str, row.verdict.steps)) or "as it is")


def _data(plan: Plan, rows: list[_Row], place: Machine) -> dict[str, Any]:
    return {
        "problem": plan.problem.to_dict(),
        "machine": {**asdict(place.device), "supposed": place.supposed},
        "wish": plan.wish,
        "origin": plan.origin,
        "backend": plan.backend,
        "rung": plan.rung,
        "refused": plan.refused,
        "note": plan.note,
        "won": plan.won,
        "backends": [row.to_dict() for row in rows],
    }


def _print_cases(as_json: bool) -> None:
    if as_json:
        print(json.dumps([asdict(one) for one in CASES], indent=2))
        return
    rows = []
    for one in CASES:
        sizes = (one.batch, one.heads, one.kv_heads, one.query_length, one.key_length, one.head_dim)
        kept = "" if one.kept_keys is None else f", {one.kept_keys:.3g} kept"
        rows.append((one.name, *map(str, sizes), f"{one.mask}{kept}", one.model))
    console = Console(highlight=False)
    console.print(table(("case", "B", "H", "N", "Q", "K", "D", "mask", "model"), rows, console.width))
