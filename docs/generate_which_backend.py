"""The tables of docs/which-backend.md: what auto would do on devices that are not at hand, from limits and preferences.

    python docs/generate_which_backend.py            # writes them anew
    python docs/generate_which_backend.py --check    # changes nothing; exit status 1 where they are out of date

Nothing is measured and nothing is imported of what is looked at: facts are pretended, and ``explain``'s own decision is
asked. Plug-ins are left out, and torch is taken as the version below whatever is installed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from heedful import AttentionDispatcher, AttentionStrategyFactory, Facts, Policy, Refusal
from heedful.cases import Case, by_name
from heedful.cli.problems import mask_of, shapes_of_case, words_of_case
from heedful.doctor.ways import WAYS
from heedful.facts import DeviceFacts
from heedful.problem import AttentionProblem, problem_for_shapes
from heedful.select import Plan, Verdict
from heedful.sources import Package
from heedful.strategy import AttentionStrategy

PAGE = Path(__file__).resolve().parent / "which-backend.md"
BEGIN, END = "<!-- devices: by docs/generate_which_backend.py -->", "<!-- end of devices -->"
TORCH = "2.13.0"
BARE = {"torch": TORCH, "torch.nn.attention.varlen": TORCH}
LETTERS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
ELSEWHERE = ("device", "architecture")  # refused for these, a backend is another maker's
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
FACTORY = AttentionStrategyFactory(plugins=False)


@dataclass(frozen=True)
class Device:
    """A generation: its name and examples, the device that stands for it, and the dtype one computes in there."""

    name: str
    examples: str
    short: str
    dtype: torch.dtype


DEVICES = (
    Device("Turing", "RTX 20, GTX 16, T4", "sm_75", HALF),
    Device("Ampere", "A100; RTX 30 (`sm_86`) is alike here", "sm_80", BRAIN),
    Device("Ada", "RTX 40, L4, L40S", "sm_89", BRAIN),
    Device("Hopper", "H100, H200", "sm_90", BRAIN),
    Device("Blackwell, datacentre", "B200", "sm_100", BRAIN),
    Device("Blackwell, consumer", "RTX 50", "sm_120", BRAIN),
    Device("CDNA3", "MI300X", "gfx942", BRAIN),
    Device("RDNA3", "RX 7900", "gfx1100", BRAIN),
    Device("Apple", "M1 and later", "mps", HALF),
    Device("CPU", "any", "cpu", FULL),
)
KINDS = {  # kind of call: the named case that stands for it
    "UNet self, SD 1.5": "sd15-self-64",
    "UNet self, SDXL": "sdxl-self-64",
    "UNet cross, SDXL": "sdxl-cross-64",
    "joint, SD3": "sd3-medium-joint",
    "joint, FLUX.1": "flux1-joint",
    "cross, padded text, PixArt": "pixart-sigma-cross",
    "video self, Wan 2.1": "wan21-14b-self",
    "video joint, padded text, HunyuanVideo": "hunyuan-video-joint",
    "text encoder, CLIP": "clip-l-text",
    "VAE mid-block": "vae-mid-128",
    "LLM prefill, Llama 3": "llama3-8b-prefill-4k",
    "LLM decode, Llama 3": "llama3-8b-decode-4k",
}


@dataclass(frozen=True)
class Answer:
    """What auto does with one call. ``first``: what it begins with; ``rivals``: what it measures that against with
    nothing installed; ``more``: what it measures, too, where that backend's package is there; ``coarse``: approximate
    ones that take the call.
    """

    first: str
    rivals: tuple[str, ...]
    more: tuple[str, ...]
    coarse: tuple[str, ...]


def facts_of(device: Device, packages: Mapping[str, str] | None) -> Facts:
    """A machine with that device and these packages; with all for None."""
    made = DeviceFacts.parse(device.short)
    return Facts(TORCH, "3.12.0", "Linux", {f"{made.type}:0": made, made.type: made}, packages)


def problem_of(case: Case, device: Device) -> AttentionProblem:
    """A named case as a call there, its mask read by the analysis."""
    shapes = shapes_of_case(case, "BHSD")
    mask = mask_of(words_of_case(case), case.kept_keys, shapes, device.dtype, analysed=True)
    return problem_for_shapes(
        shapes.query,
        shapes.key,
        shapes.value,
        dtype=device.dtype,
        device=DeviceFacts.parse(device.short),
        mask=mask,
        enable_gqa=shapes.enable_gqa,
    )


class Machine:
    """A device with nothing installed, and with everything."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.strategies = FACTORY.strategies()
        self._bare = self._dispatcher(BARE)
        self._full = self._dispatcher(None)
        self._with = {name: self._dispatcher(packages) for name, packages in _packages(self.strategies).items()}

    def _dispatcher(self, packages: Mapping[str, str] | None) -> AttentionDispatcher:
        return AttentionDispatcher(FACTORY, facts=facts_of(self.device, packages), policy=Policy())

    def verdicts(self, problem: AttentionProblem) -> dict[str, Verdict]:
        """Every backend's, with everything installed."""
        return {one.name: one for one in self._full.plan(problem, tuple(self.strategies)).verdicts}

    def answer(self, problem: AttentionProblem, verdicts: Mapping[str, Verdict]) -> Answer:
        """What auto does with a call."""
        bare = self._bare.plan(problem, "auto")
        takes = [name for name in self._with if verdicts[name].accepts]
        exact = [name for name in takes if self.strategies[name].exactness == "exact"]
        more = (name for name in exact if name in _names(self._with[name].plan(problem, "auto")))
        return Answer(_first(bare), _rivals(bare), tuple(more), tuple(name for name in takes if name not in exact))


def _packages(strategies: Mapping[str, AttentionStrategy]) -> dict[str, dict[str, str]]:
    """For each backend that needs a package, one backend a package: what is there where that one is installed."""
    found: dict[str, dict[str, str]] = {}
    seen = {"torch", "torch_npu", "torch_xla"}
    for name, strategy in strategies.items():
        source = package_of(strategy)
        if source is not None and source.distribution not in seen:
            seen.add(source.distribution)
            found[name] = {**BARE, source.module: ""}
    return found


def package_of(strategy: AttentionStrategy) -> Package | None:
    """The package that a backend's kernels come in."""
    return next((source for source in strategy.sources if isinstance(source, Package)), None)


def _names(plan: Plan) -> tuple[str, ...]:
    return tuple(dict.fromkeys(one.name for one in plan.contenders))


def _rivals(plan: Plan) -> tuple[str, ...]:
    """The others by name; of the one that it begins with, the same with other rewrites."""
    if plan.chosen is None:
        return ()
    same = [one.label for one in plan.contenders if one.name == plan.backend and one.label != plan.chosen.label]
    return (*same, *(name for name in _names(plan) if name != plan.backend))


def _first(plan: Plan) -> str:
    if plan.chosen is None:
        return plan.backend
    steps = ", ".join(step.name for step in plan.chosen.steps)
    return f"`{plan.backend}`" + (f" after {steps}" if steps else "")


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "–"


def section(device: Device) -> str:
    """A device's section."""
    machine = Machine(device)
    problems = {kind: problem_of(by_name(name), device) for kind, name in KINDS.items()}
    verdicts = {kind: machine.verdicts(problem) for kind, problem in problems.items()}
    answers = {kind: machine.answer(problem, verdicts[kind]) for kind, problem in problems.items()}
    lines = [f"### {device.name}", "", f"{device.examples}: asked as `{device.short}`, in {LETTERS[device.dtype]}.", ""]
    lines += [*_table(answers), "", *_installs(machine, answers), *_reasons(machine, verdicts), ""]
    return "\n".join(lines)


def _table(answers: Mapping[str, Answer]) -> Iterator[str]:
    """A row for all calls that get the same answer; what most of them get stands last."""
    rows: dict[Answer, list[str]] = {}
    for kind, answer in answers.items():
        rows.setdefault(answer, []).append(kind)
    yield "| call | nothing installed: auto begins with | and measures it against | a package adds | approximate |"
    yield "|---|---|---|---|---|"
    for answer, kinds in sorted(rows.items(), key=lambda row: len(row[1])):
        most = len(kinds) > len(answers) / 2
        word = ("every call" if len(rows) == 1 else "every other call") if most else "; ".join(kinds)
        cells = (word, answer.first, _code(answer.rivals), _code(answer.more), _code(answer.coarse))
        yield f"| {' | '.join(cells)} |"


def _installs(machine: Machine, answers: Mapping[str, Answer]) -> Iterator[str]:
    """How to get what would be measured, too."""
    useful = {name for answer in answers.values() for name in (*answer.more, *answer.coarse)}
    if not useful:
        yield "No package adds anything here."
    for name, strategy in machine.strategies.items():
        source = package_of(strategy)
        if name in useful and source is not None:
            coarse = f" ({strategy.exactness}: by name, or where `max_error` allows it)"
            yield f"- `{name}`{'' if strategy.exactness == 'exact' else coarse}: {_install(name, source)}"


def _install(name: str, source: Package) -> str:
    if source.distribution in WAYS:
        return f"`heedful install {name}`"
    first, _, rest = source.install.partition("; ")
    told = f"`{first}`" if first.startswith("pip ") else first
    return f"{told}; {rest}" if rest else told


def _reasons(machine: Machine, verdicts: Mapping[str, Mapping[str, Verdict]]) -> Iterator[str]:
    """Why the others do not take a call: a line for each reason; other makers' in one line at the end."""
    elsewhere: list[str] = []
    found: dict[str, list[str]] = {}
    for name in machine.strategies:
        refused = {kind: every[name].refusals[0] for kind, every in verdicts.items() if not every[name].accepts}
        if len(refused) == len(verdicts) and {one.field for one in refused.values()} <= set(ELSEWHERE):
            elsewhere.append(name)
            continue
        for reason in dict.fromkeys(map(_told, refused.values())):
            kinds = [kind for kind, refusal in refused.items() if _told(refusal) == reason]
            most = "every call" if len(kinds) == len(verdicts) else "every other call"
            where = most if len(kinds) > len(verdicts) / 2 else "; ".join(kinds)
            found.setdefault(f"{reason} ({where})", []).append(name)
    yield ""
    yield "Why not the others:"
    yield ""
    for reason, names in found.items():
        yield f"- {_code(names)}: {reason}"
    yield f"- for other devices: {_code(elsewhere)}"


def _told(refusal: Refusal) -> str:
    return f"{refusal.field} is {refusal.observed}, it takes {refusal.required}"


def tables() -> str:
    """All sections."""
    return "\n".join(section(device) for device in DEVICES).rstrip()


def renewed(text: str) -> str:
    """The page with its sections. Raises ValueError where a mark is missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the marks are missing: {BEGIN} and {END}")
    return f"{before}{begin}\n\n{tables()}\n\n{end}{after}"


def main() -> int:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where it is out of date")
    wanted = parser.parse_args()
    text = PAGE.read_text("utf-8")
    new = renewed(text)
    if new == text:
        return 0
    print(f"{PAGE.name}: {'out of date' if wanted.check else 'written'}")
    if not wanted.check:
        PAGE.write_text(new, "utf-8")
    return 1 if wanted.check else 0


if __name__ == "__main__":
    sys.exit(main())
