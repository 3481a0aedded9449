"""What a rewrite is, and how a chain of them is found.

A lowering has a face for problems, which is pure and enough to plan and explain, and a face for tensors, which is bound
once a plan is fixed: ``around`` a kernel's function it gives one that takes the operands as they were before. Most only
change operands (``before``) and output (``after``).

Bound functions read lengths from the tensors they are given, never from the problem: under ``torch.compile`` one
binding serves every length.

Shapes: B batch, H heads, N kv heads, Q query length, K key length, D head dim, E value dim, T packed tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack as listeners
from torch.compiler import is_compiling
from torch.cuda import is_current_stream_capturing as _capturing

from heedful.masks import Mask
from heedful.problem import AttentionProblem
from heedful.strategy import Limits

T = TypeVar("T")
_MOST = 4


class Operands(NamedTuple):
    """The tensors of a call on their way to the kernel. ``empty``: bool (B, H, Q, 1), True for rows that see no key."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Mask | None
    empty: Tensor | None = None


Computed = tuple[Tensor, Tensor | None]
Kernel = Callable[[Operands], Computed]
Before = Callable[[Operands], Operands]
After = Callable[[Tensor, Tensor | None, Operands, Operands], Computed]


class Lowering(ABC):
    """One rewrite. ``mends`` are the refusal fields that it can make go away; ``gain`` what it is good for otherwise.

    ``drops_keys``: hidden keys and values never reach the kernel, so that even NaN in them cannot reach the output.
    ``optional``: where no refusal needs mending it may be taken or left, for speed alone: ``switch`` in the limits'
    ``faster_with``, with ``faster_from`` 0, takes it wherever it applies, and its absence leaves it.
    """

    name: ClassVar[str]
    mends: ClassVar[frozenset[str]] = frozenset()
    gain: ClassVar[str] = "faster"
    drops_keys: ClassVar[bool] = False
    optional: ClassVar[bool] = False

    def switch(self, problem: AttentionProblem) -> str:  # noqa: ARG002
        """The word by which limits say that it pays for such problems: its name, if it needs no finer one."""
        return self.name

    def improves(self, problem: AttentionProblem, limits: Limits) -> bool:
        """Whether it is taken without a refusal to mend: where the limits say that it was measured to pay."""
        if self.switch(problem) not in limits.faster_with:
            return False
        return problem.batch * problem.heads * problem.query_length * problem.key_length >= limits.faster_from

    def gain_of(self, problem: AttentionProblem, limits: Limits) -> str:  # noqa: ARG002
        """What it is good for here, where it mends nothing."""
        return self.gain

    @abstractmethod
    def rewrite(self, problem: AttentionProblem, limits: Limits) -> AttentionProblem | None:
        """The problem after the rewrite, or None where it does not apply."""

    def before(self, old: AttentionProblem, new: AttentionProblem) -> Before:  # noqa: ARG002
        """What it does to the tensors of a problem that was rewritten from old to new."""
        return lambda x: x

    def after(self, old: AttentionProblem, new: AttentionProblem) -> After | None:  # noqa: ARG002
        """What it does to output and LSE, given the operands as they came and as they went on; None where nothing."""
        return None

    def around(self, old: AttentionProblem, new: AttentionProblem, run: Kernel) -> Kernel:
        """A function for the old problem's operands, out of one for the new problem's."""
        before, after = self.before(old, new), self.after(old, new)
        if after is None:
            return lambda x: run(before(x))

        def through(x: Operands) -> Computed:
            on = before(x)
            out, lse = run(on)
            return after(out, lse, x, on)

        return through


@dataclass(frozen=True)
class Step:
    """A lowering that was taken, the refusals it mends or else what is gained, and the problems on either side."""

    lowering: Lowering
    mended: tuple[str, ...]
    old: AttentionProblem
    new: AttentionProblem
    gain: str = ""

    @property
    def name(self) -> str:
        """The lowering's name."""
        return self.lowering.name

    @property
    def why(self) -> str:
        """What it is taken for."""
        return f"mends {', '.join(self.mended)}" if self.mended else self.gain or self.lowering.gain

    def __str__(self) -> str:
        return f"{self.name} ({self.why})"


def lower_by(
    lowerings: Iterable[Lowering], problem: AttentionProblem, limits: Limits
) -> tuple[tuple[Step, ...], AttentionProblem]:
    """The chain, in the given order, of those that mend what limits refuse, or pay; and the problem it ends in."""
    steps: list[Step] = []
    refusals = set(limits.refusals(problem))
    for lowering in lowerings:
        refused = {refusal.field for refusal in refusals} & lowering.mends
        pays = lowering.improves(problem, limits)
        rewritten = lowering.rewrite(problem, limits) if refused or pays else None
        if rewritten is None:
            continue
        left = set(limits.refusals(rewritten))
        mended = refused - {refusal.field for refusal in left} or refused  # all in part, where it only opens the way
        gain = lowering.gain_of(problem, limits)
        steps.append(Step(lowering, tuple(sorted(mended)), problem, rewritten, gain))
        problem, refusals = rewritten, left
    return tuple(steps), problem


class Memory:
    """What was made of analysed masks, each for as long as a part of the mask lives that analysis made.

    Such parts are never written to. Nothing is kept while a compiler or a dispatch mode listens, or a CUDA graph is
    captured; what is kept is made outside of inference mode, so that autograd can save it. For each part the newest
    four are kept: a band serves every length.
    """

    def __init__(self) -> None:
        self._made: WeakKeyDictionary[object, dict[Hashable, Any]] = WeakKeyDictionary()

    def get(self, part: object, what: Hashable, make: Callable[[], T], device: torch.device) -> T:
        """``make()``, or what it gave before for this part; it must not hold the part itself."""
        if part is None or is_compiling() or listeners() or (device.type == "cuda" and _capturing()):
            return make()
        known = self._made.setdefault(part, {})
        made: T | None = known.get(what)
        if made is None:
            for old in list(known)[: max(0, len(known) + 1 - _MOST)]:
                known.pop(old, None)
            with torch.inference_mode(False), torch.no_grad():
                made = known[what] = make()
        return made


def lasting(mask: Mask) -> object | None:
    """The part of a mask that analysis made and that all its contents hang on; None where there is no such part."""
    read = mask.varlen is None or mask.varlen.lengths is not None
    if not read or mask.dense is not None or mask.bias is not None or mask.block is not None:
        return None
    if mask.padding is not None or mask.rows is not None:
        return mask.profile if mask.varlen is None else None
    return mask if mask.varlen is None else mask.varlen
