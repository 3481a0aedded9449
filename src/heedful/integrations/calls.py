"""What a method calls, read from its compiled code: by name, without running it.

Follows methods of the owner's class and plain functions of the same package, some steps deep. Blind to what is looked
up by a string or passed in as an argument.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

_DEEPEST = 4


def names_called(owner: Any, method: str, wanted: frozenset[str]) -> frozenset[str]:
    """Which of the wanted names a class's method calls, itself or by its helpers; remembered for every class.

    A global counts under its own name and under that of its package, however it was imported.
    """
    return _names_called(owner, method, wanted)


@lru_cache(maxsize=4096)
def _names_called(owner: type, method: str, wanted: frozenset[str]) -> frozenset[str]:
    start = _plain(getattr(owner, method, None))
    found: set[str] = set()
    todo, seen = [(start, 0)] if start else [], {start}
    while todo:
        function, depth = todo.pop()
        mentioned = set(_names(function.__code__))
        helpers = _helpers(function, owner, mentioned - wanted) if depth < _DEEPEST else ()
        found |= (mentioned & wanted) | wanted.intersection(_true_names(function, mentioned))
        for helper in helpers:
            if helper not in seen and helper.__name__ not in wanted:
                seen.add(helper)
                todo.append((helper, depth + 1))
    return frozenset(found)


def _true_names(function: FunctionType, mentioned: set[str]) -> Iterator[str]:
    for name in mentioned & function.__globals__.keys():
        value = function.__globals__[name]
        yield getattr(value, "__name__", "")
        if callable(value):
            yield (getattr(value, "__module__", None) or "").partition(".")[0]


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _helpers(function: FunctionType, owner: type, names: set[str]) -> Iterator[FunctionType]:
    package = function.__module__.partition(".")[0]
    for name in sorted(names):
        methods = (vars(base).get(name) for base in owner.__mro__)  # all, since one may call the next by super()
        for found in (*methods, function.__globals__.get(name)):
            helper = _plain(found)
            if helper is not None and helper.__module__.partition(".")[0] == package:
                yield helper


def _plain(found: object) -> FunctionType | None:
    """The undecorated function behind a function, or None."""
    inner = inspect.unwrap(found) if isinstance(found, FunctionType) else None
    return inner if isinstance(inner, FunctionType) else None
