"""The command ``heedful``: each subcommand is one module here."""

from __future__ import annotations

import sys

import typer

from heedful.cli.demo import demo
from heedful.cli.explain import explain
from heedful.cli.listing import list_
from heedful.errors import HeedfulError

app = typer.Typer(
    help="One call, every attention kernel, never silently wrong, and it can say why.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo)
app.command("explain")(explain)
app.command("list")(list_)


def main() -> None:
    """Run the command; what heedful raises on purpose is printed as its text, with exit status 2."""
    try:
        app()
    except HeedfulError as error:
        print(f"heedful: {error}", file=sys.stderr)
        sys.exit(2)
