"""One runner's published files: reading them, waiting for the next, holding the weights still."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Optional, Union

from ..layout import files
from ..layout.documents import SCHEMA, STATE_SCHEMA
from ..layout.header import Header
from ..layout.states import READY
from . import control
from .control import Check
from .conversation import gone
from .document import Document
from .errors import Busy, HookError, NotReady
from .files import check_schema, file_name, open_regular, read_json, read_value
from .findings import Unreadable
from .header import HeaderReader
from .history import History
from .layout_start import has_all_sums, is_whole, start_of_layout
from .ownership import ABSENT, UNKNOWN, Liveness, liveness, lock_at, process_of, same_instance
from .watch import DirectoryWatch

# What `Slot.weights_held` may be told to allow besides states: an owner that has exited.
STALE = "stale"

# Seconds that a layout is waited for where no event is under way: one is never missing meanwhile.
_NO_LAYOUT = 0.5

# Seconds between looks while waiting: inotify does not see changes made by other hosts.
LOOK_AGAIN = 1.0

# `Slot.weights_held` asks so many times, so many seconds apart, whether the map is true: an event
# that waits for the lock may keep the owner from answering for the moment in which it begins.
_CHECKS = 20
_CHECK_PAUSE = 0.005
# What an answer is waited for at least, however late the lock was had.
_LEAST_CHECK_TIMEOUT = 0.1


class Slot:
    """One runner's published files.  Opening reads nothing yet."""

    # Whether what it says comes over the network, from a node agent: see `open_directory`.
    is_remote = False

    def __init__(self, directory: str, name: str) -> None:
        self.directory = file_name(directory)
        self.name = file_name(name)
        self._watches: list[DirectoryWatch] = []  # not waited on now
        self._namespace: Optional[tuple[Any, Optional[str]]] = None  # of the owner asked about last

    def __reduce__(self) -> tuple[Any, ...]:
        return Slot, (self.directory, self.name)

    def path(self, document: str) -> str:
        """Path of one of `files.DOCUMENTS`, or of a lock file, of this slot."""
        return os.path.join(self.directory, document.format(self.name))

    def read_state(self) -> dict[str, Any]:
        """The state document as it is now.  Raises HookError."""
        state = read_json(self.path(files.STATE))
        if state is None:
            raise HookError(
                f"{self.path(files.STATE)} does not exist: no hooked SGLang publishes slot "
                f"{self.name} here; check the directory and that the server has loaded its model"
            )
        check_schema(state, STATE_SCHEMA, self.path(files.STATE))
        return state

    def read(self, timeout: float = 10.0) -> Document:
        """One consistent document, never two generations mixed.

        Waits up to ``timeout`` seconds for a publication under way.  The document's state may
        well be ``updating``: then the addresses are those from before the update.
        Raises HookError.
        """
        return self._settled(self._layout, timeout)

    def read_for_sums(self, is_alone: bool) -> Document:
        """As `read`, for `totals` alone: of the tensors no more than that takes.

        ``is_alone``: no other slot is of the same process, and so none has a storage in common
        with this one.  Raises HookError.
        """
        if is_alone:
            found = self._settled(self._start_with_sums, 10.0)
            if has_all_sums(found):
                return found
        return self.read()

    def _layout(self) -> Optional[dict[str, Any]]:
        layout = read_json(self.path(files.LAYOUT))
        if layout is not None:
            check_schema(layout, SCHEMA, self.path(files.LAYOUT))
        return layout

    def _start_with_sums(self) -> Optional[dict[str, Any]]:
        """What a layout says ahead of its tensors; all of it where it seems to be cut off."""
        path = self.path(files.LAYOUT)
        return (start_of_layout(self) if is_whole(path) else self._layout()) or None

    def _settled(self, read: Callable[[], Optional[dict[str, Any]]], timeout: float) -> Document:
        """`read`, with the layout that ``read`` gives."""
        deadline = time.monotonic() + timeout
        patience = time.monotonic() + _NO_LAYOUT
        pause = 0.001
        while True:
            if time.monotonic() < deadline and self._is_about_to_publish():
                time.sleep(pause)
                pause = min(pause * 2, 0.05)
                continue
            before = self.read_state()
            layout = read()
            if layout is not None:
                after = self.read_state()
                if belong_together(before, layout, after):
                    return Document(self, layout, after)
                if self._was_left_half_way(before, layout, after):
                    return Document(self, layout, {**after, **state_of(layout)})
            elif time.monotonic() >= patience and not self._may_write_layout(before):
                raise HookError(
                    f"slot {self.name} has a state ({before['state']}) and no layout document: "
                    f"{self.path(files.LAYOUT)} was removed or could not be written; the state "
                    f"file's \"problem\" and the server's log say which"
                )
            if time.monotonic() >= deadline:
                raise HookError(
                    f"slot {self.name} has no settled document after {timeout:g} s (state "
                    f"{before['state']!r}): the model is still loading, or the layout could not "
                    f"be written; the state file's \"problem\" and the server's log say which"
                )
            time.sleep(pause)
            pause = min(pause * 2, 0.05)

    def start_of_layout(self) -> dict[str, Any]:
        """The fields of the layout ahead of its regions and tensors; empty without a layout.

        Raises HookError.
        """
        return start_of_layout(self)

    def legacy_files(self) -> Optional[dict[str, Any]]:
        """What the files in the legacy format hold, by name; None for one that is not there.

        None for all of them where they cannot be had: over the network.
        """
        return {name: _value_or_why_not(self.path(name)) for name in files.LEGACY}

    def state_size(self) -> int:
        """Bytes of the state document.  Raises OSError."""
        return os.path.getsize(self.path(files.STATE))

    def transport(self) -> Optional[dict[str, Any]]:
        """What the server's transfer engines have registered, unchecked; None: it runs none.

        Raises HookError.
        """
        return read_json(self.path(files.TRANSPORT))

    def header(self) -> Header:
        """The slot's state in its shortest form, as it is now.  Raises HookError.

        To look again and again, open it once: `open_header`.  Its owner may have exited: see
        `owner_alive`.
        """
        with self.open_header() as header:
            return header.read()

    def open_header(self) -> HeaderReader:
        """The header, to be polled: a look at its ``sequence`` takes 2 µs.  Raises HookError."""
        return HeaderReader(self.path(files.HEADER))

    def history(self, since: Optional[float] = None, kind: Optional[str] = None) -> History:
        """The events of the slot's log, the oldest first; also after its owner has exited.

        ``since``: only those that were published then or later, in seconds since 1970-01-01 UTC.
        ``kind``: only those of a kind like this, as in a file name pattern (``update_*``).
        """
        return History(self.directory, self.name, since, kind)

    def check(self, timeout: float = 1.0) -> Check:
        """Have the owner compare its map with memory now, and say whether they are equal.

        Where they are not, the owner publishes the map that is true, if no event keeps it from
        doing so, and the answer names tensors that had moved.  Takes no lock: to have the answer
        hold for as long as it is needed, see `weights_held`.  Waits ``timeout`` seconds at most.

        Raises a `ControlError`: `Busy` while an event is under way, `NoSocket` where the server
        was started with SGLANG_WEIGHT_HOOK_CHECK_SECONDS=0, `NotAllowed` to other users than the
        server's and root, `OwnerGone`, `NoAnswer` from a process that is stopped.
        """
        return control.check(self, self.read_state(), timeout)

    def _was_left_half_way(
        self, before: dict[str, Any], layout: dict[str, Any], after: dict[str, Any]
    ) -> bool:
        """Whether the process died between a layout and its state, which will never come."""
        return (
            process_of(before) == process_of(layout["identity"]) == process_of(after)
            and before["layout_generation"] < layout["layout_generation"]
            and before == after
            and os.path.lexists(self.path(files.OWNER_LOCK))
            and not self.owner_alive()
        )

    def owner_alive(self) -> bool:
        """Whether the process that publishes this slot still lives.

        It does if ``weight_owner_{slot}.lock`` is locked, which the owner does for life, and if
        the process that the state file names (pid, start time, boot id) exists.  Both count:
        whoever may read the lock file may lock it as well.  Where that process cannot be looked
        at (on another host, in another pid namespace) the lock alone decides: see `liveness`,
        which says how certain the answer is.  Where the lock file can't be read, the process
        alone decides.  Raises HookError where neither can be had.
        """
        return self.liveness().alive

    def liveness(self) -> Liveness:
        """`owner_alive`, with whether that is certain and what it rests on.  Raises HookError."""
        lock = lock_at(self.path(files.OWNER_LOCK))
        if lock == ABSENT:
            return liveness(lock, None, self._owners_namespace)
        try:
            state = self.state_if_any()
        except HookError:
            if lock == UNKNOWN:
                raise
            state = None  # nothing can be said about the process
        if state is None and lock == UNKNOWN:
            state = self.read_state()  # says that there is none
        return liveness(lock, state, lambda: self._owners_namespace(state))

    def _owners_namespace(self, state: Optional[Mapping[str, Any]] = None) -> Optional[str]:
        """The pid namespace of the process that the state names, if its layout tells it.

        Asked only where that process is not in sight, for a layout is large; and once a process.
        """
        owner = process_of(dict(state or {}))
        if self._namespace is None or self._namespace[0] != owner:
            try:
                layout = read_json(self.path(files.LAYOUT))
            except HookError:
                return None
            identity = layout.get("identity") if layout else None
            if not isinstance(identity, dict) or process_of(identity) != owner:
                return None
            found = identity.get("pid_namespace")
            self._namespace = owner, found if isinstance(found, str) else None
        return self._namespace[1]

    def wait_for_change(
        self,
        since: Union[Document, Mapping[str, Any], None] = None,
        timeout: Optional[float] = None,
    ) -> Optional[dict[str, Any]]:
        """The state document as soon as it is another one; None after ``timeout`` seconds.

        ``since``: the document or state that you know.  Without it, what is there now; a
        change between your last look and this call is then not noticed.  The beginning of an
        event (state ``updating``) is a change, too.  A slot that is not there yet is waited
        for.  Raises HookError.
        """
        known = since.state if isinstance(since, Document) else since
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._watching() as watch:
            if since is None:
                known = self.state_if_any()
            while True:
                state = self.state_if_any()
                if state is not None and state != known and not self._is_known(state, known):
                    return state
                left = LOOK_AGAIN if deadline is None else deadline - time.monotonic()
                if left <= 0:
                    return None
                watch.wait(min(left, LOOK_AGAIN))

    @contextlib.contextmanager
    def _watching(self) -> Iterator[DirectoryWatch]:
        """A watch of the directory, kept for the next time: to close one takes the kernel 10 ms."""
        try:
            watch = self._watches.pop()
        except IndexError:
            watch = DirectoryWatch(self.directory)
        if not watch.is_fresh():
            watch.close()
            watch = DirectoryWatch(self.directory)
        try:
            yield watch
        finally:
            self._watches.append(watch)

    def generations(self, timeout: Optional[float] = None) -> Iterator[Document]:
        """The document as it is, then a new one whenever addresses, contents or state changed.

        What lies between two events in quick succession is skipped, and so are the times
        during which weights are being changed.  Ends when the owner has exited,
        or after ``timeout`` seconds without a new document.  Raises HookError.
        """
        seen: Any = None
        with DirectoryWatch(self.directory) as watch:
            deadline = None if timeout is None else time.monotonic() + timeout
            while True:
                alive = self.owner_alive()  # before the look: what it published last counts
                state = self.state_if_any()
                if state is None and seen is None and not alive:
                    self.read_state()  # raises: nobody publishes here, nor is about to
                if state is not None and settled(state) and generation_of(state) != seen:
                    left = 10.0 if deadline is None else deadline - time.monotonic()
                    document = self.read(max(left, 0.0))
                    if settled(document.state) and generation_of(document.state) != seen:
                        seen = generation_of(document.state)
                        yield document
                        deadline = None if timeout is None else time.monotonic() + timeout
                        continue
                left = LOOK_AGAIN if deadline is None else deadline - time.monotonic()
                if not alive or left <= 0:
                    return
                watch.wait(min(left, LOOK_AGAIN))

    def _is_known(self, state: dict[str, Any], known: Optional[Mapping[str, Any]]) -> bool:
        """Whether ``known`` is what `read` makes of this state and a layout without a state."""
        if known is None or not known.keys() >= state.keys():
            return False
        if process_of(dict(known)) != process_of(state) or not same_instance(known, state):
            return False
        generation = known.get("layout_generation")
        return (
            isinstance(generation, int)
            and generation > state["layout_generation"]
            and not self.owner_alive()
        )

    def _is_about_to_publish(self) -> bool:
        """Whether a process has claimed the slot and has not written its first state yet."""
        return not os.path.lexists(self.path(files.STATE)) and self.owner_alive()

    def _may_write_layout(self, state: Mapping[str, Any]) -> bool:
        """Whether an event is under way at whose end a layout that is missing is written."""
        return state["state"] in ("loading", "updating") and self.owner_alive()

    def state_if_any(self) -> Optional[dict[str, Any]]:
        """The state document, or None where there is none (now)."""
        try:
            return self.read_state()
        except HookError:
            if os.path.lexists(self.path(files.STATE)):
                raise
            return None

    @contextlib.contextmanager
    def weights_held(
        self, timeout: float = 10.0, check: bool = False, allow: Collection[str] = ()
    ) -> Iterator[None]:
        """Hold the shared lock: no update begins while the body runs.

        The body runs if the slot is ``ready`` and its owner lives; otherwise `NotReady` or
        `OwnerGone` is raised.  ``allow``: further states in which it is to run (``failed``,
        ``released``, …), and ``stale`` for a slot whose owner has exited.

        The server waits for it at most ``SGLANG_WEIGHT_HOOK_LOCK_TIMEOUT`` seconds, so keep
        the body short.  Raises HookError when an update is still running after ``timeout``
        seconds.

        ``check``: once the lock is held, have the owner compare its map with memory (`Slot.check`).
        The body runs if they are equal, and also if they were not and the owner has published the
        map that is true now: so read the document inside the body, never before.  Otherwise, and
        without an answer, HookError is raised.  What SGLang moves without a call that the hook
        knows, and after the check, is not kept from moving.
        """
        descriptor = open_regular(self.path(files.SAVING_LOCK), follow=False)
        if descriptor is None:
            raise HookError(
                f"{self.path(files.SAVING_LOCK)} does not exist; check the directory and that the "
                f"server has loaded its model"
            )
        try:
            deadline = time.monotonic() + timeout
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    break
                except OSError as error:
                    if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                        raise HookError(f"cannot lock slot {self.name}: {error}") from error
                if time.monotonic() >= deadline:
                    raise HookError(
                        f"an update of slot {self.name} has been running for {timeout:g} s; "
                        f"try again when its state is no longer 'updating'"
                    )
                time.sleep(0.005)
            self._require(allow)
            if check:
                self._check_held(max(deadline - time.monotonic(), _LEAST_CHECK_TIMEOUT))
            yield
        finally:
            os.close(descriptor)

    def _require(self, allow: Collection[str]) -> None:
        """Raises OwnerGone or NotReady, unless ``allow`` has it."""
        state = self.read_state()
        if STALE not in allow and not self.owner_alive():
            raise gone(self, state)
        if state["state"] != READY and state["state"] not in allow:
            raise NotReady(
                f"slot {self.name} is {state['state']}, so its weights are not whole or not there; "
                f"wait until it is ready, or name the state in allow"
            )

    def _check_held(self, timeout: float) -> None:
        """Return if the published map is true.  Raises HookError."""
        deadline = time.monotonic() + timeout
        for attempt in range(_CHECKS):
            last = attempt == _CHECKS - 1
            try:
                found = self.check(max(deadline - time.monotonic(), _LEAST_CHECK_TIMEOUT))
            except Busy:
                if last:
                    raise
            else:
                if found.equal or found.published:
                    return
                if last:
                    raise HookError(
                        f"weights of slot {self.name} have moved ({', '.join(found.tensors)}) and "
                        f"the new map is not published yet, for an event begins; let go of the "
                        f"lock and try again"
                    )
            time.sleep(_CHECK_PAUSE)

    def __repr__(self) -> str:
        return f"<Slot {self.name!r} in {self.directory!r}>"


def state_of(layout: Mapping[str, Any]) -> dict[str, Any]:
    """The state document's fields, as far as a layout document has them."""
    fields = (
        *("instance", "layout_generation", "content_generation", "physical_epoch"),
        *("kv_physical_epoch", "checked_at", "event"),
    )
    return {
        **{field: layout[field] for field in fields if field in layout},
        "state": str(layout.get("state", "unknown")),
    }


def _value_or_why_not(path: str) -> Any:
    try:
        return read_value(path)
    except HookError as error:
        return Unreadable(str(error))


def settled(state: Mapping[str, Any]) -> bool:
    return bool(state["state"] != "updating")


def generation_of(state: dict[str, Any]) -> tuple[Any, ...]:
    fields = (
        "instance",
        "layout_generation",
        "content_generation",
        "physical_epoch",
        "kv_physical_epoch",
        "state",
    )
    return (*process_of(state), *(state.get(field) for field in fields))


def belong_together(before: dict[str, Any], layout: dict[str, Any], after: dict[str, Any]) -> bool:
    owner = layout["identity"]
    return (
        before["layout_generation"] == layout["layout_generation"] == after["layout_generation"]
        and process_of(before) == process_of(owner) == process_of(after)
        and same_instance(before, layout)
        and same_instance(layout, after)
    )
