"""What the flash-attn family is handed, argument by argument, and what it refuses for reasons of its own.

That the answers are right is the contract suite's part, over the stand-ins.
"""

from types import SimpleNamespace

import pytest
import torch
from signatures.records import all_records, bound_to_record

import heedful
from heedful.facts import DeviceFacts
from heedful.strategies.flash import FlashAttentionStrategy
from heedful.strategies.flash_3 import Flash3AttentionStrategy
from heedful.strategies.flash_4 import Flash4AttentionStrategy

RECORDS = all_records()
FAMILY = {
    FlashAttentionStrategy: "flash_attn",
    Flash3AttentionStrategy: "flash_attn_3",
    Flash4AttentionStrategy: "flash_attn_4",
}
OPEN = {FlashAttentionStrategy: (-1, -1), Flash3AttentionStrategy: (-1, -1), Flash4AttentionStrategy: (None, None)}
CAUSAL = {"is_causal": True, "causal_alignment": "bottom_right"}


def recording(strategy, record, lse=True):
    """A strategy whose kernels write down their arguments, after binding them to a record, and give shapes only."""
    made, calls = strategy(), []

    def kernel_named(name):
        def kernel(q, k, v, **arguments):
            calls.append((name, arguments))
            heads_first = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
            return (torch.empty_like(q), torch.zeros(heads_first)) if lse else torch.empty_like(q)

        entry = next(one for key, one in RECORDS[record]["functions"].items() if key.endswith(f".{name}"))
        return bound_to_record(kernel, entry)

    names = ("flash_attn_func", "flash_attn_varlen_func")
    made.__dict__["kernels"] = SimpleNamespace(**{name: kernel_named(name) for name in names})
    return made, calls


def tensors(*shape, dtype=torch.float16):
    return [torch.randn(shape, dtype=dtype) for _ in range(3)]


def problem(device="sm_90", **changes):
    made = DeviceFacts.parse(device)
    sizes = {"batch": 1, "heads": 4, "kv_heads": 4, "query_length": 9, "key_length": 9, "head_dim": 64, "value_dim": 64}
    where = {"device": "cuda", "capability": made.capability, "architecture": made.architecture}
    base = heedful.AttentionProblem(**sizes, **where, dtype=torch.float16, layout="BSHD")
    return base.replace(**changes)


def refused(strategy, device="sm_90", **changes):
    return {refusal.field for refusal in strategy().refusals(problem(device, **changes))}


@pytest.mark.parametrize("strategy", FAMILY)
def test_a_plain_call_passes_the_defaults(strategy):
    made, calls = recording(strategy, FAMILY[strategy], lse=strategy is not FlashAttentionStrategy)
    out = made.compute_attention(*tensors(2, 5, 4, 16))
    (name, arguments), asked = calls[0], "return_lse" if strategy is Flash4AttentionStrategy else "return_attn_probs"
    assert isinstance(out, torch.Tensor)
    assert name == "flash_attn_func"
    assert arguments["softmax_scale"] is None
    assert not arguments["causal"]
    assert arguments["window_size"] == OPEN[strategy]
    assert arguments["softcap"] == 0.0
    assert arguments["deterministic"] is False
    assert not arguments.get(asked)


@pytest.mark.parametrize("strategy", FAMILY)
def test_every_argument_arrives(strategy):
    made, calls = recording(strategy, FAMILY[strategy])
    words = {**CAUSAL, "window": (3, None), "scale": 0.5, "softcap": 7.0, "enable_gqa": True, "return_lse": True}
    torch.use_deterministic_algorithms(True)
    try:
        out, lse = made.compute_attention(*tensors(2, 5, 4, 16), **words, window_alignment="bottom_right")
    finally:
        torch.use_deterministic_algorithms(False)
    arguments = calls[0][1]
    assert out.shape == (2, 5, 4, 16)
    assert lse.shape == (2, 4, 5)
    assert arguments["causal"] is True
    assert arguments["window_size"] == ((3, None) if strategy is Flash4AttentionStrategy else (3, -1))
    assert (arguments["softmax_scale"], arguments["softcap"]) == (0.5, 7.0)
    assert arguments["deterministic"] is True
    assert arguments["return_lse" if strategy is Flash4AttentionStrategy else "return_attn_probs"] is True


def test_dropout_is_passed():
    made, calls = recording(FlashAttentionStrategy, "flash_attn", lse=False)
    made.compute_attention(*tensors(2, 5, 4, 16), dropout_p=0.25)
    assert calls[0][1]["dropout_p"] == 0.25


@pytest.mark.parametrize("stated", [(None, None), (6, 7)])
@pytest.mark.parametrize("strategy", FAMILY)
def test_packed_sequences(strategy, stated):
    made, calls = recording(strategy, FAMILY[strategy])
    ends = torch.tensor([0, 2, 8]), torch.tensor([0, 7, 8])
    made.compute_attention(*tensors(8, 4, 16), varlen=heedful.Varlen(*ends, *stated), return_lse=True)
    name, arguments = calls[0]
    assert name == "flash_attn_varlen_func"
    for key, given in zip(("cu_seqlens_q", "cu_seqlens_k"), ends, strict=True):
        assert arguments[key].dtype == torch.int32
        assert arguments[key].tolist() == given.tolist()
    assert (arguments["max_seqlen_q"], arguments["max_seqlen_k"]) == (6, 7)


@pytest.mark.parametrize(
    ("window", "passed", "longest"),
    [
        ((None, None), (-1, -1), 2),
        ((4, None), (4, 6), 7),  # an open right end would be taken for max_seqlen_k
        ((None, 3), (-1, 3), 4),  # an end of max_seqlen_k or more would be taken for open
        ((1, 10**9), (1, 6), 7),
        ((1, 1), (1, 1), 2),
    ],
)
def test_packed_windows_reach_the_kernel_unclamped(window, passed, longest):
    made, calls = recording(FlashAttentionStrategy, "flash_attn")
    packing = heedful.Varlen(torch.tensor([0, 2, 8]), torch.tensor([0, 2, 4]), 6, 2)
    made.compute_attention(*tensors(8, 4, 16), varlen=packing, window=window, return_lse=True)
    arguments = calls[0][1]
    assert (arguments["window_size"], arguments["max_seqlen_k"]) == (passed, longest)


@pytest.mark.parametrize(("ends", "longest"), [([0, 1, 2], 1), ([0, 1, 1, 2], 2)])
def test_a_sequence_without_a_query_beside_single_ones(ends, longest):
    made, calls = recording(FlashAttentionStrategy, "flash_attn")
    made.compute_attention(*tensors(2, 4, 16), varlen=heedful.Varlen(torch.tensor(ends)), return_lse=True)
    assert calls[0][1]["max_seqlen_q"] == longest


def test_values_whose_tokens_are_neighbours_are_copied_for_flash_3():
    made, _ = recording(Flash3AttentionStrategy, "flash_attn_3")
    strides = []
    kernel = made.kernels.flash_attn_func
    made.kernels.flash_attn_func = lambda q, k, v, **more: strides.append(v.stride(-1)) or kernel(q, k, v, **more)
    query, key, _ = tensors(2, 5, 4, 16)
    made.compute_attention(query, key, torch.randn(2, 16, 4, 5, dtype=torch.float16).transpose(1, 3))
    assert strides == [1]


@pytest.mark.parametrize("lse", [True, False])
@pytest.mark.parametrize("asked", [True, False])
def test_flash_3_may_give_a_tuple_or_a_tensor(lse, asked):
    made, calls = recording(Flash3AttentionStrategy, "flash_attn_3", lse=lse or asked)
    answer = made.compute_attention(*tensors(2, 5, 4, 16), **({"return_lse": True} if asked else {}))
    assert isinstance(answer, tuple) == asked
    assert ("return_attn_probs" in calls[0][1]) == asked


def test_flash_4_calls_bind_to_the_older_version_of_the_hub():
    made, calls = recording(Flash4AttentionStrategy, "flash_attn_4_hub")
    words = {**CAUSAL, "window": (3, 1), "scale": 0.5, "softcap": 7.0, "return_lse": True}
    made.compute_attention(*tensors(2, 5, 4, 16), **words)
    made.compute_attention(*tensors(8, 4, 16), varlen=heedful.Varlen(torch.tensor([0, 2, 8])), **words)
    assert [name for name, _ in calls] == ["flash_attn_func", "flash_attn_varlen_func"]


@pytest.mark.parametrize(
    ("strategy", "device", "taken"),
    [
        (FlashAttentionStrategy, "sm_75", False),
        (FlashAttentionStrategy, "sm_80", True),
        (FlashAttentionStrategy, "sm_90", True),
        (FlashAttentionStrategy, "sm_120", True),
        (FlashAttentionStrategy, "gfx942", False),
        (Flash3AttentionStrategy, "sm_89", False),
        (Flash3AttentionStrategy, "sm_90", True),
        (Flash3AttentionStrategy, "sm_100", False),
        (Flash4AttentionStrategy, "sm_75", False),
        (Flash4AttentionStrategy, "sm_80", True),
        (Flash4AttentionStrategy, "sm_90", True),
        (Flash4AttentionStrategy, "sm_121", True),
        (Flash4AttentionStrategy, "gfx942", False),
    ],
)
def test_which_gpus(strategy, device, taken):
    assert (refused(strategy, device) == set()) == taken


@pytest.mark.parametrize(
    ("device", "dims", "taken"),
    [
        ("sm_90", (256, 256), True),
        ("sm_90", (192, 128), True),
        ("sm_90", (72, 200), True),
        ("sm_100", (128, 64), True),
        ("sm_100", (192, 128), True),
        ("sm_100", (160, 160), False),
        ("sm_100", (256, 256), False),
        ("sm_110", (192, 128), True),
        ("sm_80", (128, 128), True),
        ("sm_86", (136, 136), False),
        ("sm_120", (192, 128), False),
    ],
)
def test_head_dims_of_flash_4(device, dims, taken):
    found = refused(Flash4AttentionStrategy, device, head_dim=dims[0], value_dim=dims[1])
    assert found == (set() if taken else {"head dim"})


def test_gradients_of_flash_4():
    assert refused(Flash4AttentionStrategy, "sm_86", needs_grad=True) == {"gradient"}
    assert refused(Flash4AttentionStrategy, "sm_90", needs_grad=True, softcap=5.0) == {"softcap"}
    assert refused(Flash4AttentionStrategy, "sm_90", softcap=5.0) == set()
    assert refused(Flash4AttentionStrategy, "sm_120", needs_grad=True) == set()
    assert refused(Flash4AttentionStrategy, "sm_120", needs_grad=True, deterministic=True) == {"deterministic gradient"}
    assert refused(Flash4AttentionStrategy, "sm_90", needs_grad=True, deterministic=True) == set()


def test_deterministic_gradients_of_flash_3():
    wide = {"head_dim": 200, "value_dim": 200, "needs_grad": True}
    assert refused(Flash3AttentionStrategy, **wide) == set()
    assert refused(Flash3AttentionStrategy, **wide, deterministic=True) == {"gradient"}
    assert refused(Flash3AttentionStrategy, needs_grad=True, deterministic=True) == set()


def test_dropout_of_flash():
    wide = {"head_dim": 200, "value_dim": 200, "needs_grad": True, "dropout_p": 0.1}
    assert refused(FlashAttentionStrategy, "sm_86", **wide) == {"head dim"}
    assert refused(FlashAttentionStrategy, "sm_80", **wide) == set()
    assert refused(FlashAttentionStrategy, softcap=5.0, dropout_p=0.1) == {"softcap"}
    assert "dropout_p" in refused(Flash3AttentionStrategy, dropout_p=0.1)
    assert "dropout_p" in refused(Flash4AttentionStrategy, dropout_p=0.1)


@pytest.mark.parametrize("device", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("window", "keys", "taken"),
    [
        ((2, None), 5, False),  # of 9 queries
        ((2, None), 8, True),
        ((None, 5), 5, False),
        ((None, 4), 5, True),
        ((None, 8), 5, True),
        ((5, None), 5, True),
    ],
)
def test_windows_that_flash_would_clamp_wrongly(window, keys, taken, device):
    mask = heedful.masks.facts_of(heedful.SlidingWindow(*window, "bottom_right"), 9, keys)
    found = refused(FlashAttentionStrategy, device, key_length=keys, mask=mask)
    assert found == (set() if taken else {"window"})


@pytest.mark.parametrize(
    ("alias", "strategy", "source", "layouts"),
    [
        ("flash_hub", "flash", "hub", ()),
        ("flash_varlen", "flash", "", ("THD",)),
        ("flash_varlen_hub", "flash", "hub", ("THD",)),
        ("_flash_3", "flash_3", "", ()),
        ("_flash_varlen_3", "flash_3", "", ("THD",)),
        ("_flash_3_hub", "flash_3", "hub", ()),
        ("_flash_3_varlen_hub", "flash_3", "hub", ("THD",)),
        ("flash_4_hub", "flash_4", "hub", ()),
    ],
)
def test_names_of_diffusers(factory, alias, strategy, source, layouts):
    made = factory.create_strategy(alias)
    assert type(made) is type(factory.create_strategy(strategy))
    assert (made.pin.source, made.pin.layouts) == (source, layouts)
