"""``sglang-weight-hook plot``."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from ..reader import Document, HookError, Slot, open_directory, open_file
from .app import command
from .options import AllowStaleOption, DirOption
from .render import page
from .render.text import complain, print_line
from .selection import document_of, slots_in, stale_status


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
    allow_stale: AllowStaleOption = False,
) -> int:
    """Draw the memory of all slots, or of those named, as HTML."""
    earlier = [open_file(path).raw for path in before] if before else None
    named = [document_of(directory, name) for name in slots or ()]
    documents = named or _readable(slots_in(open_directory(directory)))
    try:
        page.write_html([document.raw for document in documents], output, earlier)
    except _MALFORMED as error:
        raise _malformed(error) from error
    print_line(f"{output}: {len(documents)} {'slot' if len(documents) == 1 else 'slots'}")
    return max(stale_status(document, allow_stale) for document in documents)


_MALFORMED = (AttributeError, KeyError, TypeError, ValueError)


def _readable(slots: list[Slot]) -> list[Document]:
    """Those that can be drawn; about the others stderr says why, so one does not stop all."""
    found, last = [], None
    for slot in slots:
        try:
            document = slot.read()
            if len(slots) > 1:
                page.page([document.raw])
        except HookError as error:
            last = error
        except _MALFORMED as error:
            last = _malformed(error)
        else:
            found.append(document)
            continue
        if len(slots) > 1:
            complain(f"slot {slot.name} is left out: {last}")
    if not found and last is not None:
        raise last
    return found


def _malformed(error: Exception) -> HookError:
    return HookError(
        f"a layout document does not have the hook's format ({type(error).__name__}: {error}); "
        f"`sglang-weight-hook verify` says where"
    )
