"""Opening what lies in an output directory: nothing there is trusted to be what it is called."""

from __future__ import annotations

import errno
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


def open_regular(path: str, follow: bool = True, limit: Optional[int] = None) -> Optional[int]:
    """A descriptor for reading; None where there is no file.  Raises HookError.

    The one way in which anything in an output directory is opened.  It waits for nobody: a pipe
    is opened without its writer, and what is no regular file is refused.  ``follow``: also
    through a symbolic link.  ``limit``: in bytes; what is larger is refused.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags if follow else flags | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        status = os.fstat(descriptor)
    except OSError as error:
        os.close(descriptor)
        raise _unreadable(path, error) from error
    if stat.S_ISREG(status.st_mode) and (limit is None or status.st_size <= limit):
        return descriptor
    os.close(descriptor)
    if stat.S_ISREG(status.st_mode):
        raise HookError(f"{path} has {status.st_size} bytes, {limit} at most; {FOREIGN}")
    wanted = "JSON" if path.endswith(".json") else "a file"
    if not stat.S_ISDIR(status.st_mode):
        raise HookError(f"{path} is not {wanted} but a pipe or a device; {FOREIGN}")
    if wanted == "JSON":
        raise _unreadable(path, IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)))
    raise HookError(f"{path} is not {wanted} but a folder; {FOREIGN}")


def read_bytes(path: str, limit: int = MAX_DOCUMENT_BYTES) -> Optional[bytes]:
    """A whole file of up to ``limit`` bytes; None where there is none.  Raises HookError."""
    descriptor = open_regular(path, limit=limit)
    if descriptor is None:
        return None
    with os.fdopen(descriptor, "rb") as file:
        try:
            return file.read(min(os.fstat(descriptor).st_size, limit))
        except OSError as error:
            raise _unreadable(path, error) from error


def read_value(path: str) -> Any:
    """What a JSON file says; None where there is no file.  Raises HookError."""
    data = read_bytes(path)
    return None if data is None else _parsed(path, data)


def read_json(path: str) -> Optional[dict[str, Any]]:
    """A whole JSON object; None where there is no file.  Raises HookError."""
    data = read_bytes(path)
    if data is None:
        return None
    value = _parsed(path, data)
    if not isinstance(value, dict):
        raise HookError(f"{path} holds no JSON object; {FOREIGN}")
    return value


def _parsed(path: str, data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise HookError(f"{path} is not JSON ({error}); {FOREIGN}") from error


def _unreadable(path: str, error: OSError) -> HookError:
    return HookError(
        f"{path} cannot be read ({error.strerror}); read as a user who may, and check that it is "
        f"a file"
    )


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
