"""What an integration says of a module that computes attention, in values.

An integration imports no more of heedful than this, ``errors`` and ``integrations.calls``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from torch import nn

# What a layer attends to, as rules name it. In a text or image encoder or an autoencoder that role comes first.
ROLES: Mapping[str, str] = {
    "self": "keys of the sequence that it is given",
    "cross": "keys of another sequence",
    "joint": "keys of both, which the layer joins",
    "text": "any layer of a text encoder",
    "image": "any layer of an image encoder",
    "vae": "any layer of an autoencoder",
}
UNDO = "_heedful_undo"  # in a module's __dict__: a list of what reset undoes beside routes, each with ``undo()``


class Patch:
    """An attribute of one instance, set and put back exactly: one that was inherited before is deleted again.

    ``watched``: the layer's order relies on it, so that whoever sets it later is in conflict with the order. A value
    that is there already can be watched without a change.
    """

    def __init__(self, owner: Any, name: str, value: Any, *, watched: bool = False) -> None:
        self.owner, self.name, self.value, self.watched = owner, name, value, watched
        place = _place(owner, name)
        self.was_set = place is not None
        self.before = None if place is None else place[name]
        self.lost = False  # it was somebody else's when it was to be put back

    @property
    def current(self) -> Any:
        """What the instance has now; None if nothing of its own."""
        place = _place(self.owner, self.name)
        return None if place is None else place[self.name]

    @property
    def displaced(self) -> bool:
        """Whether somebody else has set it since."""
        return self.current is not self.value

    def apply(self) -> None:
        """Set it, past any ``__setattr__``; not where it was somebody else's when it was undone."""
        if self.displaced and not self.lost:
            vars(self.owner)[self.name] = self.value

    def undo(self, *, restore: bool = False) -> None:
        """Put it back. What somebody else has set since stays, but for what is watched, with ``restore``.

        A value with weights, before or since, stays: it is more than a choice of kernel, as an IP-Adapter's processor.
        """
        if self.displaced and not (restore and self.restorable):
            self.lost = True
            return
        place = _place(self.owner, self.name)
        if self.was_set and place is not None:
            place[self.name] = self.before
        elif self.was_set:
            vars(self.owner)[self.name] = self.before
        elif place is not None:
            del place[self.name]

    @property
    def restorable(self) -> bool:
        """Whether putting the value back loses no weights."""
        return self.watched and not isinstance(self.before, nn.Module) and not isinstance(self.current, nn.Module)

    def told(self) -> str:
        """What was set since, in words."""
        now = self.current
        if self.name == "processor":
            return f"its processor was replaced by {type(now).__name__}"
        return f"its {self.name} was set to {getattr(now, 'value', now)!r}"


@dataclass(frozen=True)
class Layer:
    """A module that computes attention.

    ``obstacle``: why its calls cannot be reached; empty where they can. ``patches``: to be held while it is routed.
    ``role``: one of ROLES, empty where the module does not tell. ``softmax``: False for other functions of query, key
    and value, such as linear attention, which no backend computes: shown, and not counted. ``float32_scores``: the
    module asks for scores in float32 whatever the dtype. ``conflict``: what is wrong with it, whoever computes it.
    ``elsewhere``: where its calls go now, past SDPA, unless the patches are held.
    """

    obstacle: str = ""
    patches: tuple[Patch, ...] = ()
    role: str = ""
    softmax: bool = True
    float32_scores: bool = False
    conflict: str = ""
    elsewhere: str = ""


def leads_to(wrapper: Any, goal: object) -> bool:
    """Whether a callable is another one, or holds it where it may call it: as a wrapper, a partial, or a closure."""
    found = [wrapper]
    for one in found:  # it grows
        if one is goal:
            return True
        found += [held for held in _held(one) if callable(held) and not any(held is known for known in found)]
    return False


def _held(one: Any) -> Iterator[Any]:
    """What a callable that is neither a module nor a class holds."""
    if isinstance(one, (nn.Module, type)):
        return
    if isinstance(one, functools.partial):
        yield from (one.func, *one.args, *one.keywords.values())
    yield from getattr(one, "__dict__", {}).values()
    function = getattr(one, "__func__", one)
    for cell in (function.__closure__ or ()) if isinstance(function, FunctionType) else ():
        with contextlib.suppress(ValueError):  # it is empty
            yield cell.cell_contents


def watch(owner: Any, name: str) -> Patch:
    """An attribute that is to stay as it is."""
    place = _place(owner, name)
    return Patch(owner, name, None if place is None else place[name], watched=True)


def _place(owner: Any, name: str) -> dict[str, Any] | None:
    """The dictionary that holds an instance's attribute: its own, or a module's of its submodules."""
    own: dict[str, Any] = vars(owner)
    if name in own:
        return own
    submodules: dict[str, Any] = own.get("_modules", {})
    return submodules if name in submodules else None
