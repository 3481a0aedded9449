"""AITER's attention in plain torch; imitates amd-aiter 0.1.7.post2.dev18. See ``aiter.ops.mha``."""

from aiter.ops.mha import flash_attn_func, flash_attn_varlen_func

__all__ = ["flash_attn_func", "flash_attn_varlen_func"]
