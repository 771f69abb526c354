"""A table: fitted to a terminal, whole and aligned in a pipe or a file."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Optional

from .text import console, printable, remark

ELLIPSIS = "…"
_LEAST_WIDTH = 12  # a name that is cut shorter says nothing


class Column(NamedTuple):
    title: str
    right: bool = False
    drop: int = 0  # where the terminal is too narrow: the highest goes first, 0 never
    styles: Optional[Mapping[str, str]] = None  # of a cell, by what it says


def print_table(
    columns: Sequence[Column],
    rows: Sequence[Sequence[str]],
    wide: bool = False,
    headers: bool = True,
    remedy: str = "a wider terminal shows them",
) -> None:
    """A table: fitted to a terminal, whole and aligned in a pipe or a file.

    Whatever a cell holds, no terminal obeys it.  ``wide``: whole on a terminal, too.  What does
    not fit is named on stderr, with the ``remedy``.
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    if sys.stdout.isatty() and not wide:
        _print_fitted(columns, rows, headers, remedy)
        return
    shown = [[column.title for column in columns], *rows] if headers else rows
    widths = [max([len(row[k]) for row in shown], default=0) for k in range(len(columns))]
    for row in shown:
        cells = [
            row[k].rjust(widths[k]) if column.right else row[k].ljust(widths[k])
            for k, column in enumerate(columns)
        ]
        sys.stdout.write("  ".join(cells).rstrip() + "\n")


def cut(text: str, width: int) -> str:
    """A text cut in its middle to ``width`` characters: both ends of a name tell.

    >>> cut("model.layers.17.mlp.weight", 13), cut("short", 13)
    ('model.….weight', 'short')
    >>> len(cut("model.layers.17.mlp.weight", 14))
    14
    """
    if len(text) <= width:
        return text
    behind = width // 2
    return text[: width - behind - 1] + ELLIPSIS + text[len(text) - behind :]


def _print_fitted(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], headers: bool, remedy: str
) -> None:
    from rich.cells import cell_len
    from rich.text import Text

    terminal = console()
    widths = [
        max([cell_len(column.title), *(cell_len(row[k]) for row in rows)])
        for k, column in enumerate(columns)
    ]
    kept = list(range(len(columns)))

    def excess() -> int:
        return sum(widths[k] + 2 for k in kept) - 2 - terminal.width

    while excess() > 0 and any(columns[k].drop for k in kept):
        kept.remove(max(kept, key=lambda k: columns[k].drop))
    # What is still too wide is cut: the widest text first.
    while excess() > 0:
        texts = [k for k in kept if not columns[k].right and widths[k] > _LEAST_WIDTH]
        if not texts:
            break
        widest = max(texts, key=lambda k: widths[k])
        others = max([widths[k] for k in texts if k != widest], default=_LEAST_WIDTH)
        widths[widest] -= min(excess(), max(widths[widest] - max(others, _LEAST_WIDTH), 1))

    def line(row: Sequence[str], style: Optional[str] = None) -> Text:
        text = Text(no_wrap=True)
        for k in kept:
            cell = row[k]
            if cell_len(cell) > widths[k]:
                cell = cut(cell, widths[k])
                while cell_len(cell) > widths[k]:  # characters of two columns
                    cell = cut(cell, len(cell) - 1)
            pad = " " * (widths[k] - cell_len(cell))
            styles = columns[k].styles or {}
            padded = pad + cell if columns[k].right else cell + pad
            text.append(padded if k == kept[-1] else padded + "  ", style or styles.get(row[k], ""))
        text.rstrip()
        return text

    if headers:
        terminal.print(line([column.title for column in columns], "bold"), soft_wrap=True)
    for row in rows:
        terminal.print(line(row), soft_wrap=True)
    left_out = [column.title for k, column in enumerate(columns) if k not in kept]
    if left_out:
        remark(f"{', '.join(left_out)} not shown at {terminal.width} columns; {remedy}")
