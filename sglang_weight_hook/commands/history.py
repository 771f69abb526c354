"""``sglang-weight-hook history``."""

from __future__ import annotations

import heapq
import json
import math
import re
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Annotated, Optional

import typer

from ..reader import History, HookError, PastEvent
from .app import ACT, Misused, command
from .directories import directory_at
from .options import DirOption, NoHeadersOption, OutputOption
from .output import asked_form
from .render.event import event_parts
from .render.output import JSON, TABLE, WIDE, print_answer
from .render.text import complain, date_and_time, print_line, printable
from .selection import refuse_path
from .slot_choice import slots_named

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}

# Of a record of csv, tsv or parquet.
_FIELDS = (
    *("at", "slot", "kind", "success", "state", "message", "started_at", "finished_at"),
    *("moved", "added", "removed", "layout_generation", "content_generation", "physical_epoch"),
    *("instance", "pid"),
)


_Slot = Annotated[
    Optional[str],
    typer.Argument(
        metavar="SLOT",
        show_default=False,
        help="Only events of this slot (0, 0_draft, ...); default: of all slots, by time.",
        autocompletion=slots_named,
    ),
]


@command(
    "history",
    "sglang-weight-hook history --since 12h\n"
    "sglang-weight-hook history 0 --kind 'update_*' --json\n"
    "sglang-weight-hook history --kind unannounced_change",
)
def history(
    slot: _Slot = None,
    directory: DirOption = None,
    since: Annotated[
        Optional[str],
        typer.Option(
            help="Only events since TIME: an age (90s, 15m, 2h, 3d, 1w), a date (2026-11-23), a "
            "local time (2026-11-23T10:00) or seconds since 1970-01-01 UTC.",
            metavar="TIME",
        ),
    ] = None,
    kind: Annotated[
        Optional[str],
        typer.Option(help="Only events of a kind like GLOB, e.g. 'update_*'.", metavar="GLOB"),
    ] = None,
    output: OutputOption = None,
    no_headers: NoHeadersOption = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object for each event.")
    ] = False,
) -> int:
    """Print the logged events, the oldest first.

    The log of a server that has exited can be read, too; a log keeps its last 1 to 2 MB.
    """
    form = asked_form(output, as_json, no_headers)
    if slot is not None:
        refuse_path(slot, "events")
    oldest = None if since is None else _time(since, time.time())
    found = directory_at(directory)
    one = None if slot is None else found.slot(slot).history(oldest, kind)
    histories = found.histories(oldest, kind) if one is None else [one]
    if not histories:
        raise HookError(
            f"no event was logged in {found.path}; check --dir and that a server has published "
            f"there"
        )
    unreadable: list[str] = []
    readable = [_readable(each, unreadable, len(histories) == 1) for each in histories]
    events = heapq.merge(*readable, key=lambda event: event.at)
    if form.name not in (TABLE, WIDE, JSON):
        records = [{**event.raw, "slot": event.slot, "at": event.at} for event in events]
        print_answer(form, (), (), records, _FIELDS)
        _tell_skipped(histories)
        return ACT if unreadable else 0
    for event in events:
        if form.is_json:
            line = {"slot": None, **event.raw}
            line["slot"] = event.slot
            sys.stdout.write(json.dumps(line) + "\n")
        else:
            _print_event(event)
    _tell_skipped(histories)
    return ACT if unreadable else 0


def _readable(history: History, unreadable: list[str], is_alone: bool) -> Iterator[PastEvent]:
    """Its events; one log that cannot be read stops none of the others."""
    try:
        yield from history
    except HookError as error:
        if is_alone:
            raise
        complain(f"slot {history.slot} is left out: {error}")
        unreadable.append(history.slot)


def _tell_skipped(histories: list[History]) -> None:
    for one in histories:
        if one.skipped:
            complain(f"slot {one.slot}: {one.skipped} lines of the log are no events: left out")


def _print_event(event: PastEvent) -> None:
    print_line(
        f"{date_and_time(event.at)}  {printable(event.slot)}  ", *event_parts(event.raw, event.raw)
    )


def _time(text: str, now: float) -> float:
    """Seconds since 1970-01-01 UTC.  Raises Misused.

    >>> _time("2h", 10_000.0), _time("1795355421.5", 0.0), _time("2026-11-23T10:00+00:00", 0.0)
    (2800.0, 1795355421.5, 1795428000.0)
    """
    age = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text.strip())
    try:
        if age:
            value = now - float(age[1]) * _UNITS[age[2]]
        elif re.fullmatch(r"\d+(\.\d+)?", text.strip()):
            value = float(text)
        else:
            # Python 3.10 knows no Z.
            value = datetime.fromisoformat(re.sub(r"[zZ]\Z", "+00:00", text.strip())).timestamp()
        if math.isfinite(value):
            return value
    except (ValueError, OverflowError, OSError):
        pass
    raise Misused(
        f"--since {text} is no time; give an age (2h), a time (2026-11-23T10:00) or seconds since "
        f"1970-01-01 UTC"
    )
