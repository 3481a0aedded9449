"""The shipped table of tiles: every architecture, dtype and head dim finds a row."""

import pytest
import torch

from heedful import AttentionProblem
from heedful.kernels import aot
from heedful.kernels.operands import split_of
from heedful.kernels.tiles import (
    Kind,
    Tile,
    backward_table,
    backward_tiles_for,
    is_sound,
    kinds,
    known,
    may_stream,
    table,
    tile_for,
    usual,
)
from heedful.masks import MaskFacts

PROBLEM = AttentionProblem(
    batch=2, heads=8, kv_heads=8, query_length=4096, key_length=77, head_dim=72, value_dim=64, dtype=torch.float16
)


@pytest.mark.parametrize("architecture", [*aot.TARGETS, "interpreter"])
@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("masked", [False, True])
def test_every_call_has_a_tile(architecture, bits, masked):
    for dim in (1, 16, 64, 65, 72, 128, 160, 256):
        tile = tile_for(architecture, bits, dim, masked)
        assert all(size >= 16 and size & (size - 1) == 0 for size in tile[:2]), tile
        assert tile.warps in (1, 4, 8)


def test_the_first_row_that_is_wide_enough():
    dims = table()["sm_90"]["16"]
    assert tile_for("sm_90", 16, 64) == dims[64]
    assert tile_for("sm_90", 16, 65) == dims[min(dim for dim in dims if dim >= 65)]


def test_masked_calls_have_rows_of_their_own_where_they_need_them():
    assert tile_for("sm_80", 16, 128, True) == table()["sm_80"]["16 masked"][128]
    assert tile_for("sm_80", 32, 64, True) == tile_for("sm_80", 32, 64)


def test_scores_in_int8_have_rows_of_their_own_or_those_of_sixteen_bits():
    assert tile_for("sm_90", 8, 128) == table()["sm_90"]["8"][128]
    assert tile_for("sm_90", 8, 128, True) == table()["sm_90"]["8 masked"][128]
    assert tile_for("sm_80", 8, 128) == tile_for("sm_80", 16, 128)
    assert tile_for("sm_80", 8, 128, True) == tile_for("sm_80", 16, 128, True)


@pytest.mark.parametrize("architecture", ["sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121"])
@pytest.mark.parametrize("masked", [False, True])
def test_values_in_fp8_have_rows_of_their_own_of_no_fewer_keys_than_tensor_cores_multiply(architecture, masked):
    rows = table()[known(architecture)]["8 fp8 masked" if masked else "8 fp8"]
    for dim in (1, 40, 64, 80, 96, 128, 160, 192, 256):
        assert tile_for(architecture, "8 fp8", dim, masked) == rows[min(each for each in rows if each >= dim)]
        assert tile_for(architecture, "8 fp8", dim, masked).keys >= 32


@pytest.mark.parametrize(
    ("architecture", "row"),
    [("sm_90", "sm_90"), ("sm_87", "sm_86"), ("sm_89", "sm_86"), ("sm_103", "sm_100"), ("sm_121", "sm_120"),
     ("sm_70", "sm_75"), ("gfx90a", "gfx9"), ("gfx942", "gfx9"), ("gfx1100", "gfx11"), ("gfx1201", "gfx11"),
     ("unknown", "sm_75")],
)  # fmt: skip
def test_an_architecture_that_is_not_in_the_table_is_taken_for_an_older_one(architecture, row):
    assert known(architecture) == row


def test_a_tile_reads_as_what_it_is():
    assert Tile(128, 64, 8, 3)._asdict() == {
        "queries": 128, "keys": 64, "warps": 8, "stages": 3, "loads": "",
    }  # fmt: skip


@pytest.mark.parametrize("architecture", [*aot.TARGETS, "interpreter"])
@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("masked", [False, True])
def test_every_backward_call_has_its_tiles(architecture, bits, masked):
    for dim in (1, 16, 64, 65, 72, 128, 160, 256):
        for tile in backward_tiles_for(architecture, bits, dim, masked):
            assert all(size >= 16 and size & (size - 1) == 0 for size in tile[:2]), tile
            assert tile.warps in (1, 4, 8)


def test_the_backward_table_knows_the_same_architectures():
    assert backward_table().keys() == table().keys()


def test_no_tile_for_hopper_has_one_stage_where_its_code_would_be_wrong():
    for dims in table()["sm_90"].values():
        assert all(is_sound("sm_90", tile.queries, tile.stages) for tile in dims.values())
    for dims in backward_table()["sm_90"].values():
        for keys, queries in dims.values():
            assert is_sound("sm_90", keys.keys, keys.stages)
            assert is_sound("sm_90", queries.queries, queries.stages)
    assert not is_sound("sm_90", 64, 1)
    assert is_sound("sm_90", 64, 2)
    assert is_sound("sm_90", 32, 1)
    assert is_sound("sm_100", 64, 1)


# Tiles as text


def test_a_tile_is_read_from_its_own_text():
    for rows in table().values():
        for dims in rows.values():
            for tile in dims.values():
                assert Tile.read(str(tile)) == tile
    assert str(Tile(128, 64, 8, 3)) == "128x64 8w 3s"
    assert Tile.read("128x64 4w 3s descriptors") == Tile(128, 64, 4, 3, "descriptors")


@pytest.mark.parametrize(
    "text",
    ["", "128x64", "128x64 8w 3s ", " 128x64 8w 3s", "128x64 8w 3s\n", "8x64 8w 3s", "512x64 8w 3s", "96x64 8w 3s",
     "0x64 8w 3s", "128x64 3w 3s", "128x64 32w 3s", "128x64 8w 0s", "128x64 8w 9s", "128x064 8w 3s", "128x64 08w 3s",
     "-128x64 8w 3s", "\u0661\u0662\u0668x64 8w 3s", "128x64 8w 3s; rm", "native+upcast",
     "128x64 8w 3s  descriptors", "128x64 8w 3s pointers", "128x64 4w 3s specialised"],
    ids=repr,
)  # fmt: skip
def test_what_is_no_tile_is_refused(text):
    with pytest.raises(ValueError, match="is no tile such as '128x64 8w 3s'"):
        Tile.read(text)


# Kinds of calls


def names(problem, bits=0):
    return {role: str(kind) for role, kind in kinds(problem, bits).items()}


@pytest.mark.parametrize(("head_dim", "value_dim"), [(100, 100), (72, 20), (5, 64)])
def test_calls_that_no_measured_tile_is_for_have_no_kind(head_dim, value_dim):
    """Their head dims are computed in one part: an aligned call of the same width would go by what they said."""
    assert kinds(PROBLEM.replace(head_dim=head_dim, value_dim=value_dim)) == {}


@pytest.mark.parametrize(
    ("changes", "may"),
    [
        ({"head_dim": 64, "value_dim": 128}, True),
        ({"head_dim": 64, "value_dim": 64, "mask": MaskFacts(causal="top_left")}, True),
        ({}, False),  # 72 is two parts
        ({"head_dim": 64, "value_dim": 72}, False),
        ({"head_dim": 64, "value_dim": 64, "scale": -0.1}, False),
        ({"head_dim": 64, "value_dim": 64, "mask": MaskFacts(query_padding=True)}, False),
        ({"head_dim": 64, "value_dim": 64, "mask": MaskFacts(key_padding=True)}, False),
        ({"head_dim": 64, "value_dim": 64, "mask": MaskFacts(dense="K")}, False),
        ({"head_dim": 64, "value_dim": 64, "mask": MaskFacts(bias="K")}, False),
    ],
)
def test_descriptors_are_measured_on_calls_that_they_take(changes, may):
    assert may_stream(PROBLEM.replace(**changes)) is may


def test_the_kind_of_a_call_is_a_key_of_the_store():
    assert names(PROBLEM) == {"forward": "tiles forward 16 80 beyond 1024"}
    assert names(PROBLEM.replace(query_length=1024), 8) == {"forward": "tiles int8 8 80 to 1024"}
    assert names(PROBLEM.replace(dtype=torch.float32, query_length=128, head_dim=64)) == {
        "forward": "tiles forward 32 64 to 128"
    }


def test_passes_for_gradients_have_kinds_of_their_own_by_what_they_go_over():
    assert names(PROBLEM.replace(needs_grad=True)) == {
        "forward": "tiles forward 16 80 beyond 1024",
        "keys": "tiles backward keys 16 80 to 128",
        "queries": "tiles backward queries 16 80 beyond 1024",
    }


@pytest.mark.parametrize(
    ("mask", "masked"),
    [
        (MaskFacts(), False), (MaskFacts(causal="top_left"), False), (MaskFacts(window=(None, 3, "top_left")), False),
        (MaskFacts(bias="BK", bias_dtype=torch.float32), False), (MaskFacts(dense="BHQK"), True),
        (MaskFacts(bias="QK", bias_dtype=torch.float32), True), (MaskFacts(window=(5, 3, "top_left")), True),
        (MaskFacts(key_padding=True), True),
    ],
    ids=str,
)  # fmt: skip
def test_masked_is_what_the_kernels_call_so(mask, masked):
    (kind,) = kinds(PROBLEM.replace(mask=mask)).values()
    assert kind.masked is masked
    assert (" masked " in str(kind)) is masked


def test_dtypes_of_one_width_and_what_changes_nothing_share_a_kind():
    same = PROBLEM.replace(dtype=torch.bfloat16, batch=7, scale=0.3, head_dim=80, value_dim=80, needs_lse=True)
    assert kinds(same) == kinds(PROBLEM)


@pytest.mark.parametrize("architecture", [*table()])
def test_a_kind_finds_the_row_that_its_calls_find(architecture):
    for bits in (8, 16, 32):
        for dim in range(1, 257):
            kind = Kind("forward", bits, True, sum(split_of(dim)), 0)
            assert usual(architecture, kind.role, kind.bits, kind.dim, kind.masked) == tile_for(
                architecture, bits, dim, True
            )


def test_the_table_s_tile_of_each_pass():
    pair = backward_tiles_for("sm_90", 16, 64)
    assert [usual("sm_90", role, 16, 64) for role in ("forward", "keys", "queries")] == [
        tile_for("sm_90", 16, 64), *pair
    ]  # fmt: skip
