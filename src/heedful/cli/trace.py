"""``heedful trace``: run a script and write down the attention problems that it had, to be tuned elsewhere or later."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from heedful.cli.reporting import print_report
from heedful.cli.running import run_script
from heedful.dispatch import default_dispatcher
from heedful.models import report as run_report
from heedful.trace import Trace


def trace(
    script: Annotated[Path, typer.Argument(help="A Python script that calls heedful; its arguments follow.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="The script's own arguments.")] = None,
    out: Annotated[Path, typer.Option(help="The trace; `heedful tune` reads it.")] = Path("heedful-trace.json"),
    report: Annotated[Path | None, typer.Option(help="Also save the report, for `heedful report`.")] = None,
) -> None:
    """Run a script, then write its attention problems to a file and print what computed them.

    Options of heedful's come before the script. The script's exit status is the command's; a script that raises has its
    problems written all the same.
    """
    for path, option in ((out, "--out"), (report, "--report")):
        if path is not None and (path.is_dir() or not path.resolve().parent.is_dir()):
            raise typer.BadParameter(f"{path} is no file in a folder that is there", param_hint=option)
    if report is not None and report.resolve() == out.resolve():
        raise typer.BadParameter(f"{report} is the trace's file, too; give another one", param_hint="--report")
    if not script.is_file():
        raise typer.BadParameter(f"{script} is no file", param_hint="SCRIPT")
    status = 1
    try:
        status = run_script(str(script), arguments or [])
    finally:
        _finish(out, report)
    if status:
        raise typer.Exit(status)


def _finish(out: Path, report: Path | None) -> None:
    told = Console(stderr=True, highlight=False)
    made = Trace.of(default_dispatcher.experience.tallies.values())
    found = run_report()
    made.save(out)
    if report is not None:
        found.save(report)
    print_report(found, told)
    if not made.calls:
        told.print("no call went through heedful: route a model with heedful.set_attention_backend(model, 'auto')")
    told.print(f"{len(made.calls)} problems written to {out}: `heedful tune {out}` measures them")
