"""``sglang-weight-hook diff``."""

from __future__ import annotations

from typing import Annotated

import typer

from ..reader import compare
from .app import ACT, command
from .options import DirOption, JsonOption
from .render.text import address_text, print_json, print_line, printable
from .selection import document_of, heading

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
        str, typer.Argument(metavar="OLD", help="The earlier layout: a saved file or a slot.")
    ],
    new: Annotated[
        str, typer.Argument(metavar="NEW", help="The later layout: a saved file or a slot.")
    ],
    directory: DirOption = None,
    everything: Annotated[
        bool, typer.Option("--all", help="List every changed tensor, not only the first 10.")
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Compare two layouts: tensors moved, resized, added, removed.

    Exit status 0: memory registered from OLD is still valid (contents may have changed).
    Exit status 3: register the memory again.
    """
    before, after = document_of(directory, old), document_of(directory, new)
    changes = compare(before.raw, after.raw)
    status = ACT if changes.must_register_again else 0
    # Buckets written in place after the layout are counted in the state document only.
    content = changes.content_changed or (before.content_generation != after.content_generation)
    if as_json:
        print_json(
            {
                "old": heading(before),
                "new": heading(after),
                **changes.as_dict(),
                "content_changed": content,
            }
        )
        return status
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
            print_line(f"  {' -> '.join(places)}  {printable(name)}")
        if len(names) > _LISTED and not everything:
            print_line(f"  and {len(names) - _LISTED} more (--all lists them)")
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
    contents = "contents changed" if content else "contents are the same"
    if status:
        print_line(("register again", "bold red"), f": {', '.join(reasons)}; {contents}")
    else:
        print_line(("registrations hold", "bold green"), f"; {contents}")
    return status
