"""``heedful list``, as a user types it."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import heedful
from heedful.cli import app

run = CliRunner().invoke


def test_the_table_shows_every_backend_and_why_not():
    answer = run(app, ["list"], env={"COLUMNS": "160"})
    assert answer.exit_code == 0
    assert all(row.name in answer.stdout for row in heedful.list_backends())
    assert "device is cpu, it takes cuda" in answer.stdout


def test_the_same_as_json():
    rows = json.loads(run(app, ["list", "--json"]).stdout)["backends"]
    assert {row["name"]: row["available"] for row in rows} == {
        row.name: row.available for row in heedful.list_backends()
    }


def test_an_error_of_heedful_is_one_line_and_status_2():
    script = "import sys; sys.argv = ['heedful', 'demo', '--backend', 'flesh']; from heedful.cli import main; main()"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert "no backend is called 'flesh'" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_an_unknown_device_is_named():
    with pytest.raises(heedful.InvalidArgument, match="device: got 'gpu'; give a device type of torch"):
        heedful.list_backends("gpu")
