"""A measured tile is used; one that cannot run, or is none, is dropped, and the table's runs."""

import pytest
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from heedful.kernels.choice import by_choice
from heedful.kernels.tiles import Tile
from heedful.strategy import Tuning

LABEL = "64x32 4w 2s"


def tuning(label=LABEL, role="forward"):
    dropped = []
    made = Tuning({role: label}, lambda *told: dropped.append(told))
    return made, dropped


def test_the_tile_that_was_measured_runs():
    made, dropped = tuning()
    assert by_choice(made, "forward", lambda tile: tile) == Tile(64, 32, 4, 2)
    assert dropped == []


def test_other_passes_and_calls_without_measurements_go_by_the_table():
    assert by_choice(tuning(role="keys")[0], "forward", lambda tile: tile) is None
    assert by_choice(None, "forward", lambda tile: tile) is None


@pytest.mark.parametrize(
    "error",
    [
        OutOfResources(300000, 232448, "shared memory"),
        CompilationError("text", None, "no"),
        PTXASError("spilled"),
        RuntimeError("PassManager::run failed"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_tile_that_cannot_run_is_dropped_and_not_tried_again(error):
    made, dropped = tuning()
    tried = []

    def run(tile):
        tried.append(tile)
        if tile is not None:
            raise error
        return "by the table"

    assert [by_choice(made, "forward", run) for _ in range(2)] == ["by the table"] * 2
    assert tried == [Tile(64, 32, 4, 2), None, None]
    ((role, label, reason),) = dropped
    assert (role, label) == ("forward", LABEL)
    assert str(error) in reason


def test_what_is_no_tile_is_dropped_and_never_run():
    made, dropped = tuning("64x32")
    assert by_choice(made, "forward", lambda tile: tile) is None
    assert dropped == [("forward", "64x32", "'64x32' is no tile such as '128x64 8w 3s'")]


@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), ValueError("shapes"), KeyError("stride")], ids=repr)
def test_other_errors_are_not_the_tile_s(error):
    made, dropped = tuning()

    def run(_tile):
        raise error

    with pytest.raises(type(error)):
        by_choice(made, "forward", run)
    assert dropped == []


def test_where_nothing_else_may_run_nothing_does():
    def failed(*_told):
        raise LookupError("locked")

    def run(tile):
        assert tile is not None
        raise OutOfResources(1, 0, "threads")

    with pytest.raises(LookupError, match="locked"):
        by_choice(Tuning({"forward": LABEL}, failed), "forward", run)
