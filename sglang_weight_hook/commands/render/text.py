"""Texts for people: sizes, addresses, and nothing that a terminal would obey."""

from __future__ import annotations

import json
import sys
import textwrap
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Optional, Union

if TYPE_CHECKING:  # rich is imported where it is needed: it takes longer than 64 slots to read
    from rich.console import Console

STYLES = {
    "ready": "green",
    "updating": "yellow",
    "loading": "yellow",
    "failed": "bold red",
    "released": "magenta",
    "stale": "bold red",
    "unreadable": "bold red",
}


def clock(stamp: Any) -> str:
    try:
        return time.strftime("%H:%M:%S", time.localtime(stamp))
    except (TypeError, ValueError, OverflowError, OSError):
        return "--:--:--"


def date_and_time(stamp: Any) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(stamp))
    except (TypeError, ValueError, OverflowError, OSError):
        return "---------- --:--:--"


def print_line(*parts: Union[str, tuple[str, str]]) -> None:
    """A line of text; ``(text, style)`` is coloured where colours are wanted.

    Whatever a part holds, no terminal obeys it.
    """
    from rich.text import Text

    safe = [
        printable(part) if isinstance(part, str) else (printable(part[0]), part[1])
        for part in parts
    ]
    console().print(Text.assemble(*safe), soft_wrap=True)


def print_item(word: tuple[str, str], label: str, text: str) -> None:
    """A line of a list; on a terminal its text continues below itself."""
    indent = len(word[0]) + len(label)
    width = console().width - indent
    text = printable(text)
    lines = textwrap.wrap(text, width) if sys.stdout.isatty() and width > 20 else [text]
    print_line(word, label, lines[0] if lines else "")
    for line in lines[1:]:
        print_line(" " * indent, line)


def console() -> Console:
    from rich.console import Console

    return Console(file=sys.stdout, highlight=False, markup=False, emoji=False)


def print_json(value: Mapping[str, Any]) -> int:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")
    return 0


def complain(text: str) -> None:
    try:
        sys.stderr.write(f"sglang-weight-hook: {printable(text)}\n")
    except OSError:
        pass


def remark(text: str) -> None:
    """A line beside a table, such as its sum: on stderr, so that stdout has the rows alone."""
    try:
        sys.stdout.flush()
        sys.stderr.write(f"{printable(text)}\n")
    except OSError:
        pass


def printable(value: Any) -> str:
    """Text without anything that a terminal would obey."""
    text = str(value)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def address_text(value: int) -> str:
    return f"{value:#x}"


def size_text(value: Optional[int]) -> str:
    """Bytes for people: ``15.0 GiB``.

    >>> size_text(1536), size_text(128), size_text(None)
    ('1.5 KiB', '128 B', '-')
    """
    if value is None:
        return "-"
    number, unit = float(value), "B"
    for unit in _UNITS:
        if abs(number) < 1024 or unit == _UNITS[-1]:
            break
        number /= 1024
    return f"{value} B" if unit == "B" else f"{number:.1f} {unit}"


_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
