"""What reading through a transfer engine has in common, whichever engine it is.

Bytes come into memory that is registered once, in batches.  What is asked for into other memory
is copied on from there, unless the engine writes anywhere.
"""

from __future__ import annotations

import os
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Optional, Protocol

from ..layout.header import SIZE
from ..layout.states import READY
from ..reader import Document, Header, HookError, Tensor
from . import transport as transports
from .backend import Run, Span
from .errors import Changed, NotReadable, TransferWarning
from .remote_header import RemoteHeader
from .staging import Buffer, address_of, batches
from .transport import Transport

STAGING_BYTES = 8 << 20
DIRECT_BYTES = 64 << 20  # in one batch, into memory that the engine writes into itself
# Each read of an engine costs some 80 µs, in which it moves so much: what lies this close together
# is read with what lies between.
_GAP = 32 << 10


class Read(NamedTuple):
    """One stretch of the server's memory into ours.  Of the same length, of course."""

    local: int
    remote: int
    size: int


class Connection(Protocol):
    """An engine of this process, connected to one of a server."""

    is_used: bool  # it served somebody before, and may turn out to be closed at the other end
    most_reads: int  # in one batch

    def register(self, buffer: Buffer) -> None:
        """Have the engine write into it; kept as long as the connection.  Raises NotReadable."""

    def read(self, reads: Sequence[Read], is_header: bool = False) -> None:
        """Do all of them.  Raises NotReadable, after which the connection is not used again."""

    def close(self, is_good: bool) -> None:
        """Give it back; ``is_good``: nothing has failed, so another may have it."""


class _Closed:
    """The connection of memory that is closed."""

    is_used = False
    most_reads = 1

    def register(self, buffer: Buffer) -> None:
        raise NotReadable("the memory is closed; open it again with document.open_memory()")

    def read(self, reads: Sequence[Read], is_header: bool = False) -> None:
        raise NotReadable("the memory is closed; open it again with document.open_memory()")

    def close(self, is_good: bool) -> None:
        pass


_foreign: list[Connection] = []  # of the parent of a forked child


class EngineMemory:
    """Reads the memory of the process that published ``document`` through a transfer engine."""

    name: str  # of the engine

    def __init__(
        self,
        document: Document,
        address: Optional[str],
        connect: Callable[[Transport, Document, Optional[str], bool], Connection],
    ) -> None:
        """Connect, and read the header once.  Raises NotReadable and Changed.

        ``connect`` is told by its last argument whether it may take a connection that served
        before.
        """
        self._document = document
        self._transport = transports.transport_of(document, self.name)
        for each in transports.warnings(document, self._transport):
            warnings.warn(each, TransferWarning, stacklevel=2)
        self._connect = connect
        self._address = address
        self._is_good = True
        self._buffers: list[Buffer] = []
        self.header = RemoteHeader(document.slot.name, self._header_bytes)
        ends = sorted((region.ptr, region.end) for region in document.iter_regions())
        self._starts = [ptr for ptr, _ in ends]
        self._ends = [end for _, end in ends]
        try:
            self._open_and_look()
        except NotReadable:
            self._raise_if_served_anew()
            raise

    def _open_and_look(self) -> None:
        self._open(may_be_used=True)
        try:
            try:
                self._header_bytes()
            except NotReadable:
                if not self._connection.is_used:
                    raise
                self.close()
                self._open(may_be_used=False)
                self._header_bytes()
        except BaseException:
            self.close()
            raise

    def _open(self, may_be_used: bool) -> None:
        self._is_good = True
        self._pid = os.getpid()
        self._connection = self._connect(
            self._transport, self._document, self._address, may_be_used
        )
        self._buffers = []
        try:
            self._staging = self._registered(STAGING_BYTES)
        except BaseException:
            self._connection.close(False)
            raise

    def _registered(self, size: int) -> Buffer:
        buffer = Buffer(size)
        self._connection.register(buffer)
        self._buffers.append(buffer)
        return buffer

    def _header_bytes(self) -> bytes:
        self._read([Read(self._staging.address, self._transport.header, SIZE)], is_header=True)
        return bytes(self._staging.view[:SIZE])

    def reaches(self, tensor: Tensor) -> bool:
        if sum(size for _, size in self._registered_parts(tensor.ptr, tensor.span)) < tensor.span:
            raise NotReadable(
                f"{tensor.name} lies in no region of the layout, so {self.name} has not registered "
                f"it"
            )
        return True

    def _registered_parts(self, address: int, size: int) -> Iterator[Run]:
        """A stretch, cut where one region ends and the next begins: each is registered by itself.

        Ends where there is no region.
        """
        end = address + size
        while address < end:
            number = bisect_right(self._starts, address) - 1
            if number < 0 or self._ends[number] <= address:
                return
            until = min(end, self._ends[number])
            yield address, until - address
            address = until

    def view(self, tensor: Tensor) -> None:
        return None

    def buffer(self, size: int) -> memoryview:
        return self._registered(size).view

    def fetch(self, runs: Sequence[Run], target: memoryview) -> None:
        if not runs or not target.nbytes:
            return
        if len(runs) > 1 and self._fetch_near(runs, target):
            return
        runs = [part for run in runs for part in self._registered_parts(*run)]
        here = address_of(target)
        connection, size = self._connection, sum(length for _, length in runs)
        if any(b.holds(here, size) for b in self._buffers):
            for batch in batches(runs, DIRECT_BYTES, connection.most_reads):
                self._read([Read(here + part.offset, part.address, part.size) for part in batch])
                here += batch[-1].offset + batch[-1].size
            return
        start, base = 0, self._staging.address
        for batch in batches(runs, self._staging.size, connection.most_reads):
            self._read([Read(base + part.offset, part.address, part.size) for part in batch])
            end = start + batch[-1].offset + batch[-1].size
            target[start:end] = self._staging.view[: end - start]
            start = end

    def fetch_at(self, spans: Sequence[Span], target: memoryview) -> None:
        here, connection = address_of(target), self._connection
        # An engine whose batch has failed may go on writing, so it is given no memory that its
        # owner could free or use again meanwhile.
        if not any(buffer.holds(here, target.nbytes) for buffer in self._buffers):
            for address, size, offset in spans:
                self.fetch([(address, size)], target[offset : offset + size])
            return
        reads: list[Read] = []
        filled = 0
        for address, size, offset in spans:
            for start, length in self._registered_parts(address, size):
                for first in range(start, start + length, DIRECT_BYTES):
                    part = min(DIRECT_BYTES, start + length - first)
                    if filled + part > DIRECT_BYTES or len(reads) == connection.most_reads:
                        self._read(reads)
                        reads, filled = [], 0
                    reads.append(Read(here + offset + first - address, first, part))
                    filled += part
        if reads:
            self._read(reads)

    def _fetch_near(self, runs: Sequence[Run], target: memoryview) -> bool:
        """Fetch runs that lie close together in few reads; false where they do not."""
        groups = near(runs, self._staging.size, _GAP)
        if 2 * len(groups) > len(runs):
            return False
        start, view = 0, self._staging.view
        for group in groups:
            first = group[0][0]
            size = max(address + length for address, length in group) - first
            here = self._staging.address - first
            parts = self._registered_parts(first, size)
            self._read([Read(here + at, at, length) for at, length in parts])
            for address, length in group:
                target[start : start + length] = view[address - first : address - first + length]
                start += length
        return True

    def _read(self, reads: Sequence[Read], is_header: bool = False) -> None:
        if not self._is_good:
            raise NotReadable(
                f"{self.name} has failed before; open the memory again with document.open_memory()"
            )
        if os.getpid() != self._pid:
            raise NotReadable(
                f"{self.name} does not survive a fork; open the memory in the process that reads it"
            )
        try:
            self._connection.read(reads, is_header)
        except HookError:
            self._is_good = False
            if is_header:
                raise
            self._explain()
            raise
        except BaseException:  # an interrupt, say: bytes may still be on their way
            self._is_good = False
            raise

    def _raise_if_served_anew(self) -> None:
        """Raise Changed where the server says now that it is reached in another way, or not.

        Before an event takes memory away its state is published, then its engine is withdrawn, and
        what is reached is published last: whoever failed in between finds the state.
        """
        document = self._document
        if document.is_live:
            state = document.slot.state_if_any()
            if state is not None and state.get("state") != READY:
                raise Changed(
                    f"slot {document.slot.name} is {state.get('state')} now, and its memory could "
                    f"not be read any more; read the document again when it is ready"
                )
        try:
            now = transports.transport_of(self._document, self.name)
        except NotReadable:
            return
        if now != self._transport:
            raise Changed(
                f"the server of slot {self._document.slot.name} has opened {self.name} anew; read "
                f"the document again"
            )

    def _explain(self) -> None:
        """Raise Changed where the slot has changed, as its files or a new connection tell.

        One on which something failed is not asked: an engine may refuse everything from then on.
        """
        self._raise_if_served_anew()
        try:
            connection = self._connect(self._transport, self._document, self._address, False)
        except NotReadable:
            return
        buffer = Buffer(SIZE)

        def fetch() -> bytes:
            connection.read([Read(buffer.address, self._transport.header, SIZE)], True)
            return bytes(buffer.view)

        try:
            connection.register(buffer)
            header = RemoteHeader(self._document.slot.name, fetch).look(-1)
        except NotReadable:
            return
        finally:
            connection.close(False)
        document = self._document
        generations = (
            document.instance,
            document.layout_generation,
            document.content_generation,
            document.physical_epoch,
        )
        if header is not None and (header.state, *_generations_of(header)) != (READY, *generations):
            raise Changed(
                f"slot {document.slot.name} is {header.state} now, with layout generation "
                f"{header.layout_generation} and content generation {header.content_generation}, "
                f"and the memory could not be read any more; read the document again"
            )

    def close(self) -> None:
        # Whoever keeps this object keeps no engine with it, for that listens as long as it lives.
        connection, self._connection = self._connection, _Closed()
        if os.getpid() == self._pid:
            connection.close(self._is_good)
        else:
            _foreign.append(connection)  # a forked child has none of the engine's threads


def _generations_of(header: Header) -> tuple[object, ...]:
    return (
        header.instance,
        header.layout_generation,
        header.content_generation,
        header.physical_epoch,
    )


def near(runs: Sequence[Run], most: int, gap: int) -> list[list[Run]]:
    """The runs in groups of which each lies within ``most`` bytes and has no larger ``gap``.

    >>> near([(0, 4), (8, 4), (100, 4)], most=64, gap=8)
    [[(0, 4), (8, 4)], [(100, 4)]]
    """
    groups: list[list[Run]] = []
    first = end = 0
    for address, length in runs:
        if (
            groups
            and address >= first
            and address - end <= gap
            and address + length - first <= most
        ):
            groups[-1].append((address, length))
            end = max(end, address + length)
        elif length > most:
            return [[run] for run in runs]
        else:
            groups.append([(address, length)])
            first, end = address, address + length
    return groups
