"""Reads a span of `stale_owner.py` with the engine alone, when told to; says what came of it.

Argument: what the owner printed.  Exits without destructors, which crash after a lost connection.
"""

from __future__ import annotations

import base64
import ctypes
import importlib
import json
import os
import sys
import time
from typing import Any


def reading(owner: dict[str, Any]) -> Any:
    """A function that reads the first bytes of the span: 7 or why not."""
    size = 1 << 20
    buffer = ctypes.create_string_buffer(size)
    here = ctypes.addressof(buffer)
    if "session" in owner:
        engine = importlib.import_module("mooncake.engine").TransferEngine()
        assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
        engine.register_memory(here, size)

        def read() -> Any:
            buffer.raw = b"\0" * size
            status = engine.transfer_sync_read(owner["session"], here, owner["ptr"], size)
            return buffer.raw[0] if status == 0 else "refused"

        return read

    nixl = importlib.import_module(f"{owner['module']}._bindings")
    config = nixl.nixlAgentConfig()
    config.useProgThread, config.useListenThread, config.pthrDelay = True, False, 1000
    agent = nixl.nixlAgent("stale-reader", config)
    backend = agent.createBackend("UCX", {})
    agent.registerMem(nixl.nixlRegDList(nixl.DRAM_SEG, [(here, size, 0, b"")]), [backend])
    agent.loadRemoteMD(base64.b64decode(owner["metadata"]))

    def read_with_nixl() -> Any:
        buffer.raw = b"\0" * size
        try:
            request = agent.createXferReq(
                nixl.NIXL_READ,
                nixl.nixlXferDList(nixl.DRAM_SEG, [(here, size, 0)]),
                nixl.nixlXferDList(nixl.DRAM_SEG, [(owner["ptr"], size, 0)]),
                owner["agent"],
                b"",
                [backend],
            )
            status, deadline = agent.postXferReq(request, b""), time.monotonic() + 20
            while status == nixl.NIXL_IN_PROG and time.monotonic() < deadline:
                status = agent.getXferStatus(request)
                time.sleep(0.001)
        except Exception as error:
            return type(error).__name__
        return buffer.raw[0] if status == nixl.NIXL_SUCCESS else "refused"

    return read_with_nixl


def main() -> None:
    read = reading(json.loads(sys.argv[1]))
    for _ in sys.stdin:
        os.write(2, json.dumps(read()).encode() + b"\n")  # the engines log to stdout
    os._exit(0)


main()
