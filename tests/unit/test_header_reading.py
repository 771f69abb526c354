"""Reading a slot's header: one consistent reading, cheap polling, and files that are no header.

Torn readings are provoked with `publisher.header.HeaderFile` in a process of its own, which
rewrites the file as fast as it can.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_weight_hook.layout import files
from sglang_weight_hook.layout.header import CODES, SIZE, Header, pack, unpack
from sglang_weight_hook.publisher.header import HeaderFile
from sglang_weight_hook.reader import HeaderReader, HookError, open_slot

SAMPLE = Header(
    sequence=2,
    pid=7,
    state="ready",
    process_start_ticks=11,
    boot_id="00112233-4455-6677-8899-aabbccddeeff",
    layout_generation=3,
    content_generation=4,
    physical_epoch=5,
    kv_physical_epoch=6,
    updated_at=1.25,
    checked_at=2.5,
    layout_digest="ab" * 16,
    instance="cd" * 8,
)


@pytest.fixture
def path(maps: Path) -> Path:
    maps.mkdir()
    return maps / files.HEADER.format("0")


@pytest.fixture
def header(path: Path) -> Iterator[HeaderFile]:
    written = HeaderFile(str(path), SAMPLE)
    yield written
    written.abandon()


# --- one reading --------------------------------------------------------------------------


def test_a_header_is_read_as_it_was_written(header: HeaderFile, maps: Path) -> None:
    slot = open_slot(str(maps), "0")
    assert slot.header() == SAMPLE
    header.write(SAMPLE._replace(state="updating", checked_at=None))
    assert slot.header() == SAMPLE._replace(sequence=4, state="updating", checked_at=None)


def test_every_state_is_told_and_an_owner_that_has_left(header: HeaderFile, maps: Path) -> None:
    slot = open_slot(str(maps), "0")
    for state in CODES:
        header.write(SAMPLE._replace(state=state))
        assert slot.header().state == state
    header.leave()
    assert slot.header().state == "left"


def test_the_sequence_tells_a_change_and_quiet(header: HeaderFile, path: Path) -> None:
    with HeaderReader(str(path)) as reader:
        known = reader.sequence
        assert reader.sequence == known
        header.write(SAMPLE)
        assert reader.sequence != known
        assert reader.sequence == reader.read().sequence


def test_a_header_that_was_replaced_is_not_current(header: HeaderFile, path: Path) -> None:
    with HeaderReader(str(path)) as reader:
        assert reader.is_current()
        successor = HeaderFile(str(path), SAMPLE._replace(pid=8))
        try:
            assert not reader.is_current()
            assert reader.read().pid == 7  # of the one that it has opened
        finally:
            successor.abandon()
        with HeaderReader(str(path)) as again:
            assert again.read().pid == 8
        path.unlink()
        assert not reader.is_current()


def test_a_header_cut_short_ends_no_reader(header: HeaderFile, path: Path) -> None:
    with HeaderReader(str(path)) as reader:
        os.truncate(path, 12)
        assert reader.sequence != SAMPLE.sequence or reader.sequence == 2
        with pytest.raises(HookError, match="not a header"):
            reader.read()
        os.truncate(path, 0)
        assert reader.sequence == 0


def test_the_header_of_the_real_recorder_agrees_with_its_documents(runner: Any, maps: Path) -> None:
    slot = open_slot(str(maps), "0")
    found, state = slot.header(), slot.read_state()
    for field in ("pid", "state", "layout_generation", "content_generation", "instance"):
        assert getattr(found, field) == state[field], field
    assert found.boot_id == state["boot_id"]
    assert found.process_start_ticks == state["process_start_ticks"]
    assert found.checked_at == pytest.approx(state["checked_at"], abs=1e-6)


def test_a_document_takes_checked_at_from_the_header_as_long_as_it_is_of_this_map(
    runner: Any, maps: Path
) -> None:
    slot = open_slot(str(maps), "0")
    document = slot.read()
    now = slot.header()
    path = slot.path(files.HEADER)

    def rewrite(later: Header) -> float | None:
        HeaderFile(path, later).abandon()
        return document.checked_at

    assert rewrite(now._replace(checked_at=2.5)) == 2.5
    assert rewrite(now._replace(checked_at=None)) is None
    said = document.state["checked_at"]
    for other in ({"instance": "00" * 8}, {"layout_generation": 99}, {"pid": 1}):
        assert rewrite(now._replace(checked_at=2.5, **other)) == said
    os.unlink(path)
    assert document.checked_at == said
    del document.state["checked_at"]
    assert document.checked_at is None


# --- what is no header --------------------------------------------------------------------


def _absent(path: Path) -> None:
    pass


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _link(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(pack(SAMPLE))
    path.symlink_to(other)


def _folder(path: Path) -> None:
    path.mkdir()


def _long(path: Path) -> None:
    path.write_bytes(pack(SAMPLE) + b"\0")


def _short(path: Path) -> None:
    path.write_bytes(pack(SAMPLE)[:-1])


def _huge(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 40)


def _foreign(path: Path) -> None:
    path.write_bytes(b"#" * SIZE)


def _newer(path: Path) -> None:
    data = pack(SAMPLE)
    path.write_bytes(data.replace(b"SGLWHDR1", b"SGLWHDR2"))


def _unknown_state(path: Path) -> None:
    import struct
    import zlib

    data = bytearray(pack(SAMPLE))
    data[20:24] = struct.pack("<I", 99)
    data[124:] = struct.pack("<I", zlib.crc32(data[:124]))
    path.write_bytes(data)


def _odd(path: Path) -> None:
    path.write_bytes(pack(SAMPLE._replace(sequence=3)))


def _wrong_checksum(path: Path) -> None:
    path.write_bytes(pack(SAMPLE)[:-1] + b"?")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_absent, "does not exist"),
        (_fifo, "is not a file"),
        (_link, "cannot be read"),
        (_folder, "is not a file"),
        (_long, "is not a file of 128 bytes"),
        (_short, "is not a file of 128 bytes"),
        (_huge, "is not a file of 128 bytes"),
        (_foreign, "not a header"),
        (_newer, "not a header"),
        (_unknown_state, "state 99 is unknown"),
        (_odd, "not consistent"),
        (_wrong_checksum, "not consistent"),
    ],
)
def test_what_is_no_header_is_refused_soon(
    make: Callable[[Path], None], says: str, path: Path, maps: Path
) -> None:
    make(path)
    started = time.monotonic()
    with pytest.raises(HookError, match=says):
        open_slot(str(maps), "0").header()
    assert time.monotonic() - started < 5


def test_a_reader_leaves_no_descriptor_behind(header: HeaderFile, path: Path, maps: Path) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    slot = open_slot(str(maps), "0")
    before = descriptors()
    slot.header()
    kept = slot.open_header()
    assert descriptors() == before + 1
    del kept
    assert descriptors() == before
    closed = slot.open_header()
    closed.close()
    closed.close()
    with pytest.raises(HookError, match="was closed"):
        _ = closed.sequence
    with pytest.raises(HookError, match="was closed"):
        closed.read()
    path.unlink()
    _fifo(path)
    with pytest.raises(HookError):
        slot.header()
    assert descriptors() == before


# --- torn readings ------------------------------------------------------------------------

# Every field follows from the generation, so that a mixture of two shows.
RULE = """
def at(generation):
    return Header(
        sequence=2,
        pid=generation % 100_000 + 1,
        state=("loading", "ready", "updating", "failed", "released")[generation % 5],
        process_start_ticks=generation * 3,
        boot_id=f"{generation:032x}",
        layout_generation=generation,
        content_generation=generation * 7,
        physical_epoch=generation * 11,
        kv_physical_epoch=generation * 13,
        updated_at=float(generation),
        checked_at=generation * 2.0 or None,
        layout_digest=f"{generation * 17:032x}",
        instance=f"{generation * 19:016x}",
    )
"""
WRITER = f"""
import sys
from sglang_weight_hook.layout.header import Header
from sglang_weight_hook.publisher.header import HeaderFile
{RULE}
header = HeaderFile(sys.argv[1], at(1))
print("ready", flush=True)
generation = 1
while True:
    generation += 1
    header.write(at(generation))
"""
_rule: dict[str, Any] = {"Header": Header}
exec(RULE, _rule)


def mixed(found: Header) -> bool:
    expected: Header = _rule["at"](found.layout_generation)
    spelled = expected._replace(boot_id=_spelled(expected.boot_id), sequence=found.sequence)
    return found != spelled


def _spelled(boot_id: str) -> str:
    return "-".join((boot_id[:8], boot_id[8:12], boot_id[12:16], boot_id[16:20], boot_id[20:]))


@pytest.fixture
def busy_writer(path: Path, start_python: Callable[..., subprocess.Popen[str]]) -> Path:
    """A header that another process rewrites as fast as it can."""
    writer = start_python(WRITER, str(path))
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n"
    return path


def test_no_reading_mixes_two_headers(busy_writer: Path, maps: Path) -> None:
    slot = open_slot(str(maps), "0")
    seen = set()
    readings = last = 0
    deadline = time.monotonic() + 60
    with slot.open_header() as reader:
        # On a loaded machine the two take turns, and many readings are of one header.
        while readings < 20_000 or (len(seen) < 100 and time.monotonic() < deadline):
            found = reader.read()
            assert not mixed(found)
            assert found.layout_generation >= last
            last = found.layout_generation
            seen.add(last)
            readings += 1
    assert len(seen) >= 100  # it really was rewritten meanwhile


def test_the_writer_keeps_the_sequence_odd_until_all_is_there(busy_writer: Path) -> None:
    """Whoever compares the sequence before and after alone, without the checksum, is right, too."""
    kept = 0
    descriptor = os.open(busy_writer, os.O_RDONLY)
    try:
        for _ in range(50_000):
            before = os.pread(descriptor, 8, 8)
            data = os.pread(descriptor, SIZE, 0)
            after = os.pread(descriptor, 8, 8)
            if before == after == data[8:16] and before[0] % 2 == 0:
                found = unpack(data)
                assert found is not None
                kept += 1
    finally:
        os.close(descriptor)
    assert kept > 0


@pytest.mark.parametrize("cut", [16, 20, 24, 48, 64, 96, 120, 124])
@pytest.mark.parametrize("sequence", [2, 4])
def test_a_remote_copy_of_two_halves_is_seen_by_its_checksum(cut: int, sequence: int) -> None:
    """An RDMA read promises no order; here also with the same even sequence in both halves."""
    old, new = pack(_rule["at"](5)), pack(_rule["at"](6)._replace(sequence=sequence))
    assert unpack(old) is not None
    assert unpack(new) is not None
    if old[:cut] != new[:cut]:
        assert unpack(old[:cut] + new[cut:]) is None
        assert unpack(new[:cut] + old[cut:]) is None
    else:
        assert (sequence, cut) == (2, 16)  # nothing before it differs: no mixture
