"""The speed table beside a verification: ``heedful bench`` on the backends that were right, in a process of its own.

A kernel that was right on small samples may still end its process on large ones: what was verified is not lost by it.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from heedful.verify.child import command

_RIGHT, _WRONG, _INTERRUPTED = 0, 1, 130  # bench's exit statuses with a record


@dataclass(frozen=True)
class Speed:
    """The record of ``heedful bench``; None where it gave none, and ``fault`` says how it ended."""

    record: dict[str, Any] | None
    fault: str = ""


def measured(backends: Iterable[str], device: str, plugins: Iterable[str] = (), options: Iterable[str] = ()) -> Speed:
    """Time these backends. ``plugins``: each a ``module:Class``, known to that process under its own name."""
    words = [word for name in backends for word in ("--backend", name)]
    before = f"from heedful.verify.job import register; [register(text) for text in {list(plugins)!r}]; "
    arguments = ["bench", "--json", "--device", device, *words, *options]
    done = subprocess.run(command("heedful.cli", *arguments, before=before), stdout=subprocess.PIPE, check=False)
    if done.returncode not in {_RIGHT, _WRONG, _INTERRUPTED} or not done.stdout:
        return Speed(None, f"heedful bench ended with status {done.returncode}")
    return Speed(json.loads(done.stdout))
