"""What an engine is asked for: never across two registrations, in few reads, into memory of ours.

The engine here is a stand-in that copies within this process and refuses what the real ones refuse;
the real ones are in `test_engines.py`.
"""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections.abc import Sequence
from typing import Any

import pytest

from sglang_weight_hook import Changed, NotReadable
from sglang_weight_hook.layout import header
from sglang_weight_hook.memory import engine
from sglang_weight_hook.memory.backend import Span
from sglang_weight_hook.memory.engine import EngineMemory, Read, near
from sglang_weight_hook.memory.staging import Buffer, batches
from sglang_weight_hook.memory.transport import Transport
from sglang_weight_hook.reader import Document, Slot

HEADER = header.Header(2, 7, "ready", 11, "0" * 32, 1, 1, 0, 0, 1.5, None, "ab" * 16, "cd" * 8)
SIZE = 100_000


class Owner:
    """Memory with two regions side by side, and a third one after a hole."""

    def __init__(self) -> None:
        self.memory = Buffer(SIZE)
        self.memory.view[:] = bytes(number * 7 % 251 for number in range(SIZE))
        self.page = Buffer(128)
        self.page.view[:] = header.pack(HEADER)
        self.regions = [(0, 40_000), (40_000, 20_000), (70_000, 30_000)]
        self.asked: list[tuple[int, int]] = []  # (offset, size)
        self.refuses = False
        self.written: list[tuple[int, int]] = []  # (address here, size)

    def document(self, **tensors: dict[str, Any]) -> Document:
        start = self.memory.address
        raw = {
            "layout_generation": 1,
            "content_generation": 1,
            "physical_epoch": 0,
            "instance": "cd" * 8,
            "identity": {"pid": 7, "process_start_ticks": 11, "boot_id": "elsewhere"},
            "tensors": {},
            "regions": [
                {"ptr": start + first, "size": size, "device": "cpu", "tensors": []}
                for first, size in self.regions
            ],
        }
        state = {**raw, "state": "ready", "pid": 7, "process_start_ticks": 11}
        return Document(Slot("/nowhere", "0"), raw, state)

    def open(self, monkeypatch: pytest.MonkeyPatch) -> EngineMemory:
        owner = self

        class Connection:
            is_used = False
            most_reads = 4

            def register(self, buffer: Buffer) -> None:
                pass

            def read(self, reads: Sequence[Read], is_header: bool = False) -> None:
                assert len(reads) <= self.most_reads
                for read in reads:
                    owner.written.append((read.local, read.size))
                    if owner.refuses or not owner.has(read.remote, read.size):
                        raise NotReadable("refused")
                    ctypes.memmove(read.local, read.remote, read.size)
                    if not is_header:
                        owner.asked.append((read.remote - owner.memory.address, read.size))

            def close(self, is_good: bool) -> None:
                pass

        transport = Transport("fake", "/nowhere", {"state": "registered"}, self.page.address)
        monkeypatch.setattr(engine.transports, "transport_of", lambda document, name: transport)
        monkeypatch.setattr(engine.transports, "warnings", lambda document, transport: ())

        class Memory(EngineMemory):
            name = "fake"

        return Memory(self.document(), None, lambda *arguments: Connection())

    def has(self, address: int, size: int) -> bool:
        """Whether one registration holds all of it."""
        spans = [(self.memory.address + first, length) for first, length in self.regions]
        spans.append((self.page.address, 128))
        return any(a <= address and address + size <= a + n for a, n in spans)

    def bytes(self, first: int, size: int) -> bytes:
        return bytes(self.memory.view[first : first + size])


@pytest.fixture
def owner() -> Owner:
    return Owner()


def test_a_stretch_over_two_registrations_is_read_in_two(
    owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor on several pieces of an expandable segment, each an allocation by itself."""
    memory = owner.open(monkeypatch)
    target = bytearray(30_000)
    memory.fetch([(owner.memory.address + 20_000, 30_000)], memoryview(target))
    assert target == owner.bytes(20_000, 30_000)
    assert owner.asked == [(20_000, 20_000), (40_000, 10_000)]
    owner.asked.clear()
    buffer = memory.buffer(50_000)
    spans = [Span(owner.memory.address + 39_000, 2_000, 64), Span(owner.memory.address, 10, 4_096)]
    memory.fetch_at(spans, buffer)
    assert buffer[64:2_064] == owner.bytes(39_000, 2_000)
    assert buffer[4_096:4_106] == owner.bytes(0, 10)


def test_runs_that_lie_close_together_are_read_in_one(
    owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = owner.open(monkeypatch)
    runs = [(owner.memory.address + row * 600, 400) for row in range(90)]
    target = bytearray(90 * 400)
    memory.fetch(runs, memoryview(target))
    assert target == b"".join(owner.bytes(row * 600, 400) for row in range(90))
    assert len(owner.asked) == 2  # one a registration


def test_runs_that_lie_apart_come_in_batches(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_GAP", 10)
    memory = owner.open(monkeypatch)
    runs = [(owner.memory.address + row * 1_000, 500) for row in reversed(range(40))]
    target = bytearray(40 * 500)
    memory.fetch(runs, memoryview(target))
    assert target == b"".join(owner.bytes(row * 1_000, 500) for row in reversed(range(40)))
    assert len(owner.asked) == 40


def test_staging_is_bounded(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "STAGING_BYTES", 4_096)
    memory = owner.open(monkeypatch)
    target = bytearray(30_000)
    memory.fetch([(owner.memory.address + 70_000, 30_000)], memoryview(target))
    assert target == owner.bytes(70_000, 30_000)
    assert max(size for _, size in owner.asked) == 4_096


def test_after_a_failure_nothing_is_asked_again(
    owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = owner.open(monkeypatch)
    run = [(owner.memory.address, 10)]
    owner.refuses = True
    with pytest.raises(NotReadable, match="refused"):
        memory.fetch(run, memoryview(bytearray(10)))
    owner.refuses = False
    with pytest.raises(NotReadable, match="failed before"):
        memory.fetch(run, memoryview(bytearray(10)))


def test_a_failure_is_a_change_where_a_new_connection_finds_one(
    owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = owner.open(monkeypatch)
    owner.page.view[:] = header.pack(HEADER._replace(sequence=4, state="updating"))
    owner.regions = []
    with pytest.raises(Changed, match="is updating now"):
        memory.fetch([(owner.memory.address, 10)], memoryview(bytearray(10)))


def test_a_failure_is_a_change_where_the_state_file_tells_one(
    owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's engine is closed, and its transport document not yet written."""
    memory = owner.open(monkeypatch)
    owner.refuses = True
    monkeypatch.setattr(Slot, "state_if_any", lambda self: {"state": "updating"})
    with pytest.raises(Changed, match="slot 0 is updating now"):
        memory.fetch([(owner.memory.address, 10)], memoryview(bytearray(10)))


def test_closed_memory_keeps_no_connection(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = owner.open(monkeypatch)
    connection = weakref.ref(memory._connection)
    memory.close()
    gc.collect()
    assert connection() is None
    with pytest.raises(NotReadable, match="is closed"):
        memory.fetch([(owner.memory.address, 10)], memoryview(bytearray(10)))
    memory.close()


def test_a_torn_header_is_read_again_and_one_that_stays_torn_is_told(
    owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang_weight_hook.memory import remote_header

    monkeypatch.setattr(remote_header, "_SECONDS", 0.05)
    good = header.pack(HEADER)
    torn = good[:60] + b"\xff" + good[61:]
    copies = [torn, torn, good]
    assert remote_header.RemoteHeader("0", lambda: copies.pop(0)).look(-1) == header.unpack(good)
    assert remote_header.RemoteHeader("0", lambda: good).look(2) is None
    with pytest.raises(Changed, match="not consistent"):
        remote_header.RemoteHeader("0", lambda: torn).look(-1)
    with pytest.raises(Changed, match="something else"):
        remote_header.RemoteHeader("0", lambda: bytes(128)).look(-1)


def test_the_runs_of_a_tensor_are_all_there_whatever_the_limits() -> None:
    runs = [(0, 5), (100, 1), (50, 17), (200, 8)]
    for most_bytes in (1, 3, 16, 64):
        for most_parts in (1, 2, 9):
            parts = [
                (part.address, part.size)
                for batch in batches(runs, most_bytes, most_parts)
                for part in batch
            ]
            wanted = [address + n for address, size in runs for n in range(size)]
            assert [address + n for address, size in parts for n in range(size)] == wanted
    assert near(runs, 4, 1) == [[run] for run in runs]


def test_an_engine_is_given_no_memory_of_the_callers(
    owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has failed may go on writing after the caller has freed it."""
    memory = owner.open(monkeypatch)
    target = Buffer(30_000)
    memory.fetch([(owner.memory.address, 30_000)], target.view)
    assert target.view == owner.bytes(0, 30_000)
    assert owner.written
    end = target.address + target.size
    assert all(at + size <= target.address or at >= end for at, size in owner.written)
