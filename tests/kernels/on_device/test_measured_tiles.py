"""Measured tiles in the kernels themselves: used by each pass, never instead of an answer, found by the command."""

import importlib
import json
import time

import pytest
import torch
from triton.runtime.errors import OutOfResources
from typer.testing import CliRunner

from heedful import AttentionDispatcher, AttentionStrategyFactory, Policy
from heedful.cli import app
from heedful.dispatch import default_dispatcher
from heedful.kernels import backward as backward_module
from heedful.kernels import forward as forward_module
from heedful.kernels import int8 as int8_module
from heedful.kernels.tiles import Tile
from heedful.problem import problem_for_shapes
from heedful.records import Window
from heedful.trace import Trace
from heedful.tune import ahead

SHAPE = (1, 1, 20, 24)
FORWARD, KEYS, QUERIES = "16x16 4w 1s", "32x32 4w 1s", "16x64 4w 1s"


@pytest.fixture
def launched(monkeypatch):
    """The tiles of all launches, by pass."""
    seen = []

    def spied(module, name):
        real = getattr(module, name)

        def options(tile):
            seen.append(str(tile))
            return real(tile)

        monkeypatch.setattr(module, name, options)

    spied(forward_module, "options")
    spied(backward_module, "options")
    return seen


@pytest.fixture
def problem(device):
    facts = default_dispatcher.facts.device(device)
    return problem_for_shapes(SHAPE, SHAPE, SHAPE, dtype=torch.float16, device=facts)


def fresh(**policy):
    return AttentionDispatcher(AttentionStrategyFactory(plugins=False), policy=Policy(**{"tune": "ahead", **policy}))


def settle(dispatcher, device, labels):
    for key, label in labels.items():
        for place in range(2):
            window = Window(ended=1e9 + 20.0 * place, run=f"{place}", seconds={label: 1e-3}, turns=5)
            dispatcher.experience.store(device).add_window(key, window)


def drawn(device, needs_grad=False):
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(SHAPE, generator=draw).half().to(device).requires_grad_(needs_grad) for _ in range(3)]


def test_every_pass_goes_by_the_tile_that_was_measured_for_it(device, launched):
    dispatcher = fresh()
    plain = drawn(device, needs_grad=True)
    usual = dispatcher.attention(*plain, backend="triton")
    wanted = torch.autograd.grad(usual.float().square().sum(), plain)
    settle(
        dispatcher,
        device,
        {"tiles forward 16 32 to 128": FORWARD, "tiles backward keys 16 32 to 128": KEYS,
         "tiles backward queries 16 32 to 128": QUERIES},
    )  # fmt: skip
    dispatcher.forget_plans()
    del launched[:]
    out = dispatcher.attention(*plain, backend="triton")
    found = torch.autograd.grad(out.float().square().sum(), plain)
    assert {FORWARD, KEYS, QUERIES} <= set(launched)
    torch.testing.assert_close(out, usual)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=5e-3, rtol=5e-3)


def test_int8_has_tiles_of_its_own(device, launched, monkeypatch):
    dispatcher = fresh()
    settle(dispatcher, device, {"tiles int8 8 32 to 128": FORWARD, "tiles forward 16 32 to 128": QUERIES})
    used = []
    real = int8_module.codes_of
    monkeypatch.setattr(
        int8_module,
        "codes_of",
        lambda call, tile, *args, **words: used.append(tile) or real(call, tile, *args, **words),
    )
    dispatcher.attention(*drawn(device), backend="triton_int8")
    assert used[-1] == Tile.read(FORWARD)  # the trial before it went by the table
    assert QUERIES not in launched


@pytest.mark.parametrize("needs_grad", [False, True], ids=["forward", "gradients"])
def test_a_tile_that_fits_no_more_costs_a_warning_and_no_answer(device, monkeypatch, caplog, needs_grad):
    dispatcher = fresh()
    labels = {"tiles forward 16 32 to 128": FORWARD, "tiles backward keys 16 32 to 128": KEYS}
    settle(dispatcher, device, labels)
    for module in (forward_module, backward_module):

        def options(tile, real=module.options):
            if str(tile) in labels.values():
                raise OutOfResources(300_000, 232_448, "shared memory")
            return real(tile)

        monkeypatch.setattr(module, "options", options)
    plain = drawn(device, needs_grad)
    out = dispatcher.attention(*plain, backend="triton")
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(*plain), atol=2e-3, rtol=2e-3)
    if needs_grad:
        for gradient in torch.autograd.grad(out.sum(), plain):
            assert gradient.isfinite().all()
    dispatcher.attention(*plain, backend="triton")
    told = [one.getMessage() for one in caplog.records]
    assert len(told) == 1 + needs_grad
    assert told[0].startswith("heedful: tiles forward 16 32 to 128 by 16x16 4w 1s cannot run (OutOfResources: out of")
    dispatcher.experience.finish()
    assert "shared memory" in dispatcher.experience.store(device).get("tiles forward 16 32 to 128").faults[FORWARD]


def test_foreign_text_where_a_tile_belongs_costs_a_warning_and_no_answer(device, caplog):
    dispatcher = fresh()
    settle(dispatcher, device, {"tiles forward 16 32 to 128": "99999x1 0w 3s"})
    plain = drawn(device)
    out = dispatcher.attention(*plain, backend="triton")
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(*plain), atol=2e-3, rtol=2e-3)
    (told,) = [one.getMessage() for one in caplog.records]
    assert "'99999x1 0w 3s' is no tile such as" in told


# The command


@pytest.fixture
def tuned(monkeypatch, tmp_path, device, problem):
    """``heedful tune --tiles`` on a trace of the problem, by a process's dispatcher that knows nothing, without pauses;
    gives its exit status and what it printed.
    """
    default_dispatcher.forget_plans()
    for name, value in (("_experience", None), ("_made", None), ("_policy", Policy(tune="ahead", cache=tmp_path))):
        monkeypatch.setattr(default_dispatcher, name, value)
    real, passed = time.time, [0.0]
    monkeypatch.setattr(ahead.time, "time", lambda: real() + passed[0])

    def wait(seconds):
        passed[0] += seconds

    command = importlib.import_module("heedful.cli.tiles")
    monkeypatch.setattr(command, "measure", lambda *args, **words: command.tune_tiles(*args, wait=wait, **words))
    Trace({problem: 1}).save(tmp_path / "one.trace")

    def run(*arguments, target=True):
        words = ["tune", "--tiles", *[str(tmp_path / "one.trace")] * target, "--device", device.type, "--rounds", "3"]
        answer = CliRunner(env={"NO_COLOR": "1", "COLUMNS": "140"}).invoke(app, [*words, *arguments])
        return answer.exit_code, answer.stdout

    yield run
    default_dispatcher.forget_plans()
    monkeypatch.undo()
    default_dispatcher.forget_plans()


def test_the_command_finds_tiles_which_calls_go_by_until_they_are_forgotten(tuned, device, problem):
    status, printed = tuned("--grad", "--json")
    assert status == 0, printed
    data = json.loads(printed)
    assert [one["key"] for one in data["tiles"]] == [
        "tiles forward 16 32 to 128", "tiles backward keys 16 32 to 128", "tiles backward queries 16 32 to 128"
    ]  # fmt: skip
    for one in data["tiles"]:
        assert one["winner"] in one["seconds"]
        assert (one["refused"], one["wrong"], one["out"]) == ("", [], {})
        assert one["usual"] in one["seconds"]
        assert len(one["seconds"]) > 2
        assert one["settled"]
    plan = default_dispatcher.plan(problem.replace(needs_grad=True), "triton", device=device)
    assert plan.tuned == {one["role"]: one["winner"] for one in data["tiles"]}
    status, printed = tuned("--forget", target=False)
    assert (status, printed.split(" on ")[0]) == (0, "3 kinds of call")
    assert default_dispatcher.plan(problem, "triton", device=device).tuned == {}


def test_the_command_s_table(tuned):
    status, printed = tuned()
    assert status == 0, printed
    assert "triton: tiles forward 16 32 to 128" in printed
    assert "1 of 1 kinds measured, kept in" in printed
