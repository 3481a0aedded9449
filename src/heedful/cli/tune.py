"""``heedful tune``: measure ahead of time which candidate is fastest, for named shapes, a trace, or a pipeline."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from heedful.cases import CASES, Case, select
from heedful.cli.pipelines import load_pipeline
from heedful.cli.problems import DTYPES, dtype_of
from heedful.cli.tables import table
from heedful.cli.tiles import check_device, forget_every_tile, measuring_bar, print_tiles, search
from heedful.dispatch import AttentionDispatcher, default_dispatcher
from heedful.masks import Mask, PaddingProfile
from heedful.measuring import spoken
from heedful.models import set_attention_backend
from heedful.problem import AttentionProblem, problem_for_shapes
from heedful.problem_class import class_of
from heedful.timings import table as table_of
from heedful.trace import Trace
from heedful.tune.ahead import ALONE, Tuned
from heedful.tune.ahead import tune as measure

_MOST_FLOPS_ON_A_CPU = 2e10  # of a case that is tuned unasked: some 0.3 s a call on two cores


def tune(
    targets: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TARGET]...", help="Traces, shell patterns of cases, or folders of pipelines."),
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option(help=f"Of cases: {', '.join(DTYPES)}; may be repeated.")] = None,
    layout: Annotated[str, typer.Option(help="Of cases: BHSD, or BSHD as diffusers' newer models.")] = "BHSD",
    prompt: Annotated[str, typer.Option(help="What a pipeline draws in two steps.")] = "a photograph",
    rounds: Annotated[int, typer.Option(min=3, help="Of each of the two measurements of a candidate.")] = 7,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU if there is one.")] = None,
    tiles: Annotated[
        bool, typer.Option("--tiles", help="Tiles of our own Triton kernels, instead of backends.")
    ] = False,
    grad: Annotated[bool, typer.Option("--grad", help="Of tiles: for training, too.")] = False,
    backend: Annotated[
        list[str] | None, typer.Option(help="Of tiles: whose, if not triton's; may be repeated.")
    ] = None,
    forget: Annotated[bool, typer.Option("--forget", help="Drop what is known of them; alone, of all.")] = False,
    export: Annotated[Path | None, typer.Option(help="Also write the times as a table to ship.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure every candidate for the given problems, checked first, and keep the times for auto.

    Without a target: the named cases that take less than about a third of a second a call. A second window of
    measurements follows some seconds after the first; the winner is what both agree on.

    With --tiles: which tiles our own Triton kernels are fastest with on these problems. It compiles up to sixteen
    kernels for each kind of call; nothing else ever does.
    """
    place = _device(device)
    dispatcher = default_dispatcher
    if dispatcher.policy.tune == "off":
        raise typer.BadParameter("HEEDFUL_TUNE is off, so nothing would use the times; unset it, or say ahead")
    dtypes = [dtype_of(word) for word in dtype or ()] or [torch.float32 if place.type == "cpu" else torch.float16]
    if (grad or backend) and not tiles:
        raise typer.BadParameter("it is for --tiles alone", param_hint="--grad" if grad else "--backend")
    if tiles:
        check_device(dispatcher, place)
    if forget and not targets and tiles:
        forget_every_tile(dispatcher, place)
        return
    if forget and not targets:
        dispatcher.experience.forget_all(place)
        print(f"all that was known of {place.type} here is forgotten")
        return
    problems = list(_problems(targets or [], dtypes, layout.upper(), prompt, place))
    if tiles:
        problems = [problem.replace(needs_grad=True) for problem in problems] if grad else problems
        found = search(dispatcher, problems, place, backends=backend or (), rounds=rounds, forget=forget)
        _export(export, dispatcher, place)
        print_tiles(found, dispatcher, place, as_json)
        raise typer.Exit(int(any(one.failed for one in found) or all(one.refused for one in found)))
    if forget:
        for problem in problems:
            dispatcher.experience.forget(problem, place)
    with measuring_bar(2 * len(set(map(class_of, problems)))) as step:
        tuned = measure(
            dispatcher, problems, place, rounds=rounds, on_step=lambda what: step(what.partition(" on ")[0])
        )
    _export(export, dispatcher, place)
    _print(tuned, dispatcher, place, as_json)
    if any(one.failed for one in tuned) or all(one.refused and ALONE not in one.refused for one in tuned):
        raise typer.Exit(1)


def _export(path: Path | None, dispatcher: AttentionDispatcher, place: torch.device) -> None:
    if path is not None:
        store = dispatcher.experience.store(place)
        path.write_bytes(table_of(store.fingerprint, store.records()))


def _device(name: str | None) -> torch.device:
    has_gpu = torch.cuda.is_available()
    if name not in (None, "cpu", "cuda") or (name == "cuda" and not has_gpu):
        raise typer.BadParameter(f"got {name!r}; give cpu{', or cuda' if has_gpu else ''}", param_hint="--device")
    return torch.device(name or ("cuda" if has_gpu else "cpu"))


def _problems(
    targets: list[str], dtypes: list[torch.dtype], layout: str, prompt: str, device: torch.device
) -> Iterator[AttentionProblem]:
    if layout not in ("BHSD", "BSHD"):
        raise typer.BadParameter(f"got {layout!r}; give BHSD or BSHD", param_hint="--layout")
    if not targets:
        small = [case for case in CASES if not case.gpu_only]
        if device.type == "cpu":
            small = [case for case in small if case.flops <= _MOST_FLOPS_ON_A_CPU]
        yield from _of_cases(small, dtypes, layout, device)
    for target in targets:
        path = Path(target)
        if path.is_dir():
            yield from _of_pipeline(target, prompt, device)
        elif path.is_file():
            traced = Trace.load(path).calls
            here = [one for one in traced if one.device == device.type]
            if not here:
                there = ", ".join(sorted({one.device for one in traced})) or "nothing"
                raise typer.BadParameter(f"{target} is of {there}, and this is {device.type}", param_hint="TARGET")
            yield from here
        elif found := select(target):
            yield from _of_cases(found, dtypes, layout, device)
        else:
            raise typer.BadParameter(
                f"got {target!r}; give a trace (heedful trace writes one), the folder of a diffusers pipeline, or a "
                "pattern of cases such as 'sdxl*' (heedful explain --cases prints all)",
                param_hint="TARGET",
            )


def _of_cases(
    cases: Iterable[Case], dtypes: list[torch.dtype], layout: str, device: torch.device
) -> Iterator[AttentionProblem]:
    facts = default_dispatcher.facts.device(device)
    for case in cases:
        shapes = [case.query_shape, case.key_shape, case.value_shape]
        if layout == "BSHD":
            shapes = [(batch, length, heads, dim) for batch, heads, length, dim in shapes]
        for dtype in dtypes:
            yield problem_for_shapes(
                *shapes,
                dtype=dtype,
                device=facts,
                mask=_mask_of(case),
                layout=layout,
                enable_gqa=case.heads != case.kv_heads,
            )


def _mask_of(case: Case) -> Mask | None:
    if case.kept_keys is None:
        return Mask(causal="top_left") if case.mask == "causal" else None
    kept = max(1, round(case.kept_keys * case.key_length))
    keep = torch.empty((1, case.key_length), dtype=torch.bool, device="meta")
    return Mask(padding=keep, profile=PaddingProfile("right", (kept,), case.key_length))


def _of_pipeline(folder: str, prompt: str, device: torch.device) -> list[AttentionProblem]:
    """What two steps of a pipeline ask of its attention layers."""
    logging.getLogger("xformers").setLevel(logging.ERROR)
    pipeline = load_pipeline(folder, None, str(device), "TARGET")
    set_attention_backend(pipeline, "auto")
    before = set(default_dispatcher.experience.tallies)
    pipeline(prompt, num_inference_steps=2, output_type="np")
    return [problem for problem, *_ in default_dispatcher.experience.tallies if (problem, *_) not in before]


def _print(tuned: list[Tuned], dispatcher: AttentionDispatcher, device: torch.device, as_json: bool) -> None:
    store = dispatcher.experience.store(device)
    where = str(store.path) if store.path else "memory only"
    if as_json:
        rows = [{**asdict(one), "problem": str(one.problem), "gain": one.gain} for one in tuned]
        print(json.dumps({"machine": str(store.fingerprint), "store": where, "classes": rows}, indent=2))
        return
    console = Console(highlight=False)
    cells = [_cells(one) for one in tuned]
    styles = ["dim" if one.refused else "" for one in tuned]
    console.print(
        table(("winner", "a call", "usual", "gain", "problem"), cells, console.width, wraps=True, styles=styles)
    )
    console.print(f"{sum(not one.refused for one in tuned)} of {len(tuned)} classes measured, kept in {where}")


def _cells(one: Tuned) -> tuple[Any, ...]:
    told = "".join(f"\n{label} is wrong: {fault}" for label, fault in one.wrong.items())
    if one.refused:
        return "not measured", "", "", "", f"{one.problem}: {one.refused}{told}"
    usual = spoken(one.seconds[one.usual]) if one.usual in one.seconds else "wrong"
    return one.winner, spoken(one.seconds[one.winner]), usual, f"{one.gain:.2f}x", f"{one.problem}{told}"
