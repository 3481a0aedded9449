"""``heedful demo``, as a user types it."""

import json

import pytest
import torch
from PIL import Image
from tiny_models import sd_pipeline
from typer.testing import CliRunner

from heedful.cli import app

run = CliRunner().invoke


def plain(text):
    """The text without the frame and the line breaks that a terminal's width puts into it."""
    return " ".join(text.replace("│", " ").split())


def test_the_demo_prints_figures_and_draws(tmp_path):
    out = tmp_path / "demo.png"
    answer = run(app, ["demo", "--json", "--steps", "10", "--each", "2", "--out", str(out)])
    assert answer.exit_code == 0, answer.output
    result = json.loads(answer.stdout)
    rows = {row["backend"]: row for row in result["backends"]}
    assert {"auto", "native", "native_math", "native_flash", "flex", "reference"} <= set(rows)
    assert all(row["largest_difference"] <= 1 / 255 for row in rows.values())
    assert all(row["recognised"] >= 0.9 and row["pictures"] == 20 for row in rows.values())
    assert rows["auto"]["recogniser_on_held_out_real"] >= 0.97
    assert "device is cpu" in result["cannot_run_here"]["native_cudnn"]
    with Image.open(out) as picture:
        assert picture.width > 300


def test_the_demo_prints_a_table(tmp_path):
    arguments = ["demo", "--steps", "2", "--each", "1", "--backend", "native", "--backend", "native_cudnn"]
    answer = run(app, [*arguments, "--out", str(tmp_path / "demo.png")], env={"COLUMNS": "160"})
    assert answer.exit_code == 0, answer.output
    for words in ("backend", "time per step", "largest difference", "native", "refused", "device is cpu", "picture:"):
        assert words in answer.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", "a cat"], "go with --model"),
        (["--model", "no/such-model"], "needs at least one --prompt"),
        (["--out", "/nowhere/at/all.png"], "no file in a folder that can be written"),
        (["--device", "gpu"], "gpu is no device of this machine"),
        (["--model", "/nowhere", "--prompt", "a"], "--model"),
        (["--steps", "1001"], "--steps"),
        (["--steps", "1"], "greater than or equal to 2"),
    ],
)
def test_wrong_arguments_are_explained(arguments, words):
    answer = run(app, ["demo", *arguments], env={"COLUMNS": "200"})
    assert answer.exit_code == 2
    assert words in plain(answer.stderr)


def test_a_model_is_not_downloaded_unless_it_is_pinned():
    answer = run(app, ["demo", "--model", "no/such-model", "--prompt", "a cat"], env={"COLUMNS": "300"})
    assert answer.exit_code == 2
    assert "only when pinned: --revision" in plain(answer.stderr)


def test_a_users_own_pipeline(tmp_path):
    torch.manual_seed(0)
    sd_pipeline().save_pretrained(tmp_path / "model")
    arguments = [
        "--model",
        str(tmp_path / "model"),
        "--prompt",
        "a",
        "--prompt",
        "b",
        "--steps",
        "2",
        "--device",
        "cpu",
    ]
    answer = run(app, ["demo", *arguments, "--json", "--out", str(tmp_path / "demo.png")])
    assert answer.exit_code == 0, answer.output
    result = json.loads(answer.stdout)
    assert result["judge"] == "native_math"
    for row in result["backends"]:
        assert row["largest_difference"] <= 1 / 255
        assert row["seconds_per_step"] > 0
        assert int(row["coverage"].split()[0]) >= 8


def test_an_unknown_backend_is_named(tmp_path):
    answer = run(app, ["demo", "--backend", "flesh", "--out", str(tmp_path / "x.png")])
    assert answer.exit_code != 0
    assert "no backend is called 'flesh'" in str(answer.exception)
    assert not (tmp_path / "x.png").exists()
