"""``heedful install``, as a user types it, and the scripts around it."""

import importlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from doctor_machines import MACHINES
from typer.testing import CliRunner

from heedful import AttentionStrategyFactory, policy
from heedful.cli import app, main
from heedful.doctor.install import Result

run = CliRunner(env={"NO_COLOR": "1", "FORCE_COLOR": None, "COLUMNS": "100"}).invoke
command = importlib.import_module("heedful.cli.install")  # the package has a function of that name
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def on(monkeypatch, tmp_path):
    """Have the command find itself on one of the machines; what it would carry out is listed."""
    done = []

    def put(name, result=None):
        def carry_out(decision, strategies, here, say):
            done.append(decision)
            say("a line of pip's")
            return result or Result(True, "It works.")

        monkeypatch.setattr(AttentionStrategyFactory, "_default", AttentionStrategyFactory(plugins=False))
        monkeypatch.setattr(command, "look", lambda strategies: MACHINES[name])
        monkeypatch.setattr(command, "carry_out", carry_out)
        monkeypatch.setattr(command, "settled", lambda *asked: command.decide(*asked[:3], way=asked[3]))
        monkeypatch.setattr(command, "folder_of", lambda cache: tmp_path)
        monkeypatch.setattr(command.Site, "of", lambda executable: FakeSite())
        return done

    return put


class FakeSite:
    def versions(self):
        return {"torch": "2.8.0+cu128", "flash-attn": "1.0"}


def test_a_dry_run_prints_the_command_with_pins_that_are_there_and_changes_nothing(on, tmp_path):
    done = on("ampere")
    answer = run(app, ["install", "flash", "--dry-run"])
    assert answer.exit_code == 0
    assert done == []
    (pins,) = tmp_path.glob("pins-*.txt")
    assert f"-m pip install --no-input --no-deps -c {pins} https://github.com/Dao-AILab/" in answer.stdout
    assert pins.read_text() == "torch==2.8.0+cu128\n"


def test_each_python_has_its_own_pins_where_the_cache_is(on, monkeypatch, tmp_path):
    on("ampere")
    monkeypatch.setattr(command, "folder_of", policy.folder_of)
    monkeypatch.setenv("HEEDFUL_CACHE", str(tmp_path / "moved"))
    for executable in ("/a/python", "/b/python"):
        monkeypatch.setattr(command, "look", lambda _, it=executable: replace(MACHINES["ampere"], executable=it))
        assert run(app, ["install", "flash", "--dry-run"]).exit_code == 0
    assert len(list((tmp_path / "moved").glob("pins-*.txt"))) == 2


def test_a_cache_that_cannot_be_made_does_not_stop_a_dry_run(on, monkeypatch, tmp_path):
    on("ampere")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(command, "folder_of", lambda cache: tmp_path / "file" / "cache")
    monkeypatch.setattr(command.tempfile, "mkdtemp", lambda prefix: str(tmp_path))
    answer = run(app, ["install", "flash", "--dry-run"])
    assert answer.exit_code == 0
    assert f"-c {tmp_path}/pins-" in answer.stdout


def test_an_index_that_did_not_answer_is_a_note(on):
    done = on("ampere_offline")
    answer = run(app, ["install"])
    assert (answer.exit_code, len(done)) == (0, 1)
    assert "pypi.org did not answer. To go on without a network, fetch https://" in answer.stdout


def test_commands_are_not_wrapped(on):
    on("ampere")
    lines = run(app, ["install", "--dry-run"], env={"COLUMNS": "60"}).stdout.splitlines()
    assert any(line.rstrip().endswith("linux_x86_64.whl") and "-m pip install" in line for line in lines)


@pytest.mark.parametrize("machine", ["cpu", "mps", "turing"])
def test_where_nothing_is_needed_it_says_so_and_ends_well(on, machine):
    done = on(machine)
    answer = run(app, ["install"])
    assert answer.exit_code == 0
    assert "use native" in answer.stdout.lower()
    assert done == []


@pytest.mark.parametrize(
    ("machine", "arguments"),
    [("turing", ["flash"]), ("ada_windows_embedded", ["sage"]), ("ampere_managed", [])],
)
def test_where_it_cannot_be_done_it_says_why_with_status_1(on, machine, arguments):
    done = on(machine)
    answer = run(app, ["install", *arguments])
    assert (answer.exit_code, done) == (1, [])
    assert answer.stdout.strip()


def test_it_is_done_and_the_result_told(on):
    done = on("ampere")
    answer = run(app, ["install", "flash"])
    assert answer.exit_code == 0
    assert [one.rule for one in done] == ["official wheel"]
    assert answer.stdout.endswith("It works.\n")
    assert "a line of pip's" in answer.stderr


def test_what_failed_and_was_undone_is_told_with_status_1(on):
    on("ampere", Result(False, "It raised.\nEverything is as it was before.", undone=True))
    answer = run(app, ["install", "flash"])
    assert answer.exit_code == 1
    assert "Everything is as it was before." in answer.stdout


@pytest.mark.parametrize("arguments", [["--dry-run"], []])
def test_the_same_as_json(on, arguments):
    on("ampere")
    answer = run(app, ["install", "flash", "--json", *arguments])
    data = json.loads(answer.stdout)
    assert data["decision"]["outcome"] == "install"
    assert data["dry_run"] is bool(arguments)
    assert (data["result"] is None) is bool(arguments)


def test_a_named_wheel_is_held_to_the_machine(on):
    done = on("ampere")
    answer = run(app, ["install", "flash", "--wheel", "/x/flash_attn-2.8.3+cu128torch2.9-cp312-cp312-linux_x86_64.whl"])
    assert (answer.exit_code, done) == (1, [])
    assert "it was built for torch 2.9, this torch has 2.8" in answer.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["flahs"], "did you mean 'flash'"),
        (["flash", "--way", "x"], "way: got 'x'; give one of wheel, hub, build"),
        (["flash", "--wheel", "/no/flash_attn-2.8.3-py3-none-any.whl"], "there is no such file"),
        (["--wheel", "x.whl"], "backend: got 'auto'; name the backend that the wheel is for"),
    ],
)
def test_wrong_arguments_are_named(on, monkeypatch, capsys, arguments, words):
    on("ampere")
    monkeypatch.setattr(sys, "argv", ["heedful", "install", *arguments])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert words in capsys.readouterr().err


# install.sh


@pytest.fixture
def shell(tmp_path):
    """Run install.sh with a Python that only writes down how it was called; its standard input is closed."""
    if shutil.which("sh") is None:
        pytest.skip("no POSIX shell")

    def start(python="", script=ROOT / "install.sh", cwd=None, **environ):
        (tmp_path / "bin").mkdir(exist_ok=True)
        if python:
            path = tmp_path / "bin" / "python3"
            path.write_text(f'#!/bin/sh\necho "$@" >> "{tmp_path}/calls"\n{python}\n')
            path.chmod(0o755)
        for name in ("sh", "dirname", "rm", "mktemp", "cat"):
            link = tmp_path / "bin" / name
            if not link.exists():
                link.symlink_to(shutil.which(name))
        ended = subprocess.run(
            ["sh", str(script), "flash", "--dry-run"], stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=60, cwd=cwd, env={"PATH": str(tmp_path / "bin"), **environ},
        )  # fmt: skip
        calls = tmp_path / "calls"
        return ended, calls.read_text().splitlines() if calls.exists() else []

    return start


def test_the_script_hands_its_arguments_on(shell):
    ended, calls = shell("exit 0")
    assert ended.returncode == 0
    assert calls[-1] == "-m heedful install flash --dry-run"


def test_without_python_it_says_so(shell):
    ended, _ = shell()
    assert ended.returncode == 1
    assert "no Python" in ended.stderr


def test_without_torch_it_says_what_comes_first(shell):
    ended, calls = shell('case "$*" in *"import torch"*) exit 1;; esac; exit 0')
    assert ended.returncode == 1
    assert "pytorch.org" in ended.stderr
    assert not any("pip" in call for call in calls)


def test_outside_of_a_checkout_nothing_is_fetched_by_name(shell, tmp_path):
    script = Path(shutil.copy(ROOT / "install.sh", tmp_path))
    ended, calls = shell('case "$*" in *"import heedful"*) exit 1;; esac; exit 0', script)
    assert ended.returncode == 1
    assert "clone it" in ended.stderr
    assert not any("pip" in call for call in calls)


def test_without_heedful_it_is_installed_with_torch_held(shell):
    ended, calls = shell('case "$*" in *"import heedful"*) exit 1;; *"print"*) echo torch==2.8.0;; esac; exit 0')
    assert ended.returncode == 0
    (pip,) = [call for call in calls if " pip " in call]
    assert pip.startswith("-m pip install --no-input -c ")
    assert calls[-1] == "-m heedful install flash --dry-run"


def test_cdpath_does_not_mislead_the_script(shell, tmp_path):
    """With it ``cd`` prints where it went."""
    (tmp_path / "other" / "here").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "other"):
        (folder / "here").mkdir(exist_ok=True)
    shutil.copy(ROOT / "install.sh", tmp_path / "here")
    (tmp_path / "here" / "pyproject.toml").write_text("")
    no_heedful = 'case "$*" in *"import heedful"*) exit 1;; esac; exit 0'
    ended, calls = shell(no_heedful, "here/install.sh", cwd=tmp_path, CDPATH=str(tmp_path / "other"))
    assert ended.returncode == 0, ended.stderr
    (pip,) = [call for call in calls if " pip " in call]
    assert pip.endswith(f" {tmp_path / 'here'}")


def test_the_windows_script_does_the_same_steps():
    text = (ROOT / "install.bat").read_bytes().decode("ascii")
    for words in ("import torch", "import heedful", "--no-input", "-m heedful install %*", "python_embeded", "<nul"):
        assert words in text
    assert "if errorlevel" not in text  # false for a process that crashed: its status is negative
    assert "pause" not in text.lower()
    assert "set /p" not in text.lower()
