"""The header: polling it, reading it whole, and the owner's rewriting of it."""

from __future__ import annotations

import mmap
import os
import tempfile

from sglang_weight_hook.layout import files
from sglang_weight_hook.layout.header import Header
from sglang_weight_hook.publisher.header import HeaderFile
from sglang_weight_hook.reader import HeaderReader, open_slot

from . import table
from .measure import Sample, side_by_side
from .table import Line, Section

#: One look at the sequence, CPU seconds.
POLL = 2e-6
EACH = 10_000

_CONTENT = Header(2, 1, "ready", 1, "00" * 16, 1, 1, 0, 0, 1.0, 1.0, "00" * 16, "00" * 8)


def measure(quick: bool) -> Section:
    rounds = 5 if quick else 25
    with tempfile.TemporaryDirectory(prefix="benchmark-") as place:
        path = os.path.join(place, files.HEADER.format("0"))
        written = HeaderFile(path, _CONTENT)
        slot = open_slot(place, "0")
        with HeaderReader(path) as reader, open(path, "rb") as file:
            descriptor = file.fileno()
            with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as mapping:
                words = memoryview(mapping).cast("Q")
                try:
                    found = side_by_side(
                        {
                            "poll": lambda: reader.sequence,
                            "pread": lambda: os.pread(descriptor, 8, 8),
                            "mapped": lambda: words[1],
                            "read": reader.read,
                            "header": slot.header,
                            "current": reader.is_current,
                            "write": lambda: written.write(_CONTENT),
                        },
                        rounds,
                        each=EACH // 10 if quick else EACH,
                    )
                finally:
                    words.release()
        written.abandon()
    poll = found["poll"]
    lines = [
        Line(
            "poll the sequence",
            table.timing(poll),
            f"pread of 8 bytes {table.seconds(found['pread'].median)}; "
            f"a mapped load {table.seconds(found['mapped'].median)}",
            table.seconds(poll.median),
            f"≤ {table.seconds(POLL)}",
            poll.median <= POLL,
        ),
        _plain("read it whole, opened before", found["read"]),
        _plain("`slot.header()`: open, read, close", found["header"]),
        _plain("whether the file was replaced", found["current"]),
        _plain("the owner's rewriting of it", found["write"]),
    ]
    return Section("The header", lines, HOW, LIMITS)


def _plain(what: str, sample: Sample) -> Line:
    return Line(what, table.timing(sample), "", table.seconds(sample.median))


HOW = """\
One header in a temporary directory, opened once; each figure is of one call from Python, and has
in it the call of a function that does nothing else."""
LIMITS = """\
A poll is one system call. A load from a mapping would take a tenth of the time, and end the reader
with SIGBUS when somebody truncates the file; from C, where that matters less than the microsecond,
`examples/print_regions.c` maps it. Reading it whole adds the CRC-32 and the making of an object."""
