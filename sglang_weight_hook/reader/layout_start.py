"""What a layout says ahead of its tensors: whose it is, and the sums of its memory.

A layout of a large model has megabytes, nearly all of them tensors; a table of many slots needs
none of these, and cannot take the time to read them.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from ..layout import files
from ..layout.documents import SCHEMA
from .errors import HookError
from .files import check_schema, open_regular, read_json

if TYPE_CHECKING:
    from .document import Document
    from .slot import Slot

_FIRST_BYTES = 16 * 1024
_MOST_BYTES = 1024 * 1024  # ahead of the tensors is also a list of the KV cache's buffers
_LAST = ("regions", "tensors")  # where the long part of a layout begins
# Of `memory`: what a release since 0.2 says that the document's storages add up to, in bytes.
_SUMS = ("weights_bytes", "lora_bytes", "kv_cache_bytes", "off_device_bytes")


def start_of_layout(slot: Slot) -> dict[str, Any]:
    """The fields of the slot's layout ahead of its regions and tensors; empty without a layout.

    All of the layout where it is not written in that order.  Raises HookError.
    """
    path = slot.path(files.LAYOUT)
    descriptor = open_regular(path)
    if descriptor is None:
        return {}
    with os.fdopen(descriptor, "rb") as file:
        data, size = b"", _FIRST_BYTES
        while size <= _MOST_BYTES:
            try:
                more = file.read(size - len(data))
            except OSError as error:
                raise HookError(f"{path} cannot be read ({error.strerror})") from error
            data += more
            found = _fields_ahead(data)
            if found is not None:
                # Not `check_schema`, which asks for what is left out here.
                if found.get("schema") != SCHEMA or not isinstance(found.get("identity"), dict):
                    break
                return found
            if not more:
                break
            size *= 4
    whole = read_json(path)
    if whole is None:
        return {}
    check_schema(whole, SCHEMA, path)
    return whole


def has_all_sums(document: Document) -> bool:
    """Whether the document says what its storages add up to, as releases before 0.2 do not."""
    return all(type(document.memory.get(name)) is int for name in _SUMS)


def is_whole(path: str) -> bool:
    """Whether a file ends as a JSON object does; where it cannot be read, whoever reads says so."""
    try:
        descriptor = open_regular(path)
    except HookError:
        return False
    if descriptor is None:
        return False
    with os.fdopen(descriptor, "rb") as file:
        try:
            file.seek(max(file.seek(0, os.SEEK_END) - 64, 0))
            return file.read().rstrip().endswith(b"}")
        except OSError:
            return False


def _fields_ahead(data: bytes) -> dict[str, Any] | None:
    """The fields before those in `_LAST`; None where the data ends before.

    >>> _fields_ahead(b'{"a": 1, "identity": {"pid": 7}, "regions": [{"ptr')
    {'a': 1, 'identity': {'pid': 7}}
    >>> _fields_ahead(b'{"a": 1, "identity": {"pid": ') is None
    True
    """
    decoder = json.JSONDecoder()
    text = data.decode("utf-8", "replace")  # a name that is cut in its middle is in no whole field
    at = text.find("{") + 1
    found: dict[str, Any] = {}
    try:
        while True:
            name, at = decoder.raw_decode(text, _next(text, at))
            if name in _LAST:
                return found
            at = _next(text, at)
            if text[at] != ":":
                return None
            value, at = decoder.raw_decode(text, _next(text, at + 1))
            at = _next(text, at)
            if text[at] != ",":
                return None
            at += 1
            found[name] = value
    except (ValueError, IndexError, RecursionError, TypeError):
        return None


def _next(text: str, at: int) -> int:
    """Where the next character is that is no white space."""
    while text[at] in " \t\r\n":
        at += 1
    return at
