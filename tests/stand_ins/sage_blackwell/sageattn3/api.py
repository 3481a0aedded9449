"""Stand-in for sageattn3 1.0.0 (``sageattention3_blackwell/sageattn3/api.py`` of thu-ml/SageAttention, tag v2.2.0).

It really quantises Q, K, the weights and V to FP4 in groups of 16 with scales in float8_e4m3fn. It imitates besides:

- ``attn_mask`` is taken and left out, unknown keywords (``scale``) are swallowed;
- K is smoothed in place, in the caller's tensor;
- the scale is 1/sqrt(head dim) of the tensor as it comes; no LSE, no backward;
- head dims 64 and 128 (from 256 on it prints and calls SDPA; 32 has no kernel), as many key heads as query heads;
- lengths are padded to multiples of 128, and causality is aligned at the ends of the padded lengths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

STEPS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
GROUP, BLOCK = 16, 128


def sageattn3_blackwell(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    per_block_mean: bool = True,
    **kwargs: Any,
) -> Tensor:
    if q.size(-1) >= 256:
        print(f"Unsupported Headdim {q.size(-1)}")
        return scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("Unsupported data type")
    if q.size(-1) not in (64, 128):
        raise RuntimeError("Only support head size 64, 128, and 256 for now")
    if q.size(1) != k.size(1):
        raise RuntimeError("We do not support MQA/GQA yet")
    k -= k.mean(dim=-2, keepdim=True)
    with torch.no_grad():
        return _attend(q, k, v, is_causal, per_block_mean)


def _attend(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, per_block_mean: bool) -> Tensor:
    q_len, k_len, dtype, scale = q.size(2), k.size(2), q.dtype, q.size(-1) ** -0.5
    q, k, v = (pad(t, (0, 0, 0, -t.size(2) % BLOCK)) for t in (q, k, v))
    blocks = q.unflatten(2, (-1, BLOCK)) if per_block_mean else q[:, :, None]
    mean = blocks.mean(3, keepdim=True)
    rest = (blocks - mean).flatten(2, 3).float()
    of_mean = (mean @ k[:, :, None].mT).float()
    scores = _in_fp4(rest) @ _in_fp4(k.float()).mT
    scores = (scores.unflatten(2, blocks.shape[2:4]) + of_mean).flatten(2, 3) * scale
    rows, columns = torch.arange(q.size(2))[:, None], torch.arange(k.size(2))
    hidden = columns > rows + k.size(2) - q.size(2) if is_causal else columns >= k_len
    scores = scores.masked_fill(hidden, float("-inf"))
    weights = torch.exp(scores - scores.amax(-1, keepdim=True)).nan_to_num() * (448.0 * 6.0)
    out = _in_fp4(weights) @ _in_fp4(v.float().mT).mT
    return (out / weights.sum(-1, keepdim=True)).nan_to_num()[:, :, :q_len].to(dtype).contiguous()


def _in_fp4(x: Tensor) -> Tensor:
    """What FP4 keeps of it, in groups of 16 neighbours of the last axis."""
    groups = x.unflatten(-1, (-1, GROUP))
    scale = (groups.abs().amax(-1, keepdim=True) / 6.0).to(torch.float8_e4m3fn).float()
    scaled = (groups / scale).nan_to_num(posinf=0.0, neginf=0.0)
    middles = (STEPS[1:] + STEPS[:-1]) / 2
    return (STEPS[torch.bucketize(scaled.abs().contiguous(), middles)] * scaled.sign() * scale).flatten(-2)
