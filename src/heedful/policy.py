"""Who wishes for which backend: the preference table as data, the environment, and the scope.

Precedence: the call's ``backend`` > the innermost scope (a module's rule is one) > ``HEEDFUL_BACKEND`` > auto.
The scope is a ContextVar: nested, and separate for every thread and every asyncio task.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, get_args

from heedful.errors import InvalidArgument
from heedful.problem import AttentionProblem
from heedful.sources import downloads_allowed

Wish = str | tuple[str, ...]
Tune = Literal["off", "live", "ahead"]
Guarding = Literal["replace", "raise", "off"]
USERS = "user's"  # cache folder
P = ParamSpec("P")
R = TypeVar("R")
VARIABLE = "HEEDFUL_BACKEND"
_OFF = {"0", "false", "no", "off"}

# The order in which auto asks, by device, where no timing is known. native is torch's own choice among its
# kernels; native_flash serves what native cannot (the LSE); reference is right everywhere and slow. triton, our own,
# stands behind all kernels of torch that hold no scores, until a time says otherwise, and before flex, which makes a
# mask of Q * K for each call and waits for torch's compiler. On a CPU it stands behind the reference: never chosen.
PREFERENCES: Mapping[str, tuple[str, ...]] = {
    "cpu": ("native", "native_flash", "native_math", "flex", "reference", "triton"),
    "cuda": (
        "native",
        "native_flash",
        "native_cudnn",
        "native_efficient",
        "triton",
        "flex",
        "native_math",
        "reference",
    ),
    "*": ("native", "native_math", "flex", "reference"),
}


@dataclass(frozen=True)
class Policy:
    """What auto prefers by device, and the wish that holds where neither call nor scope has one.

    ``downloads``: whether kernels of the Hub may be downloaded and run. ``analyse``: whether the contents of mask
    tensors are looked at, once a tensor. ``tune``: what auto does with times: "live" measures on real calls, "ahead"
    uses what was measured before, "off" does neither. ``guard``: what becomes of a wrong answer: "replace", "raise", or
    "off", which does not look. ``cache``: the folder of measured times, USERS for the user's own; None keeps them in
    memory. ``bundles``: the
    folder that a wrong answer's tensors are written to; None writes nothing.
    """

    preferences: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: PREFERENCES)
    default: Wish = "auto"
    default_origin: str = "auto"
    downloads: bool = False
    analyse: bool = True
    tune: Tune = "off"
    guard: Guarding = "replace"
    cache: Path | str | None = None
    bundles: Path | None = None

    def __post_init__(self) -> None:
        for name, given, known in (("tune", self.tune, get_args(Tune)), ("guard", self.guard, get_args(Guarding))):
            if given not in known:
                raise InvalidArgument(name, repr(given), f"give one of {', '.join(known)}")

    def watches(self, problem: AttentionProblem) -> bool:
        """Whether the guard looks at answers of such calls: not at compiled ones, nor where numbers are drawn."""
        return self.guard != "off" and not problem.compiling and not problem.dropout_p

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Policy:
        """The shipped table, and what the environment says.

        ``HEEDFUL_BACKEND``: a name, or several with commas for a fallback order. ``HEEDFUL_DOWNLOADS=1`` allows kernels
        of the Hub, ``HEEDFUL_ANALYSE=0`` leaves mask tensors unread. ``HEEDFUL_TUNE``: live (the default), ahead or
        off. ``HEEDFUL_GUARD``: replace (the default), raise or off. ``HEEDFUL_CACHE``: the folder of measured times,
        else the user's cache folder. ``HEEDFUL_BUNDLES``: the folder of bug reports. Raises InvalidArgument.
        """
        environ = os.environ if environ is None else environ
        names = tuple(name.strip() for name in environ.get(VARIABLE, "").split(",") if name.strip())
        bundles = environ.get("HEEDFUL_BUNDLES", "").strip()
        policy = cls(
            downloads=downloads_allowed(environ),
            analyse=environ.get("HEEDFUL_ANALYSE", "").strip().lower() not in _OFF,
            tune=_mode(environ, "HEEDFUL_TUNE", "live"),  # type: ignore[arg-type]
            guard=_mode(environ, "HEEDFUL_GUARD", "replace"),  # type: ignore[arg-type]
            cache=environ.get("HEEDFUL_CACHE", "").strip() or USERS,
            bundles=Path(bundles).expanduser() if bundles else None,
        )
        if not names:
            return policy
        return replace(policy, default=names[0] if len(names) == 1 else names, default_origin=VARIABLE)

    def order(self, device: str, known: Iterable[str]) -> tuple[str, ...]:
        """The known strategies in the order in which auto asks.

        The table up to the reference, then those that it does not name, then the reference and what stands behind it.
        """
        known = set(known)
        table = [name for name in self.preferences.get(device, self.preferences["*"]) if name in known]
        last = table[table.index("reference") :] if "reference" in table else []
        return (*table[: len(table) - len(last)], *sorted(known - set(table)), *last)


def folder_of(cache: Path | str | None) -> Path | None:
    """The folder that a policy's ``cache`` stands for; the user's is heedful's within the user's cache folder."""
    if cache == USERS:
        from platformdirs import user_cache_path

        return user_cache_path("heedful", appauthor=False)
    return None if cache is None else Path(cache).expanduser()


def _mode(environ: Mapping[str, str], variable: str, default: str) -> str:
    """One of a few words; "0", "no" and "false" are "off"."""
    word = environ.get(variable, "").strip().lower()
    known = {"HEEDFUL_TUNE": get_args(Tune), "HEEDFUL_GUARD": get_args(Guarding)}[variable]
    word = "off" if word in _OFF else word or default
    if word not in known:
        raise InvalidArgument(variable, repr(word), f"give one of {', '.join(known)}")
    return word


def as_wish(backend: object) -> Wish:
    """A user's ``backend`` as a wish: a name, or names in the order of fallback. Raises InvalidArgument."""
    if isinstance(backend, str) and backend:
        return backend
    if isinstance(backend, (list, tuple)) and backend and all(isinstance(name, str) and name for name in backend):
        return tuple(backend)
    raise InvalidArgument("backend", repr(backend), "give a name, a non-empty list of names, 'auto' or None")


class scope:
    """Wish for a backend within a ``with`` block, or within every call of the function that it decorates.

    One object may be entered any number of times, in any threads and tasks. What holds after leaving is the scope that
    was entered last and is still open; so generators that are closed out of order leave nothing behind. Where it was
    not entered (a generator that is closed in another context) leaving does nothing.
    """

    def __init__(self, wish: Wish | None) -> None:
        self.wish = wish

    def __enter__(self) -> None:
        _entered.set((*_entered.get(), self))
        _scope.set(self.wish)
        mirror.enter(self)

    def __exit__(self, *_error: object) -> None:
        left = list(_entered.get())
        if self in left:
            del left[-1 - left[::-1].index(self)]
            _entered.set(tuple(left))
            _scope.set(left[-1].wish if left else None)
        mirror.leave(self)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """The function, run within this scope. A generator's body runs between calls, so it is refused."""
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise InvalidArgument("attention_backend", "a generator function", "use it in a with statement inside")
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def awaited(*args: P.args, **kwargs: P.kwargs) -> Any:
                with self:
                    return await function(*args, **kwargs)

            return awaited  # type: ignore[return-value]

        @functools.wraps(function)
        def within(*args: P.args, **kwargs: P.kwargs) -> R:
            with self:
                return function(*args, **kwargs)

        return within


class _Mirror(threading.local):
    """The scope as compiled code sees it: dynamo can guard these attributes, but not a ContextVar.

    ``in_coroutines`` lists the scopes that are open inside asyncio tasks of this thread: tasks take turns, so no one
    value of the mirror is right for all of them, and compiled calls without a backend of their own are refused.
    ``entered`` are the thread's open scopes: each with the wish before it, and whether it was entered inside a task.
    ``route`` is the routed layer (see ``routing``) that this thread is inside of; None while heedful itself computes.
    """

    def __init__(self) -> None:
        self.wish: Wish | None = None
        self.route: Any = None
        self.in_coroutines: list[Wish | None] = []
        self.entered: list[tuple[scope, Wish | None, bool]] = []

    def enter(self, entered: scope) -> None:
        inside_task = _in_asyncio_task()
        self.entered.append((entered, self.wish, inside_task))
        if inside_task:
            self.in_coroutines.append(entered.wish)
        else:
            self.wish = entered.wish

    def leave(self, left: scope) -> None:
        place = next((place for place in reversed(range(len(self.entered))) if self.entered[place][0] is left), None)
        if place is None:
            return
        _, before, inside_task = self.entered.pop(place)
        if inside_task:
            self.in_coroutines.remove(left.wish)
            return
        for later in range(place, len(self.entered)):
            if not self.entered[later][2]:
                self.entered[later] = (self.entered[later][0], before, False)
                return
        self.wish = before


_scope: ContextVar[Wish | None] = ContextVar("heedful_scope", default=None)
_entered: ContextVar[tuple[scope, ...]] = ContextVar("heedful_entered", default=())
current_wish = _scope.get
mirror = _Mirror()


def checkpoint_context() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The ``context_fn`` of ``torch.utils.checkpoint.checkpoint``: recompute in the scope of the forward pass.

    Without it the recomputation, which runs during ``backward()`` and on GPUs in autograd's own threads, sees the scope
    of that place and time: another backend than the forward pass had, or none. With ``use_reentrant=True`` torch takes
    no ``context_fn``: there, enter ``attention_backend`` inside the checkpointed function.
    """
    return nullcontext(), scope(current_wish())


def _in_asyncio_task() -> bool:
    try:
        return asyncio.current_task() is not None
    except RuntimeError:
        return False
