"""``heedful run``: the script runs as python runs it, and the report comes however it ended."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from heedful.cli import app
from heedful.run_report import RunReport

invoke = CliRunner(env={"NO_COLOR": "1", "FORCE_COLOR": None, "COLUMNS": "140"}).invoke

CALLS = """
import torch
import torch.nn.functional as F
query = torch.randn(1, 2, 8, 16)
for _ in range(3):
    F.scaled_dot_product_attention(query, query, query)
torch.nn.MultiheadAttention(16, 2)(query[0], query[0], query[0])
"""


@pytest.fixture(autouse=True)
def own_process(process: Any) -> Any:
    return process(guard="replace")


@pytest.fixture
def ran(tmp_path: Path) -> Callable[..., Any]:
    """Run a script's text with the command, in this process."""

    def ran(text: str, *arguments: str, options: tuple[str, ...] = ()) -> Any:
        script = tmp_path / "script.py"
        script.write_text(text)
        return invoke(app, ["run", *options, str(script), *arguments])

    return ran


def test_calls_are_computed_by_heedful_and_reported(ran: Callable[..., Any]) -> None:
    answer = ran(CALLS)
    assert (answer.exit_code, answer.stdout) == (0, "")
    assert "3 calls of 1 kinds" in answer.stderr
    assert "covered 3 of 4 attention calls: native 3" in answer.stderr
    assert "passed on untouched 1: nn.MultiheadAttention was asked for its weights" in answer.stderr


def test_a_backend_is_obeyed_or_the_script_fails_as_it_would(ran: Callable[..., Any]) -> None:
    assert "reference 3" in ran(CALLS, options=("--backend", "reference")).stderr
    assert "native 3" in ran(CALLS, options=("--backend", "flash, native")).stderr
    refused = ran(CALLS, options=("--backend", "flash"))
    assert refused.exit_code == 1
    assert "heedful.errors.Refused: no wanted backend" in refused.stderr
    assert "covered 0 of 0" in refused.stderr
    unknown = ran("print('ran')", options=("--backend", "nope"))
    assert "no backend is called 'nope'" in str(unknown.exception)
    assert unknown.stdout == ""


def test_the_report_is_json_on_the_last_line_and_in_a_file(ran: Callable[..., Any], tmp_path: Path) -> None:
    answer = ran("print('first')" + CALLS, options=("--json", "--report", str(tmp_path / "run.json")))
    *before, last = answer.stdout.splitlines()
    assert before == ["first", ""]
    made = json.loads(last)
    assert (made["sdpa"]["covered"], made["sdpa"]["total"], made["rows"][0]["calls"]) == (3, 4, 3)
    assert json.loads((tmp_path / "run.json").read_text()) == made
    assert RunReport.load(tmp_path / "run.json").calls == 3
    assert invoke(app, ["report", str(tmp_path / "run.json")]).exit_code == 0


def test_the_script_is_run_as_if_alone(ran: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "beside_it.py").write_text("word = 'imported'")
    before = sys.argv[:], sys.path[:]
    text = "import sys, beside_it\nprint(__name__, __file__[-9:], sys.argv[1:], sys.argv[0][-9:], beside_it.word)"
    answer = ran(text, "--json", "--help", "-m", "3")
    sys.modules.pop("beside_it", None)
    assert answer.stdout == "__main__ script.py ['--json', '--help', '-m', '3'] script.py imported\n"
    assert (sys.argv, sys.path) == before
    assert "the script called no attention that heedful can see" in answer.stderr


def test_a_module_is_run_as_python_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package_for_run"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(
        "import sys\nprint(__name__, __package__, sys.argv[0][-11:], sys.argv[1:])" + CALLS
    )
    monkeypatch.chdir(tmp_path)
    answer = invoke(app, ["run", "--backend", "reference", "-m", "package_for_run", "--json", "x"])
    for name in [name for name in sys.modules if name.startswith("package_for_run")]:
        del sys.modules[name]
    assert answer.exit_code == 0, answer.output
    assert answer.stdout == "__main__ package_for_run __main__.py ['--json', 'x']\n"
    assert "reference 3" in answer.stderr
    absent = invoke(app, ["run", "-m", "no_module_of_that_name"])
    assert absent.exit_code == 1
    assert "No module named no_module_of_that_name" in absent.stderr


@pytest.mark.parametrize(
    ("end", "status"),
    [("sys.exit()", 0), ("sys.exit(3)", 3), ("sys.exit('it ends')", 1), ("sys.exit(False)", 0), ("raise EOFError", 1)],
)
def test_its_exit_status_is_the_commands(ran: Callable[..., Any], end: str, status: int) -> None:
    answer = ran(CALLS + f"import sys\n{end}\n")
    assert answer.exit_code == status
    assert "covered 3 of 4" in answer.stderr
    assert ("it ends" in answer.stderr) is ("it ends" in end)
    assert "Aborted" not in answer.output


def test_what_it_raises_is_told_from_its_own_first_line_on(ran: Callable[..., Any]) -> None:
    answer = ran("def odd():\n    raise ValueError('odd')\nodd()\n")
    assert answer.exit_code == 1
    lines = answer.stderr.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert 'script.py", line 3, in <module>' in lines[1]
    assert "ValueError: odd" in lines
    assert "runpy" not in answer.stderr
    assert "running.py" not in answer.stderr


def test_its_own_excepthook_is_asked(ran: Callable[..., Any]) -> None:
    before = sys.excepthook
    try:
        answer = ran(
            "import sys\nsys.excepthook = lambda kind, value, trace: print('mine', value)\nraise ValueError(3)"
        )
    finally:
        sys.excepthook = before
    assert answer.stdout == "mine 3\n"


def test_threads_that_it_starts_are_covered(ran: Callable[..., Any]) -> None:
    text = CALLS.replace("torch.nn.Mul", "#") + (
        "import threading\nfrom concurrent.futures import ThreadPoolExecutor\n"
        "def work(_=0): F.scaled_dot_product_attention(query, query, query)\n"
        "thread = threading.Thread(target=work); thread.start(); thread.join()\n"
        "with ThreadPoolExecutor(2) as pool: list(pool.map(work, range(4)))\n"
    )
    assert "covered 8 of 8" in ran(text).stderr


@pytest.mark.parametrize("place", [".", "absent/run.json"])
def test_a_place_that_cannot_be_written_is_told_before_the_script_runs(tmp_path: Path, place: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    answer = invoke(app, ["run", "--report", str(tmp_path / place), str(script)])
    assert (answer.exit_code, (tmp_path / "ran").exists()) == (2, False)
    assert "--report" in answer.output
    absent = invoke(app, ["run", str(tmp_path / "absent.py")])
    assert absent.exit_code == 2
    assert "is no file" in absent.output


def test_a_report_that_cannot_be_saved_after_all_is_told(ran: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    text = f"import os\nos.rmdir({str(tmp_path / 'gone')!r})"
    answer = ran(text, options=("--report", str(tmp_path / "gone" / "run.json")))
    assert answer.exit_code == 1
    assert "the report is not saved" in answer.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="signals end processes on POSIX only")
def test_ctrl_c_ends_it_as_it_ends_python_and_the_report_still_comes(fresh_python: Any, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(CALLS + "raise KeyboardInterrupt\n")
    words = ["heedful", "run", "--report", str(tmp_path / "run.json"), str(script)]
    done: subprocess.CompletedProcess[str] = fresh_python(
        f"import sys; sys.argv = {words!r}\nimport heedful.cli as c; c.main()"
    )
    assert done.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in done.stderr
    assert "covered 3 of 4" in done.stderr
    assert RunReport.load(tmp_path / "run.json").calls == 3


def test_names_of_main_are_those_that_python_gives(
    ran: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text(
        "'Words.'\nimport os, sys\nos.chdir('/')\nmain = sys.modules['__main__']\n"
        "print(sys.argv[0], __file__, __package__, __spec__, type(__loader__).__name__, __doc__)\n"
        "assert vars(main) is globals()\n"
    )
    answer = invoke(app, ["run", "./script.py"])
    assert answer.stdout == f"./script.py {tmp_path / 'script.py'} None None SourceFileLoader Words.\n"
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]


def test_archives_run_as_python_runs_them(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "app.pyz", "w") as archive:
        archive.writestr("__main__.py", "import sys; print(__name__, sys.argv[1:])")
    assert invoke(app, ["run", str(tmp_path / "app.pyz"), "x"]).stdout == "__main__ ['x']\n"


def test_a_report_goes_where_it_was_asked_for_though_the_script_changes_folders(
    ran: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    ran("import os\nos.chdir('elsewhere')" + CALLS, options=("--report", "run.json"))
    assert RunReport.load(tmp_path / "run.json").calls == 3
    assert not list((tmp_path / "elsewhere").iterdir())


def test_json_is_the_last_line_though_the_script_ends_within_one(ran: Callable[..., Any]) -> None:
    answer = ran(CALLS + "print('no end of line', end='')", options=("--json",))
    assert json.loads(answer.stdout.splitlines()[-1])["sdpa"]["covered"] == 3


def test_an_output_that_the_script_closed_is_no_error(fresh_python: Any, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(CALLS + "import sys\nsys.stdout.close()\n")
    words = ["heedful", "run", "--json", str(script)]
    done = fresh_python(f"import sys; sys.argv = {words!r}\nimport heedful.cli as c; c.main()")
    assert (done.returncode, done.stdout) == (0, "")
    assert "covered 3 of 4" in done.stderr
    assert "Traceback" not in done.stderr


OUTLIVING = """
import io, sys, threading, time
sys.stdout = io.StringIO()
from concurrent.futures import ThreadPoolExecutor
def work():
    F.scaled_dot_product_attention(query, query, query)
def late():
    time.sleep(0.3)
    work()
    threading.Thread(target=work).start()
threading.Thread(target=late).start()
pool = ThreadPoolExecutor(1)  # whose thread waits for work that never comes
pool.submit(work)
raise SystemExit(3)
"""


def test_threads_that_outlive_the_main_code_are_waited_for_and_counted(fresh_python: Any, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(CALLS + OUTLIVING)
    words = ["heedful", "run", "--json", "--report", str(tmp_path / "run.json"), str(script)]
    done = fresh_python(f"import sys; sys.argv = {words!r}\nimport heedful.cli as c; c.main()")
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["sdpa"]["covered"] == 6
    assert RunReport.load(tmp_path / "run.json").calls == 6


def test_a_script_that_hides_its_threads_is_told_of(ran: Callable[..., Any]) -> None:
    text = CALLS + "import threading\nthreading.setprofile(None)\n"
    assert "the script set threading.setprofile" in ran(text).stderr
    assert "the script set threading.setprofile" not in ran(CALLS).stderr


@pytest.mark.parametrize("backend", ["", " , "])
def test_no_name_at_all_is_no_backend(ran: Callable[..., Any], backend: str) -> None:
    answer = ran("print('ran')", options=("--backend", backend))
    assert (answer.exit_code, answer.stdout) == (2, "")
    assert "give a name, or several with commas" in answer.stderr


POOL = """
import dataclasses, multiprocessing, pickle
@dataclasses.dataclass
class Own: number: int
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(Own, [1, 2]), pickle.loads(pickle.dumps(Own(3))))
"""


def test_its_own_classes_come_back_from_processes_that_it_spawns(fresh_python: Any, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(POOL)
    words = ["heedful", "run", str(script)]
    done = fresh_python(f"import sys; sys.argv = {words!r}\nimport heedful.cli as c; c.main()")
    assert (done.returncode, done.stdout) == (0, "[Own(number=1), Own(number=2)] Own(number=3)\n"), done.stderr
