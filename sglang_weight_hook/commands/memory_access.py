"""Which ways lead from here to the weights of the servers in an output directory."""

from __future__ import annotations

import os
from collections.abc import Iterator

from ..reader import Document, HookError, open_directory

# More slots than these are as these are.
_SLOTS = 8


def found_in(path: str) -> Iterator[tuple[str, str]]:
    """A level (`good` or `note`) and a sentence for each live slot, without reading any weight.

    The kernel is asked for one byte, an owner for none; memory of a GPU is not opened.
    """
    if not os.path.isdir(path):
        return
    try:
        slots = open_directory(path).slots()
    except HookError:
        return
    for slot in slots[:_SLOTS]:
        try:
            document = slot.read(0.0)
            if document.owner_alive():
                yield from _of(document)
        except HookError as error:
            yield "note", f"slot {slot.name} cannot be looked at: {error}"
    if len(slots) > _SLOTS:
        yield "good", f"of {len(slots)} slots the first {_SLOTS} were tried"


def _of(document: Document) -> Iterator[tuple[str, str]]:
    from ..memory.backends import REACH, WAYS

    kinds = {tensor.device.partition(":")[0] for tensor in document.iter_tensors()}
    name = document.slot.name
    for kind in sorted(kinds & REACH.keys()):
        works, why_not = [], []
        for way in REACH[kind]:
            try:
                WAYS[way](document).close()
                works.append(way)
            except HookError as error:
                why_not.append(f"{way}: {error}")
        if works:
            yield "good", f"slot {name}: its {kind} memory can be read by {' and by '.join(works)}"
        else:
            yield "note", f"slot {name}: its {kind} memory cannot be read; {'; '.join(why_not)}"
