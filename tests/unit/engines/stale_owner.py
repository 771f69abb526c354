"""An owner with a real engine and one span that it unmaps: `test_stale_readers.py` reads it then.

Argument: mooncake or nixl.  Prints how it is reached, then answers each line on stdin.
"""

from __future__ import annotations

import ctypes
import json
import sys

from sglang_weight_hook.publisher.engines import mooncake, nixl
from sglang_weight_hook.publisher.engines.registration import Span

SIZE = 4 << 20

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def main() -> None:
    engine = {"mooncake": mooncake._Engine, "nixl": nixl._Engine}[sys.argv[1]]()
    place = libc.mmap(None, SIZE, 3, 0x22, -1, 0)  # private, anonymous
    ctypes.memset(place, 7, SIZE)
    span = Span(place, SIZE)
    engine.open()
    engine.exchange([], [span])
    print(json.dumps({**engine.fields(), "ptr": place, "size": SIZE}), flush=True)
    for line in sys.stdin:
        if line == "deregister\n" and sys.argv[1] == "nixl":
            rows = [(place, SIZE, 0, b"")]
            descriptors = engine._bindings.nixlRegDList(engine._bindings.DRAM_SEG, rows)
            engine._agent.deregisterMem(descriptors, [engine._backend])
        elif line == "deregister\n":
            engine.exchange([span], [])
        elif line == "close\n":
            engine.close()
        elif line == "unmap\n":
            assert libc.munmap(place, SIZE) == 0
        print("done", flush=True)


main()
