"""Who wishes for which backend: the preference table as data, the environment, and the scope.

Precedence: the call's ``backend`` > the innermost scope (a module's rule is one) > ``HEEDFUL_BACKEND`` > auto.
The scope is a ContextVar: nested, and separate for every thread and every asyncio task.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from heedful.errors import InvalidArgument

Wish = str | tuple[str, ...]
VARIABLE = "HEEDFUL_BACKEND"

# The order in which auto asks, by device; measured timings will go before it. native is torch's own choice among its
# kernels; native_flash serves what native cannot (the LSE); reference is right everywhere and slow.
PREFERENCES: Mapping[str, tuple[str, ...]] = {
    "cpu": ("native", "native_flash", "native_math", "flex", "reference"),
    "cuda": ("native", "native_flash", "native_cudnn", "native_efficient", "flex", "native_math", "reference"),
    "*": ("native", "native_math", "flex", "reference"),
}


@dataclass(frozen=True)
class Policy:
    """What auto prefers by device, and the wish that holds where neither call nor scope has one."""

    preferences: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: PREFERENCES)
    default: Wish = "auto"
    default_origin: str = "auto"

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Policy:
        """The shipped table, and ``HEEDFUL_BACKEND``: a name, or several with commas for a fallback order."""
        text = (os.environ if environ is None else environ).get(VARIABLE, "").strip()
        if not text:
            return cls()
        names = tuple(name.strip() for name in text.split(",") if name.strip())
        return cls(default=names[0] if len(names) == 1 else names, default_origin=VARIABLE)

    def order(self, device: str, known: Iterable[str]) -> tuple[str, ...]:
        """The known strategies in the order in which auto asks: the table, then the others, the reference last."""
        known = set(known)
        table = [name for name in self.preferences.get(device, self.preferences["*"]) if name in known]
        last = [name for name in table if name == "reference"]
        return (*(name for name in table if name not in last), *sorted(known - set(table)), *last)


def as_wish(backend: object) -> Wish:
    """A user's ``backend`` as a wish: a name, or names in the order of fallback. Raises InvalidArgument."""
    if isinstance(backend, str) and backend:
        return backend
    if isinstance(backend, (list, tuple)) and backend and all(isinstance(name, str) and name for name in backend):
        return tuple(backend)
    raise InvalidArgument("backend", repr(backend), "give a name, a non-empty list of names, 'auto' or None")


class _Mirror(threading.local):
    """The scope as compiled code sees it: dynamo can guard these attributes, but not a ContextVar.

    ``in_coroutines`` lists the scopes that are open inside asyncio tasks of this thread: tasks take turns, so no one
    value of the mirror is right for all of them, and compiled calls without a backend of their own are refused.
    """

    def __init__(self) -> None:
        self.wish: Wish | None = None
        self.in_coroutines: list[Wish] = []


_scope: ContextVar[Wish | None] = ContextVar("heedful_scope", default=None)
current_wish = _scope.get
mirror = _Mirror()


@contextmanager
def scope(wish: Wish) -> Iterator[None]:
    """Wish for a backend within a ``with`` block; restored on leaving it, by an exception too."""
    token = _scope.set(wish)
    inside_task = _in_asyncio_task()
    before = mirror.wish
    if inside_task:
        mirror.in_coroutines.append(wish)
    else:
        mirror.wish = wish
    try:
        yield
    finally:
        _scope.reset(token)
        if inside_task:
            mirror.in_coroutines.remove(wish)
        else:
            mirror.wish = before


def _in_asyncio_task() -> bool:
    try:
        return asyncio.current_task() is not None
    except RuntimeError:
        return False
