"""Opening what lies in an output directory: nothing there is trusted to be what it is called."""

from __future__ import annotations

import json
import os
import stat
from typing import Any, Optional

from ..layout.documents import SCHEMA, SCHEMA_VERSION, STATE_SCHEMA
from .errors import FOREIGN, HookError

# The layout of a model of 100,000 tensors has some 50 MB.
MAX_DOCUMENT_BYTES = 256 * 1024**2


def file_name(name: str) -> str:
    """``name``, if a file can have it.  Raises HookError."""
    try:
        if b"\0" not in os.fsencode(name):
            return name
    except ValueError:  # a lone surrogate
        pass
    raise HookError(f"{name!r} is no name that a file can have; give that of a slot or directory")


def read_json(path: str) -> Optional[dict[str, Any]]:
    """A whole JSON object; None where there is no file.  Raises HookError."""
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            # A device in a document's place would be read for ever, a huge file for long.
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise HookError(f"{path} is not JSON but a pipe or a device; {FOREIGN}")
            if status.st_size > MAX_DOCUMENT_BYTES:
                raise HookError(f"{path} has {status.st_size} bytes; {FOREIGN}")
            data = file.read(status.st_size + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise HookError(
            f"{path} cannot be read ({error.strerror}); read as a user who may, and check that "
            f"it is a file"
        ) from error
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


def check_schema(document: dict[str, Any], schema: str, path: str) -> None:
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
            raise HookError(f"{path} has no valid {name!r}; it was not written by the hook")


def _open_without_waiting(path: str, flags: int) -> int:
    # A pipe in a document's place would keep an ordinary open() waiting for its writer.
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
