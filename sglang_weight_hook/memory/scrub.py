"""Watching the weights of a running server for bytes that change though nobody has changed them.

A `Scrubber` reads all weights of one slot once, after each change of their contents, and keeps
sums of 24 bytes for every 64 KiB (`sums`): the baseline.  Then it reads them again and again.
Where sums differ while the content generation is the same, something other than an update has
written there: a flipped bit of the memory, a stray write.  One changed word is told with its
tensor, its index, its bits, and what it was before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Optional, Union

from ..layout.states import READY
from ..reader import Document, HookError, Slot, Tensor
from . import sums
from .boxes import index_of
from .errors import NotReadable
from .memory import Memory
from .needed import need_numpy
from .transport import is_transferred

PIECE = 2 << 20  # bytes that are read at a time; a multiple of `sums.BLOCK`
RETRY_SECONDS = 0.5  # while there is nothing to be read


class Read(NamedTuple):
    """A piece was read: time to pause, if the rate is bounded."""

    bytes: int
    is_baseline: bool


class Waiting(NamedTuple):
    """There is nothing to be read now; asked again after `RETRY_SECONDS`."""

    slot: str
    why: str


class Baseline(NamedTuple):
    """All weights have been read for the first time since their contents changed."""

    slot: str
    instance: Optional[str]
    content_generation: int
    tensors: int
    bytes: int
    seconds: float
    via: tuple[str, ...]


class Pass(NamedTuple):
    """All weights have been read once more."""

    slot: str
    content_generation: int
    number: int  # counts from 1 after each baseline
    bytes: int
    seconds: float
    corruptions: int  # found in this pass


class Corruption(NamedTuple):
    """Bytes are not what they were, and no update has come between."""

    slot: str
    tensor: str
    content_generation: int
    offset: int  # bytes from the first of the values, row-major: of the word, or of the block
    size: int  # bytes: of the word, or of the block
    address: Optional[int]  # of the byte that holds `bit`, in the owner's address space
    element: Optional[tuple[int, ...]]  # its index; None where several words have changed
    bit: Optional[int]  # of the element, 0 the lowest; None where several bits have changed
    bits: Optional[int]  # how many have changed
    before: Optional[str]  # the element's bytes, hexadecimal, as a little-endian number
    after: Optional[str]
    found_at: float  # seconds since 1970-01-01 UTC


Event = Union[Read, Waiting, Baseline, Pass, Corruption]


class Scrubber:
    """One slot, watched.  Iterate over `events`; stopping to iterate stops it."""

    def __init__(
        self,
        slot: Slot,
        wanted: Callable[[Tensor], bool] = lambda tensor: True,
        via: Optional[str] = None,
        every: float = 0.0,
        address: Optional[str] = None,
    ) -> None:
        """``wanted``: which tensors; ``every``: seconds between the beginnings of two passes.

        ``via``, ``address``: as for `Document.open_memory`.  Raises NotReadable without numpy.
        """
        need_numpy("scrub")
        self.slot = slot
        self._every = every
        self._began = -every
        self.via = via
        self._address = address
        self._wanted = wanted
        self._sums: dict[str, Any] = {}  # by tensor: the sums of its blocks
        self._key: Any = None  # what the sums are of
        self._passes = 0
        self.why: Optional[str] = None  # it cannot be read now
        self._is_transferred = False  # whether an engine reads it, perhaps on another machine
        self._worked = False  # whether anything could be read

    def events(self) -> Iterator[Event]:
        """What happens, for ever.  Raises NotReadable where the memory could never be reached."""
        told = None
        while True:
            why = None
            try:
                if self._rests():
                    self.why = None
                    yield Read(0, False)
                    continue
                document = self.slot.read(0.0)
                why = self._cannot_be_read(document)
                if why is None:
                    told = None
                    yield from self._once(document)
            except NotReadable as error:
                if self._key is None and not self._worked:
                    raise
                why = str(error)  # a server that is ending has taken its socket away already
            except HookError as error:  # also `Changed`: what it was reading has changed
                why = str(error)
            self.why = why
            if why is not None:
                if why != told:
                    yield Waiting(self.slot.name, why)
                    told = why
                yield Read(0, False)

    def _rests(self) -> bool:
        """Whether the last pass was a moment ago and nothing has changed since: one small read."""
        if self._key is None or time.monotonic() >= self._began + self._every:
            return False
        if self._is_transferred:
            return True  # there may be no header file here: the next pass tells
        header = self.slot.header()
        return (
            header.state == READY
            and self.slot.owner_alive()
            and self._key
            == (
                header.instance,
                header.pid,
                header.layout_generation,
                header.content_generation,
                header.physical_epoch,
            )
        )

    def _cannot_be_read(self, document: Document) -> Optional[str]:
        self._is_transferred = is_transferred(document, self.via)
        if self._is_transferred:
            return None  # what is true there, the owner's own header says
        if not document.owner_alive():
            return f"the owner of slot {self.slot.name} has exited"
        if document.state["state"] != READY:
            return f"slot {self.slot.name} is {document.state['state']}"
        return None

    def _once(self, document: Document) -> Iterator[Event]:
        """One reading of all weights: the baseline, or a pass against it."""
        key = _key(document)
        is_baseline = key != self._key
        if is_baseline:
            self._key, self._passes = None, 0
        began = self._began = time.monotonic()
        total = found = 0
        tensors = [tensor for tensor in document.iter_tensors() if self._covers(tensor)]
        taken: dict[str, Any] = {}
        ways = set()
        with document.open_memory(via=self.via, address=self._address) as memory:
            for tensor in tensors:
                rows = []
                for start, piece in _pieces(memory, tensor):
                    words = sums.words_of(piece)
                    now = sums.sums(words)
                    total += len(piece)
                    if is_baseline:
                        rows.append(now)
                    else:
                        for event in self._compared(memory, tensor, start, words, now):
                            found += 1
                            yield event
                    yield Read(len(piece), is_baseline)
                if is_baseline:
                    taken[tensor.name] = _joined(rows)
                ways.add(memory.via(tensor.name))
            memory.check()
        seconds = time.monotonic() - began
        self._worked = True
        if is_baseline:
            self._sums, self._key, self._began = taken, key, -self._every
            yield Baseline(
                self.slot.name,
                document.instance,
                document.content_generation,
                len(tensors),
                total,
                seconds,
                tuple(sorted(ways)),
            )
            return
        self._passes += 1
        yield Pass(self.slot.name, document.content_generation, self._passes, total, seconds, found)

    def _covers(self, tensor: Tensor) -> bool:
        return bool(
            tensor.resident and not tensor.volatile and tensor.size and self._wanted(tensor)
        )

    def _compared(
        self, memory: Memory, tensor: Tensor, start: int, words: Any, now: Any
    ) -> Iterator[Corruption]:
        """What has changed in one piece, and is told once: from then on it is what is expected."""
        first = start // sums.BLOCK
        known = self._sums[tensor.name][first : first + len(now)]
        per = sums.BLOCK // sums.WORD
        for k in sums.differing(known, now):
            block = words[k * per : (k + 1) * per]
            change = sums.located(known[k], now[k], block)
            known[k] = now[k]
            offset = start + k * sums.BLOCK
            generation = memory.document.content_generation
            if change is None:
                size = min(sums.BLOCK, tensor.size - offset)
                yield Corruption(
                    self.slot.name,
                    tensor.name,
                    generation,
                    offset,
                    size,
                    *(None,) * 6,
                    found_at=time.time(),
                )
            else:
                yield _described(self.slot.name, tensor, generation, offset, change, block)


def _key(document: Document) -> tuple[Any, ...]:
    """What a baseline is of."""
    return (
        document.instance,
        document.state.get("pid"),
        document.layout_generation,
        document.content_generation,
        document.physical_epoch,
    )


def _pieces(memory: Memory, tensor: Tensor) -> Iterator[tuple[int, Any]]:
    """Pieces that begin at whole blocks, with where each begins among the values.

    The pieces of a tensor whose rows do not divide a block are put together again.
    """
    start, rest = 0, b""
    for piece in memory.pieces(tensor.name, PIECE):
        if not rest and len(piece) % sums.BLOCK == 0:
            yield start, piece
            start += len(piece)
            continue
        data = rest + bytes(piece)
        whole = len(data) // sums.BLOCK * sums.BLOCK
        if whole:
            yield start, memoryview(data)[:whole]
            start += whole
        rest = data[whole:]
    if rest:
        yield start, rest


def _joined(rows: list[Any]) -> Any:
    import numpy

    return numpy.concatenate(rows)


def _described(
    slot: str, tensor: Tensor, generation: int, offset: int, change: sums.Change, block: Any
) -> Corruption:
    """A changed word as the element, the bit and the value that it is of."""
    itemsize = tensor.itemsize
    word = offset + change.word * sums.WORD  # bytes from the first of the values
    flipped = change.before ^ change.after
    low = (flipped & -flipped).bit_length() - 1
    byte = word + low // 8
    element = byte // itemsize
    values = bytearray(memoryview(block).cast("B"))
    inside = element * itemsize - offset
    after = _number(values, inside, itemsize)
    at = change.word * sums.WORD
    values[at : at + sums.WORD] = change.before.to_bytes(sums.WORD, "little")
    before = _number(values, inside, itemsize)
    index = index_of(tensor.shape, element)
    count = bin(flipped).count("1")
    steps = sum(n * step for n, step in zip(index, tensor.stride))
    return Corruption(
        slot,
        tensor.name,
        generation,
        word,
        sums.WORD,
        tensor.ptr + steps * itemsize + byte % itemsize,
        index,
        (byte % itemsize) * 8 + low % 8 if count == 1 else None,
        count,
        before,
        after,
        time.time(),
    )


def _number(values: bytearray, start: int, size: int) -> Optional[str]:
    """Bytes as a hexadecimal number; None where the element reaches into another block."""
    if start < 0 or start + size > len(values):
        return None
    return f"{int.from_bytes(values[start : start + size], 'little'):#0{2 + 2 * size}x}"
