"""``heedful verify``, as a user types it: in real processes; and its page, in a browser."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from heedful.cli import app
from heedful.verify.child import command
from heedful.verify.run import Run

run = CliRunner().invoke
WIDE = {"COLUMNS": "200"}
RIGHT, REFUSED, WRONG = (0x1A, 0x93, 0x6F), (0xEF, 0xEE, 0xEA), (0xC0, 0x27, 0x2D)


def plain(text: str) -> str:
    return " ".join(text.replace("│", " ").split())


def only(*names: str) -> list[str]:
    return [word for name in names for word in ("--only", name)]


def test_what_is_right_and_what_is_refused() -> None:
    arguments = ["verify", "native", "flash", "--dtype", "fp32", "--dtype", "fp16"]
    answer = run(app, [*arguments, *only("plain*-*", "softcap-forward"), "--json"])
    assert answer.exit_code == 0, answer.output
    record = json.loads(answer.stdout)
    native, flash = sorted(record["backends"], key=lambda column: column["name"] != "native")
    assert native["status"] == "right"
    assert native["made"] == native["planned"] > 4
    assert 0 < native["cells"]["gradient"]["units"] <= 1
    assert {"float16", "float32"} <= set(native["cells"])
    assert not {"bfloat16", "float64"} & set(native["cells"])
    assert native["cells"]["softcap"]["outcome"] == "refused"
    assert native["cells"]["softcap"]["limits"] == {"softcap": 1}
    assert (flash["status"], flash["made"]) == ("absent", 0)
    assert "device is cpu, it takes cuda" in flash["reason"]
    assert record["machine"]["torch"] == torch.__version__
    assert record["settings"]["only"] == ["plain*-*", "softcap-forward"]


def test_wrong_crashed_and_hung_strategies_are_caught_and_lose_nothing(plugins: str) -> None:
    names = only("head-dim-32-forward", "head-dim-40-forward", "head-dim-64-forward", "scale-0.3-forward")
    own = [word for name in ("Deaf", "Aborts", "Hangs") for word in ("--plugin", f"{plugins}:{name}")]
    answer = run(app, ["verify", "reference", *own, *names, "--timeout", "4"], env=WIDE)
    assert answer.exit_code == 1, answer.output
    text = plain(answer.stdout)
    assert "WRONG deaf, scale-0.3-forward: the output is off by" in text
    assert f"again: heedful verify --plugin {plugins}:Deaf --device cpu --only scale-0.3-forward" in text
    assert "CRASHED aborts, head-dim-40-forward: the process ended: signal 6 (SIGABRT)" in text
    assert "HUNG hangs, head-dim-40-forward: no answer after 4 s, and the process was ended" in text
    assert "4 backends" in text
    assert "16 checks" in text
    assert "13 right, 1 wrong, 1 crashed, 1 hung" in text


def test_the_lines_that_are_given_have_it_again(plugins: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["verify", "--plugin", f"{plugins}:Deaf", *only("scale-0.3-forward"), "--seed", "4"]
    first = json.loads(run(app, [*arguments, "--json"]).stdout)
    [column] = first["backends"]
    [fault] = column["faults"]
    heedful, *words = shlex.split(fault["reproduce"]["command"])
    assert heedful == "heedful"
    [again] = json.loads(run(app, [*words, "--json"]).stdout)["backends"]
    assert again["faults"] == [fault]
    exec(fault["reproduce"]["python"], {})
    assert f"scale-0.3-forward: {fault['detail']}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["flesh"], "BACKEND: backend: no backend is called 'flesh'; did you mean 'flash'"),
        (["--device", "sm_90"], "--device: got 'sm_90', no device of this machine"),
        (["--dtype", "int8"], "--dtype: got 'int8'; give one of fp16, bf16, fp32, fp64"),
        (["--quick", "--all"], "--quick: got --quick and --all; give one of both"),
        (["--html", "/nowhere/at/all.html"], "--html: got /nowhere/at/all.html: No such file or directory"),
        (["--timeout", "0"], "Invalid value for '--timeout'"),
        (["native", "--only", "no-such-check"], "--only: got no-such-check, and no check is called so"),
    ],
)
def test_wrong_arguments_are_explained(arguments: list[str], words: str) -> None:
    answer = run(app, ["verify", *arguments], env={"COLUMNS": "400"})
    assert answer.exit_code == 2
    assert words in plain(answer.stderr)


def test_what_is_no_plugin_fails_with_its_reason(plugins: str) -> None:
    answer = run(app, ["verify", "--plugin", f"{plugins}:no_strategy"], env=WIDE)
    assert answer.exit_code == 2
    assert "could not be verified" in answer.stderr
    assert "give a subclass of heedful.AttentionStrategy" in plain(answer.stdout)


def test_nothing_to_verify_is_no_success() -> None:
    answer = run(app, ["verify", "flash"], env=WIDE)
    assert answer.exit_code == 3
    assert "not here: flash: device is cpu, it takes cuda" in answer.stdout
    assert "nothing was verified" in answer.stderr


def test_without_a_name_it_is_every_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the machine lacks something for are told at once; the others are the jobs."""
    monkeypatch.setattr(Run, "go", lambda self: None)
    seen: list[Run] = []
    record = Run.record
    monkeypatch.setattr(Run, "record", lambda self, *about: seen.append(self) or record(self, *about))
    run(app, ["verify"])
    jobs = {job.backend for job in seen[0].jobs}
    assert {"native", "native_math", "native_flash", "flex", "reference"} <= jobs
    assert {"flash", "sage", "xformers", "native_cudnn"} <= {column.name for column in seen[0].columns}


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGINT for one process on Windows")
def _hears_ctrl_c() -> None:
    """What a shell starts in the background ignores it, and hands that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_prints_what_was_found(plugins: str, tmp_path: Path) -> None:
    mark = tmp_path / "hanging"
    arguments = ["verify", "--plugin", f"{plugins}:Hangs", *only("head-dim-32-forward", "head-dim-40-forward")]
    started = subprocess.Popen(
        command("heedful.cli", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **WIDE, "HANGING": str(mark)},
        preexec_fn=_hears_ctrl_c,
    )
    try:
        while not mark.exists() and started.poll() is None:
            time.sleep(0.05)
        started.send_signal(signal.SIGINT)
        out, error = started.communicate(timeout=60)
    finally:
        started.kill()
    assert started.returncode == 130, error
    assert "1 checks" in plain(out)
    assert "1 right (partial: interrupted)" in plain(out)
    assert "interrupted: this is partial" in error


def test_what_was_right_is_timed(monkeypatch: pytest.MonkeyPatch, plugins: str, tmp_path: Path) -> None:
    few, page = ("--rounds", "3", "--case", "clip-l-text"), tmp_path / "verify.html"
    monkeypatch.setattr("heedful.verify.speed.command", lambda *words, before: command(*words, *few, before=before))
    own = ["--plugin", f"{plugins}:Fine", "--plugin", f"{plugins}:Deaf"]
    answer = run(app, ["verify", *own, *only("scale-0.3-forward"), "--bench", "--html", str(page)], env=WIDE)
    assert answer.exit_code == 1
    [head, line] = answer.stdout.splitlines()[-3:-1]
    assert head.split() == ["case", "mask", "dtype", "torch", "fine"]  # what was wrong has no time
    assert line.startswith("clip-l-text  causal  float32")
    assert line.count(" us") + line.count(" ms") == 2
    shown = page.read_text("utf-8")
    assert "Speed" in shown
    assert shown.count('class="bar"') == 2


def test_a_bench_that_breaks_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = ["-c", "import os; os.abort()"]
    monkeypatch.setattr("heedful.verify.speed.command", lambda *words, before: [command("os")[0], *broken])
    answer = run(app, ["verify", "native", *only("plain-forward"), "--bench"], env=WIDE)
    assert answer.exit_code == 0
    assert "1 right" in answer.stdout
    assert "no times: heedful bench ended with status -6" in answer.stderr


@pytest.mark.browser
def test_the_page_looks_as_it_should(browser: Callable[..., Any], plugins: str, tmp_path: Path) -> None:
    page, picture = tmp_path / "verify.html", tmp_path / "verify.png"
    names = only("plain-*", "softcap-*", "scale-0.3-*")
    arguments = ["verify", "native", "flash", "--plugin", f"{plugins}:Deaf", *names, "--html", str(page)]
    answer = run(app, arguments, env=WIDE)
    assert answer.exit_code == 1, answer.output
    assert f"written: {page}" in answer.stdout
    shown = browser(page, "--dump-dom")
    assert shown.count('<section class="fault">') >= 3
    for words in ("<th>softcap</th>", "refused: softcap", "device is cpu, it takes cuda", "heedful verify --plugin"):
        assert words in shown
    browser(page, f"--screenshot={picture}", "--window-size=1200,1500")
    with Image.open(picture) as drawn:
        assert drawn.size == (1200, 1500)
        colours = {colour: count for count, colour in drawn.convert("RGB").getcolors(1 << 24)}
    assert all(colours.get(colour, 0) > 300 for colour in (REFUSED, WRONG)), "a cell is missing"
    assert colours.get(RIGHT, 0) > 20, "no number of a right cell"
    assert max(colours.values()) < 0.95 * 1200 * 1500
