"""A backend of one's own: one class, no second place. It is explained, listed, proved and chosen like heedful's own.

    python examples/plugin_strategy.py

As a package it needs no ``register_strategy``: an entry point of the group ``heedful.strategies`` names the class. See
docs/writing-a-backend.md. No model is needed; with one, ``heedful.set_attention_backend(pipeline, "blockwise")`` works
at once.
"""

from typing import Any

import torch
from torch import Tensor

import heedful
from heedful import AttentionStrategy, AttentionStrategyFactory, Limits


class BlockwiseStrategy(AttentionStrategy):
    """Softmax over 64 keys at a time, with a running maximum (arXiv 2112.05682).

    Takes float32 on a CPU, without any mask: what else calls need, heedful's rewrites do around it, or it is refused.
    """

    name = "blockwise"
    limits = Limits(devices=("cpu",), dtypes=(torch.float32,), scale=True, lse=False)

    def compute_attention(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        """(B, H, Q, D), (B, H, K, D) and (B, H, K, E) to (B, H, Q, E)."""
        scale = kwargs.get("scale", query.shape[-1] ** -0.5)
        top = query.new_full((*query.shape[:-1], 1), -torch.inf)
        total, out = torch.zeros_like(top), query.new_zeros((*query.shape[:-1], value.shape[-1]))
        for keys, values in zip(key.split(64, dim=-2), value.split(64, dim=-2), strict=True):
            scores = query @ keys.mT * scale
            new = torch.maximum(top, scores.amax(-1, keepdim=True))
            weights, fade = torch.exp(scores - new), torch.exp(top - new)
            total = total * fade + weights.sum(-1, keepdim=True)
            out = out * fade + weights @ values
            top = new
        return out / total


def main() -> None:
    """Register it, use it, and have it explained."""
    AttentionStrategyFactory.default().register_strategy("blockwise", BlockwiseStrategy)
    query, key, value = (torch.randn(1, 4, 200, 64, generator=torch.Generator().manual_seed(i)) for i in range(3))
    keep = torch.arange(200)[None] < torch.tensor([[150]])

    with heedful.attention_backend("blockwise"):
        out = heedful.attention(query, key, value, keep[:, None, None])  # padded: gathered before the kernel
    judge = heedful.attention(query, key, value, keep[:, None, None], backend="reference")
    print(f"largest difference from the reference: {(out - judge).abs().max():.1e}\n")
    print(heedful.explain(query, key, value, keep[:, None, None], backend="blockwise"))
    print(heedful.explain(query, key, value, softcap=30.0, backend="blockwise"))


if __name__ == "__main__":
    main()
