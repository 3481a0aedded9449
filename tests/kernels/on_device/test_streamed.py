"""The forward pass over tensor descriptors: held to the formula, and to what the pointers' kernel says.

Shapes: B batch, H heads, N kv heads, Q query length, K key length, D head dim, E value dim, T packed tokens.
"""

from __future__ import annotations

import pytest
import torch
from triton.runtime import _allocation

from heedful.kernels import forward as kernels
from heedful.kernels import streamed
from heedful.kernels.arguments import call_of_arguments
from heedful.kernels.tiles import DESCRIPTORS, Tile
from heedful.masks import Varlen
from heedful.testing.tolerance import check_close

HALF = torch.float16
SMALL, LARGE = Tile(16, 16, 4, 1, DESCRIPTORS), Tile(128, 64, 4, 2, DESCRIPTORS)


@pytest.fixture
def draw(device):
    """``draw(2, 3)``: N(0, 1) in fp16, the same on every device."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator).to(HALF).to(device)


@pytest.fixture
def launched(monkeypatch):
    """How often the kernel was launched."""
    launches = []
    real = streamed.launch
    monkeypatch.setattr(streamed, "launch", lambda *given: (launches.append(given), real(*given))[1])
    return launches


def hold(tensors, tile=SMALL, **asked):
    """Compute, and hold to the pointers' kernel in float32, which ``test_forward`` holds to the formula."""
    call = call_of_arguments(*tensors, **asked)
    assert streamed.takes(call)
    out, lse = kernels.forward(call, with_lse=True, tile=tile)
    exact = call_of_arguments(*(one.float() for one in tensors), **asked)
    want, want_lse = kernels.forward(exact, with_lse=True)
    naive, naive_lse = kernels.forward(call, with_lse=True)
    factor = 3.0 if asked.get("softcap") else 2.0
    check_close("the output", out, want.double(), naive, HALF, factor)
    check_close("the LSE", lse, want_lse.double(), naive_lse, HALF, factor)
    assert not out[want_lse == -torch.inf].any()
    return out


BANDS = [
    {},
    {"is_causal": True},
    {"is_causal": True, "causal_alignment": "bottom_right"},
    {"window": (3, 1)},
    {"window": (17, None), "window_alignment": "bottom_right"},
]


@pytest.mark.parametrize("asked", BANDS, ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(33, 33), (20, 47), (48, 32), (1, 40)])
def test_lengths_and_bands(draw, launched, queries, keys, asked):
    hold((draw(1, 2, queries, 16), draw(1, 2, keys, 16), draw(1, 2, keys, 16)), **asked)
    assert len(launched) == 1


@pytest.mark.parametrize("asked", BANDS[:2], ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (24, 64), (128, 16)], ids=str)
def test_a_tile_that_is_tried(draw, launched, dims, asked):
    head_dim, value_dim = dims
    hold((draw(1, 2, 130, head_dim), draw(1, 1, 130, head_dim), draw(1, 1, 130, value_dim)), LARGE, **asked)
    assert len(launched) == 1


def test_layouts_groups_scales_and_caps(draw, launched):
    tensors = [draw(2, 35, heads, 32).transpose(1, 2) for heads in (4, 2, 2)]
    out = hold(tensors, scale=0.3, softcap=2.0)
    assert out.transpose(1, 2).is_contiguous()
    assert len(launched) == 1


@pytest.mark.parametrize("asked", BANDS[:4], ids=str)
def test_packed_sequences_do_not_see_each_other(draw, device, launched, asked):
    ends = torch.tensor([0, 5, 5, 38, 60], dtype=torch.int32, device=device)
    tensors = [draw(64, 2, 16) for _ in range(3)]  # four tokens belong to none
    hold(tensors, varlen=Varlen(ends), **asked)
    assert len(launched) == 1


def test_a_neighbour_s_nan_is_not_seen(draw, device):
    """Descriptors end where the sequence ends."""
    ends = torch.tensor([0, 20, 40], dtype=torch.int32, device=device)
    tensors = [draw(40, 1, 16) for _ in range(3)]
    clean = kernels.forward(call_of_arguments(*tensors, varlen=Varlen(ends)), tile=SMALL)[0]
    for tensor in tensors[1:]:
        tensor[25:30] = torch.nan
    out = kernels.forward(call_of_arguments(*tensors, varlen=Varlen(ends)), tile=SMALL)[0]
    assert torch.equal(out[..., :20, :], clean[..., :20, :])


@pytest.mark.parametrize(
    "change",
    ["float32", "two parts", "dense", "bias", "padding", "negative scale", "odd rows", "odd start", "expanded keys"],
)
def test_what_descriptors_cannot_say_goes_by_pointers(draw, device, launched, change):
    shape, asked = (1, 2, 20, 72 if change == "two parts" else 16), {}
    tensors = [draw(*shape) for _ in range(3)]
    if change == "float32":
        tensors = [one.float() for one in tensors]
    elif change == "dense":
        asked["attn_mask"] = torch.ones(1, 1, 20, 20, dtype=torch.bool, device=device)
    elif change == "bias":
        asked["attn_bias"] = draw(1, 1, 20, 20)
    elif change == "padding":
        asked["key_padding"] = torch.ones(1, 20, dtype=torch.bool, device=device)
    elif change == "negative scale":
        asked["scale"] = -0.2
    elif change == "odd rows":
        tensors = [draw(1, 2, 20, 17)[..., :16] for _ in range(3)]
    elif change == "odd start":
        tensors = [draw(1, 2 * 20 * 16 + 1)[0, 1:].view(shape) for _ in range(3)]
    elif change == "expanded keys":
        tensors[1:] = [one[:, :, :1].expand(shape) for one in tensors[1:]]
    call = call_of_arguments(*tensors, **asked)
    out, _ = kernels.forward(call, tile=SMALL)
    assert not streamed.takes(call)
    assert not launched
    assert torch.equal(out, kernels.forward(call)[0])


def test_other_kernels_of_the_process_see_no_allocator(draw, launched):
    """Triton keeps it for whoever launches next in the same context."""
    before = _allocation._allocator.get()
    hold([draw(1, 1, 20, 16) for _ in range(3)])
    assert len(launched) == 1
    assert _allocation._allocator.get() is before
