"""Everything heedful raises on purpose.

HeedfulError
├── InvalidArgument (also ValueError)   one argument is malformed; names it, its value and the remedy
├── UnknownBackend  (also ValueError)   no strategy has that name; names the closest ones
├── RegistrationError (also ValueError) a strategy cannot be registered under that name
├── Refused (also RuntimeError)         nothing that was asked for can compute this problem; carries the refusals
├── CannotLoad (also ImportError)       a backend's package is there and cannot be loaded; the text is the import's own
├── WrongAnswer (also RuntimeError)     the guard found a named backend's answer wrong; carries problem and backend
├── LockBroken (also RuntimeError)      a lock cannot be replayed here; the text holds every difference
└── NothingCovered (also RuntimeError)  a model was to be configured and no attention layer was found
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from heedful.refusal import Refusal


class HeedfulError(Exception):
    """The root: catch this to catch all that heedful raises on purpose. Pickles, so worker processes can raise it."""

    def __reduce__(self) -> tuple[object, ...]:
        return _again, (type(self), self.args, self.__dict__)


def _again(kind: type[HeedfulError], args: tuple[object, ...], state: dict[str, object]) -> HeedfulError:
    """An error as it was, without its constructor, which takes other things than the text."""
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class InvalidArgument(HeedfulError, ValueError):
    """An argument is malformed, whatever the backend.

    ``argument`` is its name; the text gives the value that came and what to do instead.
    """

    def __init__(self, argument: str, observed: object, remedy: str) -> None:
        super().__init__(f"{argument}: got {observed}; {remedy}")
        self.argument = argument


class UnknownBackend(HeedfulError, ValueError):
    """No strategy has that name or alias."""

    def __init__(self, name: object, known: Iterable[str], origin: str = "backend") -> None:
        known = sorted(known)
        close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
        if "," in str(name):
            names = [word.strip() for word in str(name).split(",")]
            hint = f"for an order of fallback give a list, {names}; "
        super().__init__(f"{origin}: no backend is called {name!r}; {hint}known: {', '.join(known)}")


class RegistrationError(HeedfulError, ValueError):
    """A strategy cannot be registered so."""


class Refused(HeedfulError, RuntimeError):
    """No wanted backend can compute the problem. ``refusals`` maps each backend's name to its reasons."""

    def __init__(self, problem: object, refusals: dict[str, tuple[Refusal, ...]]) -> None:
        lines = [f"no wanted backend can compute this problem: {problem}"]
        for name, reasons in refusals.items():
            lines += [f"  {name} refuses: {reason}" for reason in reasons]
        super().__init__("\n".join(lines))
        self.problem = problem
        self.refusals = refusals


class WrongAnswer(HeedfulError, RuntimeError):
    """A backend that was asked for by name, or by a lock, computed something else than attention."""

    def __init__(self, problem: object, backend: str, fault: str) -> None:
        remedy = "use another backend, or a list or 'auto' to have it replaced"
        super().__init__(f"{backend} gave a wrong answer: {fault} ({problem}); {remedy}")
        self.problem, self.backend, self.fault = problem, backend, fault


class LockBroken(HeedfulError, RuntimeError):
    """A lock does not hold for this machine, these versions, or this call."""

    def __init__(self, what: str, differences: Iterable[str]) -> None:
        super().__init__("\n".join([what, *differences]))


class CannotLoad(HeedfulError, ImportError):
    """A source of kernels is there and cannot be used; the text is what its import said."""


class NothingCovered(HeedfulError, RuntimeError):
    """A backend was to be set on a model and it has no attention layer that heedful can reach."""
