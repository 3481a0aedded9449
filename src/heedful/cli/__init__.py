"""The command ``heedful``: each subcommand is one module here."""

from __future__ import annotations

import sys

import typer

from heedful.cli.bench import bench
from heedful.cli.demo import demo
from heedful.cli.explain import explain
from heedful.cli.listing import list_
from heedful.cli.replay import replay
from heedful.cli.reporting import report
from heedful.cli.trace import trace
from heedful.cli.tune import tune
from heedful.errors import HeedfulError

app = typer.Typer(
    help="One call, every attention kernel, never silently wrong, and it can say why.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("bench")(bench)
app.command("demo")(demo)
app.command("explain")(explain)
app.command("list")(list_)
app.command("report")(report)
app.command("trace", context_settings={"allow_interspersed_args": False})(trace)
app.command("tune")(tune)
app.command("replay")(replay)


def main() -> None:
    """Run the command; what heedful raises on purpose is printed as its text, with exit status 2."""
    try:
        app()
    except HeedfulError as error:
        print(f"heedful: {error}", file=sys.stderr)
        sys.exit(2)
