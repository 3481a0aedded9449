"""The class of a problem: all calls that are about as fast under every candidate, by one name. The key of timings.

Lengths, batch and packed tokens fall into quarter octaves (two lengths of one class differ by at most 19 %); heads,
head dims, dtype, layout and the structure of the mask count exactly, kept keys in eighths. What changes nothing about
speed, such as the scale, is left out; what changes which kernels run at all, or what passes as right, is in: the LSE,
the error that is allowed.

Shapes: B batch, H heads, N kv heads, Q query length, K key length, D head dim, E value dim.
"""

from __future__ import annotations

import math

from heedful.masks import MaskFacts
from heedful.problem import AttentionProblem

_ALIGNED = 8  # elements: rows of a mask or of scores that are no multiple of it lie askew for vector loads


def class_of(problem: AttentionProblem) -> str:
    """The name of a problem's class, such as ``cpu B2 H10/10 Q4096 K4096 D64/64 float32 BHSD causal-top_left``. Pure.

    A length is spelled as the middle of its quarter octave.
    """
    words = [
        problem.device,
        f"B{_bucket(problem.batch)}",
        f"H{problem.heads}/{problem.kv_heads}",
        f"Q{_bucket(problem.query_length)}",
        f"K{_bucket(problem.key_length)}{'' if problem.key_length % _ALIGNED == 0 else '*'}",
        f"D{problem.head_dim}/{problem.value_dim}",
        str(problem.dtype).removeprefix("torch."),
        problem.layout,
        _mask(problem.mask),
        *(name for name in _FLAGS if getattr(problem, name)),
        f"dropout{problem.dropout_p:g}" if problem.dropout_p else "",
        "softcap" if problem.softcap is not None else "",
        f"max_error{problem.max_error!r}" if problem.max_error is not None else "",
        *(f"{name}={value!r}" for name, value in problem.options),
    ]
    return " ".join(filter(None, words))


_FLAGS = ("needs_grad", "needs_lse", "deterministic", "compiling", "autocast", "broadcast", "sinks")


def _bucket(length: int) -> int:
    """A length as the middle of its quarter octave; small ones exactly, as the buckets are no wider."""
    return length if length < 4 else round(2 ** (round(4 * math.log2(length)) / 4))


def _mask(mask: MaskFacts) -> str:
    """The structure of a mask: which parts there are, and what its analysis found; a window by its width's bucket."""
    words = [
        f"causal-{mask.causal}" if mask.causal else "",
        f"window-{_side(mask.window[0])}-{_side(mask.window[1])}-{mask.window[2]}" if mask.window else "",
        f"padding-{mask.side}-{mask.kept}" if mask.key_padding else "",
        "rows" if mask.query_padding else "",
        f"varlen-{mask.packing}" if mask.varlen else "",
        f"dense-{mask.dense}" if mask.dense is not None else "",
        f"bias-{mask.bias}-{mask.bias_dtype}".replace("torch.", "") if mask.bias is not None else "",
        "block" if mask.block else "",
        "noop" if mask.noop else "",
    ]
    return "&".join(filter(None, words))


def _side(keys: int | None) -> str:
    return "open" if keys is None else str(_bucket(keys))
