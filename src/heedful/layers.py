"""What an integration says of a module that computes attention, in values.

An integration imports no more of heedful than this and ``integrations.calls``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class Patch:
    """An attribute of one instance, set and put back exactly: one that was inherited before is deleted again."""

    def __init__(self, owner: Any, name: str, value: Any) -> None:
        self.owner, self.name, self.value = owner, name, value
        self.was_set = name in vars(owner)
        self.before = vars(owner).get(name)

    def apply(self) -> None:
        """Set it, past any ``__setattr__``."""
        vars(self.owner)[self.name] = self.value

    def undo(self) -> None:
        """Put it back, unless somebody else has set it since."""
        if vars(self.owner).get(self.name) is not self.value:
            return
        if self.was_set:
            vars(self.owner)[self.name] = self.before
        else:
            del vars(self.owner)[self.name]


@dataclass(frozen=True)
class Layer:
    """A module that computes attention. ``obstacle`` says why its calls cannot be reached; empty where they can.

    ``patches`` are to be held while it is routed.
    """

    obstacle: str = ""
    patches: tuple[Patch, ...] = ()
