"""``sglang-weight-hook plot``."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from ..reader import HookError, open_directory, open_file
from .app import command
from .options import DirOption
from .render import page
from .render.text import print_line
from .selection import document_of, slots_in


@command(
    "plot",
    "sglang-weight-hook plot --output map.html\nsglang-weight-hook plot 0 1 --before before.json",
)
def plot(
    slots: Annotated[
        Optional[list[str]],
        typer.Argument(
            metavar="SLOT...",
            show_default=False,
            help="Slots (0, 0_draft, ...) or saved layout files; default: all slots.",
        ),
    ] = None,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="The HTML file to write.")
    ] = "weight_map.html",
    before: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="FILE",
            help="An earlier saved layout to compare with; one per slot, repeatable.",
        ),
    ] = None,
    directory: DirOption = None,
) -> int:
    """Draw the memory of all slots, or of those named, as HTML."""
    names = slots or [slot.name for slot in slots_in(open_directory(directory))]
    documents = [document_of(directory, name).raw for name in names]
    earlier = [open_file(path).raw for path in before] if before else None
    try:
        page.write_html(documents, output, earlier)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise HookError(
            f"a layout document does not have the hook's format ({type(error).__name__}: {error}); "
            f"`sglang-weight-hook verify` says where"
        ) from error
    print_line(f"{output}: {len(documents)} {'slot' if len(documents) == 1 else 'slots'}")
    return 0
