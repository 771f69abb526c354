"""Copies from device memory into this process's host memory.

On a stream of our own, through two pinned buffers: while one is filled by the device, what is in
the other is moved to where it belongs.  Memory that is pinned already is filled directly, and so
is a buffer that is filled again and again, which is pinned for that.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Optional

from .backend import Run
from .cuda_calls import Driver

STAGE = 2 << 20  # bytes of each pinned buffer
# A buffer of this many bytes or more is pinned when it is filled for the third time in a row.
_WORTH_PINNING = 1 << 20
_TIMES = 3

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_DISABLE_TIMING = 2  # CU_EVENT_DISABLE_TIMING
_MEMORY_TYPE, _HOST, _DEVICE = 2, 1, 2  # CUpointer_attribute, CUmemorytype
_MAX_PITCH = (1 << 31) - 1  # CU_DEVICE_ATTRIBUTE_MAX_PITCH of every device


class Rows(NamedTuple):
    """Stretches of device memory of one length, one regular step apart."""

    address: int
    width: int  # bytes of each
    height: int  # how many
    pitch: int  # bytes from one to the next

    @property
    def size(self) -> int:
        return self.width * self.height

    @property
    def reach(self) -> int:
        """Bytes from the first to one past the last."""
        return (self.height - 1) * self.pitch + self.width


def rows_of(runs: Iterable[Run]) -> Iterator[Rows]:
    """The runs, those of one length and step together.

    >>> list(rows_of([(0, 8), (32, 8), (64, 8), (65, 8)]))
    [Rows(address=0, width=8, height=3, pitch=32), Rows(address=65, width=8, height=1, pitch=8)]
    """
    rows: Optional[Rows] = None
    for address, length in runs:
        if not length:
            continue
        if rows is not None and rows.width == length:
            step = address - rows.address
            if rows.height > 1:
                step -= (rows.height - 1) * rows.pitch
            if length <= step <= _MAX_PITCH and (rows.height == 1 or step == rows.pitch):
                rows = Rows(rows.address, length, rows.height + 1, step)
                continue
        if rows is not None:
            yield rows
        rows = Rows(address, length, 1, length)
    if rows is not None:
        yield rows


def batches(copies: Iterable[Rows], limit: int = STAGE) -> Iterator[list[Rows]]:
    """The same in groups of at most ``limit`` bytes.

    >>> list(batches([Rows(0, 6, 1, 6), Rows(64, 3, 2, 8)], 8))
    [[Rows(address=0, width=6, height=1, pitch=6)], [Rows(address=64, width=3, height=2, pitch=8)]]
    """
    some: list[Rows] = []
    room = limit
    for copy in copies:
        for left in _no_wider(copy, limit):
            while left.height:
                height = min(left.height, room // left.width)
                if height:
                    some.append(left._replace(height=height))
                    room -= height * left.width
                    left = left._replace(
                        address=left.address + height * left.pitch, height=left.height - height
                    )
                if left.height:
                    yield some
                    some, room = [], limit
    if some:
        yield some


def _no_wider(rows: Rows, limit: int) -> Iterator[Rows]:
    """The same with no row of more than ``limit`` bytes: wider ones in parts, one by one."""
    if rows.width <= limit:
        yield rows
        return
    for number in range(rows.height):
        start = rows.address + number * rows.pitch
        for offset in range(0, rows.width, limit):
            part = min(limit, rows.width - offset)
            yield Rows(start + offset, part, 1, part)


class _Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D (cuda.h)."""

    _fields_ = (
        ("src_x", ctypes.c_size_t),
        ("src_y", ctypes.c_size_t),
        ("src_type", ctypes.c_int),
        ("src_host", ctypes.c_void_p),
        ("src_device", ctypes.c_uint64),
        ("src_array", ctypes.c_void_p),
        ("src_pitch", ctypes.c_size_t),
        ("dst_x", ctypes.c_size_t),
        ("dst_y", ctypes.c_size_t),
        ("dst_type", ctypes.c_int),
        ("dst_host", ctypes.c_void_p),
        ("dst_device", ctypes.c_uint64),
        ("dst_array", ctypes.c_void_p),
        ("dst_pitch", ctypes.c_size_t),
        ("width", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
    )


class _Stage:
    """A pinned buffer, and what the device is filling it with."""

    def __init__(self, address: int, event: ctypes.c_void_p) -> None:
        self.address, self.event = address, event
        self.target, self.size = 0, 0  # where it belongs


class _Pinned(NamedTuple):
    """A buffer of the caller's that we have pinned."""

    address: int
    size: int
    keeps: Any  # an export of the buffer, which cannot be freed while it is pinned


class Transfer:
    """Every method with the device's context current.  Each copy is done when it returns."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._stream: Optional[ctypes.c_void_p] = None
        self._stages: list[_Stage] = []
        self._pinned: Optional[_Pinned] = None
        self._last, self._times = 0, 0  # where the last copy went, and how often in a row

    def copy(self, copies: Sequence[Rows], target: memoryview) -> None:
        """Fill ``target`` with the rows, one after the other.  Raises CudaError."""
        if not copies:
            return
        anchor = ctypes.c_char.from_buffer(target)
        address, size = ctypes.addressof(anchor), target.nbytes
        stream = self._opened()
        try:
            if self._is_pinned(address, size) or self._pins(address, size, target):
                for rows in copies:
                    self._begin(rows, address)
                    address += rows.size
                self._driver.call("cuStreamSynchronize", stream)
            else:
                self._staged(copies, address)
        except BaseException:
            # Nothing may arrive in the caller's buffer, nor in ours, once this has returned.
            self._driver.status("cuStreamSynchronize", stream)
            for stage in self._stages:
                stage.size = 0
            raise

    def _staged(self, copies: Sequence[Rows], target: int) -> None:
        for number, batch in enumerate(batches(copies)):
            stage = self._stages[number % 2]
            self._drain(stage)
            start = 0
            for rows in batch:
                self._begin(rows, stage.address + start)
                start += rows.size
            self._driver.call("cuEventRecord", stage.event, self._stream)
            stage.target, stage.size = target, start
            target += start
        for stage in sorted(self._stages, key=lambda stage: stage.target):
            self._drain(stage)

    def _drain(self, stage: _Stage) -> None:
        if stage.size:
            self._driver.call("cuEventSynchronize", stage.event)
            ctypes.memmove(stage.target, stage.address, stage.size)
            stage.size = 0

    def _begin(self, rows: Rows, target: int) -> None:
        """Have the device copy the rows side by side to ``target``, which is pinned."""
        if rows.height == 1:
            self._driver.call(
                "cuMemcpyDtoHAsync_v2",
                ctypes.c_void_p(target),
                ctypes.c_uint64(rows.address),
                ctypes.c_size_t(rows.width),
                self._stream,
            )
            return
        copy = _Copy2D(
            src_type=_DEVICE,
            src_device=rows.address,
            src_pitch=rows.pitch,
            dst_type=_HOST,
            dst_host=target,
            dst_pitch=rows.width,
            width=rows.width,
            height=rows.height,
        )
        self._driver.call("cuMemcpy2DAsync_v2", ctypes.byref(copy), self._stream)

    # -- pinned memory

    def _is_pinned(self, address: int, size: int) -> bool:
        mine = self._pinned
        if mine is not None and mine.address <= address <= mine.address + mine.size - size:
            return True
        ask = self._driver.pointer_attribute
        return all(ask(_MEMORY_TYPE, at) == _HOST for at in (address, address + size - 1))

    def _pins(self, address: int, size: int, target: memoryview) -> bool:
        """Whether the buffer is worth being pinned, and now is."""
        self._times = self._times + 1 if address == self._last else 1
        self._last = address
        if size < _WORTH_PINNING or self._times < _TIMES:
            return False
        self._unpin()
        keeps = ctypes.c_char.from_buffer(target)
        arguments = (ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_uint(0))
        if self._driver.status("cuMemHostRegister_v2", *arguments) != 0:
            self._times = -1_000_000  # it is pinned in part, or locked memory is short
            return False
        self._pinned = _Pinned(address, size, keeps)
        return True

    def _unpin(self) -> None:
        pinned, self._pinned = self._pinned, None
        if pinned is not None:
            self._driver.status("cuMemHostUnregister", ctypes.c_void_p(pinned.address))

    def _opened(self) -> ctypes.c_void_p:
        """The stream; it and the buffers are made for the first copy."""
        driver = self._driver
        if self._stream is None:
            stream = ctypes.c_void_p()
            driver.call("cuStreamCreate", ctypes.byref(stream), ctypes.c_uint(_NON_BLOCKING))
            self._stream = stream
        while len(self._stages) < 2:
            event, buffer = ctypes.c_void_p(), ctypes.c_void_p()
            driver.call("cuEventCreate", ctypes.byref(event), ctypes.c_uint(_DISABLE_TIMING))
            arguments = (ctypes.byref(buffer), ctypes.c_size_t(STAGE), ctypes.c_uint(0))
            try:
                driver.call("cuMemHostAlloc", *arguments)
            except BaseException:
                driver.status("cuEventDestroy_v2", event)
                raise
            self._stages.append(_Stage(buffer.value or 0, event))
        return self._stream

    def close(self) -> None:
        driver = self._driver
        self._unpin()
        while self._stages:
            stage = self._stages.pop()
            driver.status("cuEventDestroy_v2", stage.event)
            driver.status("cuMemFreeHost", ctypes.c_void_p(stage.address))
        stream, self._stream = self._stream, None
        if stream is not None:
            driver.status("cuStreamDestroy_v2", stream)
