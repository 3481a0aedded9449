"""Which machine a command asks about: this one, or one that is named and may not be at hand."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import typer

from heedful.dispatch import AttentionDispatcher
from heedful.facts import DeviceFacts, Facts, probe

HELP = "A machine, at hand or not: sm_75, sm_90, gfx942, cpu, mps, xpu, xla; its packages count as installed."
_WITHOUT_MODELS = ("cpu", "mps", "xpu", "npu", "xla")
_GPU = re.compile(r"sm_?([3-9]|1[0-9])[0-9]|gfx9[0-9a-f]{2}|gfx1[0-9]{3}")


@dataclass(frozen=True)
class Machine:
    """Its facts, the device that is asked about, and whether it is only supposed."""

    facts: Facts
    device: DeviceFacts
    supposed: bool

    @property
    def dtype(self) -> torch.dtype:
        """What one computes in there unless told otherwise."""
        return torch.float32 if self.device.type == "cpu" else torch.float16

    def __str__(self) -> str:
        if self.supposed:
            return f"{self.device.name}, packages taken as installed"
        return f"this one, {self.device.architecture or self.device.type}"


def machine(name: str | None, option: str = "--device") -> Machine:
    """The machine of that name; this one, by its GPU if there is one, for None. Raises BadParameter."""
    here = probe()
    if name is None or name in {"cuda", "cuda:0"}:
        known = [facts for facts in here.devices.values() if facts.type != "cpu"]
        if name is not None and not any(facts.type == "cuda" for facts in known):
            raise typer.BadParameter(
                f"got {name!r}, and this machine has no GPU; name one, such as sm_90 or gfx942", param_hint=option
            )
        return Machine(here, known[0] if known else here.devices["cpu"], supposed=False)
    word = name.strip().lower()
    if word not in _WITHOUT_MODELS and not _GPU.fullmatch(word):
        remedy = f"give {', '.join(_WITHOUT_MODELS)}, or a GPU such as sm_75, sm_90, sm_100 or gfx942"
        raise typer.BadParameter(f"got {name!r}; {remedy}", param_hint=option)
    facts = Facts.pretend(word)
    return Machine(facts, next(iter(facts.devices.values())), supposed=True)


def torch_device(name: str | None) -> torch.device:
    """A device of this machine: what is measured has to be here. Raises BadParameter."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    remedy = "give one of torch's that this machine has, such as cpu, cuda or cuda:1"
    try:
        place = torch.device(name)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without that device
        raise typer.BadParameter(f"got {name!r}, no device of this machine; {remedy}", param_hint="--device") from error
    if place.type == "meta":
        raise typer.BadParameter(f"got {name!r}, which computes nothing; {remedy}", param_hint="--device")
    return place


def packages_of(backends: Iterable[str], dispatcher: AttentionDispatcher) -> list[str]:
    """The distributions that the measured backends come from."""
    strategies = dispatcher.factory.strategies()
    sources = [source for name in backends if name in strategies for source in strategies[name].sources]
    names = {getattr(source, "distribution", "") for source in sources} - {"", "torch"}
    installed = dispatcher.facts.packages or {}
    return sorted(name for name in names if name in installed)
