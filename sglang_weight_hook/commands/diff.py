"""``sglang-weight-hook diff``."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from ..reader import Diff, Document, compare
from .app import ACT, command
from .options import AllowStaleOption, DirOption, JsonOption
from .render.text import address_text, complain, print_json, print_line
from .selection import document_of, heading, is_alive
from .slot_choice import slots_and_files_named

# Names listed for each kind of change, unless all are asked for.
_LISTED = 10


@command(
    "diff",
    "cp weights_metadata/weight_layout_0.json before.json\n"
    "sglang-weight-hook diff before.json 0\n"
    "sglang-weight-hook diff before.json after.json --json",
)
def diff(
    old: Annotated[
        str,
        typer.Argument(
            metavar="OLD",
            help="The earlier layout: a saved file or a slot.",
            autocompletion=slots_and_files_named,
        ),
    ],
    new: Annotated[
        str,
        typer.Argument(
            metavar="NEW",
            help="The later layout: a saved file or a slot.",
            autocompletion=slots_and_files_named,
        ),
    ],
    directory: DirOption = None,
    everything: Annotated[
        bool, typer.Option("--all", help="List every changed tensor, not only the first 10.")
    ] = False,
    allow_stale: AllowStaleOption = False,
    as_json: JsonOption = False,
) -> int:
    """Compare two layouts: tensors moved, resized, added, removed.

    Exit status 0: memory registered from OLD is still valid (contents may have changed).
    Exit status 3: register the memory again, or do not use it now (NEW is not ready, or its owner
    has exited).
    """
    before, after = document_of(directory, old), document_of(directory, new)
    changes = compare(before.raw, after.raw)
    content = _content_changed(before, after, changes)
    obstacle = _obstacle(after)
    status = ACT if changes.must_register_again or (obstacle and not allow_stale) else 0
    if obstacle is not None:
        complain(obstacle)
    if as_json:
        print_json(
            {
                "state": after.state["state"],
                "owner_alive": is_alive(after),
                "old": heading(before),
                "new": heading(after),
                **changes.as_dict(),
                "content_changed": content,
                "content_only": changes.content_only if content is not None else None,
                "obstacle": obstacle,
            }
        )
        return status
    _print_names(before, after, changes, everything)
    _print_verdict(changes, content, obstacle)
    return status


def _obstacle(after: Document) -> Optional[str]:
    """Why the memory is not to be used now, whatever has changed; None where it may be."""
    if is_alive(after) is False:
        return (
            f"the owner of slot {after.slot.name} (pid {after.state.get('pid')}) has exited: its "
            f"addresses are invalid, and what was registered has no memory behind it"
        )
    return _OBSTACLES.get(str(after.state["state"]))


# What a state means for memory that was registered, where it is not to be used now.
_OBSTACLES = {
    "loading": "the engine is not built yet and may move weights; compare again when it is ready",
    "failed": "an update has failed, perhaps half way: the addresses are valid, the values may not "
    "be",
    "updating": "an update is running: contents are half written and addresses may still change; "
    "compare again when it is over",
    "released": "the weights' memory is released: touching the addresses faults, and what was "
    "registered has no memory behind it; register again when it is resumed",
}


def _content_changed(before: Document, after: Document, changes: Diff) -> Optional[bool]:
    """Whether values were written; None where two saved copies cannot tell.

    What is written in place after a layout is counted in the state document only.
    """
    if changes.content_changed or before.content_generation != after.content_generation:
        return True
    if after.is_live:
        return False
    return None


def _print_names(before: Document, after: Document, changes: Diff, everything: bool) -> None:
    for word, names in (
        ("moved", changes.moved),
        ("resized", changes.resized),
        ("added", changes.added),
        ("removed", changes.removed),
    ):
        if names:
            print_line((f"{len(names)} {word}", "bold"))
        for name in names if everything else names[:_LISTED]:
            places = [
                address_text(document.tensor(name).ptr)
                for document in (before, after)
                if name in document.tensors
            ]
            print_line(f"  {' -> '.join(places)}  {name}")
        if len(names) > _LISTED and not everything:
            print_line(f"  and {len(names) - _LISTED} more (--all lists them)")


def _print_verdict(changes: Diff, content: Optional[bool], obstacle: Optional[str]) -> None:
    reasons = [
        reason
        for reason, holds in (
            ("another process", changes.other_process),
            ("another runner", changes.other_instance and not changes.other_process),
            ("other physical pages", changes.repaged),
            ("other regions", changes.regions_changed),
        )
        if holds
    ]
    contents = {
        True: "contents changed",
        False: "contents are the same",
        None: "whether contents changed is unknown: what is written in place leaves a layout as "
        "it is (name the slot as NEW to know)",
    }[content]
    if reasons:
        print_line(("register again", "bold red"), f": {', '.join(reasons)}; {contents}")
    elif obstacle is None:
        print_line(("registrations hold", "bold green"), f"; {contents}")
    if obstacle is not None:
        print_line(("do not use it now", "bold red"), f": {obstacle}")
