"""Bug reports in one file: what is stored comes back, replays, and is checked before it is used."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.attention.flex_attention import create_block_mask

import heedful
from heedful import bundle as bundles
from heedful.bundle import read_bundle, write_bundle
from heedful.call import mask_of_call, problem_of_call
from heedful.errors import HeedfulError, InvalidArgument
from heedful.masks import Mask
from heedful.replaying import run_again

CPU = torch.device("cpu")
MASK_WORDS = ("is_causal", "causal_alignment", "window")


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tensors_of(layout="BHSD", dtype=torch.float32):
    shape = {"BHSD": (2, 3, 20, 16), "BSHD": (2, 20, 3, 16), "THD": (20, 3, 16)}[layout]
    return [drawn(*shape, dtype=dtype, seed=seed) for seed in range(3)]


def write(where, tensors=None, mask=None, strategy="native", *, max_bytes=bundles.MAX_BYTES, problem=None, **call):
    query, key, value = tensors or tensors_of(call.get("layout", "BHSD"))
    return write_bundle(
        where,
        problem=problem or problem_of_call(query, key, value, mask, **call),
        call=call,
        query=query,
        key=key,
        value=value,
        mask=mask,
        strategy=strategy,
        version="0.1.0",
        steps=("layout",),
        fault="the output is off by 1 in query 0 of batch 0, head 0; at most 0.1 is allowed",
        machine={"torch": torch.__version__, "device": "cpu"},
        max_bytes=max_bytes,
    )


MASKS = {
    "none": (None, {}),
    "bool": (torch.arange(20).lt(15)[None].expand(20, 20), {}),
    "bias": (drawn(1, 3, 20, 20, seed=9), {}),
    "causal value": (heedful.Causal("bottom_right"), {}),
    "window and padding": (
        heedful.SlidingWindow(3, None) & heedful.KeyPadding(torch.arange(20).lt(15).expand(2, -1)),
        {},
    ),
    "query padding": (heedful.KeyPadding(torch.ones(2, 20) > 0, torch.arange(20).lt(9).expand(2, -1)), {}),
    "varlen": (heedful.Varlen(torch.tensor([0, 5, 20])), {"layout": "THD"}),
    "varlen cross": (heedful.Varlen(torch.tensor([0, 5, 20]), torch.tensor([0, 9, 20]), 15, 11), {"layout": "THD"}),
    "words": (None, {"is_causal": True, "scale": 0.3, "softcap": 2.0, "window": (4, None), "return_lse": True}),
    "block": (create_block_mask(lambda b, h, q, k: q >= k, None, None, 20, 20, device="cpu"), {}),
    "bshd": (None, {"layout": "BSHD", "is_causal": True}),
}


@pytest.mark.parametrize("kind", MASKS)
def test_a_call_comes_back_and_replays(tmp_path, kind):
    mask, call = MASKS[kind]
    tensors = tensors_of(call.get("layout", "BHSD"), torch.float16)
    found = read_bundle(write(tmp_path, tensors, mask, "reference", **call))
    assert all(torch.equal(*pair) for pair in zip(tensors, (found.query, found.key, found.value), strict=True))
    assert found.call == call
    assert (found.strategy, found.version, found.steps) == ("reference", "0.1.0", ("layout",))
    assert found.fault.startswith("the output is off by 1")
    assert found.machine["device"] == "cpu"
    assert found.problem == problem_of_call(*tensors, mask, **call)
    words = {name: call[name] for name in MASK_WORDS if name in call}
    before, after = (mask_of_call(attn_mask=one, **words) or Mask() for one in (mask, found.mask))
    before, after = (one.visible(20, 20, CPU) for one in (before, after))
    assert (before is None and after is None) or torch.equal(*torch.broadcast_tensors(before, after))
    assert isinstance(found.mask, torch.Tensor) == isinstance(mask, torch.Tensor)
    for backend in (None, "auto"):
        replay = run_again(found, backend)
        assert replay.right, replay
        assert replay.verdict.rows == tuple(range(20))


def test_a_fault_is_found_again_and_a_refusal_is_told(tmp_path, monkeypatch):
    found = read_bundle(write(tmp_path, is_causal=True))
    assert run_again(found).right
    native = type(heedful.AttentionStrategyFactory.create_strategy("native"))
    monkeypatch.setattr(native, "compute_attention", lambda self, query, key, value, **call: value)
    replay = run_again(found)
    assert replay.wrong
    assert "is off by" in replay.verdict.fault
    assert run_again(found, "reference").right
    refused = run_again(found, "flash")
    assert not refused.right
    assert not refused.wrong
    assert "device is cpu, it takes cuda" in refused.refused
    assert "no backend is called" in run_again(found, "flesh").refused

    def broken(self, query, key, value, **call):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(native, "compute_attention", broken)
    assert run_again(found).wrong
    assert run_again(found).raised == "RuntimeError: an illegal memory access"


def test_autocast_is_replayed(tmp_path):
    tensors = tensors_of()
    with torch.autocast("cpu", torch.bfloat16):
        problem = problem_of_call(*tensors)
    found = read_bundle(write(tmp_path, tensors, problem=problem))
    assert found.problem.autocast
    assert run_again(found).verdict.allowed > 1e-4
    assert run_again(found).right


@pytest.mark.parametrize(
    "made",
    [
        lambda: drawn(2, 20, 3, 16).transpose(1, 2),
        lambda: drawn(2, 3, 16, 20).mT,
        lambda: drawn(2, 20, 3, 48).chunk(3, -1)[1].transpose(1, 2),
        lambda: drawn(2, 3, 21, 16)[:, :, 1:],
        lambda: drawn(1, 3, 20, 16).expand(2, 3, 20, 16),
        lambda: drawn(2, 3, 20, 32)[..., ::2],
    ],
)
def test_strides_and_offsets_come_back(tmp_path, made):
    query = made()
    found = read_bundle(write(tmp_path, [query, *tensors_of()[1:]])).query
    assert torch.equal(found, query)
    assert found.stride() == query.stride()
    assert found.storage_offset() == query.storage_offset() % 64


def test_expanded_masks_are_stored_once_and_sparse_strides_are_given_up(tmp_path):
    mask = drawn(1, 1, 1, 20).expand(2, 3, 20, 20)
    path = write(tmp_path, mask=mask)
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("mask.tensor").shape == (1, 1, 1, 20)
    assert torch.equal(read_bundle(path).mask, mask)
    assert read_bundle(path).mask.stride() == mask.stride()
    sparse = drawn(2, 3, 20, 1600)[..., ::100]
    found = read_bundle(write(tmp_path, [sparse, *tensors_of()[1:]])).query
    assert torch.equal(found, sparse)
    assert found.is_contiguous()


def test_files_are_whole_and_never_overwritten(tmp_path):
    paths = []
    workers = [threading.Thread(target=lambda: paths.append(write(tmp_path / "new"))) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(set(paths)) == 6
    assert sorted(paths) == sorted((tmp_path / "new").iterdir())
    assert all(path.name.startswith("heedful-native-") for path in paths)
    assert all(read_bundle(path).strategy == "native" for path in paths)
    path = write(tmp_path / "mine.safetensors", strategy="a/../b")
    with pytest.raises(InvalidArgument, match=r"mine\.safetensors, which exists; name a new file"):
        write(path)
    assert read_bundle(path).strategy == "a/../b"
    assert write(tmp_path, strategy="a/../b").parent == tmp_path


def test_nothing_is_left_where_writing_fails(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="no space"):
        write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_stored_is_refused(tmp_path):
    with pytest.raises(InvalidArgument, match=r"got 23040 bytes; at most 1000 are written"):
        write(tmp_path, max_bytes=1000)
    with pytest.raises(InvalidArgument, match="what JSON cannot hold"):
        write(tmp_path, options={}, tensors=tensors_of(), strategy=object(), problem=problem_of_call(*tensors_of()))
    tensors = tensors_of()
    with pytest.raises(InvalidArgument, match="give only dropout_p"):
        write(tmp_path, tensors, problem=problem_of_call(*tensors), backend="native")
    long = [torch.empty(1, 1, 9000, 1)] * 3
    block = create_block_mask(lambda b, h, q, k: q >= k, None, None, 9000, 9000, device="cpu")
    with pytest.raises(InvalidArgument, match="a BlockMask of 81000000 elements"):
        write(tmp_path, long, block)
    assert list(tmp_path.iterdir()) == []


def test_dropout_is_told_to_be_beyond_checking(tmp_path):
    assert "no formula knows what was dropped" in run_again(read_bundle(write(tmp_path, dropout_p=0.5))).refused


def test_without_safetensors_the_command_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("heedful.facts.Facts.package", lambda *_: None)
    for ask in (lambda: write(tmp_path), lambda: read_bundle(tmp_path / "x.safetensors")):
        with pytest.raises(HeedfulError, match=r"pip install 'heedful\[bundle\]'"):
            ask()


# Files from anybody


def changed(tmp_path, change, kind="window and padding"):
    """A bundle whose data and tensors were changed; what reading it says."""
    mask, call = MASKS[kind]
    path = write(tmp_path, None, mask, **call)
    with safe_open(path, framework="pt") as file:
        data = json.loads(file.metadata()["heedful"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    data = change(data, tensors) or data
    text = data if isinstance(data, str) else json.dumps(data)
    save_file(tensors, path, {"heedful": text})
    with pytest.raises(InvalidArgument) as caught:
        read_bundle(path)
    assert str(path) in str(caught.value)
    assert str(caught.value).endswith("; give a file that heedful wrote, whole and unchanged")
    return str(caught.value)


JUNK = [None, True, -1, 1e400, "x", [], {}, [[]], "bottom_right" * 99]


def test_every_field_may_hold_junk(tmp_path):
    """Reading ends in InvalidArgument, or in a bundle; in no other error."""
    path = write(tmp_path, None, *MASKS["window and padding"][:1], is_causal=True)
    with safe_open(path, framework="pt") as file:
        data = json.loads(file.metadata()["heedful"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def places(node, at=()):
        yield at
        for name in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            yield from places(node[name], (*at, name))

    refused = 0
    for at in list(places(data)):
        for junk in [*JUNK, "gone"]:
            copy = json.loads(json.dumps({"": data}))
            owner, last = copy, ""
            for name in at:
                owner, last = owner[last], name
            if junk == "gone" and isinstance(owner, dict):
                del owner[last]
            else:
                owner[last] = junk
            spoilt = tmp_path / "spoilt.safetensors"
            save_file(tensors, spoilt, {"heedful": json.dumps(copy.get("", 0))})
            try:
                read_bundle(spoilt)
            except InvalidArgument as error:
                refused += str(spoilt) in str(error)
    assert refused > 300


def test_foreign_and_truncated_files(tmp_path):
    path = write(tmp_path)
    whole = path.read_bytes()
    for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(InvalidArgument, match="no whole safetensors file"):
            read_bundle(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(InvalidArgument, match="it holds no call of heedful"):
        read_bundle(path)
    with pytest.raises(InvalidArgument, match="there is no such file"):
        read_bundle(tmp_path / "nowhere.safetensors")
    with pytest.raises(InvalidArgument, match="there is no such file"):
        read_bundle(tmp_path)


def test_hostile_files(tmp_path):
    assert "no whole safetensors" in changed(tmp_path, lambda data, tensors: "[" * 100000)
    assert "its format is 2" in changed(tmp_path, lambda data, tensors: data.update(format=2))

    def lacking(data, tensors):
        del tensors["key"]

    assert "it holds the tensors mask.padding, query, value" in changed(tmp_path, lacking)
    assert "it holds the tensors" in changed(tmp_path, lambda data, tensors: tensors.update(more=torch.zeros(1)))
    assert "unknown words 'backend'" in changed(tmp_path, lambda data, tensors: data["call"].update(backend="x"))

    def overlapping(data, tensors):
        data["tensors"]["query"] |= {"stride": [0, 0, 0, 0]}

    assert "the tensor query" in changed(tmp_path, overlapping)

    def longer(data, tensors):
        data["tensors"]["query"] |= {"shape": [2, 3, 20, 1 << 40], "stride": [1, 1, 1, 0]}

    assert "the tensor query" in changed(tmp_path, longer)
    for ends in ([0, 5, 2000], [0, 30, 20], [-5, 5, 20], [1 << 40, 0, 0]):

        def beyond(data, tensors, ends=ends):
            tensors["mask.cu_seqlens_q"] = torch.tensor(ends)

        assert "its sequences end at" in changed(tmp_path, beyond, "varlen")

    def long(data, tensors):
        data["mask"]["longest"] = [1 << 40, 1 << 40]

    assert "its longest sequence is" in changed(tmp_path, long, "varlen")


def test_strides_that_are_not_safe_are_not_restored(tmp_path):
    """Elements that overlap, or memory far beyond the numbers: the numbers come back, plainly."""
    path = write(tmp_path)
    with safe_open(path, framework="pt") as file:
        data = json.loads(file.metadata()["heedful"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for stride in ([1, 1, 1, 1], [1 << 40, 1 << 30, 1 << 20, 1], [960, 320, 16, 3]):
        data["tensors"]["query"]["stride"] = stride
        save_file(tensors, path, {"heedful": json.dumps(data)})
        found = read_bundle(path).query
        assert torch.equal(found, tensors["query"])
        assert found.is_contiguous()
