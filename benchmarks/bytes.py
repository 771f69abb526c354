"""Reading the bytes of another process, beside the bare system call; saving them; opening."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from sglang_weight_hook.reader import Document, open_slot

from . import table
from .measure import ratios, side_by_side
from .scrubbing import OWNER, _process
from .table import Line, Section

ROOT = Path(__file__).resolve().parents[1]
SHARE = 0.8  # of the bare call's speed
OPENING = 2e-3  # seconds

# What `save` needs above what its interpreter takes with everything imported, in bytes.
SAVING = """
import os, sys
import numpy, safetensors, ml_dtypes, sglang_weight_hook as hook
from sglang_weight_hook.memory.save import save
def peak():
    open("/proc/self/clear_refs", "w").write("5")
    return lambda: int(next(line.split()[1] for line in open("/proc/self/status")
                            if line.startswith("VmHWM"))) * 1024
document = hook.open_slot(sys.argv[1], "0").read()
read = peak()
before = read()
save(hook.open_slot(sys.argv[1], "0"), sys.argv[2])
print(read() - before)
"""


def measure(quick: bool) -> Section:
    mebibytes = 64 if quick else 304
    with ExitStack() as stack:
        place = stack.enter_context(tempfile.TemporaryDirectory(prefix="bytes-"))
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "SGLANG_WEIGHT_HOOK_DIR": place,
            "SGLANG_WEIGHT_HOOK_CHECK_SECONDS": "0",
        }
        owner = stack.enter_context(
            _process([sys.executable, "-c", OWNER, str(mebibytes)], environment)
        )
        assert owner.stdout is not None
        assert owner.stdout.readline() == "ready\n"
        try:
            document = open_slot(place, "0").read()
            lines = _reading(document, 3 if quick else 15)
            lines.append(_opening(document, 5 if quick else 25))
            lines.append(_saving(place, mebibytes, environment))
        finally:
            owner.terminate()
    return Section("Bytes of a CPU server", lines, HOW, LIMITS)


def _reading(document: Document, rounds: int) -> list[Line]:
    """All weights into one warm buffer, by the library and by the call alone."""
    tensors = [tensor for tensor in document.iter_tensors() if tensor.size]
    buffer = bytearray(max(tensor.size for tensor in tensors))
    view = memoryview(buffer)
    call = ctypes.CDLL(None, use_errno=True).process_vm_readv
    call.restype = ctypes.c_ssize_t
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    pid = int(document.identity["pid"])
    total = sum(tensor.size for tensor in tensors)

    def bare() -> None:
        for tensor in tensors:
            local = (ctypes.c_size_t * 2)(address, tensor.size)
            remote = (ctypes.c_size_t * 2)(tensor.ptr, tensor.size)
            got = call(pid, local, ctypes.c_ulong(1), remote, ctypes.c_ulong(1), ctypes.c_ulong(0))
            assert got == tensor.size

    with document.open_memory(via="process") as memory:

        def library() -> None:
            for tensor in tensors:
                memory.read_into(tensor.name, view)

        def pieces() -> None:
            for tensor in tensors:
                for _ in memory.pieces(tensor.name):
                    pass

        found = side_by_side({"library": library, "bare": bare, "pieces": pieces}, rounds)
    lines = []
    for name, what in (("library", "`read_into`"), ("pieces", "`pieces`")):
        share = ratios(found["bare"], found[name])
        lines.append(
            Line(
                f"{what} of {len(tensors)} tensors, {table.size(total)}",
                f"{total / found[name].median / 1e9:.2f} GB/s",
                f"process_vm_readv alone {total / found['bare'].median / 1e9:.2f} GB/s",
                table.times(share),
                f"≥ {SHARE} x" if name == "library" else "",
                share.median >= SHARE if name == "library" else None,
            )
        )
    return lines


def _opening(document: Document, rounds: int) -> Line:
    def opening() -> None:
        with document.open_memory(via="process") as memory:
            memory.via(next(iter(document.tensors)))

    found = side_by_side({"open": opening}, rounds)["open"]
    return Line(
        "open the memory, and close it",
        table.timing(found),
        "",
        table.seconds(found.median),
        f"≤ {table.seconds(OPENING)}",
        found.median <= OPENING,
    )


def _saving(place: str, mebibytes: int, environment: dict[str, str]) -> Line:
    with tempfile.TemporaryDirectory(prefix="bytes-") as folder:
        done = subprocess.run(
            [sys.executable, "-c", SAVING, place, os.path.join(folder, "model.safetensors")],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
    grown = int(done.stdout)
    return Line(
        f"memory that `save` takes for {mebibytes} MiB",
        table.size(grown),
        "",
        table.size(grown),
        f"≤ {table.size(64 << 20)}",
        grown <= 64 << 20,
    )


HOW = """\
A process that publishes linear layers of 4 MiB each, read from another one: every tensor into the
same warm buffer, by the library (which looks at the slot's header before and after each) and by
process_vm_readv alone, interleaved, in CPU time of the reader. The memory of `save` is the largest
resident size above that before it began (VmHWM)."""
LIMITS = """\
The kernel copies page by page; a reader's own pages that are touched for the first time cost as
much again, so a buffer that is kept is twice as fast as a new one each time."""
