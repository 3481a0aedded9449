"""A user's call, read: its arguments checked one by one, its masks joined, its problem stated.

The arguments are those of ``heedful.attention``; shapes as there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from heedful import facts as machine
from heedful.errors import InvalidArgument
from heedful.facts import Facts
from heedful.masks import Mask, as_alignment, as_mask, as_window
from heedful.problem import AttentionProblem, problem_for_shapes

_LARGEST = torch.finfo(torch.float64).max


def mask_of_call(
    *,
    attn_mask: object = None,
    is_causal: bool = False,
    causal_alignment: str = "top_left",
    window: tuple[int | None, int | None] | int | None = None,
) -> Mask | None:
    """The one mask that a call's mask arguments mean together. Raises InvalidArgument."""
    mask, alignment = as_mask(attn_mask), as_alignment(causal_alignment)
    for part in (
        Mask(causal=alignment) if is_causal else None,
        Mask(window=as_window(window, alignment)) if window is not None else None,
    ):
        if part is not None:
            mask = part if mask is None else mask & part
    return mask


def checked_numbers(
    *,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    softcap: float | None,
    max_error: float | None,
    options: Mapping[str, Any] | None,
    return_lse: bool,
) -> dict[str, Any]:
    """The arguments that are no tensors, as fields of the problem. Raises InvalidArgument."""
    for name, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa), ("return_lse", return_lse)):
        if not isinstance(flag, bool):
            raise InvalidArgument(name, repr(flag), "give True or False")
    for name, number, low, high in (
        ("dropout_p", dropout_p, 0.0, 1.0),
        ("scale", scale, -_LARGEST, _LARGEST),
        ("softcap", softcap, math.ulp(0.0), _LARGEST),
        ("max_error", max_error, 0.0, math.inf),
    ):
        if number is None and name != "dropout_p":
            continue
        if not isinstance(number, (int, float)) or isinstance(number, bool) or not low <= number <= high:
            words = {"scale": "a finite number", "softcap": "a finite number above 0"}
            wanted = words.get(name, f"a number from {low} to {high}")
            raise InvalidArgument(name, repr(number), f"give {wanted}")
    if options is not None and not (isinstance(options, Mapping) and all(isinstance(name, str) for name in options)):
        raise InvalidArgument("options", repr(options), "give a mapping from option names to values")
    return {
        "dropout_p": float(dropout_p),
        "scale": None if scale is None else float(scale),
        "softcap": None if softcap is None else float(softcap),
        "max_error": max_error,
        "needs_lse": return_lse,
        "options": tuple(sorted((options or {}).items())),
    }


def problem_of_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: object = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    layout: str = "BHSD",
    causal_alignment: str = "top_left",
    window: tuple[int | None, int | None] | int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    max_error: float | None = None,
    options: Mapping[str, Any] | None = None,
    return_lse: bool = False,
    facts: Facts | None = None,
) -> AttentionProblem:
    """Check every argument and state the problem. Raises InvalidArgument: argument, value and remedy."""
    _check_tensors(query, key, value, layout)
    _check_mask_kind(attn_mask)
    fields = checked_numbers(
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=plain_scale(scale),
        enable_gqa=enable_gqa,
        softcap=softcap,
        max_error=max_error,
        options=options,
        return_lse=return_lse,
    )
    mask = mask_of_call(attn_mask=attn_mask, is_causal=is_causal, causal_alignment=causal_alignment, window=window)
    dtype, autocast = computed_dtype(query.dtype, key.dtype, value.dtype, query.device.type)
    _check_mask_tensors(mask, query)
    wants_grad = (query, key, value, *([mask.bias] if mask is not None and mask.bias is not None else []))
    return problem_for_shapes(
        tuple(query.shape),
        tuple(key.shape),
        tuple(value.shape),
        dtype=dtype,
        device=(facts or machine.probe()).device(query.device),
        mask=mask,
        layout=layout,
        enable_gqa=enable_gqa,
        sinks=sinks is not None,
        needs_grad=torch.is_grad_enabled() and any(tensor.requires_grad for tensor in wants_grad),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        autocast=autocast,
        **fields,
    )


def plain_scale(scale: Any) -> Any:
    """The number that a tensor without dimensions and gradient holds, which SDPA takes for one; else what was given."""
    if isinstance(scale, Tensor) and scale.dim() == 0 and not scale.requires_grad and not scale.is_complex():
        return float(scale)
    return scale


def computed_dtype(query: torch.dtype, key: torch.dtype, value: torch.dtype, device: str) -> tuple[torch.dtype, bool]:
    """The dtype to compute in, and whether autocast makes it so. SDPA under autocast casts all but float64.

    Raises InvalidArgument for dtypes that differ without autocast, or are no floats.
    """
    for name, dtype in (("query", query), ("key", key), ("value", value)):
        if not dtype.is_floating_point:
            raise InvalidArgument(name, dtype, "give a floating dtype, such as torch.float16")
    known = torch.amp.autocast_mode.is_autocast_available(device)  # not so for "meta"
    if known and torch.is_autocast_enabled(device) and torch.float64 not in (query, key, value):
        return torch.get_autocast_dtype(device), True
    for name, dtype in (("key", key), ("value", value)):
        if dtype != query:
            raise InvalidArgument(name, dtype, f"query has {query}; all three must be equal, or use autocast")
    return query, False


# How to pack a nested tensor's sequences, by the layout that it came in.
_PACK = {
    "BHSD": ("torch.cat([t.transpose(0, 1) for t in {}.unbind()])", "t.shape[1] for t in {}.unbind()"),
    "BSHD": ("torch.cat({}.unbind())", "t.shape[0] for t in {}.unbind()"),
}


def _check_tensors(query: object, key: object, value: object, layout: str) -> None:
    if torch._C._get_tracing_state() is not None:
        remedy = "use torch.export; what set_attention_backend has set can be traced after reset_attention_backend"
        raise InvalidArgument("query", "a tensor within torch.jit.trace, to which sizes are tensors", remedy)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise InvalidArgument(name, type(tensor).__name__, "give a torch.Tensor")
        if tensor.is_nested:
            packed, lengths = (text.format(name) for text in _PACK.get(layout, _PACK["BSHD"]))
            varlen = f"heedful.Varlen(torch.tensor([0, *({lengths})]).cumsum(0))"
            remedy = f"pack the sequences: {packed}, with layout='THD' and attn_mask={varlen}"
            raise InvalidArgument(name, "a nested tensor", remedy)
        if tensor.layout != torch.strided:
            raise InvalidArgument(name, tensor.layout, "give a dense (strided) tensor")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.device != query.device:  # type: ignore[attr-defined]
            raise InvalidArgument(name, f"device {tensor.device}", f"query is on {query.device}; move it there")  # type: ignore[attr-defined]


def _check_mask_kind(attn_mask: object) -> None:
    """torch's CausalBias is a tensor in name only: it has no elements, and SDPA asks it for a kernel."""
    if type(attn_mask).__name__ != "CausalBias":
        return
    variant = getattr(getattr(attn_mask, "variant", None), "name", "of no variant")
    same = "heedful.Causal(), or is_causal=True"
    if variant == "LOWER_RIGHT":
        same = "heedful.Causal('bottom_right'), or is_causal=True with causal_alignment='bottom_right'"
    remedy = f"give {same}; exclude= of set_attention_backend leaves a layer that makes one to torch"
    raise InvalidArgument("attn_mask", f"torch's CausalBias ({variant})", remedy)


def _check_mask_tensors(mask: Mask | None, query: Tensor) -> None:
    if mask is None:
        return
    packing = () if mask.varlen is None else (mask.varlen.cu_seqlens_q, mask.varlen.cu_seqlens_k)
    for tensor in (mask.dense, mask.bias, mask.padding, mask.rows, *packing):
        if tensor is not None and tensor.device != query.device:
            raise InvalidArgument("attn_mask", f"device {tensor.device}", f"query is on {query.device}; move it there")
