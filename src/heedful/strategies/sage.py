"""SageAttention 2: scores in int8, weights and values in 16 or 8 bits. The package picks the kernel for the GPU.

Takes fp16/bf16 on CUDA, head dims to 128, causality with as many queries as keys. Refuses dense masks: ``sageattn``
takes ``attn_mask`` among its ``**kwargs`` and leaves it out. ``sage_varlen`` takes packed sequences, without LSE. The
LSE needs no mending: since 2.1.1 the package gives the natural one of the true scores, the smoothing of K undone.

Builds of 2.1.1 and 2.2.0 from before 4 August 2025 count keys beyond the last, up to a multiple of 64, as keys with
score 0 in their Triton kernels. The version does not tell; that the fp16 Triton form lacks ``attn_mask`` does.

Shapes: B batch, Q query length, K key length, H heads, D head dim, T packed tokens.
"""

from __future__ import annotations

import inspect
from dataclasses import replace

import torch
from torch import Tensor

from heedful.errors import CannotLoad
from heedful.facts import Facts
from heedful.masks import Varlen
from heedful.problem import AttentionProblem
from heedful.refusal import Refusal
from heedful.sources import Hub, Package
from heedful.strategy import HALF, Answer, AttentionStrategy, Limits, Pin, packed_arguments

TRITON = "sageattn_qk_int8_pv_fp16_triton"
INSTALL = "pip install git+https://github.com/thu-ml/SageAttention --no-build-isolation; PyPI has 1.0.6 only"
KNOWN = ((8, 0), (8, 6), (8, 9), (9, 0), (12, 0), (12, 1))  # where sageattn has a kernel; 12.1 since November 2025
EIGHT_BIT_VALUES = ((8, 9), (12, 0), (12, 1))  # where it chooses sageattn_qk_int8_pv_fp8_cuda
LONGEST = 150_000  # keys: clean to 154k, noise from 167k (sm_120, https://github.com/thu-ml/SageAttention/issues/388)
LIMITS = Limits(
    devices=("cuda",),
    min_capability=(8, 0),
    dtypes=HALF,
    max_head_dim=128,
    layouts=("BSHD",),
    masks=frozenset({"causal"}),
    scale=True,
    lse=True,
)
PACKED = replace(
    LIMITS,
    layouts=("THD",),
    masks=frozenset({"causal", "varlen"}),
    mixed_masks=True,
    empty_rows=frozenset({"output"}),
    lse=False,
)


class SageKernelStrategy(AttentionStrategy):
    """What the forms of SageAttention share. ``function``: the one that is called."""

    exactness = "quantised"
    limits = LIMITS
    function = ""

    def refusals(self, problem: AttentionProblem) -> tuple[Refusal, ...]:
        """Also for unequal lengths: one form asserts, the others align top-left until upstream's PR 372 is merged."""
        found, mask = super().refusals(problem), problem.mask
        alike = problem.query_length == problem.key_length and (mask.packed_alike or not mask.varlen)
        if mask.causal and not alike:
            observed = f"with {problem.query_length} queries and {problem.key_length} keys"
            found += (Refusal("causality", observed, "as many queries as keys in each sequence", "use native"),)
        if self.in_eight_bits(problem) and problem.key_length > LONGEST:
            found += (Refusal("key length", str(problem.key_length), f"at most {LONGEST}", "use an fp16 form"),)
        return found

    def in_eight_bits(self, problem: AttentionProblem) -> bool:  # noqa: ARG002
        """Whether ``sageattn_qk_int8_pv_fp8_cuda`` computes it."""
        return False

    def in_triton(self, facts: Facts) -> bool:  # noqa: ARG002
        """Whether a Triton kernel computes on a device of this machine."""
        return False

    def load(self, facts: Facts, downloads: bool = False) -> None:
        """See the base class. Refuses builds whose Triton kernels do not mask the end of the keys."""
        super().load(facts, downloads)
        triton = getattr(self.__dict__["kernels"], TRITON, None)
        if triton and self.in_triton(facts) and "attn_mask" not in inspect.signature(triton).parameters:
            del self.__dict__["kernels"]
            text = "gives wrong answers where the keys are no multiple of 64 (fixed 4 August 2025)"
            raise CannotLoad(f"this build of sageattention {text}: {INSTALL}")

    def compute_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        varlen: Varlen | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        return_lse: bool = False,
    ) -> Answer:
        """See the base class."""
        query, key, value = map(aligned, (query, key, value))
        function, call = self.function, {"tensor_layout": "NHD", "return_lse": return_lse}
        if varlen is not None:
            function, call = "sageattn_varlen", packed_arguments(varlen, query, key)
        with torch.cuda.device_of(query):  # the functions set the current device, and leave it so
            kernel = getattr(self.kernels, function)
            answer: Answer = kernel(query, key, value, is_causal=is_causal, sm_scale=scale, **call)
        return answer


class SageAttentionStrategy(SageKernelStrategy):
    """SageAttention 2, with the kernel that it picks for the GPU: int8 scores, no dense mask, no gradient."""

    name = "sage"
    aliases = {"sage_hub": Pin(source="hub"), "sage_varlen": Pin(source="package", layouts=("THD",))}
    function = "sageattn"
    sources = (
        Package(
            "sageattention",
            ("sageattn",),
            distribution="sageattention",
            minimum="2.1.1",
            install=INSTALL,
            optional=("sageattn_varlen", TRITON),
        ),
        Hub("SageAttention/sage-attention", 3, ("sageattn",)),
    )

    def limits_for(self, device: str) -> Limits:
        """See the base class."""
        return PACKED if self.pin.layouts == ("THD",) else super().limits_for(device)

    def refusals(self, problem: AttentionProblem) -> tuple[Refusal, ...]:
        """Also for GPUs that the package picks no kernel for."""
        found, have = super().refusals(problem), problem.capability
        if have is not None and have >= (8, 0) and have not in KNOWN and self.pin.layouts != ("THD",):
            known = ", ".join(f"{major}.{minor}" for major, minor in KNOWN)
            found += (Refusal("compute capability", f"{have[0]}.{have[1]}", known, "use native"),)
        return found

    def in_eight_bits(self, problem: AttentionProblem) -> bool:
        """See the base class."""
        return problem.capability in EIGHT_BIT_VALUES and self.pin.layouts != ("THD",)

    def in_triton(self, facts: Facts) -> bool:
        """See the base class."""
        return self.pin.layouts == ("THD",) or any(one.capability == (8, 6) for one in facts.devices.values())


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied unless its rows start at multiples of 16 bytes: the CUDA kernels load so much at once."""
    starts = (*tensor.stride()[:-1], tensor.storage_offset())
    on_grid = tensor.stride(-1) == 1 and not any(start % 8 for start in starts)
    return tensor if on_grid else tensor.clone(memory_format=torch.contiguous_format)
