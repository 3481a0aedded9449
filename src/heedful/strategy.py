"""What a backend is: a strategy that declares its limits, derives its refusals from them, and computes.

Shapes: B batch, H heads, N kv heads, Q query length, K key length, D head dim, E value dim.
"""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from heedful import facts as machine
from heedful.call import mask_of_call, problem_of_call
from heedful.errors import Refused
from heedful.facts import Facts
from heedful.masks import Mask, Varlen, of_rank_four, savable
from heedful.problem import AttentionProblem
from heedful.refusal import Refusal
from heedful.sources import Kernels, Source, load_first

Answer = Tensor | tuple[Tensor, Tensor]
Exactness = Literal["exact", "quantised", "sparse"]
HALF = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
ALL_MASKS = frozenset({"causal", "window", "key_padding", "query_padding", "varlen", "dense", "bias", "block"})


@dataclass(frozen=True)
class Pin:
    """What another name of a strategy fixes: the kind of source it is loaded from, or the layouts it is given."""

    source: str = ""
    layouts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a kernel takes, as data. The defaults are the conservative ones, for a kernel that declares nothing.

    Capabilities bound NVIDIA devices; ``architectures`` are prefixes that an AMD device must have one of (``gfx942``);
    limits that name only one of the two are for that maker's devices only. ``bfloat16_from``: the capability that it
    needs. ``masks`` are kinds of ``MaskFacts.kinds``; ``mixed_masks``: several kinds at once. ``scale``: any positive
    one, not only 1/sqrt(D). ``empty_rows``: which of "output" and "lse" are right for a query that sees no key (zeros,
    -inf). ``bias_in_query_dtype``: a bias must have the dtype of the query. ``max_batch``: the most batch rows in one
    call. ``loose_packs``: packed tokens of no sequence, and sequences without keys, are right, too. ``faster_with``:
    names of lowerings that are taken wherever they apply, because they were measured to pay here, from ``faster_from``
    scores (B * H * Q * K) on. ``scores_in_memory``: the kernel holds all scores at once. ``contends``: it may be tried
    for speed; not so where it is known to be far behind.
    """

    devices: tuple[str, ...] = ("*",)
    min_capability: tuple[int, int] | None = None
    max_capability: tuple[int, int] | None = None
    architectures: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = FLOATS
    min_head_dim: int = 1
    max_head_dim: int | None = None
    head_dim_multiple: int = 1
    value_dim_may_differ: bool = False
    layouts: tuple[str, ...] = ("BHSD",)
    masks: frozenset[str] = frozenset()
    mixed_masks: bool = False
    causal_alignments: tuple[str, ...] = ("top_left",)
    bias_in_query_dtype: bool = True
    bias_backward: bool = False
    empty_rows: frozenset[str] = frozenset()
    gqa: bool = False
    scale: bool = False
    softcap: bool = False
    dropout: bool = False
    lse: bool = False
    backward: bool = False
    deterministic_backward: bool = False
    compile: bool = False
    options: frozenset[str] = frozenset()
    max_batch: int | None = None
    bfloat16_from: tuple[int, int] | None = None
    loose_packs: bool = False
    scores_in_memory: bool = False
    faster_with: frozenset[str] = frozenset()
    faster_from: int = 0
    contends: bool = True

    def covers(self, device: str) -> bool:
        """Whether these limits speak about that type of device."""
        return "*" in self.devices or device in self.devices

    def refusals(self, problem: AttentionProblem) -> Iterator[Refusal]:
        """Every limit that the problem breaks, each with the numbers."""
        if not self.covers(problem.device):
            yield Refusal(
                "device", problem.device, " or ".join(self.devices), "move the tensors, or name another backend"
            )
            return
        yield from self._machine(problem)
        yield from self._sizes(problem)
        yield from self._mask(problem)
        yield from self._features(problem)

    def _machine(self, problem: AttentionProblem) -> Iterator[Refusal]:
        have = problem.capability
        for_nvidia = self.min_capability is not None or self.max_capability is not None
        if have is None and problem.device == "cuda" and (for_nvidia or self.architectures):
            if not any(problem.architecture.startswith(known) for known in self.architectures):
                wanted = "/".join(self.architectures) or "NVIDIA devices only"
                yield Refusal("architecture", problem.architecture or "unknown", wanted, "use native")
        elif have is not None and self.architectures and not for_nvidia:
            wanted = f"AMD devices only: {'/'.join(self.architectures)}"
            yield Refusal("architecture", problem.architecture or _dotted(have), wanted, "use native")
        elif have is not None and self.min_capability is not None and have < self.min_capability:
            yield Refusal("compute capability", _dotted(have), f"at least {_dotted(self.min_capability)}", "use native")
        elif have is not None and self.max_capability is not None and have > self.max_capability:
            yield Refusal("compute capability", _dotted(have), f"at most {_dotted(self.max_capability)}", "use native")
        if problem.dtype not in self.dtypes:
            yield Refusal("dtype", _short(problem.dtype), "/".join(map(_short, self.dtypes)), "cast the tensors")

        elif (
            problem.dtype == torch.bfloat16 and self.bfloat16_from and (have or self.bfloat16_from) < self.bfloat16_from
        ):
            observed, wanted = f"bfloat16 on {problem.architecture}", f"bfloat16 from {_dotted(self.bfloat16_from)} on"
            yield Refusal("dtype", observed, wanted, "use float16 or float32")

    def _sizes(self, problem: AttentionProblem) -> Iterator[Refusal]:
        dims = {problem.head_dim, problem.value_dim}
        if self.max_head_dim is not None and max(dims) > self.max_head_dim:
            yield Refusal("head dim", str(max(dims)), f"at most {self.max_head_dim}", "use native or reference")
        if min(dims) < self.min_head_dim or any(dim % self.head_dim_multiple for dim in dims):
            wanted = f"multiples of {self.head_dim_multiple} from {self.min_head_dim}"
            yield Refusal("head dim padding", "/".join(map(str, sorted(dims))), wanted, "pad the head dim")
        if len(dims) > 1 and not self.value_dim_may_differ:
            observed = f"{problem.value_dim} beside head dim {problem.head_dim}"
            yield Refusal("value dim", observed, "equal ones", "pad the shorter one with zeros")
        if problem.layout not in self.layouts:
            packed = self.layouts == ("THD",)
            yield Refusal(
                "layout", problem.layout, "/".join(self.layouts), "pack the sequences" if packed else "transpose"
            )
        if problem.broadcast:
            yield Refusal("leading sizes", "broadcast", "(batch, heads, length, head dim) alike", "expand them")
        if self.max_batch is not None and problem.batch > self.max_batch:
            yield Refusal("batch", str(problem.batch), f"at most {self.max_batch}", "split the batch")
        if problem.heads != problem.kv_heads and not self.gqa:
            observed = f"{problem.kv_heads} for {problem.heads} query heads"
            yield Refusal("kv heads", observed, "as many as query heads", "repeat key and value heads")

    def _mask(self, problem: AttentionProblem) -> Iterator[Refusal]:
        mask = problem.mask
        remedy = "give it as a dense mask" if self.masks & {"dense", "bias"} else "use native or reference"
        for kind in mask.kinds:
            if kind not in self.masks:
                yield Refusal("mask", kind, "/".join(sorted(self.masks)) or "no mask", remedy)
        if mask.varlen and "varlen" in self.masks and mask.packing != "tidy" and not self.loose_packs:
            remedy = "leave mask analysis on, outside of torch.compile" if mask.packing == "unknown" else "tidy it"
            yield Refusal("packing", mask.packing, "sequences that cover all tokens and have keys", remedy)
        if len(mask.kinds) > 1 and not self.mixed_masks:
            yield Refusal("mask mix", " & ".join(mask.kinds), "one kind at a time", "join them into one dense mask")
        for alignment in {mask.causal, mask.window[2] if mask.window else None} - {None, *self.causal_alignments}:
            yield Refusal("causal alignment", str(alignment), "/".join(self.causal_alignments), "give a dense mask")
        if mask.bias is not None and self.bias_in_query_dtype and mask.bias_dtype != problem.dtype:
            yield Refusal("bias dtype", _short(mask.bias_dtype), _short(problem.dtype), "cast the bias")
        if mask.bias_needs_grad and not self.bias_backward:
            yield Refusal("bias gradient", "wanted", "biases without gradient", "use native, native_math or reference")
        missing = {"output", *(["lse"] if problem.needs_lse else [])} - self.empty_rows
        if problem.may_hide_rows and missing:
            yield Refusal("empty rows", "possible", "rows that see a key", "set such rows to zero afterwards")

    def _features(self, problem: AttentionProblem) -> Iterator[Refusal]:
        # Kernels mask with -inf, then multiply: causal is NaN with scale 0, and wrong below it (CPU flash, torch 2.13).
        if problem.scale is not None and not (self.scale and problem.scale > 0):
            wanted = "positive ones" if self.scale else "1/sqrt(head dim)"
            yield Refusal("scale", f"{problem.scale:.4g}", wanted, "multiply the query")
        if problem.softcap is not None and not self.softcap:
            yield Refusal("softcap", str(problem.softcap), "none", "use flex or reference")
        if problem.sinks:
            yield Refusal("sinks", "given", "none", "no backend of this version computes attention sinks")
        if problem.dropout_p > 0 and not self.dropout:
            yield Refusal("dropout_p", str(problem.dropout_p), "0.0", "use native or native_math")
        if problem.needs_lse and not self.lse:
            yield Refusal("return_lse", "wanted", "calls without it", "use native_flash, flex or reference")
        if problem.needs_grad and not self.backward:
            yield Refusal("gradient", "wanted", "calls without it", "use torch.no_grad(), or native")
        if problem.needs_grad and problem.deterministic and not self.deterministic_backward:
            yield Refusal("deterministic gradient", "wanted", "nondeterministic ones only", "use native_math")
        if problem.compiling and not self.compile:
            yield Refusal(
                "torch.compile", "tracing", "eager calls", "call it outside the compiled function, or use native"
            )
        if problem.autocast:
            yield Refusal("autocast", "on", "inputs of one dtype", "cast the inputs first")
        for name, _ in problem.options:
            if name not in self.options:
                known = ", ".join(sorted(self.options)) or "none"
                yield Refusal("options", repr(name), known, "see the backend's documentation")


class Tuning:
    """What was measured for a strategy's own choices, such as tiles: a label for each role of ``tunable``.

    ``failed`` is told the role, the label and the reason of one that cannot run; it raises where nothing else may.
    """

    def __init__(self, labels: Mapping[str, str], failed: Callable[[str, str, str], None]) -> None:
        self._labels, self._failed = dict(labels), failed
        self.asked: set[str] = set()  # the roles that somebody has asked for

    def get(self, role: str) -> str | None:
        """The label to go by; None for the strategy's own default."""
        self.asked.add(role)
        return self._labels.get(role)

    def drop(self, role: str, label: str, reason: str) -> None:
        """Go by the default from now on: this label cannot run. Raises what ``failed`` raises."""
        self._failed(role, label, reason)
        self._labels.pop(role, None)


class AttentionStrategy(ABC):
    """One backend. Declare ``name`` and ``limits``; write ``compute_attention``. Nothing else is needed.

    ``limits`` is a Limits, or several for different devices. A class that declares none gets the conservative ones:
    plain attention without mask, dropout, gradient or LSE; every other call is refused with a reason.

    ``compute_attention`` is handed only the arguments that differ from their defaults, and only such as the limits
    allow; so an argument that was declared by mistake is a TypeError, never a wrong answer.
    """

    name: ClassVar[str] = ""
    aliases: ClassVar[tuple[str, ...] | Mapping[str, Pin]] = ()
    sources: ClassVar[tuple[Source, ...]] = ()
    limits: ClassVar[Limits | tuple[Limits, ...]] = Limits()
    exactness: ClassVar[Exactness] = "exact"
    relative_error: ClassVar[float] = 0.2  # sum|out - exact| / sum|exact| that an approximate one may make
    pin: Pin = Pin()

    @abstractmethod
    def compute_attention(self, *args: Any, **kwargs: Any) -> Answer:
        """``compute_attention(query, key, value, **kwargs)``: (B, H, Q, D), (B, N, K, D), (B, N, K, E) to (B, H, Q, E).

        ``kwargs`` are those of: attn_mask (bool, or float to be added; four dimensions that broadcast to (B, H, Q, K)),
        attn_bias (float, beside a bool attn_mask), is_causal, causal_alignment ("bottom_right"), window (left, right),
        window_alignment ("bottom_right"), key_padding (bool (B, K)), query_padding (bool (B, Q)), varlen (a Varlen),
        block_mask, dropout_p, scale, enable_gqa, softcap, options by their names, and return_lse, with which it returns
        (out, lse): lse is float32 (B, H, Q).

        Where ``limits.layouts`` say so, tensors come as (B, Q, H, D), or packed (T, H, D) with ``varlen``.
        """

    def limits_for(self, device: str) -> Limits:
        """The limits that speak about a type of device; where none do, some that name every type with limits."""
        every = self.limits if isinstance(self.limits, tuple) else (self.limits,)
        known = next((limits for limits in every if limits.covers(device)), None)
        known = known or replace(every[0], devices=tuple(name for limits in every for name in limits.devices))
        return replace(known, layouts=self.pin.layouts) if self.pin.layouts else known

    @classmethod
    def pins(cls) -> Mapping[str, Pin]:
        """The other names of the strategy, and what each one pins."""
        return cls.aliases if isinstance(cls.aliases, Mapping) else dict.fromkeys(cls.aliases, Pin())

    def lacks(self, facts: Facts, downloads: bool = False) -> tuple[Refusal, ...]:
        """What keeps every source of its kernels from being loaded; empty where one can be, or where it needs none."""
        found = [source.lack(facts, downloads and self._is_of_the_hub()) for source in self.wanted_sources()]
        return () if None in found else tuple(lack for lack in found if lack is not None)

    def wanted_sources(self) -> tuple[Source, ...]:
        """The sources to look at, in order."""
        return tuple(one for one in self.sources if self.pin.source in ("", one.kind))

    def _is_of_the_hub(self) -> bool:
        """Whether its name says so: code comes from the network for no other. ``flash`` never is, ``flash_hub`` is."""
        return all(source.kind == "hub" for source in self.wanted_sources())

    def version(self, facts: Facts | None = None) -> str:
        """The version of the first of its sources' packages that is there; torch's for torch's own kernels."""
        facts = machine.probe() if facts is None else facts
        there = (source.named_version(facts) for source in self.wanted_sources() if source.lack(facts, False) is None)
        return next(there, "") if self.sources else f"torch {facts.torch_version}"

    def load(self, facts: Facts, downloads: bool = False) -> None:
        """Import the kernels, once. Raises CannotLoad."""
        if "kernels" not in self.__dict__ and self.sources:
            self.__dict__["kernels"] = load_first(self.wanted_sources(), facts, downloads and self._is_of_the_hub())

    @functools.cached_property
    def kernels(self) -> Kernels:
        """The functions of its source by their names; loaded by the dispatcher, or here at first use."""
        self.load(machine.probe())
        loaded: Kernels = self.__dict__.get("kernels", Kernels())
        return loaded

    def refusals(self, problem: AttentionProblem) -> tuple[Refusal, ...]:
        """Why this strategy cannot compute the problem; empty when it can. Pure. Extend it for rules of your own."""
        return tuple(self.limits_for(problem.device).refusals(problem))

    def tunable(self, problem: AttentionProblem) -> Mapping[str, str]:  # noqa: ARG002
        """Choices of its own that change speed alone, such as tiles: for each role its class, a key of the store. Pure.

        Where some were measured, ``compute_attention`` is handed them as ``tuning``, a Tuning; it has defaults for all.
        """
        return {}

    def choices(self, role: str, problem: AttentionProblem, device: torch.device) -> tuple[str, ...]:  # noqa: ARG002
        """The labels that are worth measuring for a role of ``tunable``, its default first. Its kernels are loaded."""
        return ()

    def validate_constraints(self, **kwargs: Any) -> None:
        """Raise Refused unless this strategy itself, without any rewriting, takes this call.

        ``kwargs`` are those of ``heedful.attention``, with ``query``, ``key`` and ``value``. A strategy may override it
        to look at the tensors; what it raises as ValueError, TypeError or RuntimeError is taken as its refusal.
        """
        problem = problem_of_call(**kwargs)
        found = self.refusals(problem)
        if problem.is_empty:  # torch's CPU flash ends the process with an arithmetic exception (2.13)
            found = (*found, Refusal("sizes", "zero", "at least one of each", "heedful.attention needs no kernel"))
        if found:
            raise Refused(problem, {self.name or type(self).__name__: found})

    def validate_and_compute(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Answer:
        """Validate, then compute: this strategy alone, without lowerings. Raises Refused."""
        self.validate_constraints(query=query, key=key, value=value, **kwargs)
        problem = problem_of_call(query=query, key=key, value=value, **kwargs)
        words = ("attn_mask", "is_causal", "causal_alignment", "window")
        mask = mask_of_call(**{name: kwargs[name] for name in words if name in kwargs})
        mask = savable(mask) if problem.needs_grad else mask
        return self.compute_attention(query, key, value, **static_arguments(problem), **mask_arguments(mask))

    @classmethod
    def has_own_validation(cls) -> bool:
        """Whether ``validate_constraints`` was overridden, and so has to be asked before each call."""
        return cls.validate_constraints is not AttentionStrategy.validate_constraints

    @classmethod
    def describe(cls) -> str:
        """The first line of the module's or the class's docstring, for tables."""
        text = cls.__doc__ or getattr(inspect.getmodule(cls), "__doc__", None) or ""
        return text.strip().partition("\n")[0]


def static_arguments(problem: AttentionProblem) -> dict[str, Any]:
    """The keyword arguments of ``compute_attention`` that follow from the problem alone; only what is not default."""
    mask = problem.mask
    window = mask.window
    every: dict[str, Any] = {
        "is_causal": mask.causal is not None,
        "causal_alignment": mask.causal if mask.causal == "bottom_right" else None,
        "window": window[:2] if window else None,
        "window_alignment": window[2] if window and window[2] == "bottom_right" else None,
        "dropout_p": problem.dropout_p or None,
        "scale": problem.scale,
        "enable_gqa": problem.heads != problem.kv_heads,
        "softcap": problem.softcap,
        "return_lse": problem.needs_lse,
    }
    return {name: value for name, value in every.items() if value is not None and value is not False} | dict(
        problem.options
    )


def mask_arguments(mask: Mask | None) -> dict[str, Any]:
    """The keyword arguments of ``compute_attention`` that are tensors of the mask."""
    if mask is None:
        return {}
    arguments: dict[str, Any] = {}
    if mask.dense is not None:
        arguments["attn_mask"] = of_rank_four(mask.dense)
    if mask.bias is not None:
        arguments["attn_mask" if mask.dense is None else "attn_bias"] = of_rank_four(mask.bias)
    if mask.padding is not None:
        arguments["key_padding"] = mask.padding
    if mask.rows is not None:
        arguments["query_padding"] = mask.rows
    if mask.varlen is not None:
        arguments["varlen"] = mask.varlen
    if mask.block is not None:
        arguments["block_mask"] = mask.block
    return arguments


def unit_strides(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same tensors, copied where neighbouring features are not neighbours in memory.

    Torch's operators read such tensors as if they were (2.13: CPU flash gives noise); SDPA checks before it calls them.
    """
    return tuple(t if t.stride(-1) == 1 else t.clone(memory_format=torch.contiguous_format) for t in tensors)


def packed_arguments(varlen: Varlen, query: Tensor, key: Tensor) -> dict[str, Any]:
    """What flash-attn's packed functions want to know of a packing: int32 ends, and the longest sequences.

    A longest sequence that the packing does not state is read from its ends, which waits for the GPU; under
    ``torch.compile``, where nothing can be read, it is T, which costs blocks of threads that find nothing to do.
    """
    ends = [cu.to(device=query.device, dtype=torch.int32) for cu in (varlen.cu_seqlens_q, varlen.cu_seqlens_k)]
    longest = [varlen.max_seqlen_q, varlen.max_seqlen_k]
    if None in longest and torch.compiler.is_compiling():
        longest = [len(query), len(key)]
    elif None in longest:
        longest = torch.stack([cu.diff().max() for cu in ends]).tolist()
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    return dict(zip(names, [*ends, *longest], strict=True))


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _short(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
