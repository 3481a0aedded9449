"""``heedful bench``, as a user types it; and its page, in a browser."""

import json

import pytest
import torch
from PIL import Image
from torch.nn.functional import scaled_dot_product_attention as sdpa
from typer.testing import CliRunner

import heedful
from heedful.cli import app

run = CliRunner().invoke
WIDE = {"COLUMNS": "240"}
QUICK = ["bench", "--rounds", "3", "--case", "clip-l-text"]


def plain(text):
    """The text without the frame and the line breaks that a terminal's width puts into it."""
    return " ".join(text.replace("│", " ").split())


@pytest.fixture
def registered():
    """Register a strategy ``mine`` that computes so, for this test."""

    def register(compute):
        mine = type("Mine", (heedful.AttentionStrategy,), {
            "compute_attention": staticmethod(compute),
            "limits": heedful.Limits(masks=frozenset({"causal"})),
        })  # fmt: skip
        heedful.AttentionStrategyFactory.register_strategy("mine", mine)

    yield register
    heedful.AttentionStrategyFactory.unregister_strategy("mine")


def wrong(*tensors, **words):
    return sdpa(*tensors, **words) * 1.01


def test_every_backend_of_this_machine_is_measured(tmp_path):
    out = tmp_path / "bench.json"
    answer = run(app, [*QUICK, "--json", "--out", str(out)])
    assert answer.exit_code == 0, answer.output
    record = json.loads(answer.stdout)
    assert record == json.loads(out.read_text())
    [group] = record["groups"]
    assert (group["case"], group["mask"], group["dtype"]) == ("clip-l-text", "causal", "float32")
    assert group["matmul_tflops"] > 0
    rows = {row["backend"]: row for row in group["rows"]}
    available = {row.name for row in heedful.list_backends("cpu") if row.available}
    assert set(rows) == {"torch", "auto", *available}
    for row in rows.values():
        assert row["status"] == "right"
        assert row["median_ms"] > 0
        assert row["max_abs_error"] <= row["allowed_error"]
        assert row["peak_bytes"] >= 12 * 77 * 64 * 4
        assert row["rounds"] == 3
    assert rows["torch"]["times_as_fast_as_torch"] == 1.0
    assert rows["auto"]["ran"] == "native"
    assert record["machine"]["torch"] == torch.__version__
    assert list(tmp_path.iterdir()) == [out]  # nothing temporary is left


def test_masks_and_dtypes_are_crossed_and_tables_printed():
    arguments = [*QUICK, "--mask", "none,padded", "--dtype", "bf16", "--dtype", "fp32", "--backend", "native"]
    answer = run(app, arguments, env=WIDE)
    assert answer.exit_code == 0, answer.output
    for words in ("none, bfloat16", "none, float32", "padded, bfloat16", "padded, float32"):
        assert f"clip-l-text, mask {words} (B 1 H 12 Q 77 K 77 D 64" in answer.stdout
    assert answer.stdout.count("native ") >= 4
    assert "SDPA" in answer.stdout
    assert "native_math" not in answer.stdout
    assert "Median of the rounds" in answer.stdout


def test_a_wrong_answer_is_shown_without_a_time_and_fails(registered):
    registered(wrong)
    answer = run(app, [*QUICK, "--backend", "mine"], env=WIDE)
    assert answer.exit_code == 1
    assert "WRONG mine: off by 0.0" in answer.stdout
    [line] = [line for line in answer.stdout.splitlines() if "mine" in line]
    assert not any(unit in line for unit in (" ms", " us", "1.0x"))


def test_a_wrong_answer_has_no_figures_in_the_json(registered):
    registered(wrong)
    answer = run(app, [*QUICK, "--backend", "mine", "--json"])
    assert answer.exit_code == 1
    record = json.loads(answer.stdout)
    assert record["wrong"] == 1
    [row] = [row for row in record["groups"][0]["rows"] if row["backend"] == "mine"]
    assert row["status"] == "wrong"
    assert row["max_abs_error"] > row["allowed_error"]
    for figure in ("median_ms", "spread_ms", "times_as_fast_as_torch", "tflops", "share_of_matmul", "peak_bytes"):
        assert row[figure] is None


def test_a_broken_kernel_fails_alone(registered):
    def broken(*tensors, **words):
        raise RuntimeError("no such kernel image")

    registered(broken)
    answer = run(app, [*QUICK, "--backend", "mine", "--backend", "native"], env=WIDE)
    assert answer.exit_code == 1
    assert "FAILED mine: RuntimeError: no such kernel image" in answer.stdout
    assert "native" in answer.stdout


def test_ctrl_c_keeps_what_was_measured(registered):
    made = []

    def interrupted(*tensors, **words):
        made.append(1)
        if len(made) > 1:
            raise KeyboardInterrupt
        return sdpa(*tensors, **words)

    registered(interrupted)
    cases = ["--case", "clip-l-text", "--case", "dit-xl2-self", "--mask", "none"]
    answer = run(app, ["bench", "--rounds", "3", *cases, "--backend", "mine", "--json"])
    assert answer.exit_code == 130
    record = json.loads(answer.stdout)
    assert record["interrupted"]
    assert [group["case"] for group in record["groups"]] == ["clip-l-text"]
    assert "interrupted: 1 of 2 begun" in answer.stderr


def test_refusals_are_told():
    answer = run(app, [*QUICK, "--backend", "native_cudnn", "--mask", "dense"], env={"COLUMNS": "400"})
    assert answer.exit_code == 0
    assert "refused native_cudnn: device is cpu, it takes cuda" in answer.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--case", "sdxl-self"], "--case: got 'sdxl-self', and no case is called so; closest: sdxl-self-"),
        (["--mask", "none,diagonal"], "--mask: got 'diagonal'; give some of none, causal, padded, dense"),
        (["--dtype", "int8"], "--dtype: got 'int8'; give one of fp16, bf16, fp32, fp64"),
        (["--backend", "flesh"], "--backend: backend: no backend is called 'flesh'; did you mean 'flash'"),
        (["--device", "sm_90"], "--device: got 'sm_90', no device of this machine; give one of torch's"),
        (["--device", "meta"], "--device: got 'meta', which computes nothing"),
        (["--rounds", "2"], "Invalid value for '--rounds'"),
        (["--max-seconds", "0"], "Invalid value for '--max-seconds'"),
        (
            ["--html", "/nowhere/at/all.html"],
            "--html: got /nowhere/at/all.html: No such file or directory; give a file",
        ),
        (["--out", "/"], "--out: got /, which is a folder"),
    ],
)
def test_wrong_arguments_are_explained(arguments, words, monkeypatch):
    monkeypatch.setattr("heedful.bench.measure.Run.groups", None)  # nothing is measured before they are looked at
    answer = run(app, ["bench", *arguments], env={"COLUMNS": "400"})
    assert answer.exit_code == 2
    assert words in plain(answer.stderr)


def test_the_usual_cases_are_there():
    from heedful.cases import by_name
    from heedful.cli.bench import _USUAL

    assert all(by_name(name) for names in _USUAL.values() for name in names)
    assert not any(by_name(name).gpu_only for name in _USUAL["cpu"])


# In a browser

BEST = (0x1A, 0x93, 0x6F)
TORCH = (0x6B, 0x6F, 0x76)
OTHERS = (0x9F, 0xB3, 0xC8)
BAD = (0xC0, 0x27, 0x2D)


@pytest.mark.browser
def test_the_page_looks_as_it_should(registered, browser, tmp_path):
    registered(wrong)
    page, picture = tmp_path / "report.html", tmp_path / "report.png"
    cases = ["--case", "clip-l-text", "--case", "llama3-8b-decode-4k", "--mask", "none"]
    backends = [word for name in ("native", "native_math", "mine", "native_cudnn") for word in ("--backend", name)]
    answer = run(app, ["bench", "--rounds", "3", *cases, *backends, "--html", str(page)], env=WIDE)
    assert answer.exit_code == 1, answer.output
    assert f"written: {page}" in answer.stdout

    shown = browser(page, "--dump-dom")
    assert shown.count('<section class="work">') == 2
    for words in (
        "<h2>clip-l-text</h2>",
        "<h2>llama3-8b-decode-4k</h2>",
        "WRONG",
        "off by",
        "device is cpu, it takes cuda",
    ):
        assert words in shown
    assert shown.count('class="bar"') == 6  # torch, native, native_math, twice

    browser(page, f"--screenshot={picture}", "--window-size=1200,1500")
    with Image.open(picture) as drawn:
        assert drawn.size == (1200, 1500)
        colours = {colour: count for count, colour in drawn.convert("RGB").getcolors(1 << 24)}
    assert len(colours) > 100
    wanted = [BEST, OTHERS, BAD, *([TORCH] if 'class="row torch"' in shown else [])]  # torch's may be the best one
    assert all(colours.get(colour, 0) > 300 for colour in wanted), "a bar or a badge is missing"
    assert max(colours.values()) < 0.9 * 1200 * 1500
