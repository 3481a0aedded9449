"""A strategy's call to the kernels, with its gradient: straight, through autograd, or as an operator for a compiler.

Without gradient and compiler the kernel is launched at once. ``torch.autograd.Function`` serves eager training;
``operators`` hold what ``torch.compile`` and ``torch.export`` see (decision 19). All three run the same kernels.

The LSE has no gradient. There is no gradient of a gradient, no forward mode, and no ``torch.func`` transform: each is
refused, none is lost.

Shapes: B batch, H heads, Q query length, K key length, D head dim, E value dim.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from heedful.kernels.arguments import as_given, bias_of, call_of_arguments
from heedful.kernels.backward import Known, backward
from heedful.kernels.choice import by_choice
from heedful.kernels.forward import forward
from heedful.kernels.operands import Call, of_rank_four, rest_for
from heedful.kernels.tiles import FORWARD
from heedful.strategy import Tuning


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, return_lse: bool = False, tuning: Tuning | None = None, **asked: Any
) -> tuple[Tensor, Tensor | None]:
    """Out, and the LSE if wanted, in the form of the query; ``asked`` are the arguments of ``call_of_arguments``.

    ``tuning`` has measured tiles, which eager calls go by.
    """
    if torch.compiler.is_compiling():
        from heedful.kernels.operators import attend_traced

        out, lse = attend_traced(query, key, value, **asked)
        return as_given(query, out, lse if return_lse else None)
    _refuse_transforms(query, key, value)
    bias = bias_of(**asked)
    found: tuple[Tensor, Tensor | None]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (query, key, value, bias)):
        found = _with_gradient(query, key, value, bias, asked, tuning)
    else:
        call = call_of_arguments(query, key, value, **asked)
        found = by_choice(
            tuning if call.splits else None, FORWARD, lambda tile: forward(call, with_lse=return_lse, tile=tile)
        )
    return as_given(query, found[0], found[1] if return_lse else None)


def _with_gradient(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, asked: dict[str, Any], tuning: Tuning | None
) -> tuple[Tensor, Tensor]:
    query, key, value = of_rank_four(query, key, value)
    with torch.no_grad():
        call = call_of_arguments(query, key, value, **asked)
    answer: tuple[Tensor, Tensor] = _Attention.apply(query, key, value, bias, call, tuning)  # type: ignore[no-untyped-call]
    return answer


class _Attention(torch.autograd.Function):
    """Out and LSE of a call; query, key, value and bias stand beside it for autograd to see them."""

    @staticmethod
    def forward(
        ctx: Any, _query: Tensor, _key: Tensor, _value: Tensor, bias: Tensor | None, call: Call, tuning: Tuning | None
    ) -> tuple[Tensor, Tensor]:
        rest = rest_for(call)
        chosen = tuning if call.splits else None
        out, lse = by_choice(chosen, FORWARD, lambda tile: forward(call, with_lse=True, rest=rest, tile=tile))
        assert lse is not None
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(*tensors_of(call), out, lse, rest)
        ctx.asked, ctx.tuning = _without_tensors(call), tuning
        ctx.bias_shape = None if bias is None else tuple(bias.shape)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, out, lse, rest = ctx.saved_tensors
        query, key, value, bias, *_ = ctx.needs_input_grad
        with torch.no_grad():
            gradients = backward(
                with_tensors(ctx.asked, tensors),
                Known(out, lse, rest, dout),
                query=query,
                key=key,
                value=value,
                bias=ctx.bias_shape if bias else None,
                tuning=ctx.tuning,
            )
        if torch.is_grad_enabled():  # create_graph=True: who asks for a gradient of these must hear of it
            return *(None if one is None else _Once.apply(one, out) for one in gradients), None, None  # type: ignore[no-untyped-call]
        return *gradients, None, None


class _Once(torch.autograd.Function):
    """A gradient of which there is no gradient. ``once_differentiable`` would leave it out without a word."""

    @staticmethod
    def forward(_ctx: Any, gradient: Tensor, _out: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(_ctx: Any, *_: Any) -> Any:
        raise NotImplementedError("triton: there is no gradient of a gradient; use native_math or reference")


def tensors_of(call: Call) -> tuple[Tensor | None, ...]:
    """Every tensor of a call, for ``with_tensors``."""
    packing = call.packing
    ends = (None, None) if packing is None else (packing.ends_q, packing.ends_k)
    return (call.query, call.key, call.value, call.dense, call.bias, call.keep, call.rows, *ends)


def with_tensors(asked: Call, tensors: list[Any] | tuple[Any, ...]) -> Call:
    """A call with other tensors in the order of ``tensors_of``."""
    query, key, value, dense, bias, keep, rows, ends_q, ends_k = tensors
    packing = None if asked.packing is None else replace(asked.packing, ends_q=ends_q, ends_k=ends_k)
    return replace(
        asked, query=query, key=key, value=value, dense=dense, bias=bias, keep=keep, rows=rows, packing=packing
    )


def _without_tensors(call: Call) -> Call:
    """What is asked of a call. Its tensors are autograd's to keep, which sees when one of them is written to."""
    return with_tensors(call, (None,) * 9)


def _refuse_transforms(*tensors: Tensor) -> None:
    if torch._C._functorch.maybe_current_level() is not None:
        raise NotImplementedError("triton: torch.func transforms do not pass through it; use native_math or reference")
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError("triton: no forward-mode gradient passes through it; use native_math or reference")
