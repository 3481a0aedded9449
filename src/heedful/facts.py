"""What machine this is: probed once, and injectable, so that a test can be an sm_75 laptop or an H200.

A fact is read, never decided here: what a backend needs stands in its limits.
"""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class DeviceFacts:
    """One device: its torch type, and on GPUs its compute capability and architecture.

    ``capability`` is (major, minor) on NVIDIA devices and None elsewhere; ``architecture`` is ``sm_90`` or ``gfx942``.
    """

    type: str
    name: str = ""
    capability: tuple[int, int] | None = None
    architecture: str = ""

    @classmethod
    def parse(cls, text: str) -> DeviceFacts:
        """A device one does not have, from its short name: ``cpu``, ``mps``, ``sm_75`` (``sm75``), ``gfx942``."""
        word = text.strip().lower().replace("_", "")
        if word.startswith("sm") and word[2:].isdigit():
            number = int(word[2:])
            return cls("cuda", f"sm_{number}", (number // 10, number % 10), f"sm_{number}")
        if word.startswith("gfx") and len(word) > 3:
            return cls("cuda", word, None, word)
        if word.isalpha():
            return cls(word, word)
        raise ValueError(f"device: got {text!r}; give a name such as cpu, mps, sm_75, sm_90 or gfx942")


@dataclass(frozen=True)
class Facts:
    """The machine: versions, and every device by torch's name for it (``cpu``, ``cuda:0``, …)."""

    torch_version: str
    python_version: str
    system: str
    devices: dict[str, DeviceFacts] = field(default_factory=dict, hash=False)

    def device(self, device: torch.device) -> DeviceFacts:
        """The facts of one device; a type that was not probed is known by its type alone."""
        exact = self.devices.get(str(device)) or self.devices.get(f"{device.type}:0")
        return exact or DeviceFacts(device.type, device.type)

    @classmethod
    def pretend(cls, device: str) -> Facts:
        """This machine, but with the named device (``sm_75``, ``gfx942``, …) as its first one of that type."""
        made = DeviceFacts.parse(device)
        here = probe()
        return cls(here.torch_version, here.python_version, here.system, {f"{made.type}:0": made, made.type: made})


def _gpu(index: int) -> DeviceFacts:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return DeviceFacts("cuda", properties.name, None, properties.gcnArchName.partition(":")[0])
    capability = (properties.major, properties.minor)
    return DeviceFacts("cuda", properties.name, capability, f"sm_{capability[0]}{capability[1]}")


@functools.lru_cache(maxsize=1)
def probe() -> Facts:
    """Look at this machine, once a process. Initialises CUDA only where torch sees a GPU."""
    devices = {"cpu": DeviceFacts("cpu", platform.processor() or platform.machine())}
    if torch.cuda.is_available():
        devices |= {f"cuda:{index}": _gpu(index) for index in range(torch.cuda.device_count())}
    if torch.backends.mps.is_available():
        devices["mps:0"] = DeviceFacts("mps", "Apple GPU")
    return Facts(torch.__version__, platform.python_version(), platform.system(), devices)
