"""The command ``heedful``: each subcommand is one module here."""

from __future__ import annotations

import errno
import io
import os
import sys

import typer

from heedful.cli.bench import bench
from heedful.cli.demo import demo
from heedful.cli.doctor import doctor
from heedful.cli.explain import explain
from heedful.cli.install import install
from heedful.cli.listing import list_
from heedful.cli.replay import replay
from heedful.cli.reporting import report
from heedful.cli.run import run
from heedful.cli.trace import trace
from heedful.cli.tune import tune
from heedful.cli.verify import verify
from heedful.errors import HeedfulError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

app = typer.Typer(
    help="One call, every attention kernel, never silently wrong, and it can say why.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("bench")(bench)
app.command("demo")(demo)
app.command("doctor")(doctor)
app.command("explain")(explain)
app.command("install")(install)
app.command("list")(list_)
app.command("report")(report)
app.command("run", context_settings={"allow_interspersed_args": False})(run)
app.command("trace", context_settings={"allow_interspersed_args": False})(trace)
app.command("tune")(tune)
app.command("replay")(replay)
app.command("verify")(verify)


def main() -> None:
    """Run the command; what heedful raises on purpose is printed as its text, with exit status 2.

    So is a full disk. What a terminal cannot show is replaced.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        try:
            app()
        finally:
            if not sys.stdout.closed:  # as a script that `run` ran may have left it
                sys.stdout.flush()
    except HeedfulError as error:
        print(f"heedful: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        print(f"heedful: what it had to say could not be written: {error}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(2)  # the end of Python would try to write it again
