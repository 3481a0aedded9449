"""Stands in for flash-attn-4 4.0.0b36, a namespace package beside flash-attn 2; see ``interface``."""

from importlib.metadata import PackageNotFoundError, version

from flash_attn.cute.interface import flash_attn_func, flash_attn_varlen_func

try:
    __version__ = version("fa4")  # the real one asks for this name too, and so never finds its own version
except PackageNotFoundError:
    __version__ = "0.0.0"

__all__ = ["flash_attn_func", "flash_attn_varlen_func"]
