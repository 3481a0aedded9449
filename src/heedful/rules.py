"""Which layers a rule means: those of a role, or those whose path a pattern matches.

A pattern is a role's name (see ``layers.ROLES``), ``re:`` and a regular expression that is searched in the path, or
else a glob over the whole path, in which ``*`` also stands for dots. Refuses patterns that decide about no layer.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from heedful.errors import InvalidArgument
from heedful.layers import ROLES
from heedful.policy import Wish

REGEX = "re:"


@dataclass(frozen=True)
class Rule:
    """What is wished for the layers that a pattern means. ``argument``: where it was given, "rules" or "exclude"."""

    pattern: str
    wish: Wish | None
    argument: str = "rules"

    @property
    def origin(self) -> str:
        """How reports name it."""
        return f"{'rule' if self.argument == 'rules' else self.argument} {self.pattern!r}"

    def means(self, path: str, role: str) -> bool:
        """Whether it is about the layer at this path, of this role."""
        if self.pattern in ROLES:
            return role == self.pattern
        if self.pattern.startswith(REGEX):
            return re.search(self.pattern[len(REGEX) :], path) is not None
        return fnmatch.fnmatchcase(path, self.pattern)


def rule(pattern: object, wish: Wish | None, argument: str = "rules") -> Rule:
    """A rule of a user's. Raises InvalidArgument for a pattern that is none."""
    if isinstance(pattern, re.Pattern):
        remedy = f"write a regular expression as {f'{REGEX}{pattern.pattern}'!r}"
        raise InvalidArgument(argument, repr(pattern), remedy)
    if not isinstance(pattern, str) or not pattern:
        raise InvalidArgument(argument, repr(pattern), "give path patterns or roles, as strings")
    if pattern.startswith(REGEX):
        try:
            re.compile(pattern[len(REGEX) :])
        except re.error as error:
            raise InvalidArgument(argument, repr(pattern), f"it is no regular expression: {error}") from None
    return Rule(pattern, wish, argument)


def deciding(rules: Iterable[Rule], path: str, role: str) -> Rule | None:
    """The first rule that is about a layer."""
    return next((rule for rule in rules if rule.means(path, role)), None)


def check_that_all_decide(rules: Sequence[Rule], layers: Sequence[tuple[str, str]]) -> None:
    """Raise InvalidArgument for a rule that decides about none of the layers, given by path and role."""
    used = {deciding(rules, path, role) for path, role in layers}
    for rule in rules:
        if rule not in used:
            shadowed = any(rule.means(path, role) for path, role in layers)
            what = "only layers that an earlier rule decides about" if shadowed else f"none of {len(layers)} layers"
            remedy = f"it matches {what}; {_near(rule.pattern, layers)}"
            raise InvalidArgument(rule.argument, repr(rule.pattern), remedy)


def _near(pattern: str, layers: Sequence[tuple[str, str]]) -> str:
    """What there is instead: roles for a role, patterns that look alike for a pattern."""
    if pattern in ROLES:
        roles = Counter(role for _, role in layers if role)
        return f"the roles here are {', '.join(f'{role} ({count})' for role, count in roles.items()) or 'unknown'}"
    known: dict[str, None] = {}
    for path, role in layers:
        first, _, _ = path.partition(".")
        _, _, last = path.rpartition(".")
        known.update(dict.fromkeys(filter(None, (path, f"{first}.*" if "." in path else "", f"*.{last}", role))))
    close = difflib.get_close_matches(pattern.removeprefix(REGEX), known, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"{hint}the first path is {layers[0][0]!r}"
