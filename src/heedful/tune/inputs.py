"""Tensors for a problem that is only known by its description: as its class says, and otherwise random.

Shapes: B batch, H heads, N kv heads, Q query length, K key length, D head dim, E value dim, T packed tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from heedful.errors import InvalidArgument
from heedful.masks import Mask, MaskFacts, Varlen
from heedful.problem import AttentionProblem

_SEEN = 0.7  # of the keys, where a dense mask's contents are not known
_SEQUENCES = 4  # in a pack whose lengths are not known


class Inputs(NamedTuple):
    """A call: tensors in the problem's layout, its mask, and its other arguments."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Mask | None
    words: dict[str, Any]


def inputs_for(problem: AttentionProblem, device: torch.device, seed: int = 0) -> Inputs:
    """A call of the problem's class. Raises InvalidArgument for one that cannot be made from a description.

    Those are broadcast leading sizes, block masks and sinks, and calls that are not measured alone: with a gradient,
    dropout or autocast, deterministic or compiled ones. Lengths of packed sequences are equal, dense masks random.
    """
    for name, there in (
        ("broadcast", problem.broadcast),
        ("block mask", problem.mask.block),
        ("sinks", problem.sinks),
        ("gradient", problem.needs_grad),
        ("dropout", problem.dropout_p > 0),
        ("autocast", problem.autocast),
        ("determinism", problem.deterministic),
        ("torch.compile", problem.compiling),
    ):
        if there:
            raise InvalidArgument("problem", f"{name} in {problem}", "nothing measures such calls")
    draw = torch.Generator().manual_seed(seed)
    sizes = [
        (problem.heads, problem.query_length, problem.head_dim),
        (problem.kv_heads, problem.key_length, problem.head_dim),
        (problem.kv_heads, problem.key_length, problem.value_dim),
    ]
    query, key, value = (
        torch.randn(_shape(problem, *one), generator=draw, dtype=torch.float32).to(problem.dtype).to(device)
        for one in sizes
    )
    mask = problem.mask
    words = {
        "is_causal": mask.causal is not None,
        "window": mask.window[:2] if mask.window else None,
        "causal_alignment": mask.causal or (mask.window[2] if mask.window else "top_left"),
        "enable_gqa": problem.heads != problem.kv_heads,
        "scale": problem.scale,
        "softcap": problem.softcap,
        "layout": problem.layout,
        "return_lse": problem.needs_lse,
        "max_error": problem.max_error,
        "options": dict(problem.options) or None,
    }
    return Inputs(query, key, value, _mask(problem, device, draw), words)


def _shape(problem: AttentionProblem, heads: int, length: int, dim: int) -> tuple[int, ...]:
    shapes = {
        "BHSD": (problem.batch, heads, length, dim),
        "BSHD": (problem.batch, length, heads, dim),
        "THD": (length, heads, dim),
    }
    return shapes[problem.layout]


def _mask(problem: AttentionProblem, device: torch.device, draw: torch.Generator) -> Mask | None:
    """What the call's words do not say of the mask."""
    facts = problem.mask
    batch, queries, keys = problem.batch, problem.query_length, problem.key_length
    parts: dict[str, Any] = {}
    if facts.key_padding:
        parts["padding"] = _padding(facts, keys, keys, draw).expand(batch, keys).contiguous().to(device)
    if facts.query_padding:
        parts["rows"] = _padding(facts, queries, keys, draw).expand(batch, queries).contiguous().to(device)
    sizes = {"B": batch, "H": problem.heads, "Q": queries, "K": keys}
    if facts.dense is not None:
        seen = torch.rand(_of_axes(facts.dense, sizes), generator=draw) < (1.0 if facts.noop else _SEEN)
        seen[..., 0] = True
        parts["dense"] = seen.to(device)
    if facts.bias is not None:
        bias = torch.randn(_of_axes(facts.bias, sizes), generator=draw)
        parts["bias"] = (bias * (not facts.noop)).to(facts.bias_dtype).to(device)
    if facts.varlen:
        idle = 1 if facts.packing == "loose" else 0  # tokens of no sequence
        ends = [_ends(length - idle, device) for length in (queries, keys)]
        return Varlen(ends[0], None if facts.packed_alike else ends[1])
    return Mask(**parts) if parts else None


def _padding(facts: MaskFacts, length: int, keys: int, draw: torch.Generator) -> Tensor:
    """Bool (1, length): as many eighths kept as the facts say, on their side, but never all: that is no padding."""
    kept = max(1, min(length - 1, length * (4 if facts.kept is None else facts.kept) // 8))
    places = torch.arange(length)
    if facts.side == "left":
        return (places >= length - kept)[None]
    if facts.side == "interior" and length == keys:
        return (torch.randperm(length, generator=draw) < kept)[None]
    return (places < kept)[None]


def _of_axes(axes: str, sizes: dict[str, int]) -> list[int]:
    return [sizes[axis] if axis in axes else 1 for axis in "BHQK"]


def _ends(length: int, device: torch.device) -> Tensor:
    return torch.linspace(0, length, _SEQUENCES + 1).round().to(torch.int32).to(device)
