"""A table: fitted to a terminal, whole and aligned in a pipe or a file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from .text import console, printable


class Column(NamedTuple):
    title: str
    right: bool = False
    drop: int = 0  # where the terminal is too narrow: the highest goes first, 0 never


def print_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """A table: fitted to a terminal, whole and aligned in a pipe or a file.

    Whatever a cell holds, no terminal obeys it.
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [
        max([len(column.title), *(len(row[k]) for row in rows)]) for k, column in enumerate(columns)
    ]
    kept = list(range(len(columns)))
    if not sys.stdout.isatty():
        for row in [[column.title for column in columns], *rows]:
            cells = [
                row[k].rjust(widths[k]) if columns[k].right else row[k].ljust(widths[k])
                for k in kept
            ]
            sys.stdout.write("  ".join(cells).rstrip() + "\n")
        return
    terminal = console()
    while sum(widths[k] + 2 for k in kept) - 2 > terminal.width and any(
        columns[k].drop for k in kept
    ):
        kept.remove(max(kept, key=lambda k: columns[k].drop))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for k in kept:
        last = k == kept[-1]
        table.add_column(
            columns[k].title,
            justify="right" if columns[k].right else "left",
            no_wrap=not last,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(Text(row[k]) for k in kept))
    terminal.print(table)
