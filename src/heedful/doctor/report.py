"""What the doctor found: the machine, every backend, what is broken and why, and the command for this very machine.

``examine()`` makes the report; ``str()`` of it is the page, without colours.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from heedful.doctor.advice import Advice, advise
from heedful.doctor.decision import AUTO, Strategies, decide, refusals_of, troubled
from heedful.doctor.environment import Environment, Found, canonical, numbers
from heedful.doctor.look import look
from heedful.doctor.plans import Decision
from heedful.doctor.ways import LOOKED_FOR
from heedful.factory import AttentionStrategyFactory
from heedful.facts import DeviceFacts
from heedful.sources import Hub, Package
from heedful.strategy import AttentionStrategy

State = Literal["usable", "broken", "too old", "missing", "not for this device"]
PINS_SHOWN = "pins.txt"
_WIDTH = 100
_FEATURES = ("softcap", "lse", "dropout", "backward")
_SAID = {"lse": "the LSE", "backward": "gradients"}


@dataclass(frozen=True)
class Row:
    """One backend: what it is here, and ``text``: why, or what it would add."""

    name: str
    state: State
    text: str


@dataclass(frozen=True)
class Trouble:
    """A package that does not work: what it said, the advice for that, and what to do on this machine, if known."""

    package: Found
    advice: Advice | None
    here: str = ""

    @property
    def text(self) -> str:
        """What happened, in its own words."""
        return self.package.text


@dataclass(frozen=True)
class Report:
    """All that `heedful doctor` says."""

    environment: Environment
    rows: tuple[Row, ...]
    troubles: tuple[Trouble, ...]
    decision: Decision

    def sections(self) -> Mapping[str, list[tuple[str, str]]]:
        """The page: headings, and under each the lines, a label and a text."""
        broken = [(str(one.package), _told(one)) for one in self.troubles]
        return {
            "This machine": _facts(self.environment),
            "Backends": [(row.name, f"{row.state}: {row.text}") for row in self.lines()],
            "What is broken": broken or [("nothing", "every installed package with kernels could be imported")],
            "What to do": advised(self.decision, self.environment),
        }

    def lines(self) -> list[Row]:
        """The rows of the page: backends that one and the same reason keeps from this device share a line."""
        away = [row for row in self.rows if row.state == "not for this device"]
        reasons = {row.text: [other.name for other in away if other.text == row.text] for row in away}
        shared = [Row("–", "not for this device", f"{text}: {', '.join(names)}") for text, names in reasons.items()]
        return [*(row for row in self.rows if row not in away), *shared]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        troubles = [
            {
                "package": asdict(one.package),
                "advice": None if one.advice is None else asdict(one.advice),
                "here": one.here,
            }
            for one in self.troubles
        ]
        return {
            "environment": self.environment.to_dict(),
            "backends": [asdict(row) for row in self.rows],
            "troubles": troubles,
            "decision": self.decision.to_dict(self.environment, PINS_SHOWN),
        }

    def __str__(self) -> str:
        lines = ["heedful doctor"]
        for heading, entries in self.sections().items():
            room = max(len(label) for label, _ in entries) + 2
            lines += ["", heading]
            for label, text in entries:
                first, *rest = _wrapped(text, _WIDTH - room - 2) or [""]
                lines.append(f"  {label:<{room}}{first}".rstrip())
                lines += [f"  {'':<{room}}{line}" for line in rest]
        return "\n".join(lines)


def examine(
    environment: Environment | None = None,
    strategies: Strategies | None = None,
    *,
    looked: Callable[[Strategies], Environment] = look,
) -> Report:
    """Look at this machine, or take one as given, and say what its backends are and need.

    Takes a few seconds: each package with kernels is imported in a process of its own.
    """
    known = AttentionStrategyFactory.default().strategies() if strategies is None else strategies
    here = looked(known) if environment is None else environment
    rows = tuple(sorted((_row(here, known[name]) for name in known), key=lambda row: _ORDER[row.state]))
    return Report(here, rows, _troubles(here, known), decide(here, known, AUTO))


_ORDER: Mapping[str, int] = {"usable": 0, "broken": 1, "too old": 2, "missing": 3, "not for this device": 4}


def _row(here: Environment, strategy: AttentionStrategy) -> Row:
    places = here.gpus or (DeviceFacts(here.device if here.device != "cuda" else "cpu"),)
    refusals = [refusals_of(strategy, place) for place in places]
    if all(refusals):
        first = refusals[0][0]
        return Row(
            strategy.name, "not for this device", f"{first.field} is {first.observed}, it takes {first.required}"
        )
    package = next((source for source in strategy.sources if isinstance(source, Package)), None)
    if package is None:
        return Row(strategy.name, "usable", strategy.describe())
    if canonical(package.distribution) == "torch":
        return _of_torch(here, strategy, package)
    found = here.package(package.distribution)
    if found is None:
        return Row(strategy.name, "missing", _gain(strategy))
    if package.minimum and numbers(found.version) < numbers(package.minimum):
        return Row(strategy.name, "too old", f"{found}, needs {package.minimum}")
    if troubled(found, strategy.name):
        return Row(strategy.name, "broken", f"{found} {found.fault}")
    return Row(strategy.name, "usable", strategy.describe())


def _of_torch(here: Environment, strategy: AttentionStrategy, package: Package) -> Row:
    if here.torch_release < numbers(package.minimum):
        return Row(strategy.name, "too old", f"torch {here.torch}, needs {package.minimum}")
    found = here.package("torch")
    if found is not None and troubled(found, strategy.name):
        return Row(strategy.name, "broken", f"{found} {found.fault}")
    return Row(strategy.name, "usable", strategy.describe())


def _gain(strategy: AttentionStrategy) -> str:
    """What the strategy's limits take that torch's own call does not."""
    limits = strategy.limits_for("cuda")
    masks = [
        {"varlen": "packed sequences", "window": "windows"}[kind]
        for kind in ("window", "varlen")
        if kind in limits.masks
    ]
    more = [_SAID.get(name, name) for name in _FEATURES if getattr(limits, name) and name in ("softcap", "lse")]
    exact = "exact" if strategy.exactness == "exact" else f"{strategy.exactness}, by name only"
    gained = ", ".join([*masks, *more])
    hub = next((f"; also on the Hub: {name}" for name in _hub_names(strategy)), "")
    return f"it would add {gained or 'another kernel'} ({exact}){hub}"


def _hub_names(strategy: AttentionStrategy) -> list[str]:
    if not any(isinstance(source, Hub) for source in strategy.sources):
        return []
    return [name for name, pin in strategy.pins().items() if pin.source == "hub" and not pin.layouts]


def _troubles(here: Environment, known: Strategies) -> tuple[Trouble, ...]:
    found = [one for one in here.packages if troubled(one)]
    return tuple(Trouble(one, advise(f"{one}: {one.text}"), _on_this(here, known, one)) for one in found)


def _on_this(here: Environment, known: Strategies, package: Found) -> str:
    """The answer of `heedful install` for a backend of the package: its command, or why there is nothing to do."""
    for name, strategy in known.items():
        for source in strategy.sources:
            if isinstance(source, Package) and canonical(source.distribution) == canonical(package.distribution):
                decision = decide(here, known, name)
                return f"heedful install {name}" if decision.outcome == "install" else decision.reason
    return ""


def _told(trouble: Trouble) -> str:
    lines = [line for line in trouble.text.splitlines() if line.strip()]
    shown = lines if len(lines) <= 6 else [*lines[:3], "…", *lines[-2:]]
    advice = "no advice is known for this text; `heedful doctor --json` holds the whole of it"
    if trouble.advice is not None:
        advice = str(trouble.advice)
    elif trouble.package.fault == "hangs":
        advice = "kernels that are compiled at their first use may take minutes: heedful doctor --timeout 600"
    here = [f"→ on this machine: {trouble.here}"] if trouble.here else []
    return "\n".join([f"{trouble.package.fault}:", *shown, f"→ {advice}", *here])


def _facts(here: Environment) -> list[tuple[str, str]]:
    gpus = [_gpu(gpu) for gpu in here.gpus]
    runtime = f"CUDA {here.cuda}" if here.cuda else f"HIP {here.hip}" if here.hip else "no CUDA"
    tools = [here.compiler or "no C++ compiler", f"nvcc {here.nvcc}" if here.nvcc else "no nvcc"]
    tools.append("Python headers" if here.headers else "no Python headers")
    place = "managed by the system" if here.managed else "can be written" if here.writable else "cannot be written"
    packages = [
        f"{one} ({one.fault if troubled(one) else 'works'})"
        for one in here.packages
        if one.distribution not in LOOKED_FOR
    ]
    system = [f"{here.system} {here.machine}", here.libc, f"{here.cores} cores", f"{here.memory_gib:.0f} GiB free"]
    return [
        ("Python", f"{here.python} ({here.python_tag}), {here.layout}, {_from_home(here.executable)}"),
        ("system", ", ".join(filter(None, system))),
        ("torch", f"{here.torch}, {runtime}, C++11 ABI {str(here.cxx11_abi).upper()}"),
        ("GPU", "; ".join(gpus) or f"none that torch sees; CPU {here.processor}".rstrip()),
        *([("driver", here.driver)] if here.driver else []),
        ("to build", ", ".join(tools)),
        ("to install", f"{f'pip {here.pip}' if here.pip else 'no pip'}, its folder {place}, {_network(here)}"),
        ("packages", ", ".join(packages) or "none with kernels"),
    ]


def _from_home(path: str) -> str:
    """A page is shown to others: it names no user."""
    home = os.path.expanduser("~").rstrip("/\\")
    return f"~{path[len(home) :]}" if home and path.startswith((f"{home}/", f"{home}\\")) else path


def _network(here: Environment) -> str:
    return f"{here.index} {'can be reached' if here.online else 'cannot be reached'}"


def _gpu(gpu: DeviceFacts) -> str:
    capability = f" (compute capability {'.'.join(map(str, gpu.capability))})" if gpu.capability else ""
    return f"{gpu.name or gpu.type}{capability or (f' ({gpu.architecture})' if gpu.architecture else '')}"


def advised(decision: Decision, here: Environment, pins: str = PINS_SHOWN) -> list[tuple[str, str]]:
    """A decision's lines: what and why, the command, and what else there is to know."""
    lines = [(decision.backend if decision.backend != AUTO else "best here", decision.reason)]
    if decision.outcome == "install":
        lines.append(("run", f"heedful install {decision.backend}"))
        lines += [("which is", command) for command in decision.commands(here, pins)]
    if decision.use:
        lines.append(("then use", f'attention_backend("{decision.use}")'))
    lines += [("not", text) for text in decision.passed_over]
    return lines + [("note", text) for text in decision.notes]


def _wrapped(text: str, width: int) -> list[str]:
    lines = []
    for line in text.splitlines():
        lines += textwrap.wrap(line, max(width, 40), break_long_words=False, break_on_hyphens=False) or [""]
    return lines
