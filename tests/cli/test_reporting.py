"""``heedful report``, as a user types it."""

import json

import pytest
from typer.testing import CliRunner

from heedful.cli import app
from heedful.errors import InvalidArgument
from heedful.run_report import RunReport, RunRow

run = CliRunner(env={"NO_COLOR": "1", "FORCE_COLOR": None, "COLUMNS": "140"}).invoke
PROBLEM = "B2 H10 Q4096 K4096 D64 float32 BHSD on cpu, mask dense bool [QK]"
ROWS = (
    RunRow("unet.*.attn1", PROBLEM, "native", ("gather_keys", "upcast"), "auto", 30, 0.75, 0.75, "right in 3"),
    RunRow("", PROBLEM, "flex", (), "auto", 10, 0.25, 0.25, "right in 1, error 0.0021"),
    RunRow("vae", PROBLEM, "reference", (), "forced by name", 1, 0.0, 0.0, "not checked"),
)
WRONG = RunRow("[bold]", PROBLEM, "odd", (), "auto", 2, 0.0, 0.0, "WRONG: [red] NaN in query 3")


@pytest.fixture
def saved(tmp_path):
    def save(*rows):
        RunReport(rows).save(tmp_path / "run.report")
        return str(tmp_path / "run.report")

    return save


def test_a_line_for_each_kind_of_call(saved):
    answer = run(app, ["report", saved(*ROWS)])
    assert answer.exit_code == 0, answer.output
    lines = [line.split() for line in answer.stdout.splitlines()]
    assert lines[0] == ["calls", "time", "a", "call", "backend", "guard", "layer", "problem"]
    native = next(line for line in lines if "native" in line)
    assert native[:5] == ["30", "75%", "25", "ms", "native"]
    assert ["gather_keys"] in [line[:1] for line in lines]
    untimed = next(line for line in lines if "reference" in line)
    assert untimed[:4] == ["1", "reference", "not", "checked"]
    assert "[QK]" in answer.stdout
    assert lines[-1] == ["41", "calls", "of", "3", "kinds"]


def test_the_same_as_json(saved):
    path = saved(*ROWS)
    answer = run(app, ["report", path, "--json"])
    assert answer.exit_code == 0
    assert json.loads(answer.stdout) == json.loads(json.dumps(RunReport(ROWS).to_dict()))


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_wrong_answer_is_status_1_and_brackets_are_no_markup(saved, options):
    answer = run(app, ["report", saved(*ROWS, WRONG), *options])
    assert answer.exit_code == 1
    assert "[red]" in answer.stdout
    assert "[bold]" in answer.stdout
    assert "WRONG" in answer.stdout


def test_an_empty_report_says_so(saved):
    answer = run(app, ["report", saved()])
    assert (answer.exit_code, answer.stdout) == (0, "0 calls of 0 kinds\n")


@pytest.mark.parametrize("columns", ["60", "100"])
def test_nothing_is_cut_off(saved, columns):
    answer = run(app, ["report", saved(*ROWS, WRONG)], env={"COLUMNS": columns})
    assert "…" not in answer.stdout
    assert max(map(len, answer.stdout.splitlines())) <= int(columns)


@pytest.mark.parametrize("content", ["", "{}", '{"format": 1, "kind": "trace", "rows": []}', None])
def test_a_file_that_is_none_is_named(tmp_path, content):
    path = tmp_path / "some.file"
    if content is not None:
        path.write_text(content)
    answer = run(app, ["report", str(path)])
    assert isinstance(answer.exception, InvalidArgument)
    assert "some.file; it cannot be read" in str(answer.exception)


def test_the_command_tells_it_as_text_with_status_2(fresh_python, tmp_path):
    done = fresh_python(f"import sys; sys.argv = ['heedful', 'report', {str(tmp_path / 'none')!r}]\n"
                        "from heedful.cli import main; main()")  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("heedful: report: got ")
    assert "Traceback" not in done.stderr
