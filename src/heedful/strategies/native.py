"""Torch's own choice among its kernels: the public ``scaled_dot_product_attention``.

No LSE: the public call does not give it. A mask beside causality is joined into one first, because the CPU kernels
accept both and honour one.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from heedful.strategy import FLOATS, AttentionStrategy, Limits

_EVERYWHERE = Limits(
    dtypes=FLOATS,
    value_dim_may_differ=True,
    masks=frozenset({"causal", "dense", "bias"}),
    bias_backward=True,
    gqa=True,
    scale=True,
    dropout=True,
    backward=True,
    deterministic_backward=True,
    compile=True,
)


class NativeAttentionStrategy(AttentionStrategy):
    """torch SDPA: torch picks among its own kernels."""

    name = "native"
    # On a CPU both kernels give zeros to a row that sees no key (measured, torch 2.13); elsewhere it depends on the
    # kernel that torch picks, so the rows are set to zero for it.
    limits = (
        replace(
            _EVERYWHERE,
            devices=("cpu",),
            value_dim_may_differ=False,  # its flash kernel wants equal ones, and the other holds all scores
            empty_rows=frozenset({"output"}),
            faster_with=frozenset({"gather_keys", "upcast"}),  # see benchmarks/lowerings.py
            faster_from=1 << 14,
        ),
        _EVERYWHERE,
    )

    # The very function: a wrapper would cost 0.4 us a call.
    compute_attention = staticmethod(torch.nn.functional.scaled_dot_product_attention)
