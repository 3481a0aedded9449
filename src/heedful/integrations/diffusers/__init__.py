"""diffusers' attention dispatcher, on heedful's strategies: drop-in functions, and ``install()``.

``from heedful.integrations.diffusers import dispatch_attention_fn`` computes by heedful at once, with diffusers'
signature and layout (B, S, H, D); diffusers need not be there. ``install()`` sends diffusers' own dispatcher to
heedful, for every model that is loaded or will be, until ``uninstall()``.

Public: ``dispatch_attention_fn``, ``attention_backend``, ``AttentionBackendName``, ``install``, ``uninstall``,
``is_installed``; and under diffusers' own private names ``_AttentionBackendRegistry`` and each backend's function,
``_flash_attention``, ``_native_attention``, ``_xformers_attention`` and so on. All are looked up when asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

_PLACES = {
    "AttentionBackendName": ("names", "backend_names"),
    "_AttentionBackendRegistry": ("registry", "AttentionBackendRegistry"),
    "attention_backend": ("dispatch", "attention_backend"),
    "dispatch_attention_fn": ("dispatch", "dispatch_attention_fn"),
    "install": ("installation", "install"),
    "is_installed": ("installation", "is_installed"),
    "uninstall": ("installation", "uninstall"),
}
__all__ = [
    "AttentionBackendName",
    "attention_backend",
    "dispatch_attention_fn",
    "install",
    "is_installed",
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
