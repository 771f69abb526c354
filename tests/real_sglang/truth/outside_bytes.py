"""Reads another process's tensors with process_vm_readv(2), knowing a published map alone.

Nothing of the project is imported here: the files are opened as any reader would open them, by
the protocol in docs/format.md, and of a tensor only pointer, dtype, shape and stride are used.
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import itertools
import json
import os
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ITEM_SIZE = {
    **dict.fromkeys(("bool", "uint8", "int8", "float8_e4m3fn", "float8_e5m2"), 1),
    **dict.fromkeys(("bfloat16", "float16", "int16"), 2),
    **dict.fromkeys(("float32", "int32"), 4),
    **dict.fromkeys(("float64", "int64"), 8),
}
_INTEGERS: dict[str, Literal["B", "b", "i"]] = {"uint8": "B", "int8": "b", "int32": "i"}
_UNSIGNED: dict[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_process_vm_readv = ctypes.CDLL(None, use_errno=True).process_vm_readv
_process_vm_readv.restype = ctypes.c_ssize_t
_process_vm_readv.argtypes = (
    ctypes.c_int,
    *(ctypes.POINTER(_IoVec), ctypes.c_ulong) * 2,
    ctypes.c_ulong,
)


def read_memory(pid: int, address: int, size: int) -> bytes:
    """``size`` bytes at ``address`` of another process, or OSError."""
    buffer = ctypes.create_string_buffer(size)
    local = _IoVec(ctypes.addressof(buffer), size)
    remote = _IoVec(address, size)
    count = _process_vm_readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    if count != size:
        number = ctypes.get_errno() if count < 0 else 0
        what = os.strerror(number) if number else f"{count} of {size} bytes"
        raise OSError(number, f"process {pid} at {address:#x}: {what}")
    return buffer.raw


@dataclass(frozen=True)
class Place:
    """Where a published tensor lies."""

    ptr: int
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, published: dict[str, Any]) -> Place:
        return cls(
            published["ptr"],
            published["dtype"].removeprefix("torch."),
            tuple(published["shape"]),
            tuple(published["stride"]),
        )

    def read(self, pid: int) -> bytes:
        """The values, row-major, whatever the strides."""
        if 0 in self.shape:
            return b""
        item = ITEM_SIZE[self.dtype]
        assert all(step >= 0 for step in self.stride), self
        elements = 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride))
        span = read_memory(pid, self.ptr, elements * item)
        return span if self._is_row_major() else self._gather(span, item)

    def _is_row_major(self) -> bool:
        expected = 1
        for length, step in zip(reversed(self.shape), reversed(self.stride)):
            if length != 1 and step != expected:
                return False
            expected *= length
        return True

    def _gather(self, span: bytes, item: int) -> bytes:
        view = memoryview(span).cast(_UNSIGNED[item])
        *outer, length = self.shape
        *outer_steps, step = self.stride
        rows = []
        for index in itertools.product(*map(range, outer)):
            start = sum(i * s for i, s in zip(index, outer_steps))
            if step:
                rows.append(view[start : start + (length - 1) * step + 1 : step].tobytes())
            else:
                rows.append(view[start : start + 1].tobytes() * length)
        return b"".join(rows)


def as_floats(values: bytes, dtype: str) -> list[float]:
    """What SGLang gives as JSON numbers for such values: they are turned into float32 first."""
    if dtype == "bfloat16":
        widened = array.array("I", (bits << 16 for bits in array.array("H", values)))
        return list(array.array("f", widened.tobytes()))
    if dtype == "float16":
        return list(struct.unpack(f"{len(values) // 2}e", values))
    if dtype in _INTEGERS:
        return list(array.array("f", array.array(_INTEGERS[dtype], values)))
    assert dtype == "float32", dtype
    return list(array.array("f", values))


class HasChanged(AssertionError):
    """Another map has been published since the documents were read."""


@dataclass(frozen=True)
class PublishedMap:
    """One slot's documents, as they were when state and layout belonged together."""

    directory: Path
    slot: str
    state: dict[str, Any]
    layout: dict[str, Any]

    @property
    def pid(self) -> int:
        return int(self.state["pid"])

    @property
    def identity(self) -> dict[str, Any]:
        identity: dict[str, Any] = self.layout["identity"]
        return identity

    @property
    def tensors(self) -> dict[str, dict[str, Any]]:
        tensors: dict[str, dict[str, Any]] = self.layout["tensors"]
        return tensors

    def names(self) -> dict[str, str]:
        """Every published name, aliases too -> the canonical one."""
        names = {alias: name for name, found in self.tensors.items() for alias in found["aliases"]}
        return names | {name: name for name in self.tensors}

    @contextmanager
    def held(self) -> Iterator[None]:
        """No update begins meanwhile, and none has since the documents were read."""
        with open(self.directory / f"weight_saving_{self.slot}.lock", "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            if not self._is_current():
                raise HasChanged(f"slot {self.slot} has changed since")
            yield
            assert self._is_current(), f"slot {self.slot} changed under a reader's lock"

    def _is_current(self) -> bool:
        fields = ("state", "pid", "layout_generation", "content_generation")
        now = _document(self.directory, "weight_state", self.slot)
        return [now[field] for field in fields] == [self.state[field] for field in fields]


def settled_maps(
    directory: Path, slots: int, timeout: float = 60.0, state: str = "ready"
) -> list[PublishedMap]:
    """All maps, once every slot is in that state and its documents belong together."""
    deadline = time.monotonic() + timeout
    while True:
        names = sorted(
            path.name.removeprefix("weight_state_").removesuffix(".json")
            for path in directory.glob("weight_state_*.json")
        )
        try:
            maps = [_settled_map(directory, name, state) for name in names]
        except (FileNotFoundError, ValueError):
            maps = []
        found = [one for one in maps if one is not None]
        if len(found) == len(names) == slots:
            return found
        states = {name: _what_it_says(directory, name) for name in names}
        assert time.monotonic() < deadline, f"{slots} slots were to be {state}; there are {states}"
        time.sleep(0.05)


def _settled_map(directory: Path, slot: str, wanted: str) -> PublishedMap | None:
    state = _document(directory, "weight_state", slot)
    layout = _document(directory, "weight_layout", slot)
    again = _document(directory, "weight_state", slot)
    owner = [layout["identity"][field] for field in ("pid", "process_start_ticks", "boot_id")]
    if state != again or state["state"] != wanted or state["problem"] is not None:
        return None
    if owner != [state[field] for field in ("pid", "process_start_ticks", "boot_id")]:
        return None
    if layout["layout_generation"] != state["layout_generation"]:
        return None
    return PublishedMap(directory, slot, state, layout)


def _document(directory: Path, kind: str, slot: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((directory / f"{kind}_{slot}.json").read_text())
    return document


def _what_it_says(directory: Path, slot: str) -> Sequence[object]:
    state = _document(directory, "weight_state", slot)
    return [state[field] for field in ("state", "event", "problem")]
