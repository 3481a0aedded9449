"""The kernels as operators of torch: opaque to a compiler, with shapes for it to trace and a gradient.

``heedful::attention`` and ``heedful::attention_backward``. They are registered when this module is imported, which the
strategy does when it is loaded. They take the arguments of ``AttentionStrategy.compute_attention`` flat, tensors of
rank four, and a packing by its ends and longest sequences, which nobody reads from the device.

Shapes: B batch, H heads, N kv heads, Q query length, K key length, D head dim, E value dim, S packed sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heedful.kernels.arguments import bias_of, call_of_arguments
from heedful.kernels.backward import Known, backward
from heedful.kernels.forward import forward
from heedful.kernels.operands import Call, empty_like_query, of_rank_four, rest_for
from heedful.masks import Varlen
from heedful.strategy import packed_arguments

_ARGUMENTS = """Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? attn_bias, Tensor? key_padding,
    Tensor? query_padding, Tensor? ends_q, Tensor? ends_k, SymInt longest_q, SymInt longest_k, bool is_causal,
    str causal_alignment, int? left, int? right, str window_alignment, float? scale, float? softcap"""
_WANTED = "bool want_query, bool want_key, bool want_value, bool want_bias"


@torch.library.custom_op("heedful::attention", mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
def attention(query: Tensor, key: Tensor, value: Tensor, *asked: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Out (B, H, Q, E), LSE (B, H, Q), and what float32 rounds away of it, which is empty without a bias."""
    call = _call(query, key, value, *asked)
    rest = rest_for(call)
    out, lse = forward(call, with_lse=True, rest=rest)
    assert lse is not None
    return out, lse, lse.new_empty(0) if rest is None else rest


@attention.register_fake
def _(query: Tensor, _key: Tensor, value: Tensor, *asked: Any) -> tuple[Tensor, Tensor, Tensor]:
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    rest = lse.new_empty(0) if bias_of(*asked[:2]) is None else torch.empty_like(lse)
    return empty_like_query(query, value.shape[3]), lse, rest


@torch.library.custom_op(
    "heedful::attention_backward",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor out, Tensor lse, Tensor rest, {_WANTED}, {_ARGUMENTS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def attention_backward(
    dout: Tensor, out: Tensor, lse: Tensor, rest: Tensor, want_query: bool, want_key: bool, want_value: bool,
    want_bias: bool, query: Tensor, key: Tensor, value: Tensor, *asked: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of query, key, value and bias; empty where none is wanted."""
    call, bias = _call(query, key, value, *asked), bias_of(*asked[:2])
    gradients = backward(
        call,
        Known(out, lse, None if call.bias is None else rest, dout),
        query=want_query,
        key=want_key,
        value=want_value,
        bias=tuple(bias.shape) if want_bias and bias is not None else None,
    )
    return tuple(query.new_empty(0) if one is None else one for one in gradients)


@attention_backward.register_fake
def _(
    _dout: Tensor, _out: Tensor, _lse: Tensor, _rest: Tensor, want_query: bool, want_key: bool, want_value: bool,
    want_bias: bool, query: Tensor, key: Tensor, value: Tensor, *asked: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    bias = bias_of(*asked[:2])
    wanted = ((query, want_query), (key, want_key), (value, want_value))
    made = [torch.empty_like(one) if want else query.new_empty(0) for one, want in wanted]
    return (*made, query.new_empty(0) if bias is None or not want_bias else bias.new_empty(bias.shape))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    out, lse, rest = output
    ctx.mark_non_differentiable(lse, rest)
    ctx.places = [place for place, one in enumerate(inputs) if isinstance(one, Tensor)]
    ctx.rest = [None if isinstance(one, Tensor) else one for one in inputs]
    ctx.save_for_backward(out, lse, rest, *(inputs[place] for place in ctx.places))


def _gradient(ctx: Any, dout: Tensor, _dlse: Any, _drest: Any) -> tuple[Tensor | None, ...]:
    out, lse, rest, *tensors = ctx.saved_tensors
    inputs = list(ctx.rest)
    for place, tensor in zip(ctx.places, tensors, strict=True):
        inputs[place] = tensor
    place_of_bias = 3 if inputs[3] is not None and inputs[3].dtype != torch.bool else 4
    places = (0, 1, 2, place_of_bias)
    wanted = [ctx.needs_input_grad[place] for place in places]
    found = torch.ops.heedful.attention_backward(dout, out, lse, rest, *wanted, *inputs)
    gradients: list[Tensor | None] = [None] * len(inputs)
    for place, want, gradient in zip(places, wanted, found, strict=True):
        gradients[place] = gradient if want else None
    return tuple(gradients)


attention.register_autograd(_gradient, setup_context=_keep)


def attend_traced(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str = "top_left",
    window: tuple[int | None, int | None] | None = None,
    window_alignment: str = "top_left",
    key_padding: Tensor | None = None,
    query_padding: Tensor | None = None,
    varlen: Varlen | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,  # noqa: ARG001 - the kernels read the head counts
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Out (B, H, Q, E) and LSE (B, H, Q) by the operator, of the arguments of ``call_of_arguments``."""
    ends: tuple[Any, ...] = (None, None, 0, 0)
    if varlen is not None:
        queries, keys = (t if t.dim() == 3 else t[0].transpose(0, 1) for t in (query, key))
        known = packed_arguments(varlen, queries, keys)
        ends = (known["cu_seqlens_q"], known["cu_seqlens_k"], known["max_seqlen_q"], known["max_seqlen_k"])
    left, right = (None, None) if window is None else window
    out, lse, _ = torch.ops.heedful.attention(
        *of_rank_four(query, key, value), attn_mask, attn_bias, key_padding, query_padding, *ends, is_causal,
        causal_alignment, left, right, window_alignment, scale, softcap,
    )  # fmt: skip
    return out, lse.detach()


def _call(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, attn_bias: Tensor | None,
    key_padding: Tensor | None, query_padding: Tensor | None, ends_q: Tensor | None, ends_k: Tensor | None,
    longest_q: int, longest_k: int, is_causal: bool, causal_alignment: str, left: int | None, right: int | None,
    window_alignment: str, scale: float | None, softcap: float | None,
) -> Call:  # fmt: skip
    return call_of_arguments(
        query,
        key,
        value,
        attn_mask=attn_mask,
        attn_bias=attn_bias,
        is_causal=is_causal,
        causal_alignment=causal_alignment,
        window=(left, right),
        window_alignment=window_alignment,
        key_padding=key_padding,
        query_padding=query_padding,
        varlen=None if ends_q is None else Varlen(ends_q, ends_k, longest_q, longest_k),
        scale=scale,
        softcap=softcap,
    )
