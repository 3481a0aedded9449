"""The call as a value: parts of head dims, bands, strides. No kernel is launched."""

import pytest
import torch

from heedful.kernels.operands import OPEN, Band, Call, Packing, call_of, empty_like_query, split_of, strides_of, unit_of


@pytest.mark.parametrize(
    ("dim", "split"),
    [(1, (16, 0)), (16, (16, 0)), (17, (32, 0)), (24, (32, 0)), (40, (32, 16)), (64, (64, 0)), (72, (64, 16)),
     (80, (64, 16)), (96, (64, 32)), (112, (128, 0)), (128, (128, 0)), (160, (128, 32)), (192, (128, 64)),
     (200, (256, 0)), (256, (256, 0))],
)  # fmt: skip
def test_head_dims_are_split_and_not_padded(dim, split):
    assert split_of(dim) == split


@pytest.mark.parametrize("dim", range(1, 257))
def test_parts_are_powers_of_two_that_hold_the_dim(dim):
    first, second = split_of(dim)
    assert first + second >= dim
    assert first >= 16
    assert all(part & (part - 1) == 0 for part in (first, second))
    assert second == 0 or (second >= 16 and first < dim)
    assert first + second < 2 * max(dim, 16)


def test_bands_join_by_the_end_they_count_from():
    band = Band.of((None, 0, "top_left"), (9, 4, "bottom_right"), (7, None, "bottom_right"), (3, 5, "top_left"))
    assert band == Band(left=3, left_end=7, right=0, right_end=4)
    assert Band.of() == Band(OPEN, OPEN, OPEN, OPEN)
    assert not Band.of((None, None, "top_left")).has_left
    assert (Band.of((None, 0, "bottom_right")).has_left, Band.of((None, 0, "bottom_right")).has_right) == (False, True)


def test_sides_too_far_for_32_bits_are_open():
    assert Band.of((1 << 40, 1 << 35, "top_left")) == Band()


def half(dim):
    return torch.empty(1, 2, 8, dim, dtype=torch.float16)


def drawn(*shape):
    return torch.empty(shape, device="meta")


def test_masks_broadcast_with_stride_zero():
    query = drawn(2, 3, 5, 16)
    call = call_of(query, query, query, dense=drawn(1, 1, 1, 5) > 0, bias=drawn(3, 5, 1)[None], keep=drawn(1, 5) > 0)
    found = call.masks()
    assert [found[f"stride_dense_{axis}"] for axis in "bhmn"] == [0, 0, 0, 1]
    assert [found[f"stride_bias_{axis}"] for axis in "bhmn"] == [0, 5, 1, 0]
    assert (found["DENSE_PER_QUERY"], found["BIAS_PER_QUERY"]) == (False, True)
    assert found["dense"].dtype == torch.uint8
    assert found["rows"] is None
    assert call.is_masked


def test_packed_tensors_are_a_batch_of_one_by_views():
    query = torch.empty(7, 3, 16)
    packing = Packing(*[torch.tensor([0, 3, 7], dtype=torch.int32)] * 2, 4, 4)
    call = call_of(query, query, query, packing=packing)
    assert call.query.shape == (1, 3, 7, 16)
    assert call.query.data_ptr() == query.data_ptr()
    assert (call.sequences, call.longest_query, call.longest_key) == (2, 4, 4)


@pytest.mark.parametrize(("scale", "sign"), [(0.5, 1), (-2.0, -1), (0.0, 0)])
def test_signs_of_scales(scale, sign):
    query = drawn(1, 1, 5, 16)
    assert call_of(query, query, query, scale=scale).sign == sign


def test_wide_strides_are_seen():
    small, large = drawn(1, 1, 5, 16), torch.empty_strided((1, 1, 5, 16), (0, 0, 1 << 23, 1), device="meta")
    assert not Call(small, small, small, 1.0).wide
    assert Call(small, large, small, 1.0).wide


def test_heads_that_lie_far_apart_are_not_wide():
    """A tile is of one head: 8192 tokens of 16 heads and 128 features lie 16 million elements from the next batch."""
    query = torch.empty(4, 16, 8192, 128, device="meta")
    keep, mask = torch.empty(4, 1 << 23, device="meta") > 0, torch.empty(4, 1, 4096, 4096, device="meta") > 0
    assert not Call(query, query, query, 1.0, dense=mask, keep=keep).wide
    assert Call(query, query, query, 1.0, dense=drawn(1, 1, 2, 1 << 22) > 0).wide


def test_strides_go_by_sixteen_bytes_where_all_are_aligned():
    half = torch.empty(2, 4, 8, 72, dtype=torch.float16, device="meta")
    assert unit_of(half, half) == 8
    assert unit_of(half.float()) == 4
    assert strides_of(half, "key", "bhnd", 8) == {
        "stride_key_b": 288, "stride_key_h": 72, "stride_key_n": 9, "stride_key_d": 1,
    }  # fmt: skip
    odd = torch.empty(2, 4, 8, 73, dtype=torch.float16, device="meta")
    assert unit_of(half, odd) == 1
    assert unit_of(half.mT) == 1


def test_an_output_lies_in_memory_as_its_query():
    query = drawn(2, 7, 3, 16).transpose(1, 2)
    assert empty_like_query(query, 8).transpose(1, 2).is_contiguous()
    assert empty_like_query(query.contiguous(), 8).is_contiguous()


@pytest.mark.parametrize(
    ("tensors", "split"),
    [
        ([half(72)] * 3, (64, 16)),
        ([half(160)] * 3, (128, 32)),
        ([half(72), half(72), half(73)[..., :72]], (128, 0)),  # rows of 146 bytes
        ([half(74)] * 3, (128, 0)),
        ([half(72), half(72).mT.contiguous().mT, half(72)], (128, 0)),
        ([torch.empty(2 * 8 * 72 + 1, dtype=torch.float16)[1:].view(1, 2, 8, 72)] * 3, (128, 0)),  # begins between two
        ([half(72).float()] * 3, (64, 16)),
    ],
)
def test_head_dims_are_split_where_rows_are_aligned(tensors, split):
    call = Call(*tensors, 1.0)
    assert call.parts(call.dims[0]) == split
    assert call.width == sum(split)
