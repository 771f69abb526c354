"""Checks that a slot's published files are complete and consistent with each other.

Each check is a small function from documents to findings.  An ``error`` means: do not use
these addresses.  A ``warning`` means: they are valid, with a limitation that the message names.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple, Optional

from ..layout import files
from . import checks, columns
from .document import Document
from .errors import HookError
from .files import read_value
from .findings import ERROR as ERROR
from .findings import WARNING as WARNING
from .findings import Finding, Remark, limited
from .legacy import legacy_files
from .schema_checker import Checker
from .slot import Slot

STATE_LIMIT = 2048  # bytes

_SCHEMAS = os.path.join(os.path.dirname(files.__file__), "schema")


class Verdict(NamedTuple):
    """Everything found about one slot.  ``document`` is None where none could be read."""

    slot: str
    document: Optional[Document]
    findings: list[Finding]

    @property
    def good(self) -> bool:
        return not any(finding.level == ERROR for finding in self.findings)


def verify_slot(slot: Slot, timeout: float = 10.0, live: bool = False) -> Verdict:
    """Check a slot: its documents, the legacy files beside them, and its owner.

    ``live``: also have the owner compare its map with memory (`Slot.check`).
    Waits up to ``timeout`` seconds for an update under way.  Raises nothing.
    """
    remarks: list[Remark] = []
    document = None
    try:
        document, contents = _read_everything(slot, timeout)
        remarks += _schema(document.state, "state")
        if not _has_errors(remarks):
            remarks += _state(document.state)
        found = verify_document(document)
        if not _has_errors(found):
            found += _generations(document)
            if contents is not None and document.state["state"] != "updating":
                found += legacy_files(document, contents)
        remarks += found
        size = slot.state_size()
        if size > STATE_LIMIT:
            remarks.append((ERROR, "state", f"the state document has {size} bytes, 2048 at most"))
    except (HookError, OSError) as error:
        remarks.append((ERROR, "readable", str(error)))
    remarks += _owner(slot)
    if live:
        remarks += _live(slot)
    return Verdict(slot.name, document, [Finding(slot.name, *remark) for remark in remarks])


def verify_file(document: Document) -> Verdict:
    """Check a saved layout by itself (`reader.open_file`)."""
    name = document.slot.name
    return Verdict(name, document, [Finding(name, *found) for found in verify_document(document)])


def verify_document(document: Document) -> list[Remark]:
    """Check what one layout document says of itself."""
    remarks = list(_schema(document.raw, "layout"))
    if _has_errors(remarks):
        return remarks  # what follows relies on every field being what it should be
    try:
        cache = list(document.iter_kv_cache())
        accounted: Iterable[checks.Accounted]
        if columns.are_sound(document.tensors, document.regions, cache):
            accounted = map(itemgetter(*_ACCOUNTED), document.tensors.values())
        else:
            tensors = list(document.iter_tensors())
            regions = list(document.iter_regions())
            remarks += limited("tensors", checks.tensors(tensors))
            remarks += limited("overlaps", checks.overlaps(tensors, cache))
            remarks += limited("regions", checks.regions(tensors, regions))
            accounted = map(attrgetter(*_ACCOUNTED), tensors)
    except HookError as error:
        return [*remarks, (ERROR, "schema", str(error))]
    remarks += checks.totals(document, accounted, cache)
    remarks += checks.completeness(document)
    return remarks


_ACCOUNTED = ("device", "size", "resident", "storage_ptr", "storage_size", "kind")


def _has_errors(remarks: list[Remark]) -> bool:
    return any(level == ERROR for level, _, _ in remarks)


# --- reading ------------------------------------------------------------------------------


def _read_everything(slot: Slot, timeout: float) -> tuple[Document, Optional[dict[str, Any]]]:
    """All documents of one publication; of an update under way if that outlasts ``timeout``."""
    deadline = time.monotonic() + timeout
    while True:
        document = slot.read(timeout)
        contents = slot.legacy_files()
        late = time.monotonic() >= deadline
        if slot.read_state() == document.state and (document.state["state"] != "updating" or late):
            return document, contents
        if late:
            raise HookError(
                f"slot {slot.name} is being published again and again; try once more, or with "
                f"more than {timeout:g} s"
            )
        time.sleep(0.02)


# --- owner, state, generations ------------------------------------------------------------


def _owner(slot: Slot) -> Iterator[Remark]:
    try:
        found = slot.liveness()
        if found.alive and not found.certain:
            yield (
                WARNING,
                "owner",
                f"whether the owner lives is not certain: {found.why}; verify on the server's "
                f"host, in its pid namespace",
            )
        if found.alive:
            return
        pid = slot.read_state()["pid"]
    except HookError:
        return  # no state: said already
    yield (
        ERROR,
        "owner",
        f"stale: the owner (pid {pid}) has exited, so the addresses are invalid; start the "
        f"server again",
    )


def _live(slot: Slot) -> Iterator[Remark]:
    """What the owner says when it is asked."""
    try:
        found = slot.check()
    except HookError as error:
        yield WARNING, "live", f"map and memory were not compared: {error}"
        return
    if not found.equal:
        now = (
            "the map that is true now has been published: read it again"
            if found.published
            else "the new map is not published yet: read it when the event under way is over"
        )
        names = ", ".join(found.tensors)
        yield (
            ERROR,
            "live",
            f"the map was not true: without a call that is known to move weights, tensors have "
            f"moved, come or gone ({names}); {now}",
        )


def _state(state: Mapping[str, Any]) -> Iterator[Remark]:
    name, event = state["state"], state.get("event")
    kind = event.get("kind") if isinstance(event, dict) else None
    message = event.get("message") if isinstance(event, dict) else None
    if state.get("problem"):
        yield ERROR, "problem", f"the hook could not publish: {state['problem']}"
    if name == "failed" and not state.get("problem"):
        yield (
            WARNING,
            "state",
            f"{kind} failed ({message}): the addresses hold, contents may be half written; "
            f"update again",
        )
    elif name == "loading":
        yield WARNING, "state", "the engine is still being built: addresses may still change"
    elif name == "updating":
        yield WARNING, "state", f"{kind} is running: these addresses are from before it"
    elif name == "released":
        yield WARNING, "state", "the weights' memory is released: touching the addresses faults"
    for missing in state.get("missing") or ():
        yield WARNING, "missing", f"this SGLang lacks {missing}: changes made that way are not seen"
    lock = state.get("lock")
    if isinstance(lock, str) and lock not in ("held", "not held"):
        yield (
            WARNING,
            "lock",
            f"the last event went on without the lock ({lock}): a reader held it too long",
        )


def _generations(document: Document) -> Iterator[Remark]:
    layout, state = document.raw["content_generation"], document.state["content_generation"]
    if layout > state:
        yield (
            ERROR,
            "generations",
            f"the layout has content generation {layout}, the state, which is never behind, "
            f"{state}",
        )
    checksums = document.raw.get("checksums")
    if isinstance(checksums, dict) and checksums.get("content_generation") != state:
        yield (
            WARNING,
            "checksums",
            f"the checksums are those of content generation "
            f"{checksums.get('content_generation')}, the weights have {state}",
        )


def _schema(document: Any, name: str) -> Iterator[Remark]:
    """Check a document against ``schema/weight_{name}.schema.json``."""
    path = os.path.join(_SCHEMAS, f"weight_{name}.schema.json")
    checker = _checker(path)
    if checker is None:
        yield (
            WARNING,
            "schema",
            f"{path} is missing, so the {name} document was not checked against it",
        )
        return
    yield from limited(
        "schema",
        (
            (ERROR, "schema", f"{name}{'.' if where else ''}{where} {problem}")
            for where, problem in checker.violations(document)
        ),
    )


def _checker(path: str) -> Optional[Checker]:
    """The schema at ``path``, made ready once; None where there is none."""
    if path not in _checkers:
        try:
            schema = read_value(path)
        except HookError:
            return None
        if not isinstance(schema, dict):
            return None
        _checkers[path] = Checker(schema)
    return _checkers[path]


_checkers: dict[str, Checker] = {}
