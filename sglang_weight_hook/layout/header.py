"""The header file: a slot's state in 128 bytes at fixed offsets, mapped by its owner.

Little-endian.  A poll compares `SEQUENCE`, one aligned load; a full reading
copies the 128 bytes and calls `unpack`.  An odd sequence means that the owner is writing.  The
checksum over the bytes before it tells a torn copy from a whole one without any promise about
the order of memory accesses, so a remote reader (RDMA) can rely on it too.

=======  =====  ==============================================================================
offset   bytes  content
=======  =====  ==============================================================================
0        8      magic ``SGLWHDR1``
8        8      sequence: odd while the owner writes; each write raises it by two
16       4      pid of the owner, in its own pid namespace
20       4      state: an index into `CODES`; 0 means that the owner has left the slot
24       8      the owner's start time in clock ticks since boot (/proc/PID/stat, field 22)
32       16     boot id (/proc/sys/kernel/random/boot_id) as 16 bytes
48       8      layout generation
56       8      content generation
64       8      physical epoch of the weights
72       8      physical epoch of the KV cache
80       8      when the state was published, in nanoseconds since 1970-01-01 UTC
88       8      when map and memory were last found equal, in nanoseconds since 1970-01-01 UTC;
                0 means never
96       16     the first 16 bytes of the SHA-256 of weight_layout_{slot}.json
112      8      instance id of the runner, as the 8 bytes of its hexadecimal text
120      4      reserved, 0
124      4      CRC-32 (as in zlib and IEEE 802.3) of bytes 0 to 123
=======  =====  ==============================================================================
"""

from __future__ import annotations

import struct
from binascii import crc32
from typing import NamedTuple, Optional

from .states import STATES

SIZE = 128  # bytes
MAGIC = b"SGLWHDR1"
SEQUENCE = 1  # index of the sequence among the header's 16 words of 8 bytes

# What the state's number means.
LEFT = "left"  # the owner has let go of the slot
CODES = (LEFT, *STATES)

_FORMAT = struct.Struct("<8sQIIQ16sQQQQQQ16s8sII")
assert _FORMAT.size == SIZE

_NANOSECONDS = 10**9


class Header(NamedTuple):
    """One consistent reading.  Times in seconds since 1970-01-01 UTC."""

    sequence: int
    pid: int
    state: str  # one of `CODES`
    process_start_ticks: int
    boot_id: str  # as /proc/sys/kernel/random/boot_id has it
    layout_generation: int
    content_generation: int
    physical_epoch: int
    kv_physical_epoch: int
    updated_at: float
    checked_at: Optional[float]  # when map and memory were last found equal; None: not yet
    layout_digest: str  # 32 hexadecimal digits: the start of the layout file's SHA-256
    instance: str  # 16 hexadecimal digits


def pack(header: Header) -> bytes:
    """The 128 bytes.

    >>> sample = Header(2, 7, "ready", 1, "0" * 32, 3, 4, 0, 0, 1.5, None, "ab" * 16, "cd" * 8)
    >>> unpack(pack(sample)) == sample._replace(boot_id="00000000-0000-0000-0000-000000000000")
    True
    """
    body = _FORMAT.pack(
        MAGIC,
        header.sequence,
        header.pid,
        CODES.index(header.state),
        header.process_start_ticks,
        bytes.fromhex(header.boot_id.replace("-", "")).ljust(16, b"\0")[:16],
        header.layout_generation,
        header.content_generation,
        header.physical_epoch,
        header.kv_physical_epoch,
        round(header.updated_at * _NANOSECONDS),
        round((header.checked_at or 0.0) * _NANOSECONDS),
        bytes.fromhex(header.layout_digest).ljust(16, b"\0")[:16],
        bytes.fromhex(header.instance).ljust(8, b"\0")[:8],
        0,
        0,
    )
    return body[:-4] + struct.pack("<I", crc32(body[:-4]))


def unpack(data: bytes) -> Optional[Header]:
    """What 128 bytes say; None where they were copied while the owner wrote.

    Raises ValueError where they are no header.
    """
    if len(data) != SIZE or not data.startswith(MAGIC):
        raise ValueError("this is not a header")
    (_, sequence, pid, code, ticks, boot, layout, content, epoch, kv_epoch, updated, checked) = (
        fields := _FORMAT.unpack(data)
    )[:12]
    digest, instance, _, checksum = fields[12:]
    if sequence % 2 or checksum != crc32(data[:-4]):
        return None
    if code >= len(CODES):
        raise ValueError(f"the header's state {code} is unknown to this release")
    text = boot.hex()
    return Header(
        sequence,
        pid,
        CODES[code],
        ticks,
        "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:])),
        layout,
        content,
        epoch,
        kv_epoch,
        updated / _NANOSECONDS,
        checked / _NANOSECONDS if checked else None,
        digest.hex(),
        instance.hex(),
    )
