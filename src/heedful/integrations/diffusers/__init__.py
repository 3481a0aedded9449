"""diffusers' attention dispatcher, on heedful's strategies: drop-in functions, and ``install()``.

``from heedful.integrations.diffusers import dispatch_attention_fn`` computes by heedful at once, with diffusers'
signature and layout (B, S, H, D); diffusers need not be there. ``install()`` sends diffusers' own dispatcher to
heedful, for every model that is loaded or will be, until ``uninstall()``.

``enable_flash_attention(pipeline, True)`` is a plug-in's checkbox: flash where it can run, and a status that says what
ran. ``fuse_qkv_projections()`` and ``unfuse_qkv_projections()`` are diffusers' fusion with LoRA adapters minded.

Public: ``dispatch_attention_fn``, ``attention_backend``, ``AttentionBackendName``, ``install``, ``uninstall``,
``is_installed``, ``enable_flash_attention``, ``flash_status``, ``fuse_qkv_projections``, ``unfuse_qkv_projections``;
and under diffusers' own private names
``_AttentionBackendRegistry`` and each backend's function, ``_flash_attention``, ``_native_attention``,
``_xformers_attention`` and so on. All are looked up when asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

_PLACES = {
    "AttentionBackendName": ("names", "backend_names"),
    "_AttentionBackendRegistry": ("registry", "AttentionBackendRegistry"),
    "attention_backend": ("dispatch", "attention_backend"),
    "dispatch_attention_fn": ("dispatch", "dispatch_attention_fn"),
    "enable_flash_attention": ("switch", "enable_flash_attention"),
    "flash_status": ("switch", "flash_status"),
    "fuse_qkv_projections": ("fusion", "fuse_qkv_projections"),
    "install": ("installation", "install"),
    "is_installed": ("installation", "is_installed"),
    "unfuse_qkv_projections": ("fusion", "unfuse_qkv_projections"),
    "uninstall": ("installation", "uninstall"),
}
__all__ = [
    "AttentionBackendName",
    "attention_backend",
    "dispatch_attention_fn",
    "enable_flash_attention",
    "flash_status",
    "fuse_qkv_projections",
    "install",
    "is_installed",
    "unfuse_qkv_projections",
    "uninstall",
]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        module, attribute = _PLACES[name]
        found = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
        return found() if name == "AttentionBackendName" else found
    if (name.startswith("_") and name.endswith("_attention")) or "_attention_" in name:
        functions = importlib.import_module(f"{__name__}.backends").FUNCTIONS
        if name in functions:
            return functions[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    functions = importlib.import_module(f"{__name__}.backends").FUNCTIONS
    return sorted({*globals(), *_PLACES, *functions})
