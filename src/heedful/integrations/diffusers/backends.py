"""diffusers' function of each backend, by diffusers' own name: the same parameters and layout.

All tensors are (B, S, H, D); the LSE is float32 (B, H, S). Refuses what the strategy cannot do (a mask, an LSE), with
the reason, not what diffusers' function of that name refuses. Functions without ``enable_gqa`` take grouped heads as
they come, like the kernels they stand for. ``is_causal`` means with every backend what it means to SDPA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from heedful.integrations.diffusers.dispatch import attend

Function = Callable[..., Any]


def native_like(backend: Any) -> Function:
    """All of SDPA's arguments."""

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        _parallel_config: Any = None,
    ) -> Any:
        return attend(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
            backend=backend, return_lse=return_lse, parallel_config=_parallel_config,
        )  # fmt: skip

    return attention


def _flex_like(backend: str) -> Function:
    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        _parallel_config: Any = None,
    ) -> Any:
        return attend(
            query, key, value, attn_mask, 0.0, is_causal, scale, enable_gqa,
            backend=backend, return_lse=return_lse, parallel_config=_parallel_config,
        )  # fmt: skip

    return attention


def _flash_like(backend: str) -> Function:
    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        return_lse: bool = False,
        _parallel_config: Any = None,
    ) -> Any:
        return attend(
            query, key, value, attn_mask, dropout_p, is_causal, scale, True,
            backend=backend, window_size=window_size, return_lse=return_lse, parallel_config=_parallel_config,
        )  # fmt: skip

    return attention


def _flash_varlen_like(backend: str) -> Function:
    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        scale: float | None = None,
        is_causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        return_lse: bool = False,
        _parallel_config: Any = None,
    ) -> Any:
        return attend(
            query, key, value, attn_mask, dropout_p, is_causal, scale, True,
            backend=backend, window_size=window_size, return_lse=return_lse, parallel_config=_parallel_config,
        )  # fmt: skip

    return attention


def _flash_3_like(backend: str) -> Function:
    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        scale: float | None = None,
        is_causal: bool = False,
        return_lse: bool = False,
        _parallel_config: Any = None,
    ) -> Any:
        return attend(
            query, key, value, attn_mask, 0.0, is_causal, scale, True,
            backend=backend, return_lse=return_lse, parallel_config=_parallel_config,
        )  # fmt: skip

    return attention


def _flash_3_hub_like(backend: str) -> Function:
    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        scale: float | None = None,
        is_causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        _parallel_config: Any = None,
    ) -> Any:
        return attend(
            query, key, value, attn_mask, 0.0, is_causal, scale, True,
            backend=backend, window_size=window_size, softcap=softcap, return_lse=return_attn_probs,
            options={"deterministic": True} if deterministic else None, parallel_config=_parallel_config,
        )  # fmt: skip

    return attention


def _sage_like(backend: str) -> Function:
    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        is_causal: bool = False,
        scale: float | None = None,
        return_lse: bool = False,
        _parallel_config: Any = None,
    ) -> Any:
        return attend(
            query, key, value, attn_mask, 0.0, is_causal, scale, True,
            backend=backend, return_lse=return_lse, parallel_config=_parallel_config,
        )  # fmt: skip

    return attention


def _aiter_like(backend: str) -> Function:
    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        return_lse: bool = False,
        _parallel_config: Any = None,
    ) -> Any:
        return attend(
            query, key, value, attn_mask, dropout_p, is_causal, scale, True,
            backend=backend, return_lse=return_lse, parallel_config=_parallel_config,
        )  # fmt: skip

    return attention


def _npu_like(backend: str) -> Function:
    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        scale: float | None = None,
        return_lse: bool = False,
        _parallel_config: Any = None,
    ) -> Any:
        return attend(
            query, key, value, attn_mask, dropout_p, False, scale, True,
            backend=backend, return_lse=return_lse, parallel_config=_parallel_config,
        )  # fmt: skip

    return attention


def _xla_like(backend: str) -> Function:
    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        is_causal: bool = False,
        return_lse: bool = False,
        _parallel_config: Any = None,
    ) -> Any:
        return attend(
            query, key, value, attn_mask, 0.0, is_causal, None, True,
            backend=backend, return_lse=return_lse, parallel_config=_parallel_config,
        )  # fmt: skip

    return attention


# diffusers' function, what it is like, and the backend that it names (diffusers 0.42).
_TABLE: tuple[tuple[str, Callable[[str], Function], str], ...] = (
    ("_flash_attention", _flash_like, "flash"),
    ("_flash_attention_hub", _flash_like, "flash_hub"),
    ("_flash_varlen_attention", _flash_varlen_like, "flash_varlen"),
    ("_flash_varlen_attention_hub", _flash_varlen_like, "flash_varlen_hub"),
    ("_flash_attention_3", _flash_3_like, "_flash_3"),
    ("_flash_attention_3_hub", _flash_3_hub_like, "_flash_3_hub"),
    ("_flash_varlen_attention_3", _flash_3_like, "_flash_varlen_3"),
    ("_flash_attention_3_varlen_hub", _flash_3_like, "_flash_3_varlen_hub"),
    ("_flash_attention_4_hub", _flash_3_like, "flash_4_hub"),
    ("_aiter_flash_attention", _aiter_like, "aiter_fa2_hub"),
    ("_native_flex_attention", _flex_like, "flex"),
    ("_native_attention", native_like, "native"),
    ("_native_cudnn_attention", native_like, "_native_cudnn"),
    ("_native_efficient_attention", native_like, "_native_efficient"),
    ("_native_flash_attention", native_like, "_native_flash"),
    ("_native_math_attention", native_like, "_native_math"),
    ("_native_npu_attention", _npu_like, "_native_npu"),
    ("_native_xla_attention", _xla_like, "_native_xla"),
    ("_sage_attention", _sage_like, "sage"),
    ("_sage_attention_hub", _sage_like, "sage_hub"),
    ("_sage_attention_blackwell_hub", _sage_like, "sage_blackwell_hub"),
    ("_sage_varlen_attention", _sage_like, "sage_varlen"),
    ("_sage_qk_int8_pv_fp8_cuda_attention", _sage_like, "_sage_qk_int8_pv_fp8_cuda"),
    ("_sage_qk_int8_pv_fp8_cuda_sm90_attention", _sage_like, "_sage_qk_int8_pv_fp8_cuda_sm90"),
    ("_sage_qk_int8_pv_fp16_cuda_attention", _sage_like, "_sage_qk_int8_pv_fp16_cuda"),
    ("_sage_qk_int8_pv_fp16_triton_attention", _sage_like, "_sage_qk_int8_pv_fp16_triton"),
    ("_xformers_attention", native_like, "xformers"),
)


def _named(name: str, function: Function, backend: str) -> Function:
    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"Attention by the backend {backend!r}, or Refused; see heedful.integrations.diffusers.backends."
    return function


FUNCTIONS: dict[str, Function] = {name: _named(name, like(backend), backend) for name, like, backend in _TABLE}
BY_BACKEND: dict[str, Function] = {backend: FUNCTIONS[name] for name, _, backend in _TABLE}
