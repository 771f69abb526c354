"""Resolves the slots, files and directories named on the command line."""

from __future__ import annotations

import fnmatch
import glob
import os
from typing import Any, Optional

from ..layout.states import READY
from ..reader import Directory, Document, HookError, Slot, Tensor, open_file
from ..reader.slot_names import slot_named, some_of
from .app import ACT, Misused
from .directories import directory_at
from .render.text import complain, printable


def document_of(directory: Optional[str], slot: Optional[str]) -> Document:
    """The document of a slot, of the only slot, or of a saved file."""
    if slot is not None and is_path(slot):
        return open_file(slot)
    found = directory_at(directory)
    slots = slots_in(found)
    if slot is None:
        if len(slots) > 1:
            names = [each.name for each in slots]
            raise Misused(
                f"there are slots {some_of(names)} in {found.path}; name one of them "
                f"(`sglang-weight-hook slots` lists all)"
            )
        return slots[0].read()
    return slot_named(found, slots, slot).read()


def slots_in(found: Directory) -> list[Slot]:
    slots = found.slots()
    if not slots:
        raise HookError(
            f"no slot is published in {found.path}; check --dir and that the server has loaded its "
            f"model, and run `python -m sglang_weight_hook doctor` in the server's environment"
        )
    return slots


def is_path(slot: str) -> bool:
    return os.sep in slot or slot.endswith(".json")


def refuse_path(name: str, lacks: str) -> None:
    """Raises Misused for a saved file where only a slot has what is asked for."""
    if is_path(name):
        raise Misused(f"{name} is a saved file, which has no {lacks}; name a slot")


def is_like(name: str, pattern: str) -> bool:
    """Whether a name is like ``pattern``: holds it, or as a whole matches it if it is a GLOB.

    >>> is_like("model.norm.weight", "norm"), is_like("model.norm.weight", "norm*")
    (True, False)
    >>> is_like("model.norm.weight", "*.norm.*"), is_like("a[0].b", "a[[]0]*")
    (True, True)
    """
    return fnmatch.fnmatchcase(name, pattern) if glob.has_magic(pattern) else pattern in name


def is_wanted(tensor: Tensor, pattern: Optional[str]) -> bool:
    """Whether one of the tensor's names is like ``pattern``; None: every tensor is."""
    return pattern is None or any(is_like(name, pattern) for name in (tensor.name, *tensor.aliases))


def inside(value: Any, *path: str) -> Any:
    """The value at ``path`` inside unchecked JSON; None where there is none."""
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def heading(document: Document) -> dict[str, Any]:
    """The fields of a JSON answer that identify its document, and say whether it is good now."""
    liveness = document.slot.liveness() if document.is_live else None
    return {
        "slot": document.slot.name,
        "state": document.state["state"],
        "owner_alive": is_alive(document),
        # Whether that is beyond doubt, and what it rests on; null for a saved copy.
        "owner_certain": None if liveness is None else liveness.certain,
        "owner_why": None if liveness is None else liveness.why,
        "layout_generation": document.layout_generation,
        "content_generation": document.content_generation,
        "physical_epoch": document.physical_epoch,
        "pid": document.state.get("pid"),
    }


def is_alive(document: Document) -> Optional[bool]:
    """Whether the owner lives; None for a saved copy, which has no owner."""
    return document.owner_alive() if document.is_live else None


def standing(document: Document) -> str:
    return (
        f"slot {printable(document.slot.name)} {printable(document.state['state'])}, "
        f"layout {document.layout_generation}, content {document.content_generation}"
    )


def stale_status(document: Document, allow_stale: bool = False) -> int:
    """The exit status that the document itself asks for; stderr says why it is not 0.

    A saved copy is what it is.  ``allow_stale``: it is known, and does not count.
    """
    why = why_stale(document)
    if why is None:
        return 0
    complain(why)
    return 0 if allow_stale else ACT


def stale_status_of_all(documents: list[Document], allow_stale: bool = False) -> int:
    """As `stale_status`; many slots whose owners have exited are named in one line a directory."""
    exited: dict[str, list[str]] = {}
    others = []
    for document in documents:
        if _has_exited(document):
            exited.setdefault(document.slot.directory, []).append(document.slot.name)
        else:
            others.append(document)
    if sum(map(len, exited.values())) < 2:
        return max((stale_status(each, allow_stale) for each in documents), default=0)
    for place, names in exited.items():
        slots = "slot" if len(names) == 1 else "slots"
        complain(
            f"{slots} {some_of(names)} in {place}: stale, for the owner has exited, so that the "
            f"addresses are invalid; start the server again"
        )
    status = max((stale_status(each, allow_stale) for each in others), default=0)
    return status if allow_stale else ACT


def _has_exited(document: Document) -> bool:
    """Whether the owner is known to have exited."""
    try:
        return is_alive(document) is False
    except HookError:
        return False


def why_stale(document: Document) -> Optional[str]:
    """Why the answers of a document are not good now; None where they are, or it is a copy."""
    name, state = document.slot.name, document.state
    try:
        alive = is_alive(document)
    except HookError as error:  # an agent that has gone since: unknown is not good
        return f"slot {name} is unknown now: {error}"
    if alive is False:
        return (
            f"slot {name} is stale: its owner (pid {state.get('pid')}) has exited, so its "
            f"addresses are invalid; start the server again"
        )
    if document.is_live and state["state"] != READY:
        return f"slot {name} is {state['state']}: {_MEANINGS.get(str(state['state']), '')}"
    return None


_MEANINGS = {
    "loading": "its engine is not built yet, and may move weights; wait until it is ready",
    "updating": "its weights are being changed; wait until it is ready",
    "failed": "an update has failed, perhaps half way; its addresses are valid, its values may not",
    "released": "its weights have no physical memory; touching the addresses faults",
}
