"""Tables without frames, for narrow screens: all columns but one keep their width."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    width: int,
    *,
    wraps: bool = False,
    styles: Sequence[str] | None = None,
) -> Table:
    """The last column takes the rest of the screen's width: what does not fit is cut, or wrapped where it ``wraps``.

    Columns named by one letter are numbers. Cells are plain text: brackets in them are no markup.
    """
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    widths[-1] = max(16, min(widths[-1], width - sum(widths[:-1]) - 2 * len(widths[:-1])))
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, room in zip(columns, widths, strict=True):
        elastic = name == columns[-1]
        made.add_column(
            name,
            width=room,
            no_wrap=not (elastic and wraps),
            overflow="fold" if wraps else "ellipsis",
            justify="right" if len(name) == 1 else "left",
        )
    for row, style in zip(rows, styles or [""] * len(rows), strict=True):
        made.add_row(*map(Text, row), style=style)
    return made
