"""What analysis says of a mask's tensor means what the tensor means; and the cache never answers for another tensor."""

import copy
import gc
import itertools
import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from heedful import Bias, Causal, Dense, KeyPadding, Mask, SlidingWindow, Varlen
from heedful import analysis as module
from heedful.analysis import MaskCache, analyse
from heedful.errors import InvalidArgument
from heedful.masks import as_mask, facts_of, key_of

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
BATCH, HEADS = 2, 3
lengths = st.integers(1, 9)
seeds = st.integers(0, 10_000)
KEEP = torch.tensor([[True, True, True, False, False], [True, True, True, True, False]])


def random_bool(*shape, seed=0, share=0.6):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def triangle(queries, keys, shift=0):
    return torch.ones(queries, keys, dtype=torch.bool).tril(shift)


def additive(seen, low=-math.inf, dtype=torch.float32):
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, low)


def scores(mask, sizes):
    """What a mask adds to scores of (B, H, Q, K), -inf where it hides; of finite numbers -1e4 or less, too."""
    total = torch.zeros(sizes, dtype=torch.float64)
    if mask.bias is not None:
        bias = mask.bias.double()
        total = total + torch.where(bias <= -9984.0, -math.inf, bias)
    seen = mask.visible(sizes[-2], sizes[-1], CPU)
    return total if seen is None else torch.where(seen, total, -math.inf)


def weights(mask, sizes):
    """The softmax of random scores with the mask, in float64: rows that see nothing are zeros."""
    given = 3 * torch.randn(sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    given = given if mask.bias is None else given + mask.bias.double()
    seen = mask.visible(sizes[-2], sizes[-1], CPU)
    given = given if seen is None else torch.where(seen, given, -math.inf)
    return given.softmax(-1).nan_to_num(0.0)


@st.composite
def structured(draw, queries, keys):
    """Bool (b, h, q, k) of some structure, or of none, of which any size may be 1 or expanded."""
    rows = draw(st.sampled_from((1, BATCH)))
    keep = draw(
        st.sampled_from(
            [
                torch.arange(keys) < torch.randint(0, keys + 1, (rows, 1)),
                torch.arange(keys) >= torch.randint(0, keys + 1, (rows, 1)),
                random_bool(rows, keys, seed=draw(seeds)),
                torch.ones(rows, keys, dtype=torch.bool),
            ]
        )
    )
    used = random_bool(rows, queries, seed=draw(seeds))
    left, right = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    cuts = sorted(draw(st.sets(st.integers(0, min(queries, keys)), max_size=3)) | {0})
    packing = Varlen(torch.tensor([*cuts, queries]), torch.tensor([*cuts, keys]))
    alignment = draw(st.sampled_from(("top_left", "bottom_right")))
    whole = torch.ones(1, 1, queries, keys, dtype=torch.bool)
    band = SlidingWindow(left, right, alignment).visible(queries, keys, CPU)
    seen = draw(
        st.sampled_from(
            [
                whole,
                keep[:, None, None],
                whole & keep[:, None, None],
                used[:, None, :, None] & keep[:, None, None],
                used[:, None, :, None],
                Causal(alignment).visible(queries, keys, CPU) & keep[:, None, None],
                band & keep[:, None, None],
                packing.visible(queries, keys, CPU),
                (packing & Causal(alignment)).visible(queries, keys, CPU),
                random_bool(rows, HEADS, queries, keys, seed=draw(seeds)),
                random_bool(rows, 1, queries, keys, seed=draw(seeds), share=0.9),
            ]
        )
    )
    while seen.dim() < 4:
        seen = seen[None]
    if draw(st.booleans()):  # one element otherwise: what is almost a structure is none
        flips = torch.zeros(seen.numel(), dtype=torch.bool)
        flips[draw(st.integers(0, seen.numel() - 1))] = draw(st.booleans())
        seen = seen ^ flips.view(seen.shape)
    full = [draw(st.sampled_from((-1, size))) if have == 1 else -1
            for have, size in zip(seen.shape, (BATCH, HEADS, queries, keys), strict=True)]  # fmt: skip
    seen = seen.expand(*full)
    seen = seen.contiguous() if draw(st.booleans()) else seen
    leading = [size == 1 for size in seen.shape[:2]]
    return (
        seen[0, 0] if all(leading) and draw(st.booleans()) else seen[0] if leading[0] and draw(st.booleans()) else seen
    )


@settings(max_examples=200, deadline=None)
@given(st.data(), lengths, lengths, st.sampled_from((torch.bool, *DTYPES)))
def test_what_is_found_means_what_the_tensor_means(data, queries, keys, dtype):
    seen = data.draw(structured(queries, keys))
    tensor = seen if dtype == torch.bool else additive(seen, data.draw(st.sampled_from((-math.inf, -1e4, -6e4))), dtype)
    batch = seen.shape[0] if seen.dim() == 4 else data.draw(st.sampled_from((1, BATCH)))
    sizes = (batch, HEADS, queries, keys)
    mask = as_mask(tensor)
    for found in (analyse(mask, batch), analyse(mask)):
        assert torch.equal(scores(found, sizes), scores(mask, sizes))
        torch.testing.assert_close(weights(found, sizes), weights(mask, sizes))
        if found.padding is not None:
            kept = found.padding.sum(-1).tolist()
            assert list(found.profile.kept) == kept
            assert found.profile.key_length == keys


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(33, 70), st.sampled_from((8, 33, 1030, 2100)), st.sampled_from((torch.bool, torch.float32)))
def test_rows_are_sampled_and_words_counted_right(seed, queries, keys, dtype):
    """Beyond the sizes where all is read at once."""
    keep = torch.arange(keys) < torch.randint(1, keys + 1, (2, 1), generator=torch.Generator().manual_seed(seed))
    seen = (triangle(queries, keys, keys - queries) & keep[:, None])[:, None].expand(2, HEADS, queries, keys)
    changed = seen.contiguous()
    row, key = seed % queries, seed * 7 % keys
    changed[seed % 2, :, row, key] ^= True
    for each in (seen, changed):
        tensor = each if dtype == torch.bool else additive(each)
        mask = as_mask(tensor)
        assert torch.equal(scores(analyse(mask), seen.shape), scores(mask, seen.shape))
    found = analyse(Mask(dense=seen))
    assert found.causal in ("bottom_right", "top_left") or found.window or found.padding is not None


def test_every_row_of_a_large_mask_is_checked():
    seen = triangle(300, 300)
    assert analyse(Mask(dense=seen)).causal == "top_left"
    for row, key in ((1, 299), (298, 0), (150, 3), (151, 151)):
        changed = seen.clone()
        changed[row, key] ^= True
        mask = Mask(dense=changed)
        assert analyse(mask) is mask


# What is recognised


def named(tensor, batch=None):
    return str(facts_of(analyse(as_mask(tensor), batch)))


@pytest.mark.parametrize(
    ("tensor", "name"),
    [
        (torch.ones(4, 5, dtype=torch.bool), "dense bool [QK] (hides nothing)"),
        (torch.zeros(2, 1, 4, 5), "bias float32 [BQK] (hides nothing)"),
        (-torch.zeros(5), "bias float32 [K] (hides nothing)"),
        (torch.ones(()), "bias float32 [scalar]"),
        (KEEP[:, None, None], "key padding (right, 6/8 kept)"),
        (KEEP.flip(1)[:, None, None], "key padding (left, 6/8 kept)"),
        (KEEP.roll(1, 1)[:, None, None], "key padding (interior, 6/8 kept)"),
        (KEEP[:, None, None].expand(2, 3, 4, 5), "key padding (right, 6/8 kept)"),
        (KEEP[:, None, None].expand(2, 3, 4, 5).contiguous(), "key padding (right, 6/8 kept)"),
        ((KEEP[:, :, None] & KEEP[:, None])[:, None], "key padding (right, 6/8 kept) & query padding"),
        (torch.zeros(2, 1, 1, 5, dtype=torch.bool), "key padding (right, 0/8 kept)"),
        (triangle(6, 6), "causal top_left"),
        (triangle(4, 6), "causal top_left"),
        (triangle(6, 4), "causal top_left"),
        (triangle(4, 6, 2), "causal bottom_right"),
        (triangle(6, 4, -2), "causal bottom_right"),
        (triangle(5, 5) & KEEP[:, None, None], "causal top_left & key padding (right, 6/8 kept)"),
        (triangle(5, 5) & KEEP.flip(1)[:, None, None], "causal top_left & key padding (left, 6/8 kept)"),
        (SlidingWindow(2, 1).visible(7, 7, CPU), "window 2..1 top_left"),
        (SlidingWindow(2, None).visible(7, 7, CPU), "window 2..None top_left"),
        (SlidingWindow(None, 2).visible(7, 7, CPU), "window None..2 top_left"),
        (SlidingWindow(2, 0, "bottom_right").visible(5, 9, CPU), "window 2..0 bottom_right"),
        (SlidingWindow(1, 1, "bottom_right").visible(5, 9, CPU), "window 1..1 bottom_right"),
        (SlidingWindow(0, 0).visible(7, 7, CPU), "window 0..0 top_left"),
        (triangle(6, 6).triu(-7).flip(0), "dense bool [QK]"),
        (torch.randn(4, 5), "bias float32 [QK]"),
        (torch.tensor([0.0, math.nan, -math.inf]), "bias float32 [K]"),
        (torch.tensor([0.0, math.inf]), "bias float32 [K]"),
        (KEEP[:, None, :, None], "dense bool [BQ]"),
        (torch.ones(0, 5, dtype=torch.bool), "dense bool [QK]"),
        (random_bool(3, 1, 1), "dense bool [H]"),
    ],
)
def test_what_is_recognised(tensor, name):
    assert named(tensor) == name
    if tensor.dtype == torch.bool and "hides" not in name and "dense" not in name:
        assert named(additive(tensor)) == name
        assert named(additive(tensor, dtype=torch.bfloat16)) == name


def test_a_mask_that_hides_nothing_keeps_shape_and_dtype_but_no_memory():
    tensor = torch.zeros(2, 3, 4, 5, dtype=torch.float16)
    bias = analyse(Mask(bias=tensor)).bias
    assert torch.equal(bias, tensor)
    assert bias.dtype == tensor.dtype
    assert bias.untyped_storage().nbytes() == 10


def test_the_profile_of_queries_and_keys():
    profile = analyse(Mask(dense=(KEEP.flip(1)[:, :, None] & KEEP[:, None])[:, None])).profile
    assert (profile.side, profile.kept, profile.query_side, profile.queries) == ("right", (3, 4), "left", (3, 4))


def test_truths_of_any_byte():
    bytes_ = (KEEP.to(torch.uint8) * 255).view(torch.bool)
    assert named(bytes_[:, None, None]) == named(bytes_[:, None].repeat(1, 4, 1)[:, None]) == named(KEEP[:, None, None])
    assert analyse(KeyPadding(bytes_)).profile.kept == (3, 4)


def test_heads_that_differ_are_no_structure():
    seen = triangle(6, 6).repeat(1, 3, 1, 1)
    assert named(seen) == "causal top_left"
    seen[0, 2, 0, 5] = True
    assert named(seen) == "dense bool [HQK]"


@pytest.mark.parametrize("causal", [None, "top_left", "bottom_right"])
def test_blocks_are_a_packing_for_batch_one_only(causal):
    packing = Varlen(torch.tensor([0, 2, 5, 9]), torch.tensor([0, 3, 6, 11]))
    seen = (packing & Mask(causal=causal)).visible(10, 12, CPU)
    found = analyse(Mask(dense=seen), batch=1)
    assert found.varlen.cu_seqlens_q.tolist() == [0, 2, 5, 9]
    assert found.causal == causal
    assert (found.varlen.max_seqlen_q, found.varlen.max_seqlen_k) == (4, 4 if causal == "top_left" else 5)
    assert found.varlen.cu_seqlens_q.dtype == torch.int32
    assert torch.equal(found.visible(10, 12, CPU), seen)
    assert analyse(Mask(dense=seen)).varlen is None
    assert analyse(Mask(dense=seen), batch=2).varlen is None
    assert analyse(Mask(dense=seen.repeat(2, 1, 1, 1)), batch=2).varlen is None


def test_blocks_with_a_gap_are_none():
    seen = torch.block_diag(torch.ones(2, 2), torch.zeros(1, 1), torch.ones(3, 3), torch.ones(1, 2)).bool()
    mask = Mask(dense=seen)
    assert analyse(mask, 1) is mask


# Additive masks


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("low", [-1e4, "lowest", -math.inf])
def test_low_values_hide_where_every_row_keeps_a_zero(dtype, low):
    low = torch.finfo(dtype).min if low == "lowest" else low
    bias = additive(KEEP[:, None, None], low, dtype)
    assert named(bias) == "key padding (right, 6/8 kept)"
    bias[1] = low
    padding = "key padding (right, 3/8 kept)"
    assert named(bias) == (padding if low == -math.inf else f"bias {dtype} [BK]".replace("torch.", ""))


def test_a_bfloat16_cast_up_still_hides_and_smaller_values_do_not():
    assert named(additive(KEEP[:, None, None], -1e4, torch.bfloat16).float()) == "key padding (right, 6/8 kept)"
    assert named(additive(KEEP[:, None, None], -9900.0)) == "bias float32 [BK]"


def test_finite_rows_without_a_zero_stay_among_infinite_ones():
    bias = additive(triangle(5, 5), -1e4)
    assert named(bias) == "causal top_left"
    bias[0, 0] = -1e4
    assert named(bias) == "bias float32 [QK]"
    bias[0] = -math.inf
    assert named(bias) == "bias float32 [QK]"


def test_finite_values_do_not_hide_beside_other_parts():
    """Left padding and causality: what row 0 sees is one key of -1e4, which softmax makes a 1."""
    bias = additive(KEEP.flip(1)[:, None, None], -1e4)
    assert analyse(Causal() & Bias(bias)).bias is bias
    assert analyse(Causal() & Bias(additive(KEEP.flip(1)[:, None, None]))).bias is None
    cache = MaskCache()
    assert cache.simplest(bias).padding is not None
    assert cache.simplest(bias, alone=False) is bias


# Mask values


def test_key_padding_gets_its_profile():
    found = analyse(KeyPadding(KEEP, KEEP.flip(1)))
    assert (found.profile.side, found.profile.kept, found.profile.queries) == ("right", (3, 4), (3, 4))
    assert found.profile.query_side == "left"
    assert torch.equal(found.rows, KEEP.flip(1))
    assert analyse(found) is found
    assert analyse(KeyPadding(KEEP[:1], KEEP)).profile.kept == (3, 3)


def test_parts_beside_the_padding_stay():
    found = analyse(SlidingWindow(2, 0) & Causal() & KeyPadding(KEEP))
    assert (found.causal, found.window, found.profile.side) == ("top_left", (2, 0, "top_left"), "right")


@pytest.mark.parametrize(
    ("mask", "name"),
    [
        (Causal() & Dense(torch.ones(5, 5, dtype=torch.bool)), "causal top_left"),
        (Causal("bottom_right") & Dense(triangle(5, 5)), "causal bottom_right"),
        (Causal("bottom_right") & Dense(triangle(3, 5)), "causal bottom_right & dense bool [QK]"),
        (Causal() & Dense(KEEP[:, None, None]), "causal top_left & key padding (right, 6/8 kept)"),
        (KeyPadding(KEEP) & Dense(triangle(4, 5)), "causal top_left & key padding (right, 6/8 kept)"),
        (KeyPadding(KEEP) & Dense(KEEP.flip(1)[:, None, None]), "key padding"),
        (KeyPadding(KEEP) & Bias(torch.randn(5)), "key padding (right, 6/8 kept) & bias float32 [K]"),
        (Dense(triangle(5, 5)) & Bias(torch.zeros(5, 5)), "causal top_left"),
        (
            SlidingWindow(9, 1, "bottom_right") & Dense(SlidingWindow(1, 9).visible(9, 9, CPU)),
            "window 1..1 bottom_right",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_masks_of_several_parts(mask, name):
    found = analyse(mask)
    assert str(facts_of(found)) == name
    sizes = (2, 1, 9, 9) if mask.window else (2, 1, 5 if "padding" not in name or mask.causal else 4, 5)
    if mask.causal == "bottom_right" and "dense" in name:
        sizes = (2, 1, 3, 5)
    assert torch.equal(scores(found, sizes), scores(mask, sizes))


def test_packings_beside_tensors_stay():
    mask = Varlen(torch.tensor([0, 5])) & Dense(torch.ones(5, 5, dtype=torch.bool))
    assert analyse(mask) is mask
    assert MaskCache().simplest(mask) is mask


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_lengths_of_a_packing_are_read_once_and_again_after_a_write(dtype):
    ends, cache = torch.tensor([0, 2, 5], dtype=dtype), MaskCache()
    mask = Varlen(ends)
    found = cache.simplest(mask)
    assert found is cache.simplest(mask)
    assert found.varlen.lengths == ((2, 3), (2, 3))
    assert (found.varlen.alike, found.varlen.max_seqlen_q) == (True, 3)
    ends[1] = 4
    assert cache.simplest(mask).varlen.lengths == ((4, 1), (4, 1))


def test_a_packing_with_causality_keeps_it_and_equal_ends_count_as_one():
    found = analyse(Varlen(torch.tensor([0, 2, 5]), torch.tensor([0, 2, 5])) & Causal())
    assert (found.causal, found.varlen.alike) == ("top_left", True)
    assert not analyse(Varlen(torch.tensor([0, 2, 5]), torch.tensor([0, 3, 5]))).varlen.alike


@pytest.mark.parametrize("ends", [[1, 5], [0, 4, 3]])
def test_ends_that_do_not_rise_from_zero_are_refused(ends):
    with pytest.raises(InvalidArgument, match="cu_seqlens_q"):
        analyse(Varlen(torch.tensor(ends)))


# What must not be looked at


def opaque(tensor):
    cache, mask = MaskCache(), as_mask(tensor)
    return analyse(mask) is mask and cache.simplest(tensor) is tensor and len(cache) == 0


def test_learned_biases_are_never_read():
    bias = torch.nn.Parameter(torch.zeros(5, 5))
    assert opaque(bias)
    with torch.no_grad():
        assert opaque(bias)
        assert opaque(bias[None])
    assert not opaque(torch.nn.Parameter(torch.zeros(5, 5), requires_grad=False))


def test_a_bias_that_needs_grad_later_is_opaque_from_then_on():
    cache, bias = MaskCache(), torch.zeros(5, 5)
    assert cache.simplest(bias).noop
    mask = KeyPadding(KEEP) & Bias(bias)
    assert cache.simplest(mask).bias is None
    bias.requires_grad_()
    assert cache.simplest(bias) is bias
    assert cache.simplest(mask) is mask


def test_inference_tensors_and_others_are_opaque():
    with torch.inference_mode():
        assert opaque(torch.ones(5, 5, dtype=torch.bool))
    assert opaque(torch.ones(5, 5, dtype=torch.bool).as_subclass(type("Mine", (torch.Tensor,), {})))
    assert opaque(torch.ones(5, 5, dtype=torch.bool, device="meta"))
    assert opaque(torch.ones(1, 1, 1, 5, 5, dtype=torch.bool))
    assert opaque(torch.zeros(5, 5, dtype=torch.float8_e5m2))
    assert opaque(torch.zeros(5, 5).to_sparse())


def test_nothing_is_read_while_something_listens(monkeypatch):
    seen = torch.ones(3, 5, dtype=torch.bool)
    answers = []

    def ask(x):
        answers.append(opaque(seen))
        return x

    torch.vmap(ask)(torch.ones(2))
    torch.func.grad(ask)(torch.ones(()))
    with torch.autograd.forward_ad.dual_level():
        ask(None)
    with TorchDispatchMode():
        ask(None)
    monkeypatch.setattr(module, "is_compiling", lambda: True)
    ask(None)
    assert answers == [True] * 5


def test_nothing_known_is_used_while_a_compiler_or_a_mode_listens(monkeypatch):
    cache, seen = MaskCache(), torch.ones(3, 5, dtype=torch.bool)
    assert cache.simplest(seen).noop
    with TorchDispatchMode():
        assert cache.simplest(seen) is seen
    monkeypatch.setattr(module, "is_compiling", lambda: True)
    assert cache.simplest(seen) is seen


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")
def test_a_graph_capture_sees_the_tensor_itself():
    cache, seen = MaskCache(), torch.ones(3, 5, dtype=torch.bool, device="cuda")
    assert cache.simplest(seen).noop
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert cache.simplest(seen) is seen


def test_what_is_made_in_inference_mode_can_be_saved_for_gradients():
    with torch.inference_mode(False):
        seen = KEEP.clone()[:, None, None]
    with torch.inference_mode():
        assert not analyse(Mask(dense=seen)).padding.is_inference()


class Syncs(TorchDispatchMode):
    """Counts what brings a number to the host."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        synchronises = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")
        self.count += any(word == func.overloadpacket.__name__ for word in synchronises)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "mask",
    [
        Dense(triangle(40, 40)),
        Bias(additive(triangle(40, 40))),
        Dense(Varlen(torch.tensor([0, 20, 40])).visible(40, 40, CPU)),
        Causal() & KeyPadding(KEEP) & Dense(triangle(4, 5)),
        Dense(random_bool(40, 40)),
        Dense(KEEP[:, None, None]),
        KeyPadding(KEEP, KEEP),
    ],
)
def test_one_synchronisation_a_mask(mask, monkeypatch):
    """The code that other devices run: rows are sampled on a CPU only, and ``tolist`` is the only way to the host."""
    fetched = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(module, "_could_be", lambda *_: True)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: fetched.append(self) or original(self))
    with Syncs() as syncs:
        answers = module._analysed(mask)
    assert len(fetched) == 1
    assert syncs.count == 0  # of a CPU tensor, tolist reads memory
    assert answers.wide is not None or "dense" in str(facts_of(mask))


# The cache


@pytest.fixture
def cache():
    return MaskCache()


def fresh(seed=0, keys=7):
    return random_bool(2, 1, 1, keys, seed=seed)


def test_the_same_object_each_time(cache):
    tensor, padding = fresh(), KeyPadding(KEEP)
    assert cache.simplest(tensor) is cache.simplest(tensor)
    assert cache.simplest(padding) is cache.simplest(padding) is cache.simplest(KeyPadding(KEEP))
    assert cache.simplest(padding) is not cache.simplest(Causal() & padding)
    assert cache.simplest(Causal() & padding).causal == "top_left"
    assert cache.simplest(None) is None
    assert cache.simplest("native") == "native"


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_key_says_what_is_read_of_both(cache, batch, alone):
    packed = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).bool()[None, None]
    for each in (fresh(), packed, KeyPadding(KEEP), Causal() & KeyPadding(KEEP), random_bool(2, 1, 40, 40, seed=5)):
        wanted = cache.simplest(each, batch, alone)
        plain = key_of(each)
        for _ in range(3):
            assert cache.keyed(each, batch, alone) == (
                wanted,
                plain if wanted is each else (plain, wanted.key),
            )


def test_the_key_follows_writes_and_gradients(cache):
    bias = torch.zeros(1, 1, 5, 5)
    (_, noop), (_, same) = cache.keyed(bias, 1, True), cache.keyed(bias, 1, True)
    assert noop is same
    bias[0, 0, 1, 2] = 0.5
    assert cache.keyed(bias, 1, True) == (bias, key_of(bias))
    bias.requires_grad_()
    seen, key = cache.keyed(bias, 1, True)
    assert seen is bias
    assert key[-1] is True


def test_what_is_no_mask_has_no_key(cache):
    with pytest.raises(TypeError, match="str"):
        cache.keyed("native", 1, True)


def test_views_made_anew_are_found(cache, monkeypatch):
    base = KEEP.clone()
    first = cache.simplest(base[:, None, None])
    monkeypatch.setattr(module, "_analysed", None)  # no more of it
    assert cache.simplest(base[:, None, None]) is first
    assert cache.simplest(base[:][:, None, None]) is first


def test_other_views_of_one_storage_are_other_masks(cache):
    base = torch.tensor([True, True, False, True, False, True])
    assert cache.simplest(base[None, :3]).profile.side == "right"
    assert cache.simplest(base[None, 1:4]).profile.side == "interior"
    assert cache.simplest(base[None, ::2]).profile.kept == (1,)
    assert cache.simplest(base.view(1, 2, 1, 3)) is not cache.simplest(base.view(2, 1, 1, 3))
    assert cache.simplest(base.view(2, 1, 1, 3)).profile.kept == (2, 2)


def test_writes_are_noticed(cache):
    tensor = KEEP.clone()[:, None, None]
    padding = KeyPadding(tensor[:, 0, 0])
    assert cache.simplest(tensor).profile.kept == cache.simplest(padding).profile.kept == (3, 4)
    tensor[0, 0, 0, 0] = False
    assert cache.simplest(tensor).profile.kept == cache.simplest(padding).profile.kept == (2, 4)
    with torch.inference_mode():
        tensor[1] = True
    assert cache.simplest(tensor).profile.kept == (2, 5)
    tensor.logical_not_()
    assert cache.simplest(padding).profile.kept == (3, 0)
    tensor.transpose_(0, 3)
    assert cache.simplest(tensor).profile.kept == (1, 0, 0, 1, 1)


def test_a_new_tensor_in_freed_memory_is_another_mask(cache):
    """The allocator gives memory, and Python ids, to the next that asks."""
    addresses: set = set()
    again = 0
    for kept in itertools.islice(itertools.cycle(range(1, 60)), 5000):
        tensor = (torch.arange(64) < kept)[None]
        address = (tensor.data_ptr(), id(tensor))
        again += address in addresses
        addresses.add(address)
        assert cache.simplest(tensor).profile.kept == (kept,)
        del tensor
        if again == 20:
            return
    raise AssertionError("no address was given twice, so nothing was shown")


def test_entries_die_with_their_storage(cache):
    tensor, padding = fresh(), KEEP.clone()
    view = tensor[:1]
    cache.simplest(tensor)
    cache.simplest(KeyPadding(padding))
    assert len(cache) == 2
    assert cache.nbytes == tensor.numel() + padding.numel()
    del padding
    gc.collect()
    assert len(cache) == 1
    del tensor
    assert len(cache) == 1  # a view lives
    del view
    assert len(cache) == cache.nbytes == len(cache._objects) == 0


@pytest.mark.parametrize("make", [lambda: torch.ones(64, 64), lambda: torch.zeros(64, 64), lambda: torch.rand(9, 64)])
def test_the_tensor_itself_is_not_held(cache, make):
    tensor = make()
    storage = module.StorageWeakRef(tensor.untyped_storage())
    cache.simplest(tensor)
    both = KeyPadding(torch.ones(2, 64, dtype=torch.bool)) & Bias(tensor)
    found = cache.simplest(both)
    assert cache.simplest(both) is found
    assert found.profile is not None
    del tensor, both, found
    gc.collect()
    assert storage.expired()


def test_bytes_and_entries_are_bounded():
    kept = [fresh(seed, 100) for seed in range(8)]
    cache = MaskCache(max_bytes=500)
    first = cache.simplest(kept[0])
    for tensor in kept[1:]:
        cache.simplest(tensor)
        assert cache.simplest(kept[0][:]) is first  # used each time, so it stays
        assert cache.nbytes <= 500
    assert len(cache) == 2
    assert torch.equal(cache.simplest(kept[1]).padding, kept[1][:, 0, 0])
    few = MaskCache(max_entries=3)
    for tensor in kept:
        few.simplest(tensor)
    assert len(few) == 3
    tiny = MaskCache(max_bytes=10)
    assert tiny.simplest(kept[0]) is kept[0]
    assert tiny.nbytes == 0
    cache.clear()
    assert len(cache) == 0
    assert cache.simplest(kept[0]) is not first


def test_objects_are_bounded(cache, monkeypatch):
    monkeypatch.setattr(module, "MAX_OBJECTS", 4)
    base = KEEP.clone()
    views = [base[:, None, None] for _ in range(9)]
    assert len({id(cache.simplest(view)) for view in views}) == 1
    assert len(cache._objects) == 4


def test_the_answer_fits_the_batch(cache):
    packed = Varlen(torch.tensor([0, 3, 7])).visible(7, 7, CPU)
    assert cache.simplest(packed, batch=1).varlen is not None
    assert cache.simplest(packed, batch=1) is cache.simplest(packed, batch=1)
    assert cache.simplest(packed, batch=2) is packed
    assert cache.simplest(packed) is packed
    assert cache.simplest(packed, batch=1, alone=False) is packed
    tensor = fresh()
    assert cache.simplest(tensor, batch=2).padding is not None
    assert cache.simplest(tensor, batch=6) is tensor  # (3, 2, H, Q, D)


def test_beside_other_parts_only_what_joins_is_given(cache):
    assert cache.simplest(KEEP[:, None, None], alone=False).padding is not None
    causal = triangle(3, 5, 2)
    assert cache.simplest(causal, alone=False) is causal


def test_a_derived_tensor_is_not_looked_at(cache, monkeypatch):
    source = KEEP.clone()[:, None, None]
    first = cache.simplest(source)
    monkeypatch.setattr(module, "_analysed", None)
    made = source.repeat(1, 8, 3, 1)
    cache.derive(made, source)
    del source
    gc.collect()
    assert cache.simplest(made) is first
    assert cache.simplest(made[:]) is first
    monkeypatch.undo()
    made[0] = True
    assert cache.simplest(made).profile.kept == (5, 4)


def test_deriving_from_what_is_opaque_says_nothing(cache):
    made = KEEP.clone()[:, None, None]
    cache.derive(made, torch.zeros(5, requires_grad=True))
    cache.derive(torch.zeros(5, requires_grad=True), made)
    assert cache.simplest(made).padding is not None


def test_copies_of_a_tensor_are_other_tensors(cache):
    tensor = KEEP.clone()[:, None, None]
    other = copy.deepcopy(tensor)
    assert cache.simplest(tensor) is not cache.simplest(other)


def test_threads_never_get_another_tensors_answer():
    cache = MaskCache(max_bytes=400, max_entries=5)
    shared = [(torch.arange(64) < kept)[None].clone() for kept in range(1, 12)]
    wrong = []

    def ask(seed):
        try:
            for turn in range(150):
                kept = (seed * 7 + turn) % 11
                own = (torch.arange(64) < kept + 20)[None]
                for tensor, expected in ((shared[kept], kept + 1), (own, kept + 20)):
                    answer = cache.simplest(tensor)
                    if answer is not tensor and answer.profile.kept != (expected,):
                        wrong.append((answer, expected))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(cache) <= 5


@pytest.mark.parametrize("again", [lambda mask: mask.data, lambda mask: mask.detach()], ids=["data", "detach"])
def test_a_new_tensor_over_written_memory_is_read_anew(cache, again):
    mask = triangle(6, 6)
    assert cache.simplest(again(mask)).causal == "top_left"
    mask.fill_(True)
    assert cache.simplest(again(mask)).noop
