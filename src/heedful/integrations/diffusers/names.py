"""The names of diffusers' backends: its own enum where diffusers is there, else one of the same names.

Every place that takes a backend also takes heedful's names (``reference``, ``aiter``, …), "auto", and a list of names.
"""

from __future__ import annotations

import functools
import importlib
from enum import Enum
from importlib.util import find_spec
from typing import Any

from heedful.errors import UnknownBackend
from heedful.factory import AttentionStrategyFactory

PACKAGE = "heedful.integrations.diffusers"
NAMES = (
    "flash", "flash_hub", "flash_varlen", "flash_varlen_hub", "flash_4_hub",
    "_flash_3", "_flash_varlen_3", "_flash_3_hub", "_flash_3_varlen_hub",
    "aiter", "aiter_fa2_hub",
    "flex", "native", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math", "_native_npu",
    "_native_xla",
    "sage", "sage_hub", "sage_blackwell_hub", "sage_varlen", "_sage_qk_int8_pv_fp8_cuda",
    "_sage_qk_int8_pv_fp8_cuda_sm90", "_sage_qk_int8_pv_fp16_cuda", "_sage_qk_int8_pv_fp16_triton",
    "xformers",
)  # fmt: skip


@functools.cache
def backend_names() -> Any:
    """``AttentionBackendName``: diffusers' own object, so that members are equal and identical; imports diffusers.

    Without diffusers an enum of strings with the same members, and AITER, heedful's shorter name.
    """
    if find_spec("diffusers") is not None:
        return importlib.import_module("diffusers.models.attention_dispatch").AttentionBackendName
    return own_names()


@functools.cache
def own_names() -> Any:
    """The enum for machines without diffusers. Pickles by the package's public name."""
    members = {name.upper(): name for name in NAMES}
    return Enum("AttentionBackendName", members, type=str, module=PACKAGE, qualname="AttentionBackendName")


def plain(backend: Any) -> Any:
    """A backend as heedful takes it: members of enums become their strings, also in lists; all else stays."""
    if isinstance(backend, Enum):
        return backend.value
    if isinstance(backend, (list, tuple)):
        return tuple(name.value if isinstance(name, Enum) else name for name in backend)
    return backend


def spelling(wish: Any) -> str | None:
    """diffusers' name of the backend that a scope wishes for; None for a list, "auto", and what diffusers has not."""
    return next((name for name in NAMES if isinstance(wish, str) and _is(name, wish)), None)


def _is(name: str, wish: str) -> bool:
    try:
        return bool(AttentionStrategyFactory.default().resolve(name) == wish)
    except UnknownBackend:
        return False
