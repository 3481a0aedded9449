"""PyTorch's own samples of scaled_dot_product_attention, and torch.func's transforms, through heedful.attention."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, jvp, vmap

import heedful

BACKENDS = ("native", "native_math", "flex", "auto")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
sdpa = torch.nn.functional.scaled_dot_product_attention


@pytest.fixture(scope="module")
def opinfo() -> Any:
    """The table entry. Importing the table warns about its own use of deprecated modules (torch 2.13)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        from torch.testing._internal.common_methods_invocations import op_db
    (entry,) = [entry for entry in op_db if entry.name == "nn.functional.scaled_dot_product_attention"]
    return entry


def samples(opinfo: Any, dtype: torch.dtype, wants_grad: bool) -> list[tuple[tuple[Tensor, ...], dict[str, Any]]]:
    torch.manual_seed(0)
    found = [
        ((sample.input, *sample.args), sample.kwargs)
        for sample in opinfo.sample_inputs("cpu", dtype, requires_grad=wants_grad)
    ]
    assert len(found) >= 20
    return found


def answers(call: Callable[..., Tensor], tensors: tuple[Tensor, ...], words: dict[str, Any]) -> list[Tensor]:
    """The output, and the gradient of every tensor that wants one."""
    torch.manual_seed(7)
    out = call(*tensors, **words)
    leaves = [tensor for tensor in (*tensors, words.get("attn_mask")) if tensor is not None and tensor.requires_grad]
    weights = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).reshape(out.shape)
    return [out.detach(), *(torch.autograd.grad(out, leaves, weights) if leaves else [])]


def doubled(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def near(got: list[Tensor], sdpas: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    """As near to float64 as SDPA is, to a factor of two and some roundings of the sample's largest value.

    SDPA takes its unfused kernel for three dimensions, which rounds less than the fused one that four dimensions get.
    """
    # In float64 SDPA is the judge itself, and its error not known; in float32 scores of 300 make exp() lose 5 bits.
    roundings = 64 if dtype in (torch.float64, torch.float32) else 8
    least = roundings * torch.finfo(dtype).eps * max(best.abs().max().item() for best in exact)
    for mine, theirs, best in zip(got, sdpas, exact, strict=True):
        assert mine.dtype == dtype
        allowed = 2 * (theirs.double() - best).abs().max().item() + least
        error = (mine.double() - best).abs().max().item()
        assert error <= allowed


def reasons(refused: heedful.Refused) -> set[str]:
    return {reason.field for found in refused.refusals.values() for reason in found}


@pytest.mark.parametrize("wants_grad", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_torchs_own_samples(opinfo: Any, backend: str, dtype: torch.dtype, wants_grad: bool) -> None:
    ran = 0
    for tensors, words in samples(opinfo, dtype, wants_grad):
        try:
            got = answers(heedful.attention, tensors, {**words, "backend": backend})
        except heedful.Refused as refused:
            expected = {"dropout_p"} if words["dropout_p"] else set()
            expected |= {"gradient"} if wants_grad else set()
            if words.get("attn_mask") is not None and wants_grad:
                expected.add("bias gradient")
            if backend == "flex" and expected and reasons(refused) == expected:
                continue
            raise
        ran += 1
        theirs = answers(sdpa, tensors, words)
        if words["dropout_p"]:  # one generator, asked for as many numbers in the same order: the same weights drop
            near(got, theirs, [tensor.double() for tensor in theirs], dtype)
            continue
        as_it_is = backend == "native" and dtype != torch.float16  # which native has upcast on a CPU
        if as_it_is and len({tensor.shape[:-2] for tensor in tensors}) == 1 and tensors[0].dim() == 4:
            torch.testing.assert_close(got, theirs, rtol=0, atol=0)
            continue
        exact = answers(sdpa, tuple(map(doubled, tensors)), {name: doubled(value) for name, value in words.items()})
        near(got, theirs, exact, dtype)
    assert ran == (25 if backend != "flex" else 0 if wants_grad else 13)


# torch.func

TRANSFORMABLE = ("native", "native_math", "reference")


@pytest.fixture
def batch() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(3, 2, 4, 8, 5) for _ in range(3)]


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
@pytest.mark.parametrize("backend", TRANSFORMABLE)
def test_vmap_and_grad(batch: list[Tensor], backend: str) -> None:
    def call(query: Tensor, key: Tensor, value: Tensor, keep: Tensor) -> Tensor:
        return heedful.attention(query, key, value, heedful.KeyPadding(keep), backend=backend)

    keep = (torch.arange(8) < torch.tensor([[8], [5], [3]]))[:, None].expand(3, 2, 8)
    masks = keep[:, :, None, None, :]
    want = sdpa(*batch, masks)
    torch.testing.assert_close(vmap(call)(*batch, keep), want)
    leaf = batch[0].clone().requires_grad_()
    (wanted,) = torch.autograd.grad(sdpa(leaf, *batch[1:], masks).square().sum(), leaf)
    got = vmap(grad(lambda *tensors: call(*tensors).square().sum()))(*batch, keep)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    only = [tensor[0, 0, 0] for tensor in batch]
    jacobian = jacrev(lambda query: heedful.attention(query, *only[1:], backend=backend))(only[0])
    theirs = torch.autograd.functional.jacobian(lambda query: sdpa(query, *only[1:]), only[0])
    torch.testing.assert_close(jacobian, theirs, rtol=1e-4, atol=1e-5)


# The formulas of the forward mode that torch loads here are still TorchScript (torch 2.13).
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_forward_mode(batch: list[Tensor]) -> None:
    """Torch's fused CPU kernel has none and says so; the unfused one has."""
    query, key, value = (tensor[0] for tensor in batch)
    tangents = {}
    for backend in ("native_math", "reference"):
        _, tangents[backend] = jvp(lambda x, b=backend: heedful.attention(x, key, value, backend=b), (query,), (key,))
    torch.testing.assert_close(tangents["native_math"], tangents["reference"], rtol=1e-4, atol=1e-5)
    with pytest.raises(NotImplementedError, match="forward AD"):
        jvp(lambda x: heedful.attention(x, key, value, backend="native"), (query,), (key,))


def test_flex_refuses_transforms_clearly(batch: list[Tensor]) -> None:
    with pytest.raises(NotImplementedError, match=r"flex: torch\.func transforms .* use native_math or reference"):
        vmap(lambda *tensors: heedful.attention(*tensors, backend="flex"))(*batch)
    with pytest.raises(heedful.Refused, match="gradient is wanted"):
        grad(lambda query: heedful.attention(query, *batch[1:], backend="flex").sum())(batch[0])
