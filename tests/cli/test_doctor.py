"""``heedful doctor``, as a user types it; and ``python -m heedful``."""

import importlib
import json
import xml.etree.ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
from doctor_machines import MACHINES
from typer.testing import CliRunner

from heedful import AttentionStrategyFactory
from heedful.cli import app
from heedful.doctor import examine

command = importlib.import_module("heedful.cli.doctor")  # the package has a function of that name
_ENTRY = """
import typer
import heedful.cli as cli
cli.app = typer.Typer(pretty_exceptions_enable=False)
cli.app.command()(lambda: print("{text}"))
sys.argv[1:] = []
cli.main()
"""
run = CliRunner(env={"NO_COLOR": "1", "FORCE_COLOR": None, "COLUMNS": "100"}).invoke


@pytest.fixture
def on(monkeypatch):
    """Have the command find itself on one of the machines."""

    def put(name):
        monkeypatch.setattr(AttentionStrategyFactory, "_default", AttentionStrategyFactory(plugins=False))
        monkeypatch.setattr(command, "look", lambda strategies, trial: MACHINES[name])
        return MACHINES[name]

    return put


@pytest.mark.parametrize("name", ["ampere_broken_wheel", "ada_windows_embedded", "mps", "blackwell_datacentre"])
@pytest.mark.parametrize("columns", [80, 120])
def test_the_page_has_all_that_the_report_has(on, name, columns):
    here = on(name)
    answer = run(app, ["doctor"], env={"COLUMNS": str(columns)})
    assert answer.exit_code == 0
    assert max(map(len, answer.stdout.splitlines())) <= columns
    printed = "".join(answer.stdout.split())
    for heading, entries in examine(here).sections().items():
        assert "".join(heading.split()) in printed
        if heading != "Backends":
            assert all("".join(text.split()) in printed for _, text in entries if len(text) < 30)
    assert all(row.name in answer.stdout for row in examine(here).rows)


def test_brackets_in_an_error_are_no_markup(on, monkeypatch):
    here = on("ampere_broken_wheel")
    package = replace(here.packages[0], text="ImportError: [bold]x[/bold] [/]")
    monkeypatch.setattr(command, "look", lambda strategies, trial: replace(here, packages=(package,)))
    assert "[bold]x[/bold] [/]" in run(app, ["doctor"]).stdout


def test_the_same_as_json(on):
    on("ampere_broken_wheel")
    data = json.loads(run(app, ["doctor", "--json"]).stdout)
    assert data["environment"]["torch"] == "2.8.0+cu128"
    assert data["troubles"][0]["advice"]["name"] == "other torch or ABI"
    assert data["decision"]["rule"] == "official wheel"
    assert data["decision"]["steps"][-1].endswith("linux_x86_64.whl")


def test_the_page_can_be_drawn(on, tmp_path):
    on("cpu")
    picture = tmp_path / "doctor.svg"
    assert run(app, ["doctor", "--picture", str(picture)]).exit_code == 0
    root = xml.etree.ElementTree.parse(picture).getroot()
    assert root.tag.endswith("svg")
    assert "native_flash" in picture.read_text("utf-8")
    answer = run(app, ["doctor", "--picture", str(tmp_path / "no" / "x.svg")])
    assert answer.exit_code == 2
    assert "cannot be written" in answer.stderr


def test_this_machine_for_real(fresh_python, tmp_path):
    """All of it, in a process of its own: with a package that hangs among those that it imports."""
    folder = tmp_path / "flash_attn"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "flash_attn_interface.py").write_text("import time; time.sleep(99)")
    script = "import sys; sys.argv[1:] = 'doctor --json --timeout 3'.split(); import heedful.cli as c; c.main()"
    answer = fresh_python(script, tmp_path)
    assert answer.returncode == 0, answer.stderr
    data = json.loads(answer.stdout)
    faults = {one["package"]["distribution"]: one["package"]["fault"] for one in data["troubles"]}
    assert faults["flash-attn"] == "hangs"
    assert {row["name"]: row["state"] for row in data["backends"]}["native"] == "usable"


def test_no_package_with_kernels_is_imported_here(fresh_python):
    script = """
import sys
from heedful.doctor import examine
from heedful.doctor.look import look
examine(looked=lambda strategies: look(strategies, trial=lambda jobs: ()))
print([name for name in ("xformers", "sageattention", "triton", "kernels", "rich") if name in sys.modules])
"""
    answer = fresh_python(script)
    assert answer.stdout.strip() == "[]", answer.stderr


def test_python_dash_m(fresh_python):
    script = "import runpy, sys; sys.argv = ['heedful', '--help']; runpy.run_module('heedful', run_name='__main__')"
    answer = fresh_python(script)
    assert answer.returncode == 0
    assert "doctor" in answer.stdout
    assert "install" in answer.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_one_line(fresh_python):
    script = f"""
import os, sys
os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
{_ENTRY.format(text="x")}
"""
    answer = fresh_python(script)
    assert answer.returncode == 2
    assert answer.stderr.splitlines() == [
        "heedful: what it had to say could not be written: [Errno 28] No space left on device"
    ]


def test_what_a_terminal_cannot_show_is_replaced(fresh_python):
    script = f"""
import sys
sys.stdout.reconfigure(encoding="cp1252", errors="strict")
{_ENTRY.format(text="a →" + chr(92) + "ud800 z")}
"""
    answer = fresh_python(script)
    assert (answer.returncode, answer.stdout) == (0, "a ?? z\n"), answer.stderr
