"""Kernels compiled for GPUs that are not here, and what the machine code says of them.

Arguments are specialised as Triton's own launcher does it: pointers and integers that 16 divides are marked so, an
integer 1 is a constant. The cache of compiled kernels is Triton's.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from heedful.kernels import backward, forward, fp8, int8, streamed
from heedful.kernels.candidates import SHARED as SHARED_OF_ROWS
from heedful.kernels.jit import int8 as int8_kernels
from heedful.kernels.jit.forward import forward_kernel
from heedful.kernels.jit.streamed import streamed_kernel
from heedful.kernels.operands import Call, Packing, call_of
from heedful.kernels.tiles import DESCRIPTORS, FP8, Tile, known

HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")
# Shared memory of a program, in KiB, and the instructions that multiply matrices: on Turing Triton 3.7 uses none.
SHARED = {target: SHARED_OF_ROWS[known(target)] for target in TARGETS}
MATRIX = {**dict.fromkeys(TARGETS, ("mma.sync",)), "sm_75": (), "sm_90": ("wgmma.mma_async",),
          "sm_100": ("tcgen05.mma",), "gfx942": ("v_mfma",), "gfx1100": ("v_wmma",)}  # fmt: skip
WITHOUT_SPILLS = ("sm_80", "sm_90", "sm_100")  # where a spill in a shipped configuration is a fault
_TYPES = {HALF: "*fp16", BF16: "*bf16", FLOAT: "*fp32", torch.uint8: "*u8", torch.int32: "*i32", torch.int8: "*i8",
          torch.float64: "*fp64", torch.int64: "*i64", torch.float8_e4m3fn: "*fp8e4nv"}  # fmt: skip
_MATRIX = r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_(?:mfma|smfmac|wmma|swmmac)_\w+)"
_EIGHT_BITS = r"\b(?:(?:mma\.sync|wgmma\.mma_async)\S*\.s8\.s8\b|tcgen05\.mma\S*kind::i8\b|v_(?:mfma|wmma)_i32_\w+8\b)"
_FP8 = r"\b(?:(?:mma\.sync|wgmma\.mma_async)\S*\.e4m3\.e4m3\b|tcgen05\.mma\S*kind::f8f6f4\b)"
_STORED = re.compile(r"ttg\.local_alloc %\S+ :")  # of registers; a buffer for loads has no operand
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")


@dataclass(frozen=True)
class Compiled:
    """What became of a kernel: registers of a thread, bytes that it spills, shared memory, matrix instructions.

    ``tile``: queries, keys, warps and stages. ``exact``: float32, which no matrix instruction computes in full, or
    nothing to multiply. ``eight_bit``: how many of them multiply int8; None where there is no int8. ``fp8``: likewise.
    ``still``: on Hopper, how many operands of two parts lie in one place from step to step of a loop, where ptxas mixes
    them up (``tiles.is_sound``).
    """

    kernel: str
    target: str
    tile: tuple[int, ...]
    registers: int
    spilled: int
    shared: int
    matrix: Mapping[str, int]
    exact: bool = False
    eight_bit: int | None = None
    fp8: int | None = None
    still: int = 0

    @property
    def faults(self) -> list[str]:
        """What keeps it from being shipped, in words."""
        name = f"{self.kernel} for {self.target}"
        found = []
        if self.spilled and self.target in WITHOUT_SPILLS:
            found.append(
                f"{name} spills {self.spilled} bytes: give its row of tiles.json a smaller tile, or more warps"
            )
        if self.shared > SHARED[self.target] * 1024:
            found.append(f"{name} wants {self.shared} bytes of shared memory; there are {SHARED[self.target]} KiB")
        wanted = MATRIX[self.target] if not self.exact else ()
        if wanted and not any(word.startswith(wanted) for word in self.matrix):
            found.append(f"{name} has no {' or '.join(wanted)}: {dict(self.matrix)}")
        if self.eight_bit == 0:
            found.append(f"{name} multiplies int8 by other instructions than the matrix ones for it")
        if self.fp8 == 0:
            found.append(f"{name} multiplies fp8 by other instructions than the matrix ones for it")
        if self.still:
            found.append(f"{name} has {self.still} operands that lie still in loops: its code may be wrong")
        return found


@dataclass(frozen=True)
class Variant:
    """A kernel as it is launched: ``make`` gives, for an architecture, its function, arguments, options and tile."""

    name: str
    targets: tuple[str, ...]
    make: Callable[[str], tuple[Any, dict[str, Any], dict[str, Any], Tile]]


def target_of(name: str) -> GPUTarget:
    """``sm_90`` or ``gfx942`` as Triton's target."""
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)


def compile_for(
    target: str, name: str, kernel: Any, arguments: Mapping[str, Any], options: Mapping[str, Any], tile: Tile
) -> Compiled:
    """Compile a kernel with arguments as it would be launched with. Raises what Triton's compiler raises."""
    built = triton.compile(source_of(kernel, arguments), target=target_of(target), options=dict(options))
    if target.startswith("sm_"):
        registers, spilled = _of_cubin(built.asm["cubin"])
        text = built.asm["ptx"]
    else:
        text = built.asm["amdgcn"]
        registers, spilled = _of_amdgcn(text)
    found = re.findall(_MATRIX, text)
    matrix = {word: found.count(word) for word in sorted(set(found))}
    multiplied = [arguments.get(name) for name in ("query", "value")]
    exact = any(each is None or each.dtype == FLOAT for each in multiplied)
    eight_bit = len(re.findall(_EIGHT_BITS, text)) if arguments.get("query_scales") is not None else None
    fp8 = len(re.findall(_FP8, text)) if arguments.get("value_scales") is not None else None
    shared = built.metadata.shared
    in_parts = bool(arguments.get("D1") or arguments.get("E1"))
    still = still_operands(built.asm["ttgir"]) if "wgmma" in text and in_parts else 0
    return Compiled(name, target, tuple(tile[:4]), registers, spilled, shared, matrix, exact, eight_bit, fp8, still)


def still_operands(ttgir: str) -> int:
    """How many times a loop of this code, as Triton's compiler has it before the last steps, stores to shared memory
    what its loads did not bring there ahead.
    """
    depth, loops, found = 0, [], 0
    for line in ttgir.splitlines():
        if "scf.for" in line:
            loops.append(depth)
        found += bool(loops) and _STORED.search(line) is not None
        depth += line.count("{") - line.count("}")
        while loops and depth <= loops[-1]:
            loops.pop()
    return found


def every() -> list[tuple[str, str]]:
    """Each compilation: the kernel's name and the target."""
    return [(variant.name, target) for variant in variants() for target in variant.targets]


def compile_variant(name: str, target: str) -> Compiled:
    """One of ``every``."""
    variant = next(variant for variant in variants() if variant.name == name)
    return compile_for(target, name, *variant.make(target))


def triton_version() -> str:
    """The version that compiles here."""
    return str(triton.__version__)


def source_of(kernel: Any, arguments: Mapping[str, Any]) -> ASTSource:
    """The kernel's source, specialised for arguments. Raises KeyError where one is missing."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        kind, aligned = _specialised(value, parameter)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = value
        elif aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def _specialised(value: Any, parameter: Any) -> tuple[str, bool]:
    """An argument's type, and whether 16 is known to divide it."""
    if parameter.is_constexpr or value is None:
        return "constexpr", False
    if isinstance(value, Tensor):
        return _TYPES[value.dtype], True
    if isinstance(value, float):
        return "fp32", False
    if value == 1 and not parameter.do_not_specialize:
        return "constexpr", False
    return "i32" if -(1 << 31) <= value < 1 << 31 else "i64", value % 16 == 0 and not parameter.do_not_specialize


def _of_cubin(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of the stack: kernels without arrays of their own have one for spills alone."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(file)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = _USAGE.search(text)
    if usage is None:
        raise ValueError(f"cuobjdump: got {text!r}; its output has another form than REG:… STACK:…")
    return int(usage[1]), int(usage[2])


def _of_amdgcn(text: str) -> tuple[int, int]:
    """Vector registers, and bytes that are spilled from them."""
    count = {name: int(number) for name, number in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s*(\d+)", text)}
    return count["vgpr_count"], 4 * count["vgpr_spill_count"]


def variants() -> Iterator[Variant]:
    """The kernels that are compiled for GPUs that are not here; each is one compilation a target."""
    everywhere, large = TARGETS, WITHOUT_SPILLS
    yield _forward("forward d64 fp16", everywhere, 64)
    yield _forward("forward d128 fp16 causal", everywhere, 128, causal=True)
    yield _forward("forward d72 bf16 bias, padding", large, 72, dtype=BF16, biased=True, padded=True)
    yield _forward(
        "forward d160 bf16 varlen, window, lse", ("sm_80", "sm_90", "gfx942"), 160, dtype=BF16, packed=True, window=True
    )
    yield _forward("forward d256 bf16", ("sm_80", "sm_90"), 256, dtype=BF16)
    yield _forward("forward d64 fp32 bool mask", ("sm_90",), 64, dtype=FLOAT, dense=True)
    yield _streamed("descriptors d128 bf16", ("sm_90", "sm_100"), 128, Tile(128, 128, 8, 3, DESCRIPTORS), dtype=BF16)
    for kernel in ("keys", "queries"):
        yield _backward(f"backward of {kernel} d96 fp16", kernel, large, 96)
        yield _backward(f"backward of {kernel} d128 fp16 causal", kernel, (*large, "gfx942"), 128, causal=True)
    yield _backward("backward of a bias d96 fp16", "bias", ("sm_90",), 96, biased=True)
    yield _forward("int8 d64 fp16", (*large, "gfx942"), 64, eight_bits=True)
    yield _forward("int8 d128 fp16 causal", large, 128, eight_bits=True, causal=True)
    yield _forward("int8 d72 bf16 bias, padding, lse", ("sm_90",), 72, eight_bits=True, dtype=BF16, biased=True,
                   padded=True, lse=True)  # fmt: skip
    for kernel in ("seen", "sums", "keys", "queries"):
        yield _codes(f"int8 {kernel} d128 bf16 bias, padding", ("sm_90",), kernel)
    yield _forward("int8, fp8 values d128 bf16 causal, lse", ("sm_89", "sm_90", "sm_100", "sm_120"), 128, values=True,
                   dtype=BF16, causal=True, lse=True)  # fmt: skip


def _forward(
    name: str, targets: tuple[str, ...], head_dim: int, *, eight_bits: bool = False, values: bool = False,
    lse: bool = False, **features: Any,
) -> Variant:  # fmt: skip
    """The forward kernel, with scores in ``eight_bits``, and its ``values`` as well."""

    def make(architecture: str) -> tuple[Any, dict[str, Any], dict[str, Any], Tile]:
        call = sample_call(head_dim, **features)
        tile = forward.tile_of(call, architecture, FP8 if values else 8 if eight_bits else 0)
        with_lse = lse or call.packing is not None
        out, logs = torch.empty_like(call.query), call.query.new_empty(call.sizes[:3], dtype=FLOAT)
        spans = None if call.keep is None else call.keep.new_empty((call.sizes[0], 3), dtype=torch.int32)
        codes = int8.room_for(call, tile, with_shift=with_lse) if eight_bits or values else None
        if codes is not None and values:
            codes = replace(codes, values=fp8.room_for(call, tile))
        given = forward.arguments(call, out, logs if with_lse else None, spans, codes)
        return forward_kernel, {**given, **forward.constants(call, tile, codes)}, forward.options(tile), tile

    return Variant(name, targets, make)


def _streamed(name: str, targets: tuple[str, ...], head_dim: int, tile: Tile, **features: Any) -> Variant:
    """The forward kernel over descriptors, by one of the tiles that ``candidates`` has."""

    def make(_architecture: str) -> tuple[Any, dict[str, Any], dict[str, Any], Tile]:
        call = sample_call(head_dim, **features)
        given = {**forward.arguments(call, torch.empty_like(call.query), None, None), **forward.constants(call, tile)}
        return streamed_kernel, streamed.arguments(call, tile, given), forward.options(tile), tile

    return Variant(name, targets, make)


def _codes(name: str, targets: tuple[str, ...], kernel: str) -> Variant:
    """One of the kernels that make codes."""

    def make(architecture: str) -> tuple[Any, dict[str, Any], dict[str, Any], Tile]:
        call = sample_call(128, dtype=BF16, biased=True, padded=True)
        tile = forward.tile_of(call, architecture, 8)
        codes = int8.room_for(call, tile, with_shift=True)
        sums = codes.key_scales.new_empty((call.sequences, call.key.shape[1], 8, 128))
        means, seen = sums[:, :, 0], codes.key.new_empty(codes.key.shape[:3], dtype=torch.uint8)
        given = {
            "seen": lambda: int8.seen_arguments(call, tile, seen),
            "sums": lambda: int8.sums_arguments(call, seen, sums, sums[..., 0]),
            "keys": lambda: int8.keys_arguments(call, tile, codes, seen, means),
            "queries": lambda: int8.queries_arguments(call, tile, codes, means),
        }[kernel]()
        function = getattr(int8_kernels, f"{'quantise_' * (kernel in ('keys', 'queries'))}{kernel}_kernel")
        return function, given, int8.options_for(call), tile

    return Variant(name, targets, make)


def _backward(name: str, kernel: str, targets: tuple[str, ...], head_dim: int, **features: Any) -> Variant:
    def make(architecture: str) -> tuple[Any, dict[str, Any], dict[str, Any], Tile]:
        call = sample_call(head_dim, **features)
        tiles = backward.tiles_of(call, architecture)
        lse = call.query.new_empty(call.sizes[:3], dtype=FLOAT)
        known = backward.Known(call.query, lse, None if call.bias is None else lse, call.query)
        given = backward.Given(call, known, lse, None)
        if kernel == "keys":
            launch = backward.keys_pass(given, call.key, call.value, tiles.keys)
        elif kernel == "queries":
            launch = backward.queries_pass(given, call.query, tiles.queries)
        else:
            assert call.bias is not None
            launch = backward.bias_pass(given, call.bias, (1, *call.bias.shape[1:]), tiles.queries)
        function, _, arguments, options = launch
        return function, arguments, options, tiles.keys if kernel == "keys" else tiles.queries

    return Variant(name, targets, make)


def sample_call(
    head_dim: int,
    *,
    dtype: torch.dtype = HALF,
    causal: bool = False,
    window: bool = False,
    dense: bool = False,
    biased: bool = False,
    padded: bool = False,
    packed: bool = False,
) -> Call:
    """A call on the meta device, of tensors as models have them: (B, S, H, D) in memory."""
    batch, heads, length = 1 if packed else 2, 16, 4096

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    ends = empty(5, dtype=torch.int32)
    return call_of(
        *(empty(batch, length, heads, head_dim).transpose(1, 2) for _ in range(3)),
        bands=((None, 0, "top_left"),) if causal else ((256, 256, "bottom_right"),) if window else (),
        dense=empty(1, 1, length, length, dtype=torch.bool) if dense else None,
        bias=empty(1, heads, length, length) if biased else None,
        keep=empty(batch, length, dtype=torch.bool) if padded else None,
        packing=Packing(ends, ends, 2048, 2048, tidy=True) if packed else None,
    )
