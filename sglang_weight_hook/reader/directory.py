"""An output directory: its slots and their events."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple, Optional

from ..layout import location
from ..layout.documents import SCHEMA
from .document import Document
from .errors import HookError
from .files import check_schema, file_name, read_json
from .history import History
from .slot import LOOK_AGAIN, Slot, state_of
from .watch import DirectoryWatch

_STATE_NAME = re.compile(r"weight_state_(.+)\.json\Z")
_EVENTS_NAME = re.compile(r"weight_events_(.+?)(?:\.1)?\.jsonl\Z")
_LAYOUT_NAME = re.compile(r"^weight_layout_(.+)\.json$")


def slot_order(name: str) -> tuple[tuple[bool, int, str], ...]:
    """The sorting key of a slot's name: by number, and a draft after its target.

    >>> sorted(["10", "1", "0_draft1", "0", "2", "0_draft", "0.host-7"], key=slot_order)
    ['0', '0.host-7', '0_draft', '0_draft1', '1', '2', '10']
    """
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    # Ahead of int(), which refuses what has more than 4300 digits.
    return tuple(
        (False, int(part), "") if part.isdecimal() and len(part) < 20 else (True, 0, part)
        for part in parts
    )


class Change(NamedTuple):
    """Something that `Directory.events` has seen."""

    slot: Slot
    state: Optional[dict[str, Any]]  # the state document, the last one known if it was removed
    alive: bool  # whether the process that publishes the slot lives
    initial: bool  # the state when the watching began, not a change
    problem: Optional[str] = None  # why the slot cannot be read now; the others go on


class Directory:
    """An output directory: the slots of every runner that publishes into it."""

    def __init__(self, path: str) -> None:
        self.path = file_name(path)

    @property
    def place(self) -> str:
        """The same for every path that leads to this directory."""
        return os.path.realpath(self.path)

    def slots(self) -> list[Slot]:
        """All slots with a state file: 0, 0_draft, 1, 2, 10, ...  Raises HookError."""
        matches = (_STATE_NAME.match(name) for name in self._names())
        names = sorted((m.group(1) for m in matches if m), key=slot_order)
        return [Slot(self.path, name) for name in names]

    def slot(self, name: str) -> Slot:
        return Slot(self.path, name)

    def slots_at(self, addresses: Collection[int]) -> list[Slot]:
        """Those that may have something at one of the addresses: all, for their documents are here.

        Raises HookError.
        """
        return self.slots()

    def histories(self, since: Optional[float] = None, kind: Optional[str] = None) -> list[History]:
        """The event log of each slot that has one, in the order of `slots`; see `Slot.history`.

        Also of slots whose owner has exited and taken the other files away.  Raises HookError.
        """
        matches = (_EVENTS_NAME.match(name) for name in self._names())
        slots = sorted({match.group(1) for match in matches if match}, key=slot_order)
        return [History(self.path, slot, since, kind) for slot in slots]

    def events(self, timeout: Optional[float] = None) -> Iterator[Change]:
        """What happens in this directory: first every slot as it is, then every change.

        The directory need not exist yet.  Ends after ``timeout`` seconds; None: never.
        Raises HookError.
        """
        known: dict[str, tuple[Optional[dict[str, Any]], bool]] = {}
        slots: dict[str, Slot] = {}
        problems: dict[str, str] = {}
        deadline = None if timeout is None else time.monotonic() + timeout
        initial = True
        with DirectoryWatch(self.path) as watch:
            while True:
                for name in sorted(self._names_if_any() | set(known), key=slot_order):
                    # The same object each time: it remembers what it has found out.
                    slot = slots.get(name) or slots.setdefault(name, self.slot(name))
                    before, lived = known.get(name, (None, False))
                    try:
                        alive = slot.owner_alive()  # before the look: the last publication counts
                        state = slot.state_if_any()
                    except HookError as error:
                        known.setdefault(name, (None, False))
                        if problems.get(name) != str(error):
                            problems[name] = str(error)
                            yield Change(slot, before, lived, initial, str(error))
                        continue
                    problems.pop(name, None)
                    known[name] = (state, alive)
                    if state is not None and state != before:
                        yield Change(slot, state, alive, initial)
                    elif lived and not alive:
                        yield Change(slot, state or before, alive, initial)
                initial = False
                left = LOOK_AGAIN if deadline is None else deadline - time.monotonic()
                if left <= 0:
                    return
                watch.wait(min(left, LOOK_AGAIN))

    def _names(self) -> list[str]:
        """The names of all files.  Raises HookError."""
        try:
            return os.listdir(self.path)
        except OSError as error:
            raise HookError(
                f"{self.path}: {error.strerror}; give the server's weights_metadata directory, "
                f"or set {location.DIRECTORY}"
            ) from error

    def _names_if_any(self) -> set[str]:
        try:
            return {slot.name for slot in self.slots()}
        except HookError:  # no such directory, yet or any more
            return set()

    def __repr__(self) -> str:
        return f"<Directory {self.path!r}>"


def open_directory(path: Optional[str] = None) -> Directory:
    """The directory ``path``, else that of ``SGLANG_WEIGHT_HOOK_DIR``, else the default.

    Also the URL of a node agent (``https://node:7411``, ``http://…``) or of a registry of many
    (``etcd://host:2379,host2:2379``, ``etcds://…`` with TLS): see docs/fleet.md.  What cannot be
    done from afar raises HookError, an agent that does not answer `Unreachable`.
    """
    value = path if path is not None else os.environ.get(location.DIRECTORY)
    if value is not None and location.is_url(value):
        # The other way round as a rule: fleet is built on the reader.
        from ..fleet.opening import open_url

        return open_url(value)
    return Directory(location.directory_from(value, os.getcwd()))


def open_slot(path: Optional[str], name: str) -> Slot:
    """Slot ``name`` (``"0"``, ``"0_draft"``, …) of a directory."""
    return open_directory(path).slot(name)


def open_file(path: str) -> Document:
    """A saved copy of a ``weight_layout_{slot}.json``.  Raises HookError.

    The state is that of the copy; the slot as it is now is not read.
    """
    raw = read_json(file_name(path))
    if raw is None:
        raise HookError(f"{path} does not exist; give a copy of a weight_layout_{{slot}}.json")
    check_schema(raw, SCHEMA, path)
    name = os.path.basename(path)
    match = _LAYOUT_NAME.match(name)
    state = state_of(raw)
    for key in ("pid", "process_start_ticks", "boot_id", "hostname"):
        state[key] = raw["identity"].get(key)
    slot = Slot(os.path.dirname(os.path.abspath(path)), match.group(1) if match else name)
    return Document(slot, raw, state, is_live=False)
