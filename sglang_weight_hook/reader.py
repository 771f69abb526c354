"""Read what a hooked SGLang publishes.  The standard library alone: no torch, no SGLang.

    >>> import sglang_weight_hook as hook
    >>> directory = hook.open_directory(EXAMPLE)   # a weights_metadata directory
    >>> [slot.name for slot in directory.slots()]
    ['0']
    >>> document = hook.open_slot(EXAMPLE, "0").read()
    >>> document.state["state"], len(document.tensors) > 0
    ('ready', True)

Every error is a `HookError` whose message says what to do.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any, Optional

from . import identity, publish, settings
from .document import SCHEMA, SCHEMA_VERSION, STATE_SCHEMA

_STATE_NAME = re.compile(r"^weight_state_(.+)\.json$")


class HookError(Exception):
    """Anything that keeps a map from being read; the message says what to do about it."""


class Document:
    """One consistent publication of a slot: layout and state of the same generation.

    ``raw``: the layout document; ``state``: the state document, which is the newer of the
    two about ``content_generation`` (buckets written in place rewrite only the state).
    """

    def __init__(self, slot: Slot, raw: dict[str, Any], state: dict[str, Any]) -> None:
        self.slot = slot
        self.raw = raw
        self.state = state

    @property
    def tensors(self) -> Mapping[str, dict[str, Any]]:
        """Every tensor by canonical name: the ``tensors`` object of the layout."""
        tensors: Mapping[str, dict[str, Any]] = self.raw["tensors"]
        return tensors

    @property
    def regions(self) -> list[dict[str, Any]]:
        """Merged spans ready for registration: the ``regions`` list of the layout."""
        regions: list[dict[str, Any]] = self.raw["regions"]
        return regions

    @property
    def layout_generation(self) -> int:
        return int(self.raw["layout_generation"])

    @property
    def content_generation(self) -> int:
        return int(self.state["content_generation"])

    def __repr__(self) -> str:
        return (
            f"<Document slot={self.slot.name!r} state={self.state['state']!r} "
            f"layout={self.layout_generation} content={self.content_generation}>"
        )


class Slot:
    """One runner's published files.  Opening reads nothing yet."""

    def __init__(self, directory: str, name: str) -> None:
        self.directory = directory
        self.name = name

    def path(self, document: str) -> str:
        """Path of one of `publish.DOCUMENTS`, or of a lock file, of this slot."""
        return os.path.join(self.directory, document.format(self.name))

    def read_state(self) -> dict[str, Any]:
        """The state document as it is now.  Raises HookError."""
        state = _read_json(self.path(publish.STATE))
        if state is None:
            raise HookError(
                f"{self.path(publish.STATE)} does not exist: no hooked SGLang publishes slot "
                f"{self.name} here; check the directory and that the server has loaded its model"
            )
        _check_schema(state, STATE_SCHEMA, self.path(publish.STATE))
        return state

    def read(self, timeout: float = 10.0) -> Document:
        """One consistent document, never two generations mixed.

        Waits up to ``timeout`` seconds for a publication under way.  The document's state may
        well be ``updating``: then the addresses are those from before the update.
        Raises HookError.
        """
        deadline = time.monotonic() + timeout
        pause = 0.001
        while True:
            before = self.read_state()
            layout = _read_json(self.path(publish.LAYOUT))
            if layout is not None:
                _check_schema(layout, SCHEMA, self.path(publish.LAYOUT))
                after = self.read_state()
                if _belong_together(before, layout, after):
                    return Document(self, layout, after)
            if time.monotonic() >= deadline:
                raise HookError(
                    f"slot {self.name} has no settled document after {timeout:g} s (state "
                    f"{before['state']!r}): the model is still loading, or the layout could not "
                    f"be written; the state file's \"problem\" and the server's log say which"
                )
            time.sleep(pause)
            pause = min(pause * 2, 0.05)

    def owner_alive(self) -> bool:
        """Whether the process that publishes this slot still lives.

        It holds ``weight_owner_{slot}.lock`` for life, so being able to lock that file means
        that it is gone.  Where the file can't be opened, pid, start time and boot decide.
        """
        try:
            descriptor = os.open(self.path(publish.OWNER_LOCK), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        except OSError:
            return _process_lives(self.read_state())
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return True
            return _process_lives(self.read_state())
        finally:
            os.close(descriptor)
        return False

    @contextlib.contextmanager
    def weights_held(self, timeout: float = 10.0) -> Iterator[None]:
        """Hold the shared lock: no update begins while the body runs.

        The server waits for it at most ``SGLANG_WEIGHT_HOOK_LOCK_TIMEOUT`` seconds, so keep
        the body short.  Raises HookError when an update is still running after ``timeout``
        seconds.
        """
        try:
            descriptor = os.open(self.path(publish.SAVING_LOCK), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise HookError(f"{self.path(publish.SAVING_LOCK)}: {error.strerror}") from error
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
            yield
        finally:
            os.close(descriptor)

    def __repr__(self) -> str:
        return f"<Slot {self.name!r} in {self.directory!r}>"


class Directory:
    """An output directory: the slots of every runner that publishes into it."""

    def __init__(self, path: str) -> None:
        self.path = path

    def slots(self) -> list[Slot]:
        """All slots with a state file, by name.  Raises HookError."""
        try:
            names = os.listdir(self.path)
        except OSError as error:
            raise HookError(
                f"{self.path}: {error.strerror}; give the server's weights_metadata directory, "
                f"or set {settings.DIRECTORY}"
            ) from error
        matches = (_STATE_NAME.match(name) for name in names)
        return [Slot(self.path, name) for name in sorted(m.group(1) for m in matches if m)]

    def slot(self, name: str) -> Slot:
        return Slot(self.path, name)

    def __repr__(self) -> str:
        return f"<Directory {self.path!r}>"


def open_directory(path: Optional[str] = None) -> Directory:
    """The directory ``path``, else that of ``SGLANG_WEIGHT_HOOK_DIR``, else the default."""
    value = path if path is not None else os.environ.get(settings.DIRECTORY)
    return Directory(settings.directory_from(value, os.getcwd()))


def open_slot(path: Optional[str], name: str) -> Slot:
    """Slot ``name`` (``"0"``, ``"0_draft"``, …) of a directory."""
    return open_directory(path).slot(name)


# --- pieces -------------------------------------------------------------------------------


def _read_json(path: str) -> Optional[dict[str, Any]]:
    """A whole JSON object; None where there is no file.  Raises HookError."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise HookError(f"{path} cannot be read: {error.strerror}") from error
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise HookError(f"{path} is not JSON ({error}); it was not written by the hook") from error
    if not isinstance(value, dict):
        raise HookError(f"{path} holds no JSON object; it was not written by the hook")
    return value


# What the reader itself relies on; everything else is the caller's to look for.
_REQUIRED: dict[str, dict[str, type]] = {
    STATE_SCHEMA: {
        "state": str,
        "layout_generation": int,
        "content_generation": int,
        "pid": int,
    },
    SCHEMA: {
        "layout_generation": int,
        "content_generation": int,
        "identity": dict,
        "tensors": dict,
        "regions": list,
    },
}


def _check_schema(document: dict[str, Any], schema: str, path: str) -> None:
    if document.get("schema") != schema:
        raise HookError(f"{path} is no {schema} document; it was not written by the hook")
    version = document.get("schema_version")
    if not isinstance(version, int) or not 1 <= version <= SCHEMA_VERSION:
        raise HookError(
            f"{path} has schema version {version!r}, this reader knows 1 to {SCHEMA_VERSION}; "
            f"install the hook's newer release where you read"
        )
    for name, kind in _REQUIRED[schema].items():
        if not isinstance(document.get(name), kind):
            raise HookError(f"{path} has no proper {name!r}; it was not written by the hook")


def _belong_together(before: dict[str, Any], layout: dict[str, Any], after: dict[str, Any]) -> bool:
    owner = layout["identity"]
    return before["layout_generation"] == layout["layout_generation"] == after[
        "layout_generation"
    ] and _process(before) == _process(owner) == _process(after)


def _process(part: dict[str, Any]) -> tuple[Any, ...]:
    return part.get("pid"), part.get("process_start_ticks"), part.get("boot_id")


def _process_lives(state: dict[str, Any]) -> bool:
    """Best answer without the owner lock; another host's process is taken to live."""
    if (state.get("hostname"), state.get("boot_id")) != (socket.gethostname(), identity.boot_id()):
        return True
    return bool(identity.start_ticks(state["pid"]) == state.get("process_start_ticks"))
