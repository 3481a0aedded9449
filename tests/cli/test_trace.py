"""``heedful trace``, as a user types it: the script runs as it would alone, and its problems are written down."""

import json
import sys

import pytest
from typer.testing import CliRunner

from heedful.cli import app
from heedful.run_report import RunReport
from heedful.trace import Trace

run = CliRunner(env={"NO_COLOR": "1", "FORCE_COLOR": None, "COLUMNS": "140"}).invoke

CALLS = """
import torch, heedful
query = torch.randn(1, 2, 8, 16)
for _ in range(3):
    heedful.attention(query, query, query)
heedful.attention(query, query, query, is_causal=True)
"""


@pytest.fixture(autouse=True)
def own_process(process):
    return process(guard="replace")


@pytest.fixture
def traced(tmp_path):
    """Run a script's text; the answer and the trace, None where there is none."""

    def traced(text, *arguments, options=()):
        script, out = tmp_path / "script.py", tmp_path / "out.trace"
        script.write_text(text)
        answer = run(app, ["trace", "--out", str(out), *options, str(script), *arguments])
        return answer, Trace.load(out) if out.exists() else None

    return traced


def test_a_scripts_problems_and_their_calls_are_written(traced):
    answer, trace = traced(CALLS)
    assert answer.exit_code == 0, answer.output
    assert [(str(problem), calls) for problem, calls in trace.calls.items()] == [
        ("B1 H2 Q8 K8 D16 float32 BHSD on cpu", 3),
        ("B1 H2 Q8 K8 D16 float32 BHSD on cpu, mask causal top_left", 1),
    ]
    assert "4 calls of 2 kinds" in answer.stderr
    assert "2 problems written to" in answer.stderr
    assert answer.stdout == ""


def test_the_report_is_saved_beside_it(traced, tmp_path):
    answer, _ = traced(CALLS, options=["--report", str(tmp_path / "run.report")])
    assert answer.exit_code == 0, answer.output
    found = RunReport.load(tmp_path / "run.report")
    assert (found.calls, {row.backend for row in found}) == (4, {"native"})


def test_the_script_is_run_as_if_alone(traced, tmp_path):
    (tmp_path / "beside_the_script.py").write_text("word = 'imported'")
    before = sys.argv[:], sys.path[:]
    text = "import sys, beside_the_script\nprint(__name__, sys.argv[1:], sys.argv[0][-9:], beside_the_script.word)"
    answer, _ = traced(text, "--out", "x", "--help", "-n", "3")
    sys.modules.pop("beside_the_script", None)
    assert answer.stdout == "__main__ ['--out', 'x', '--help', '-n', '3'] script.py imported\n"
    assert (sys.argv, sys.path) == before


@pytest.mark.parametrize(
    ("end", "status"),
    [("sys.exit()", 0), ("sys.exit(0)", 0), ("sys.exit(3)", 3), ("sys.exit('it ends')", 1), ("sys.exit(False)", 0)],
)
def test_its_exit_status_is_the_commands(traced, end, status):
    answer, trace = traced(CALLS + f"import sys\n{end}\n")
    assert answer.exit_code == status
    assert len(trace.calls) == 2
    assert ("it ends" in answer.stderr) is ("it ends" in end)


@pytest.mark.parametrize("error", ["ValueError('odd')", "KeyboardInterrupt"])
def test_a_script_that_raises_has_its_problems_written_all_the_same(traced, error):
    before = sys.argv[:], sys.path[:]
    answer, trace = traced(CALLS + f"raise {error}\n")
    assert answer.exit_code != 0
    assert error.startswith("Key") or isinstance(answer.exception, ValueError)
    assert len(trace.calls) == 2
    assert (sys.argv, sys.path) == before


def test_a_script_that_never_calls_is_told_how_to(traced):
    answer, trace = traced("print('no attention')")
    assert (answer.exit_code, trace.calls) == (0, {})
    assert "no call went through heedful: route a model" in answer.stderr


def test_a_script_that_is_not_there_leaves_the_last_trace_alone(tmp_path):
    out = tmp_path / "out.trace"
    out.write_text("of yesterday")
    answer = run(app, ["trace", "--out", str(out), str(tmp_path / "absent.py")])
    assert answer.exit_code == 2
    assert "is no file" in answer.output
    assert out.read_text() == "of yesterday"


@pytest.mark.parametrize("option", ["--out", "--report"])
@pytest.mark.parametrize("place", [".", "absent/run.json"])
def test_a_place_that_cannot_be_written_is_told_before_the_script_runs(tmp_path, option, place):
    script = tmp_path / "script.py"
    script.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    answer = run(app, ["trace", option, str(tmp_path / place), str(script)])
    assert answer.exit_code == 2
    assert option in answer.output
    assert not (tmp_path / "ran").exists()


def test_what_is_traced_can_be_read_by_anybody(traced, tmp_path):
    traced(CALLS)
    data = json.loads((tmp_path / "out.trace").read_text())
    assert (data["format"], data["kind"]) == (1, "trace")
    assert [each["calls"] for each in data["problems"]] == [3, 1]
