"""``sglang-weight-hook slots``: the answer, and a way to it that does without typer.

64 slots take less time to read than typer and rich to import, so that plain arguments are read
here (`plainly`); help, completion and whatever is unclear are `slots_command`'s.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any, Optional

from ..reader import HookError
from .directories import directories_of
from .overview import STALE, SlotOverview, age_text, generations_text, slots_of
from .render.output import Form, Unwritable, form_of, print_answer
from .render.table import Column
from .render.text import STYLES, complain, remark

_OK, _NO_ANSWER, _USAGE, _ACT = 0, 1, 2, 3

FIELDS = (
    *("directory", "slot", "host", "gpu", "device", "model", "model_class", "role", "ranks"),
    *("state", "published_state", "layout_generation", "content_generation"),
    *("event", "event_ok", "event_at", "checked_at", "owner_alive", "pid", "problem"),
)
_COLUMNS = (
    Column("slot"),
    Column("host", drop=3),
    Column("gpu", right=True, drop=1),
    Column("model", drop=6),
    Column("role", drop=5),
    Column("ranks", drop=4),
    Column("state", styles=STYLES),
    Column("gen", right=True),
    Column("last event"),
    Column("age", right=True),
    Column("checked", right=True, drop=2),
    Column("owner"),
)


def answer(directories: Optional[list[str]], form: Form, allow_stale: bool = False) -> int:
    """Print a line for each slot; the exit status.  Raises HookError."""
    asked = directories_of(directories)
    found, problems = slots_of(asked)
    for problem in problems:
        complain(problem)
    if not found:
        if problems:
            return _NO_ANSWER
        where = ", ".join(directory.path for directory in asked)
        raise HookError(
            f"no slot is published in {where}; check --dir and that the server has loaded its model"
        )
    now = time.time()
    several = len({one.directory for one in found}) > 1
    if form.is_json:
        entries = [one._asdict() for one in found]
        sys.stdout.write(json.dumps({"slots": entries, "problems": problems}, indent=2) + "\n")
    else:
        columns = (*_COLUMNS, Column("directory", drop=7)) if several else _COLUMNS
        rows = [_row(one, now) + ([one.directory] if several else []) for one in found]
        print_answer(form, columns, rows, [one._asdict() for one in found], FIELDS)
        remark(_sum(found))
    for one in found:
        if one.problem is not None:
            complain(f"slot {one.slot} in {one.directory}: {one.problem}")
    if problems or any(one.problem is not None for one in found):
        return _ACT
    return _ACT if not allow_stale and any(one.state == STALE for one in found) else _OK


def _row(one: SlotOverview, now: float) -> list[str]:
    model = one.model or one.model_class
    return [
        one.slot,
        one.host or "-",
        "-" if one.gpu is None else str(one.gpu),
        "-" if model is None else model.rstrip("/").rsplit("/", 1)[-1],
        one.role or "-",
        one.ranks or "-",
        one.state,
        generations_text(one.layout_generation, one.content_generation),
        (one.event or "-") + (" failed" if one.event_ok is False else ""),
        age_text(one.event_at, now),
        age_text(one.checked_at, now),
        {True: "alive", False: "exited", None: "-"}[one.owner_alive],
    ]


def _sum(found: list[SlotOverview]) -> str:
    """How many there are of each state: ``64 slots: 62 ready, 2 stale``."""
    counts: dict[str, int] = {}
    for one in found:
        counts[one.state] = counts.get(one.state, 0) + 1
    told = ", ".join(f"{count} {state}" for state, count in counts.items())
    return f"{len(found)} slot{'s' if len(found) > 1 else ''}: {told}"


def plainly(arguments: list[str]) -> Optional[int]:
    """The answer to arguments that need no explanation; None where typer has to look at them."""
    given: dict[str, Any] = {"--dir": [], "--output": None}
    flags = {"--json": False, "--no-headers": False, "--allow-stale": False}
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if argument in flags:
            flags[argument] = True
            continue
        name = "--output" if name == "-o" and not equals else name
        if name not in given:
            return None
        if not equals:
            value = next(rest, "")
            if not value or value.startswith("-"):
                return None
        if name == "--dir":
            given[name].append(value)
        else:
            given[name] = value
    try:
        form = form_of(given["--output"], flags["--json"], flags["--no-headers"])
        status = answer(given["--dir"], form, flags["--allow-stale"])
        sys.stdout.flush()
        return status
    except Unwritable as error:
        complain(str(error))
        return _USAGE
    except HookError as error:
        complain(str(error))
        return _NO_ANSWER
    except KeyboardInterrupt:
        return 130
