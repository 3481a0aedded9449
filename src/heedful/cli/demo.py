"""``heedful demo``: pictures by a real diffusion model, under every backend that this machine can run."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import heedful
from heedful.cli.pipelines import load_pipeline

if TYPE_CHECKING:
    import numpy as np

    from heedful.demo.compare import Draw, Drawn

_NEEDS = {"diffusers": "diffusers", "sklearn": "scikit-learn", "PIL": "Pillow"}


@dataclass(frozen=True)
class _Show:
    """What is drawn: with which pipeline, how, and how the pictures are arranged and judged."""

    pipeline: Any
    draw: Draw
    judge: str
    columns: int
    scale: int
    figures: Callable[[np.ndarray], dict[str, Any]]


def demo(
    model: Annotated[
        str | None, typer.Option(help="A folder, or the id of a cached Hub model, instead of the digits.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="What to draw with --model; may be repeated.")] = None,
    revision: Annotated[
        str | None, typer.Option(help="Commit of the Hub model: allows it to be downloaded, pinned to that.")
    ] = None,
    backend: Annotated[list[str] | None, typer.Option(help="Only these backends; may be repeated.")] = None,
    judge: Annotated[
        str | None, typer.Option(help="Whose pictures all are compared with: reference, or native_math with --model.")
    ] = None,
    steps: Annotated[int, typer.Option(min=2, max=1000, help="Denoising steps.")] = 25,
    seed: Annotated[int, typer.Option(help="Of the noise, the same for every backend.")] = 0,
    each: Annotated[int, typer.Option(min=1, help="Pictures of each digit.")] = 10,
    device: Annotated[str | None, typer.Option(help="Torch device. The GPU if there is one.")] = None,
    out: Annotated[Path, typer.Option(help="The picture of all grids side by side.")] = Path("heedful-demo.png"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Draw the same pictures under every backend, and print which kernel ran, how fast, and how far apart they are."""
    _check_installed()
    _check_out(out)
    for name in (*(backend or []), *([judge] if judge else [])):
        if name != "auto":
            heedful.AttentionStrategyFactory.resolve(name)
    _check_device(device)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _quiet_extras()
    if model is None:
        if prompt or revision:
            raise typer.BadParameter("--prompt and --revision go with --model; the digits need neither")
        show = _digits(each, steps, seed, place)
    else:
        show = _users_model(model, prompt or [], revision, steps, seed, place)
    from heedful.demo.compare import compare, runnable_backends

    names, refused = runnable_backends()
    names = backend or names
    judge = judge or show.judge
    with _progress() as progress:
        bar = progress.add_task("drawing", total=steps * len({*names, judge}))
        drawn = compare(
            show.pipeline,
            show.draw,
            names,
            judge,
            lambda name: progress.update(bar, advance=1, description=f"drawing with {name}"),
        )
    result = _result(drawn, refused if backend is None else {}, show, judge, out)
    print(json.dumps(result, indent=2)) if as_json else _print(result)


def _check_installed() -> None:
    missing = [name for module, name in _NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise typer.BadParameter(f"heedful demo needs {', '.join(missing)}: pip install 'heedful[demo]'")


def _check_out(out: Path) -> None:
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise typer.BadParameter(f"{out} is no file in a folder that can be written", param_hint="--out")


def _check_device(device: str | None) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without that device
        raise typer.BadParameter(f"{device} is no device of this machine: {error}", param_hint="--device") from error


def _quiet_extras() -> None:
    """diffusers imports xFormers where it is installed, which logs that its wheel is for another torch."""
    logging.getLogger("xformers").setLevel(logging.ERROR)


def _digits(each: int, steps: int, seed: int, device: str) -> _Show:
    import numpy as np

    from heedful.demo.digits import NAMES, load_pipeline, recogniser

    pipeline = load_pipeline().to(device)
    pipeline.set_progress_bar_config(disable=True)
    names = [name for name in NAMES for _ in range(each)]
    recognise, held_out = recogniser()

    def draw(tick: Callable[[], None]) -> np.ndarray:
        return np.asarray(pipeline(names, seed=seed, steps=steps, on_step=tick).numpy())

    def figures(pictures: np.ndarray) -> dict[str, Any]:
        right = recognise(torch.from_numpy(pictures)) == np.repeat(np.arange(len(NAMES)), each)
        return {"recognised": float(right.mean()), "pictures": len(names), "recogniser_on_held_out_real": held_out}

    return _Show(pipeline, draw, "reference", columns=each, scale=max(2, 320 // (9 * each)), figures=figures)


def _users_model(model: str, prompts: list[str], revision: str | None, steps: int, seed: int, device: str) -> _Show:
    import numpy as np

    if not prompts:
        raise typer.BadParameter("--model needs at least one --prompt")
    pipeline = load_pipeline(model, revision, device)

    def draw(tick: Callable[[], None]) -> np.ndarray:
        def after_step(_pipeline: Any, _step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
            tick()
            return values

        noise = [torch.Generator("cpu").manual_seed(seed + index) for index in range(len(prompts))]
        answer = pipeline(
            prompts,
            num_inference_steps=steps,
            generator=noise,
            output_type="np",
            callback_on_step_end=after_step,
        )
        return np.asarray(answer.images)

    return _Show(pipeline, draw, "native_math", columns=len(prompts), scale=1, figures=lambda _pictures: {})


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _by_reason(refused: dict[str, str]) -> dict[str, list[str]]:
    """The backends by the first of their reasons; ``heedful list --verbose`` tells all, with the remedies."""
    found: dict[str, list[str]] = {}
    for name, reasons in refused.items():
        found.setdefault(reasons.partition(" (")[0].partition(";")[0], []).append(name)
    return found


def _result(drawn: list[Drawn], refused: dict[str, str], show: _Show, judge: str, out: Path) -> dict[str, Any]:
    """All figures as JSON data; writes the picture."""
    from heedful.demo.picture import grid, save, side_by_side

    rows = [{**each.row(), **(show.figures(each.pictures) if each.pictures is not None else {})} for each in drawn]
    sheets = [
        (each.backend, _small_print(each), grid(each.pictures, show.columns, show.scale))
        for each in drawn
        if each.pictures is not None
    ]
    save(side_by_side(sheets), out)
    return {
        "judge": judge,
        "backends": rows,
        "cannot_run_here": refused,
        "picture": str(out),
        "versions": {"heedful": heedful.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def _small_print(drawn: Drawn) -> str:
    speed = "" if drawn.seconds_per_step is None else f"{drawn.seconds_per_step * 1000:.1f} ms a step"
    return f"{speed}, largest difference {drawn.difference:.1e}"


def _print(result: dict[str, Any]) -> None:
    table = Table(title=f"the same pictures by every backend (judge: {result['judge']})", title_justify="left")
    for column in ("backend", "ran", "layers", "time per step", "largest difference", "recognised"):
        name = column in ("backend", "ran")
        table.add_column(column, justify="left" if name else "right", no_wrap=name)
    for row in result["backends"]:
        if row["refused"]:
            table.add_row(row["backend"], "refused")
            continue
        speed = "" if row["seconds_per_step"] is None else f"{row['seconds_per_step'] * 1000:.2f} ms"
        seen = f"{row['recognised']:.0%}" if "recognised" in row else ""
        difference = f"{row['largest_difference']:.1e}"
        table.add_row(row["backend"], ", ".join(row["kernels"]), row["coverage"], speed, difference, seen)
    console = Console()
    console.print(table)
    judged = next((row for row in result["backends"] if "recognised" in row), None)
    if judged is not None:
        held_out = f"{judged['recogniser_on_held_out_real']:.1%} of real digits it has not seen"
        console.print(f"recognised: of {judged['pictures']} digits, by a classifier that is right on {held_out}")
    for row in result["backends"]:
        if row["refused"]:
            console.print(f"{row['backend']} refused: {row['refused']}", highlight=False, markup=False)
    for reason, names in _by_reason(result["cannot_run_here"]).items():
        console.print(f"cannot run here, because {reason}: {', '.join(names)}", style="dim", highlight=False)
    console.print(f"picture: {result['picture']}")
