"""The table: one line for each thing measured, on the terminal and in ``docs/benchmarks.md``."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple, Optional

from .measure import Sample

COLUMNS = ("what", "hook", "baseline", "figure", "target", "")


class Line(NamedTuple):
    what: str
    hook: str
    baseline: str
    figure: str
    target: str = ""
    met: Optional[bool] = None  # None: there is no target, or it could not be measured

    @property
    def mark(self) -> str:
        return "" if self.met is None else "met" if self.met else "MISSED"


class Section(NamedTuple):
    """What one benchmark module has measured."""

    title: str
    lines: list[Line]
    how: str  # what was measured, for who wants to do it again
    limits: str  # what limits it, and how far that is from the physical floor


def seconds(value: float) -> str:
    """
    >>> seconds(1.25), seconds(0.0125), seconds(4.2e-06)
    ('1.25 s', '12.5 ms', '4.20 µs')
    """
    unit, factor = next(
        (pair for pair in (("s", 1.0), ("ms", 1e3)) if value * pair[1] >= 1), ("µs", 1e6)
    )
    shown = value * factor
    return f"{shown:.{max(0, 2 - len(str(int(shown))) + 1)}f} {unit}"


def size(count: float) -> str:
    """
    >>> size(2048), size(13 * 2**20)
    ('2.0 KiB', '13.0 MiB')
    """
    units = ["B", "KiB", "MiB", "GiB"]
    while abs(count) >= 1024 and len(units) > 1:
        count /= 1024
        del units[0]
    return f"{count:.1f} {units[0]}"


def number(count: int) -> str:
    """
    >>> number(100000)
    '100 000'
    """
    return f"{count:,}".replace(",", " ")


def timing(sample: Sample) -> str:
    return f"{seconds(sample.median)} ±{sample.spread:.0%} n={sample.n}"


def times(sample: Sample, digits: int = 2) -> str:
    return f"{sample.median:.{digits}f} x ±{sample.spread:.0%}"


# --- the terminal -------------------------------------------------------------------------


def as_text(sections: Iterable[Section]) -> str:
    rows = [COLUMNS]
    for section in sections:
        rows.append((section.title, "", "", "", "", ""))
        for line in section.lines:
            rows.append(("  " + line.what, *line[1:5], line.mark))
    # A section's title may reach over the other columns.
    widths = [
        max(len(row[column]) for row in rows if row[1] or column) for column in range(len(COLUMNS))
    ]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
    )


# --- the document -------------------------------------------------------------------------


def as_document(sections: Sequence[Section], command: str) -> str:
    lines = [
        "# Benchmarks",
        "",
        f"Written by `{command}`; every line was measured in that one run, interleaved with its",
        "baseline. Times are CPU time (user and kernel) of the process unless it says wall. A",
        "timing is `median ±half of the interquartile range n=rounds`; a ratio is the median of",
        "the rounds' own ratios.",
        "",
        *(f"* {fact}" for fact in machine()),
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    for section in sections:
        lines.append(f"| **{section.title}** | | | | | |")
        for line in section.lines:
            mark = f"**{line.mark}**" if line.met is False else line.mark
            lines.append("| " + " | ".join((*line[:5], mark)) + " |")
    lines += ["", "## How each is measured, and what limits it", ""]
    for section in sections:
        lines += [f"### {section.title}", "", section.how, "", section.limits, ""]
    return "\n".join(lines)


def machine() -> list[str]:
    """The machine and the versions that the figures belong to."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    load = Path("/proc/loadavg").read_text(encoding="ascii").split()[0]
    return [
        f"{cpu}, {os.cpu_count()} cores, {platform.system()} {platform.release()}; "
        f"load average {load} when the run ended, so others were running too",
        f"Python {platform.python_version()}, torch {_version('torch')}, "
        f"orjson {_version('orjson')}",
    ]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
