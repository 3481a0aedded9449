"""The kernels of SageAttention 2 by name, each on the GPUs that it runs on.

All have int8 scores. They differ in where the weights meet the values: in fp16 or in fp8, in CUDA or in Triton. The
Triton one knows ``attn_mask``; it is not used, because builds that do not know it take the name and leave it out.
"""

from __future__ import annotations

from dataclasses import replace

from heedful.facts import Facts
from heedful.problem import AttentionProblem
from heedful.sources import Package
from heedful.strategies.sage import INSTALL, LIMITS, TRITON, SageKernelStrategy


def _package(function: str) -> tuple[Package, ...]:
    return (Package("sageattention", (function,), "sageattention", "2.1.1", INSTALL),)


class SageInt8Fp8CudaStrategy(SageKernelStrategy):
    """SageAttention 2 in CUDA, values in fp8, for compute capability 8.9 and up."""

    name = "sage_qk_int8_pv_fp8_cuda"
    aliases = ("_sage_qk_int8_pv_fp8_cuda",)
    function = "sageattn_qk_int8_pv_fp8_cuda"
    sources = _package(function)
    limits = replace(LIMITS, min_capability=(8, 9))

    def in_eight_bits(self, problem: AttentionProblem) -> bool:  # noqa: ARG002
        """See the base class."""
        return True


class SageInt8Fp8CudaSm90Strategy(SageKernelStrategy):
    """SageAttention 2 in CUDA, values in fp8, for compute capability 9.0 alone."""

    name = "sage_qk_int8_pv_fp8_cuda_sm90"
    aliases = ("_sage_qk_int8_pv_fp8_cuda_sm90",)
    function = "sageattn_qk_int8_pv_fp8_cuda_sm90"
    sources = _package(function)
    limits = replace(LIMITS, min_capability=(9, 0), max_capability=(9, 0))


class SageInt8Fp16CudaStrategy(SageKernelStrategy):
    """SageAttention 2 in CUDA, values in fp16."""

    name = "sage_qk_int8_pv_fp16_cuda"
    aliases = ("_sage_qk_int8_pv_fp16_cuda",)
    function = "sageattn_qk_int8_pv_fp16_cuda"
    sources = _package(function)


class SageInt8Fp16TritonStrategy(SageKernelStrategy):
    """SageAttention 2 in Triton, values in fp16."""

    name = "sage_qk_int8_pv_fp16_triton"
    aliases = ("_sage_qk_int8_pv_fp16_triton",)
    function = TRITON
    sources = _package(function)

    def in_triton(self, facts: Facts) -> bool:  # noqa: ARG002
        """See the base class."""
        return True
