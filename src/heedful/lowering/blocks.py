"""A mask as FlexAttention's BlockMask, so that blocks which hide everything are skipped.

Making one costs more than a call, so it is made only of masks that analysis found, once for each of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.lowering.base import Before, Lowering, Memory, Operands, lasting
from heedful.masks import Mask, MaskFacts
from heedful.problem import AttentionProblem
from heedful.strategy import Limits

_made = Memory()


class BlockOfMask(Lowering):
    """Look at a mask by blocks of 128 x 128 once, and skip the empty ones in every layer that uses it."""

    name = "block_mask"
    gain = "skips blocks that are hidden"

    def rewrite(self, problem: AttentionProblem, limits: Limits) -> AttentionProblem | None:
        mask, kinds = problem.mask, set(problem.mask.kinds)
        padded, packed = bool(kinds & {"key_padding", "query_padding"}), mask.varlen
        known = mask.side is not None if padded else mask.packing in ("tidy", "loose")
        if "block" not in limits.masks or problem.layout == "THD" or problem.compiling:
            return None
        if kinds & {"dense", "bias", "block"} or padded == packed or not known:
            return None
        return problem.replace(mask=MaskFacts(block=True, rows_seen=not problem.may_hide_rows))

    def before(self, old: AttentionProblem, new: AttentionProblem) -> Before:  # noqa: ARG002
        axis = -2 if old.layout == "BHSD" else -3

        def block(x: Operands) -> Operands:
            mask, device = x.mask, x.query.device
            if mask is None:
                return x
            lengths = (x.query.shape[axis], x.key.shape[axis])
            what = (mask.causal, mask.window, *lengths, device)
            made = _made.get(lasting(mask), what, lambda: _block(mask, *lengths, device), device)
            return x._replace(mask=Mask(block=made))

        return block


def _block(mask: Mask, query_length: int, key_length: int, device: torch.device) -> object:
    from torch.nn.attention.flex_attention import create_block_mask

    seen = mask.visible(query_length, key_length, device)
    assert seen is not None
    table = seen.expand(*seen.shape[:-2], query_length, key_length)
    table = table[(None,) * (4 - table.dim())] if table.dim() < 4 else table
    batch, heads = table.shape[:2]

    def look(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return table[b if batch > 1 else b * 0, h if heads > 1 else h * 0, q, k]

    sizes = (batch if batch > 1 else None, heads if heads > 1 else None, query_length, key_length)
    return create_block_mask(look, *sizes, device=str(device))
