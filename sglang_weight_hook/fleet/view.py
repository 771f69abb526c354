"""What the agent knows of its directories, followed in threads that only read."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Optional

from ..reader import Change, Directory, HookError
from ..reader.directory import slot_order
from .entry import Entry, encoded, entry_of

# Each so many seconds a directory is looked at as a whole, for files that have been removed.
ROUND = 5.0
PAUSE = 1.0  # seconds after a look that has failed

# What is told of each change: the entry, or the id of a slot whose files are gone.
Told = Callable[[Optional[Entry], str], None]

_log = logging.getLogger(__name__)


class DirectoryView:
    """The slots of one directory, which need not exist yet."""

    def __init__(self, directory: Directory, id_of: Callable[[str], str], told: Told) -> None:
        self.directory = directory
        self.problem: Optional[str] = None  # why the directory's slots are not known
        self.entries: dict[str, Entry] = {}  # by the slot's name; replaced, never changed
        self.looked = threading.Event()  # the first look is over
        self.looked_at = time.monotonic()  # when it was last seen what there is
        self._found: set[str] = set()
        self._id_of = id_of
        self._told = told
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="directory", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """From now on nothing is told; the thread ends by itself, within `ROUND` seconds."""
        self._stopped.set()

    def _follow(self) -> None:
        while not self._stopped.is_set():
            try:
                if not self._sweep():
                    self.looked.set()
                    self._stopped.wait(PAUSE)
                    continue
                for change in self.directory.events(ROUND):
                    if self._stopped.is_set():
                        return
                    self._take(change)
            except Exception as error:  # a thread that ended would leave old answers standing
                self.problem = f"{self.directory.path} cannot be followed: {error!r}"
                _log.exception("%s cannot be followed", self.directory.path)
                self._stopped.wait(ROUND)
            self.looked.set()

    def _take(self, change: Change) -> None:
        name = change.slot.name
        before = self.entries.get(name)
        if change.initial and before is not None and _is_known(change, before):
            return  # each round tells everything
        slot = before.slot if before else change.slot  # it remembers what it has found out
        found = entry_of(slot, self._id_of(name), change.state, change.problem, before)
        if before is None or found.encoded != before.encoded:
            self.entries = {**self.entries, name: found}
            self._told(found, found.id)
        if self.entries.keys() >= self._found:
            self.looked.set()

    def _sweep(self) -> bool:
        """Look at all that is there: what is new, what has gone, whether it can be read.

        False where that is not known: then what was there is still listed, with the problem.
        """
        try:
            names = {slot.name for slot in self.directory.slots()}
            self.problem = None
        except (HookError, OSError) as error:
            self.problem = str(error)
            if not isinstance(error.__cause__, FileNotFoundError):
                self._doubt(str(error))
                return False
            names = set()
        self.looked_at = time.monotonic()
        self._found = names
        if not names:
            self.looked.set()
        gone = self.entries.keys() - names
        if gone:
            before = self.entries
            self.entries = {name: one for name, one in before.items() if name not in gone}
            for name in sorted(gone):
                self._told(None, before[name].id)
        return True

    def _doubt(self, problem: str) -> None:
        """Nobody knows now what is so: neither that a slot is gone, nor that it lives on."""
        for name, before in list(self.entries.items()):
            if before.content["problem"] != problem:
                content = {**before.content, "problem": problem}
                found = before._replace(content=content, encoded=encoded(content))
                self.entries = {**self.entries, name: found}
                self._told(found, found.id)


def _is_known(change: Change, before: Entry) -> bool:
    known = before.content
    return (change.state, change.alive, change.problem) == (
        known["state"],
        known["owner_alive"],
        known["problem"],
    )


class Views:
    """Several directories as one list of slots."""

    def __init__(self, directories: Sequence[Directory], told: Sequence[Told] = ()) -> None:
        self.told = list(told)
        self._lock = threading.Lock()
        self._places: dict[str, int] = {}  # by slot's id: the directory's number, from 1
        self.directories = [
            DirectoryView(directory, self._names(number), self._tell)
            for number, directory in enumerate(directories, 1)
        ]

    def start(self, timeout: float = 10.0) -> None:
        """Begin, and wait until each directory was looked at once."""
        deadline = time.monotonic() + timeout
        for view in self.directories:  # one by one, so that ids are the same after a restart
            view.start()
            view.looked.wait(max(deadline - time.monotonic(), 0.0))

    def stop(self) -> None:
        for view in self.directories:
            view.stop()

    def entries(self) -> list[Entry]:
        """Every slot, by directory and in the order in which these were found."""
        found: list[Entry] = []
        for view in self.directories:
            entries = view.entries  # as they are now; the thread replaces them
            found += [entries[name] for name in sorted(entries, key=slot_order)]
        return found

    def not_looked_at(self, seconds: float) -> set[str]:
        """The slots of directories that nobody could look at for so long: one hangs, perhaps."""
        since = time.monotonic() - max(seconds, 2 * ROUND + PAUSE)
        return {
            entry.id
            for view in self.directories
            if view.looked_at < since
            for entry in list(view.entries.values())
        }

    def entry(self, id: str) -> Optional[Entry]:
        for view in self.directories:
            for found in view.entries.values():
                if found.id == id:
                    return found
        return None

    def _names(self, number: int) -> Callable[[str], str]:
        """How the slots of a directory are called: by name, with its number where that is taken.

        The first directory to have a name keeps it as long as the agent runs, so that no slot
        changes its id when another comes.
        """

        def id_of(name: str) -> str:
            with self._lock:
                return (
                    name if self._places.setdefault(name, number) == number else f"{name}@{number}"
                )

        return id_of

    def _tell(self, entry: Optional[Entry], id: str) -> None:
        for told in self.told:
            try:
                told(entry, id)
            except Exception:
                _log.exception("a change of slot %s was not told", id)
