"""``sglang-weight-hook plot``."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Optional

import typer

from ..reader import Document, HookError, Slot, open_file
from .app import ACT, command
from .directories import directory_at
from .options import AllowStaleOption, DirOption
from .render.text import complain, print_line
from .selection import document_of, is_alive, slots_in, stale_status_of_all
from .slot_choice import a_slot_or_file_named


@command(
    "plot",
    "sglang-weight-hook plot --output map.html\nsglang-weight-hook plot 0 1 --before before.json",
)
def plot(
    slots: Annotated[
        Optional[list[str]],
        typer.Argument(
            metavar="SLOT",
            show_default=False,
            help="Slots (0, 0_draft, ...) or saved layout files; default: all slots.",
            autocompletion=a_slot_or_file_named,
        ),
    ] = None,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="The HTML file to write.")
    ] = "weight_map.html",
    before: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="FILE",
            help="A layout saved earlier, to compare its slot with; repeatable.",
        ),
    ] = None,
    directory: DirOption = None,
    allow_stale: AllowStaleOption = False,
) -> int:
    """Draw the memory of all slots, or of those named, as HTML.

    Exit status 3 if a slot is stale or not ready, or cannot be read and so is left out.
    The page needs no network. What follows the # of its address says what it shows:
    #search=TEXT (part of a name, a glob, an address), #path=MODULE, #slot=SLOT,
    #theme=light|dark (default: the system's), joined by &.
    """
    earlier = [open_file(path).raw for path in before] if before else None
    named = [document_of(directory, name) for name in slots or ()]
    asked = [] if named else slots_in(directory_at(directory))
    documents = named or _read(asked)
    try:
        try:
            _write(documents, output, earlier)
        except _MALFORMED:
            if named or len(documents) == 1:
                raise
            documents = _drawable(documents)
            _write(documents, output, earlier)
    except _MALFORMED as error:
        raise _malformed(error) from error
    print_line(f"{output}: {len(documents)} {'slot' if len(documents) == 1 else 'slots'}")
    status = stale_status_of_all(documents, allow_stale)
    # A page without some of the slots looks like one of all.
    return ACT if len(documents) < len(asked) else status


_MALFORMED = (AttributeError, KeyError, TypeError, ValueError)


def _write(
    documents: list[Document], output: str, earlier: Optional[Sequence[Mapping[str, Any]]]
) -> None:
    from .render import page

    page.write_html(
        [document.raw for document in documents],
        output,
        earlier,
        [is_alive(document) for document in documents],
        [_events_of(document) for document in documents],
    )


def _events_of(document: Document) -> list[Mapping[str, Any]]:
    """The log of a live slot; none where there is no log, or where it cannot be read."""
    if not document.is_live:
        return []
    with contextlib.suppress(HookError):
        return [event.raw for event in document.slot.history()]
    return []


def _read(slots: list[Slot]) -> list[Document]:
    """Those that can be read; about the others stderr says why, so one does not stop all."""
    found, last = [], None
    for slot in slots:
        try:
            found.append(slot.read())
        except HookError as error:
            last = error
            if len(slots) > 1:
                complain(f"slot {slot.name} is left out: {last}")
    if not found and last is not None:
        raise last
    return found


def _drawable(documents: list[Document]) -> list[Document]:
    """Of several documents, those that can be drawn; looked for only once drawing all failed."""
    from .render import page

    found, last = [], None
    for document in documents:
        try:
            page.page([document.raw])
        except _MALFORMED as error:
            last = _malformed(error)
            complain(f"slot {document.slot.name} is left out: {last}")
        else:
            found.append(document)
    if not found and last is not None:
        raise last
    return found


def _malformed(error: Exception) -> HookError:
    return HookError(
        f"a layout document does not have the hook's format ({type(error).__name__}: {error}); "
        f"`sglang-weight-hook verify` says where"
    )
