"""One file per strategy; whatever stands here is found by scanning.

The classes can be imported from here: ``from heedful.strategies import FlashAttentionStrategy``.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from heedful.strategy import AttentionStrategy


def __getattr__(name: str) -> Any:
    if name.endswith("Strategy"):
        for module in pkgutil.iter_modules(__path__):
            found = getattr(importlib.import_module(f"{__name__}.{module.name}"), name, None)
            if isinstance(found, type) and issubclass(found, AttentionStrategy):
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
