"""``heedful list``, as a user types it."""

import json
import subprocess
import sys

import pytest
from rich.text import Text
from typer.testing import CliRunner

import heedful
from heedful import Refusal
from heedful.cli import app
from heedful.cli.listing import _in_short
from heedful.listing import BackendRow

run = CliRunner(env={"NO_COLOR": "1", "FORCE_COLOR": None}).invoke


def test_the_table_shows_every_backend_and_why_not():
    answer = run(app, ["list"], env={"COLUMNS": "160"})
    assert answer.exit_code == 0
    assert all(row.name in answer.stdout for row in heedful.list_backends())
    assert "device is cpu, it takes cuda" in answer.stdout


@pytest.mark.parametrize("columns", [80, 100, 120])
@pytest.mark.parametrize("arguments", [[], ["--device", "sm75"], ["--device", "gfx942"]])
def test_each_backend_is_one_line(columns, arguments):
    """Names, answers and exactness are whole."""
    answer = run(app, ["list", *arguments], env={"COLUMNS": str(columns), "LINES": "24"})
    lines = answer.stdout.splitlines()
    rows = heedful.list_backends().rows
    assert len(lines) == len(rows) + 2
    assert max(map(len, lines)) <= columns
    for line, row in zip(lines[2:], rows, strict=True):
        name, here, exactness = line.split()[:3]
        assert (name, exactness) == (row.name, row.exactness)
        assert here in {"yes", "no"}


@pytest.mark.parametrize(
    ("refusals", "words"),
    [
        (
            [Refusal("package", "x not installed", "x 2 or newer", "pip"), Refusal("device", "cpu", "cuda")],
            "device is cpu",
        ),
        ([Refusal("dtype", "a", "b"), Refusal("package", "x 1.0.6", "x 2.1.1 or newer")], "x 1.0.6, needs 2.1.1"),
        (
            [Refusal("package", "x not installed", "x", "pip"), Refusal("download", "not allowed", "h")],
            "x not installed",
        ),
        ([Refusal("download", "not allowed", "kernels of the Hub with permission only")], "download not allowed"),
        ([Refusal("compute capability", "7.5", "at least 8.0", "use native")], "capability 7.5, takes ≥ 8.0"),
        ([Refusal("import", "x cannot be loaded:\n  OSError: gone", "y")], "x cannot be loaded: OSError: gone"),
        ([Refusal("layout", "BHSD", "THD")], "layout is BHSD, it takes THD"),
    ],
)
def test_the_decisive_reason_is_told_in_few_words(refusals, words):
    assert _in_short(BackendRow("x", (), "exact", "", tuple(refusals))).startswith(words)


def test_verbose_tells_every_reason_its_remedy_and_all_names():
    answer = run(app, ["list", "--verbose"], env={"COLUMNS": "60"})
    assert answer.exit_code == 0
    for row in heedful.list_backends():
        assert row.description in answer.stdout
        assert all(f"- {refusal}\n" in answer.stdout for refusal in row.refusals)
        assert all(name in answer.stdout for name in row.aliases)


def test_the_same_as_json():
    data = json.loads(run(app, ["list", "--json"]).stdout)
    known = heedful.list_backends()
    assert {row["name"]: row["available"] for row in data["backends"]} == {row.name: row.available for row in known}
    assert {row["name"]: row["aliases"] for row in data["backends"]} == {row.name: [*row.aliases] for row in known}
    assert data["supposed"] is False


def test_a_machine_that_is_not_here():
    data = json.loads(run(app, ["list", "--device", "sm_90", "--json"]).stdout)
    assert data["problem"]["architecture"] == "sm_90"
    assert data["problem"]["dtype"] == "float16"
    rows = {row["name"]: row for row in data["backends"]}
    assert rows["flash"]["available"]
    assert rows["flash_3"]["available"]
    assert not rows["aiter"]["available"]
    assert not any("package" in reason or "download" in reason for row in rows.values() for reason in row["reasons"])
    table = run(app, ["list", "--device", "sm90"], env={"COLUMNS": "80"}).stdout
    assert table.startswith("sm_90, packages taken as installed: ")
    assert " there " in table


@pytest.mark.parametrize("command", ["list", "explain"])
@pytest.mark.parametrize("name", ["gpu", "sm", "sm7", "sm_9000", "gfx", "", "cuda:x", "sm_75; rm"])
def test_an_unknown_machine_is_named(command, name):
    answer = run(app, [command, "--device", name], env={"COLUMNS": "200"})
    assert answer.exit_code == 2
    assert f"Invalid value for --device: got {name!r}; give cpu, mps," in Text.from_ansi(answer.stderr).plain


def test_an_error_of_heedful_is_one_line_and_status_2():
    script = "import sys; sys.argv = ['heedful', 'demo', '--backend', 'flesh']; from heedful.cli import main; main()"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert "no backend is called 'flesh'" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_an_unknown_device_is_named():
    with pytest.raises(heedful.InvalidArgument, match="device: got 'gpu'; give a device type of torch"):
        heedful.list_backends("gpu")
