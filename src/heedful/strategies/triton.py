"""Our own Triton kernels: flash attention that ships as Python and needs only triton, which comes with torch for GPUs.

Takes fp16/bf16/fp32, any head dim to 256 without padding it, every mask but block masks, any strides; its gradients are
deterministic. No dropout. On a CPU only in Triton's interpreter, which is for tests: slow, and silently wrong in bf16,
so that is refused there.

Shapes: B batch, Q query length, K key length, H heads, N kv heads, D head dim, E value dim, T packed tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from heedful.errors import CannotLoad
from heedful.facts import INTERPRETED, Facts
from heedful.problem import AttentionProblem
from heedful.refusal import Refusal
from heedful.sources import Package
from heedful.strategy import ALL_MASKS, HALF, Answer, AttentionStrategy, Limits, Tuning

LEAST = "3.4"  # 3.3 does not compile these kernels
AMD = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")
INSTALL = f"pip install 'triton>={LEAST}'"
INTERPRETER = Limits(
    devices=("cpu",),
    dtypes=(torch.float32, torch.float16),
    max_head_dim=256,
    value_dim_may_differ=True,
    layouts=("BHSD", "THD"),
    masks=ALL_MASKS - {"block"},
    mixed_masks=True,
    causal_alignments=("top_left", "bottom_right"),
    bias_in_query_dtype=False,
    empty_rows=frozenset({"output", "lse"}),
    gqa=True,
    scale=True,
    softcap=True,
    lse=True,
    loose_packs=True,
    contends=False,
)
_DIFFERENTIABLE = replace(INTERPRETER, backward=True, deterministic_backward=True, bias_backward=True, compile=True)


class TritonKernelStrategy(AttentionStrategy):
    """What our own Triton kernels share: where they run, and that nothing is computed there otherwise than they say."""

    sources = (Package("triton", ("jit",), "triton", LEAST, INSTALL),)
    bits: int | str = 0  # the rows of the table of tiles, where they are not those of the inputs' dtype

    def refusals(self, problem: AttentionProblem) -> tuple[Refusal, ...]:
        """See the base class; and tensors on a CPU, unless Triton interprets."""
        if problem.device == "cpu" and problem.architecture != INTERPRETED:
            remedy = f"{INSTALL}; for tests, TRITON_INTERPRET=1 runs it on a CPU"
            return (Refusal("device", "cpu", f"cuda with triton {LEAST} or newer", remedy),)
        return super().refusals(problem)

    def tunable(self, problem: AttentionProblem) -> Mapping[str, str]:
        """The classes of tiles: of the forward pass, and of those for gradients."""
        from heedful.kernels.tiles import kinds

        return {role: str(kind) for role, kind in kinds(problem, self.bits).items()}

    def choices(self, role: str, problem: AttentionProblem, device: torch.device) -> tuple[str, ...]:
        """The tiles that are worth measuring, the table's first."""
        from heedful.kernels.candidates import candidates
        from heedful.kernels.forward import architecture_of
        from heedful.kernels.tiles import kinds, may_stream

        kind = kinds(problem, self.bits)[role]
        found = candidates(architecture_of(device), role, kind.bits, kind.dim, kind.masked)
        return tuple(str(tile) for tile in found if not tile.loads or may_stream(problem))

    def lacks(self, facts: Facts, downloads: bool = False) -> tuple[Refusal, ...]:
        """See the base class; and a GPU beside the interpreter, which computes its bf16 wrong without a word."""
        found = super().lacks(facts, downloads)
        gpu = next((one for one in facts.devices.values() if one.type == "cuda"), None)
        if gpu is None or not interprets(facts):
            return found
        observed = f"on, with {gpu.name or gpu.architecture} at hand"
        return (*found, Refusal("interpreter", observed, "a GPU, or the interpreter", "unset TRITON_INTERPRET"))

    def load(self, facts: Facts, downloads: bool = False) -> None:
        """See the base class. Triton decides whether it interprets when the kernels are defined, once a process."""
        super().load(facts, downloads)
        from heedful.kernels import forward, operators  # noqa: F401 - the operators are there for a compiler to trace

        if facts.packages is not None and forward.is_interpreted() != interprets(facts):
            del self.__dict__["kernels"]
            raise CannotLoad("TRITON_INTERPRET was changed after the start: set it before Python starts")


class TritonAttentionStrategy(TritonKernelStrategy):
    """our own Triton kernels: odd head dims, and masks and biases inside the kernel."""

    name = "triton"
    limits = (
        _DIFFERENTIABLE,
        replace(
            _DIFFERENTIABLE,
            devices=("cuda",),
            min_capability=(7, 5),
            architectures=AMD,
            dtypes=(torch.float32, *HALF),
            bfloat16_from=(8, 0),
            contends=True,
        ),
    )

    def compute_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        return_lse: bool = False,
        tuning: Tuning | None = None,
        **asked: Any,
    ) -> Answer:
        """See the base class; ``asked`` are the arguments of ``call_of_arguments``."""
        from heedful.kernels.autograd import attend

        out, lse = attend(query, key, value, return_lse=return_lse, tuning=tuning, **asked)
        return out if lse is None else (out, lse)


def interprets(facts: Facts) -> bool:
    """Whether Triton interprets its kernels on this machine."""
    return facts.device(torch.device("cpu")).architecture == INTERPRETED
