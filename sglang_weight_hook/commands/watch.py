"""``sglang-weight-hook watch``."""

from __future__ import annotations

import json
import sys
import time
from typing import Annotated, Any, Optional

import typer

from ..reader import Change, Directory, HookError
from .app import ACT, command
from .directories import directory_at
from .options import DirOption
from .render.event import event_parts
from .render.text import clock, complain, print_line, printable
from .selection import inside, refuse_path
from .slot_choice import slots_named

_Slot = Annotated[
    Optional[str],
    typer.Argument(
        metavar="SLOT",
        show_default=False,
        help="Only events of this slot (0, 0_draft, ...); default: all slots.",
        autocompletion=slots_named,
    ),
]
_AllEvents = Annotated[
    bool, typer.Option("--all-events", help="Also print the start of each event (`updating`).")
]
_Begins = Annotated[bool, typer.Option("--begins", hidden=True)]  # its name in 0.1
_Count = Annotated[
    Optional[int], typer.Option(help="Stop after N completed events.", metavar="N", min=1)
]
_Timeout = Annotated[
    Optional[float], typer.Option(help="Stop after S seconds.", metavar="S", min=0)
]
_JsonLines = Annotated[bool, typer.Option("--json", help="Print one JSON object for each event.")]


@command(
    "watch",
    "sglang-weight-hook watch\n"
    "sglang-weight-hook watch 0 --json\n"
    "sglang-weight-hook watch --count 1 --timeout 60",
)
def watch(
    slot: _Slot = None,
    directory: DirOption = None,
    all_events: _AllEvents = False,
    begins: _Begins = False,
    count: _Count = None,
    timeout: _Timeout = None,
    as_json: _JsonLines = False,
) -> int:
    """Print a line for each completed event, until Ctrl-C.

    Starts with a line for the present state of each slot.  Events in quick succession may
    share a line.  Exit status 3 if --timeout ends it before --count is reached, or if a slot cannot
    be read and so is left out; 1 if --timeout ends it before there was a slot.
    """
    if slot is not None:
        refuse_path(slot, "events")
    seen = 0
    were_any = False
    left_out: set[str] = set()
    found = directory_at(directory)
    _say_what_is_waited_for(found, slot)
    try:
        for change in found.events(timeout):
            if slot is not None and change.slot.name != slot:
                continue
            were_any = True
            if change.problem is not None:
                complain(change.problem)
                left_out.add(change.slot.name)
                continue
            left_out.discard(change.slot.name)
            finished = not change.alive or inside(change.state, "event", "success") is not None
            if not (finished or all_events or begins or change.initial):
                continue
            if as_json:
                sys.stdout.write(json.dumps(_change(change)) + "\n")
            else:
                _print_change(change)
            sys.stdout.flush()  # a pipe gets each line at once
            seen += finished and not change.initial
            if count is not None and seen >= count:
                return ACT if left_out else 0
    except KeyboardInterrupt:
        return ACT if left_out else 0
    if not were_any:
        raise _none_within(found, slot, timeout or 0.0)
    return ACT if left_out or count is not None else 0


def _none_within(found: Directory, slot: Optional[str], seconds: float) -> HookError:
    what = "no slot" if slot is None else f"no slot {slot}"
    return HookError(
        f"{what} was published in {found.path} within {seconds:g} s; check --dir and that the "
        f"server has loaded its model"
    )


def _say_what_is_waited_for(found: Directory, slot: Optional[str]) -> None:
    """On stderr, where nothing can be printed yet: silence looks like a command that hangs."""
    try:
        names = [each.name for each in found.slots()]
    except HookError:
        complain(f"{found.path} does not exist or cannot be read yet; waiting for a server there")
        return
    if not names or (slot is not None and slot not in names):
        what = "no slot" if slot is None else f"no slot {slot}"
        complain(f"{what} is published in {found.path} yet; waiting for a server to load its model")


def _change(change: Change) -> dict[str, Any]:
    return {
        "slot": change.slot.name,
        "initial": change.initial,
        "owner_alive": change.alive,
        "state": change.state,
    }


def _print_change(change: Change) -> None:
    state = change.state or {}
    event = state.get("event")
    event = event if isinstance(event, dict) else {}
    stamp = time.time() if not change.alive else state.get("updated_at")
    where = f"{clock(stamp)}  {printable(change.slot.name)}  "
    if not change.alive:
        pid = state.get("pid")
        print_line(where, ("stale", "bold red"), f"  owner {pid} has exited: addresses are invalid")
        return
    print_line(where, *event_parts(event, state))
