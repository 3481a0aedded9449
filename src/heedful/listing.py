"""The table of all backends, as asked about one plain problem: what `heedful list` and ``list_backends`` show."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from heedful.errors import UnknownBackend
from heedful.problem import AttentionProblem
from heedful.refusal import Refusal


@dataclass(frozen=True)
class BackendRow:
    """One backend in the table: its other names, its exactness, what it is, and why it cannot run a plain call here."""

    name: str
    aliases: tuple[str, ...]
    exactness: str
    description: str
    refusals: tuple[Refusal, ...]

    @property
    def available(self) -> bool:
        """Whether it takes a plain call on the table's device."""
        return not self.refusals


@dataclass(frozen=True)
class BackendTable:
    """All backends, as asked about one plain problem. Iterates as rows and prints as text."""

    problem: AttentionProblem
    rows: tuple[BackendRow, ...]

    def __iter__(self) -> Iterator[BackendRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> BackendRow:
        for row in self.rows:
            if name in (row.name, *row.aliases):
                return row
        raise UnknownBackend(name, [row.name for row in self.rows])

    def __str__(self) -> str:
        lines = [f"backends for {self.problem}"]
        for row in self.rows:
            verdict = row.description if row.available else "; ".join(map(str, row.refusals))
            lines.append(f"  {'+' if row.available else '-'} {row.name:<17} {verdict}")
        return "\n".join(lines)
