"""The safetensors format: writing a file in a stream, and the bytes of saved ones.

A file is 8 bytes (the header's length, little-endian), a JSON header, and the tensors' bytes one
after the other (https://huggingface.co/docs/safetensors, "Format").  The safetensors library writes
only what is in memory as a whole, so the header is made here; every file that was written, and
every file that is read, is opened with the library first, which refuses what is no such file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from types import TracebackType
from typing import Any, NamedTuple, Optional

from ..reader import HookError, Tensor
from .dtypes import ELEMENT_TYPES
from .errors import NotReadable

_LARGEST_HEADER = 100_000_000  # bytes; the library refuses a larger one
RAW = "raw_dtypes"  # metadata: names of tensors saved as bytes -> torch's name of their type


class Entry(NamedTuple):
    """One tensor of a file."""

    name: str
    dtype: str  # safetensors' name: BF16, F8_E4M3, ...
    shape: tuple[int, ...]
    size: int  # bytes


def entry_of(tensor: Tensor) -> tuple[Entry, bool]:
    """How a tensor is saved, and whether as plain bytes, for want of a name for its type."""
    known = ELEMENT_TYPES.get(tensor.dtype)
    if known is not None and known.safetensors is not None:
        return Entry(tensor.name, known.safetensors, tensor.shape, tensor.size), False
    shape = (*tensor.shape, tensor.itemsize) if tensor.itemsize != 1 else tensor.shape
    return Entry(tensor.name, "U8", shape, tensor.size), True


def header_of(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    """What a file begins with, its length included; the data begins at a multiple of 8."""
    described: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for entry in entries:
        described[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [start, start + entry.size],
        }
        start += entry.size
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def metadata_at(path: str) -> dict[str, str]:
    """What a file says of itself, also where it is cut off behind its header; else nothing."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            described = json.loads(file.read(length)) if length <= _LARGEST_HEADER else {}
        metadata = described.get("__metadata__") or {}
        return {str(key): str(value) for key, value in metadata.items()}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def require() -> None:
    """Raises NotReadable where the libraries are missing that saved weights need."""
    try:
        import numpy  # noqa: F401
        import safetensors  # noqa: F401
    except ImportError as error:
        raise NotReadable(
            f"saved weights need {error.name}, which is not installed here; pip install numpy "
            f"safetensors ml_dtypes"
        ) from None


def checked(path: str) -> Any:
    """The safetensors library's own reading of a file.  Raises HookError where it has none."""
    require()
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="np")
    except (SafetensorError, OSError, ValueError) as error:
        raise HookError(
            f"{path} is no safetensors file ({error}); give another, or save it again"
        ) from error


class SafetensorsFile:
    """One file; of its values nothing is in memory that is not looked at.

    They are read and not mapped: a load from a mapping of a file that is cut off meanwhile ends the
    process.
    """

    def __init__(self, path: str) -> None:
        """Raises HookError."""
        library = checked(path)
        self.path = path
        self.metadata: dict[str, str] = dict(library.metadata() or {})
        del library
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        try:
            self._take_header()
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            self._file.close()
            raise HookError(f"{path} is being rewritten; read it again") from error

    def _take_header(self) -> None:
        """The library has refused offsets and shapes that are not true of the file."""
        length = int.from_bytes(self._file.read(8), "little")
        if length > _LARGEST_HEADER:
            raise ValueError("header too large")
        described = json.loads(self._file.read(length))
        described.pop("__metadata__", None)
        self._start = 8 + length
        self.entries: dict[str, Entry] = {}
        self._offsets: dict[str, int] = {}
        for name, entry in described.items():
            first, end = entry["data_offsets"]
            self.entries[name] = Entry(name, entry["dtype"], tuple(entry["shape"]), end - first)
            self._offsets[name] = first

    def pieces(self, name: str, limit: int) -> Iterator[memoryview]:
        """The tensor's bytes, at most ``limit`` at a time and whole elements.  Raises HookError.

        Each is valid until the next is asked for.
        """
        entry = self.entries[name]
        itemsize = max(entry.size // max(prod(entry.shape), 1), 1)
        step = max(limit // itemsize, 1) * itemsize
        start = self._start + self._offsets[name]
        buffer = memoryview(bytearray(min(step, entry.size)))
        for offset in range(0, entry.size, step):
            piece = buffer[: min(step, entry.size - offset)]
            self._fill(piece, start + offset)
            yield piece

    def _fill(self, piece: memoryview, offset: int) -> None:
        while len(piece):
            got = os.preadv(self._file.fileno(), [piece], offset)
            if not got:
                raise HookError(f"{self.path} has been cut off meanwhile; read it again")
            piece, offset = piece[got:], offset + got

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self.close()


def index_of(path: str) -> list[str]:
    """The files that a ``*.safetensors.index.json`` names, in its folder.  Raises HookError."""
    try:
        with open(path, encoding="utf-8") as file:
            weights = json.load(file)["weight_map"]
        names = sorted(set(weights.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise HookError(
            f"{path} is no index of safetensors files ({type(error).__name__}); give another"
        ) from error
    if not all(isinstance(name, str) and name == os.path.basename(name) for name in names):
        raise HookError(f"{path} names files outside of its folder; give another index")
    return [os.path.join(os.path.dirname(path), name) for name in names]
