"""The tables of backends in the guides, from the registry: what stands between two marks is written by this script.

    python docs/generate_backends.py            # writes the tables anew
    python docs/generate_backends.py --check    # changes nothing; exit status 1 where one is out of date
    python docs/generate_backends.py --print    # prints docs/backends.md's table

Plug-ins are left out: the tables say what is in this repository.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from heedful import AttentionStrategy, AttentionStrategyFactory, Limits
from heedful.facts import DeviceFacts
from heedful.problem import problem_for_shapes
from heedful.sources import Source

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- backends: by docs/generate_backends.py -->", "<!-- end of backends -->"
LETTERS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
KINDS = ("causal", "window", "key_padding", "varlen", "dense", "bias", "block")
ENGLISH = {
    "head": "| name | other names | where it runs | exactness |",
    "everywhere": "everywhere",
    "exact": "exact",
    "quantised": "quantised",
    "and": "; ",
    "npu": "Ascend NPU",
    "xla": "TPU (XLA)",
    "xpu": "Intel XPU",
}
CHINESE = {
    **ENGLISH,
    "head": "| 名称 | 其他名称 | 运行在哪里 | 精确性 |",
    "everywhere": "所有设备",
    "exact": "精确",
    "quantised": "量化",
    "and": "；",
    "npu": "昇腾 NPU",
    "xla": "TPU（XLA）",
    "xpu": "英特尔 XPU",
}


def limits_of(strategy: AttentionStrategy) -> tuple[Limits, ...]:
    """All of a strategy's limits."""
    return strategy.limits if isinstance(strategy.limits, tuple) else (strategy.limits,)


def where(strategy: AttentionStrategy, words: Mapping[str, str]) -> str:
    """The devices that it runs on."""
    every = limits_of(strategy)
    if any("*" in limits.devices for limits in every):
        return words["everywhere"]
    places = [place for limits in every for device in limits.devices for place in _at(device, limits, words)]
    if "CPU" in places and _refuses_a_cpu(strategy):
        places = [place for place in places if place != "CPU"]
    return words["and"].join(places)


def _refuses_a_cpu(strategy: AttentionStrategy) -> bool:
    """Whether it takes a CPU's tensors only where something plays the GPU, as Triton's interpreter does for tests."""
    shape = (1, 1, 16, 64)
    plain = problem_for_shapes(shape, shape, shape, dtype=torch.float32, device=DeviceFacts("cpu", "cpu"))
    return any(refusal.field == "device" for refusal in strategy.refusals(plain))


def _at(device: str, limits: Limits, words: Mapping[str, str]) -> list[str]:
    if device != "cuda":
        return [words.get(device, device.upper())]
    places = []
    least, most = (
        None if one is None else f"{one[0]}.{one[1]}" for one in (limits.min_capability, limits.max_capability)
    )
    if least or most or not limits.architectures:
        bound = f" {least}" if least == most else f" {least}–{most}" if most else f" ≥ {least}"
        places.append(f"CUDA{bound if least else ''}")
    if limits.architectures:
        few = limits.architectures != ("gfx",) and len(limits.architectures) < 3
        places.append(f"ROCm {', '.join(limits.architectures)}" if few else "ROCm")
    return places


def _code(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _source(source: Source) -> str:
    least = getattr(source, "minimum", "")
    return f"{source} ≥ {least}" if least else str(source)


def short_row(name: str, strategy: AttentionStrategy, words: Mapping[str, str]) -> str:
    """A README's row."""
    exactness = words.get(strategy.exactness, strategy.exactness)
    return f"| `{name}` | {_code(list(strategy.pins()))} | {where(strategy, words)} | {exactness} |"


def long_row(name: str, strategy: AttentionStrategy) -> str:
    """A row of docs/backends.md: what the kernel itself takes, on its main device."""
    limits = limits_of(strategy)[-1]
    masks = ", ".join(kind.replace("_", " ") for kind in KINDS if kind in limits.masks) or "none"
    features = {"gradient": limits.backward, "LSE": limits.lse, "dropout": limits.dropout, "softcap": limits.softcap,
                "grouped heads": limits.gqa, "compile": limits.compile}  # fmt: skip
    has = ", ".join(word for word, there in features.items() if there) or "none"
    dim = "any" if limits.max_head_dim is None else f"≤ {limits.max_head_dim}"
    dtypes = ", ".join(LETTERS[dtype] for dtype in limits.dtypes)
    sources = "; ".join(map(_source, strategy.sources)) or "torch"
    cells = (
        f"[`{name}`](#{name})",
        where(strategy, ENGLISH),
        sources,
        dtypes,
        dim,
        "/".join(limits.layouts),
        masks,
        has,
    )
    return f"| {' | '.join(cells)} |"


def short(words: Mapping[str, str]) -> str:
    """A README's table."""
    rows = [short_row(name, strategy, words) for name, strategy in strategies().items()]
    return "\n".join([words["head"], "|---|---|---|---|", *rows])


def long() -> str:
    """The table of docs/backends.md."""
    head = "| name | where | kernels from | dtypes | head dim | layouts | masks it takes itself | beside |"
    rows = [long_row(name, strategy) for name, strategy in strategies().items()]
    return "\n".join([head, "|---|---|---|---|---|---|---|---|", *rows])


def strategies() -> Mapping[str, AttentionStrategy]:
    """The ones of this repository."""
    return AttentionStrategyFactory(plugins=False).strategies()


TABLES: dict[str, Callable[[], str]] = {
    "README.md": lambda: short(ENGLISH),
    "README.zh.md": lambda: short(CHINESE),
    "docs/backends.md": long,
}


def renewed(text: str, table: str, marks: tuple[str, str] = (BEGIN, END)) -> str:
    """A guide's text with the table between its marks. Raises ValueError where a mark is missing."""
    before, begin, rest = text.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not begin or not end:
        raise ValueError(f"the marks are missing: {marks[0]} and {marks[1]}")
    return f"{before}{begin}\n{table}\n{end}{after}"


def stale() -> list[str]:
    """The guides whose table is out of date."""
    return [name for name, table in TABLES.items() if (text := _read(name)) != renewed(text, table())]


def _read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def main() -> int:
    """Write, check or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where a table is out of date")
    parser.add_argument("--print", action="store_true", help="print docs/backends.md's table")
    wanted = parser.parse_args()
    if wanted.print:
        print(long())
        return 0
    old = stale()
    for name in old:
        print(f"{name}: {'out of date' if wanted.check else 'written'}")
        if not wanted.check:
            (ROOT / name).write_text(renewed(_read(name), TABLES[name]()), "utf-8")
    return 1 if old and wanted.check else 0


if __name__ == "__main__":
    sys.exit(main())
