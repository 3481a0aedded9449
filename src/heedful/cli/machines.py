"""Which machine a command asks about: this one, or one that is named and may not be at hand."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import typer

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
