"""Exact kernels of a GPU keep the scores of half-precision queries and keys in float32: ``routing`` relies on it."""

from __future__ import annotations

import pytest
import torch

import heedful

EXACT = [row.name for row in heedful.list_backends("cuda") if row.available and row.exactness == "exact"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch sees none here")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", EXACT)
def test_scores_beyond_the_range_of_half_precision(name: str, dtype: torch.dtype) -> None:
    seed = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 128, 64, generator=seed).to("cuda", dtype) for _ in range(3))
    query, key = query * 120, key * 120
    assert (query.float() @ key.float().mT).abs().max() > torch.finfo(torch.float16).max
    want = heedful.attention(query.float(), key.float(), value.float(), backend="reference")
    out = heedful.attention(query, key, value, backend=name)
    # Float32 sums of such scores differ by a hundredth; in half precision they would be infinite, or off by 200.
    torch.testing.assert_close(out.float(), want, atol=0.1, rtol=0.1)
