"""The tiles that are measured: the table's first, few, and none that is known not to fit."""

import itertools

import pytest

from heedful.kernels import aot
from heedful.kernels.candidates import MOST, candidates, fits
from heedful.kernels.tiles import FP8, Tile, backward_table, known, table, usual

ROLES = ("forward", "keys", "queries")
EVERY = list(itertools.product((8, FP8, 16, 32), (16, 64, 80, 128, 256), (False, True)))


@pytest.mark.parametrize("architecture", [*aot.TARGETS, "interpreter"])
@pytest.mark.parametrize("role", ROLES)
def test_the_table_s_tile_comes_first_and_the_others_are_sound_and_few(architecture, role):
    for bits, dim, masked in EVERY:
        if bits == FP8 and (role != "forward" or FP8 not in table()[known(architecture)]):
            continue  # no kernel is of that kind
        found = candidates(architecture, role, bits, dim, masked)
        assert found[0] == usual(architecture, role, bits, dim, masked)
        assert 3 <= len(found) <= MOST
        assert len(set(found)) == len(found)
        for tile in found:
            assert Tile.read(str(tile)) == tile
            assert fits(tile, known(architecture), role, bits, dim)
            assert 1 <= tile.stages <= 4


def width_of(row):
    width = row.removesuffix(" masked")
    return width if width == FP8 else int(width)


def test_what_is_known_beforehand_speaks_against_no_tile_that_is_shipped():
    for row, by_bits in table().items():
        for bits, dims in by_bits.items():
            assert all(fits(tile, row, "forward", width_of(bits), dim) for dim, tile in dims.items())
    for row, by_bits in backward_table().items():
        for bits, dims in by_bits.items():
            for dim, pair in dims.items():
                for role, tile in zip(("keys", "queries"), pair, strict=True):
                    assert fits(tile, row, role, width_of(bits), dim)


@pytest.mark.parametrize(
    ("tile", "why"),
    [
        (Tile(128, 256, 8, 4), "three stages of 256 keys and values of 128 features are 384 KiB"),
        (Tile(256, 128, 4, 1), "256 x 128 sums and as many scores in 128 threads are 512 numbers each"),
    ],
    ids=str,
)
def test_what_cannot_fit_is_left_out(tile, why):
    assert not fits(tile, "sm_90", "forward", 16, 128), why
    assert tile not in candidates("sm_90", "forward", 16, 128)


def test_they_differ_in_sizes_warps_and_stages():
    found = candidates("sm_90", "forward", 16, 128)
    for place in range(4):
        assert len({tile[place] for tile in found}) > 1


@pytest.mark.parametrize(
    ("architecture", "role", "bits", "dim", "masked", "loads"),
    [
        ("sm_90", "forward", 16, 128, False, {"", "descriptors"}),
        ("sm_103", "forward", 16, 64, False, {"", "descriptors"}),
        ("sm_120", "forward", 16, 64, False, {"", "descriptors"}),
        ("sm_90", "forward", 16, 80, False, {""}),  # two parts
        ("sm_90", "forward", 16, 128, True, {""}),
        ("sm_90", "forward", 8, 128, False, {""}),
        ("sm_90", "forward", 32, 64, False, {""}),
        ("sm_90", "keys", 16, 64, False, {""}),
        ("sm_80", "forward", 16, 64, False, {""}),
        ("gfx942", "forward", 16, 64, False, {""}),
    ],
)
def test_descriptors_are_tried_where_a_copy_engine_is_and_the_kernel_takes_the_kind(
    architecture, role, bits, dim, masked, loads
):
    assert {tile.loads for tile in candidates(architecture, role, bits, dim, masked)} == loads


def test_no_row_of_the_tables_asks_for_descriptors():
    """They are for a measurement to choose."""
    rows = [tile for by_bits in table().values() for dims in by_bits.values() for tile in dims.values()]
    assert {tile.loads for tile in rows} == {""}


def test_the_interpreter_has_neither_warps_nor_stages():
    for role in ROLES:
        found = candidates("interpreter", role, 32, 64)
        assert len({tile[2:] for tile in found}) == 1
        assert len(found) > 3


def test_amd_loads_no_more_than_two_stages_ahead():
    assert {tile.stages for tile in candidates("gfx942", "forward", 16, 64)} == {1, 2}
