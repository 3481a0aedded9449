"""The CUDA paths without a GPU: tensors on ``meta`` that injected facts call a GPU.

Shapes, dtypes and signatures of the aten operators are checked by torch's own meta kernels; numbers are not.
"""

import pytest
import torch

import heedful
from heedful.facts import DeviceFacts

CUDA_ONLY = ("native_flash", "native_efficient", "native_cudnn")
BATCH, HEADS, QUERIES, KEYS = 2, 8, 33, 47

CALLS = {
    "plain": {},
    "causal": {"is_causal": True},
    "bool mask": {"attn_mask": torch.bool},
    "float32 bias": {"attn_mask": torch.float32},
    "lse": {"return_lse": True},
    "lse under a mask": {"return_lse": True, "attn_mask": torch.bool},
    "grouped heads": {"enable_gqa": True},
    "heads third": {"layout": "BSHD"},
    "window": {"window": (3, 4)},
    "gradient": {"grad": True},
    "gradient under a bias": {"grad": True, "attn_mask": torch.float32},
    "dropout": {"dropout_p": 0.1},
}


def dispatcher_for(capability):
    name = f"sm_{capability[0]}{capability[1]}"
    device = DeviceFacts("cuda", name, capability, name)
    return heedful.AttentionDispatcher(facts=heedful.Facts("2.13", "3.11", "Linux", {"meta": device}))


def tensors(call, head_dim, value_dim):
    def make(heads, length, dim):
        shape = (BATCH, length, heads, dim) if call.get("layout") == "BSHD" else (BATCH, heads, length, dim)
        return torch.empty(shape, device="meta", dtype=torch.float16, requires_grad=call.get("grad", False))

    kv_heads = 2 if call.get("enable_gqa") else HEADS
    return make(HEADS, QUERIES, head_dim), make(kv_heads, KEYS, head_dim), make(kv_heads, KEYS, value_dim)


def arguments(call):
    more = {name: value for name, value in call.items() if name != "grad"}
    if "attn_mask" in more:
        more["attn_mask"] = torch.ones(BATCH, 1, QUERIES, KEYS, device="meta").to(more["attn_mask"])
    return more


def must_refuse(name, capability, call, head_dim, value_dim):
    """By the kernels' rules, written anew: which of these calls cannot be had."""
    if name == "native_efficient":
        return False
    if capability < (8, 0):
        return True
    if name == "native_flash":
        return "attn_mask" in call or "window" in call
    most = 256 if capability >= (9, 0) and not call.get("grad") else 128
    return max(head_dim, value_dim) > most


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
@pytest.mark.parametrize("dims", [(64, 64), (72, 72), (77, 77), (64, 48), (160, 160), (256, 256)])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("name", CUDA_ONLY)
def test_shapes_or_a_refusal(name, call, dims, capability):
    query, key, value = tensors(call, *dims)
    dispatcher = dispatcher_for(capability)
    if must_refuse(name, capability, call, *dims):
        with pytest.raises(heedful.Refused, match=name):
            dispatcher.attention(query, key, value, backend=name, **arguments(call))
        return
    answer = dispatcher.attention(query, key, value, backend=name, **arguments(call))
    out, lse = answer if isinstance(answer, tuple) else (answer, None)
    assert out.shape == (*query.shape[:-1], dims[1])
    assert out.dtype == torch.float16
    if call.get("return_lse"):
        assert (lse.shape, lse.dtype) == ((BATCH, HEADS, QUERIES), torch.float32)
    if call.get("grad"):
        out.sum().backward()
        assert all(tensor.grad.shape == tensor.shape for tensor in (query, key, value))
