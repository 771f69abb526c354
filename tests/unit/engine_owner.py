"""A process that publishes weights (`bytes_owner`) and has a real transfer engine register them.

The engine is Mooncake or NIXL itself; what the owner says of it is written here and not by the
hook's subscribers, so that a reader's tests hold whatever those do.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bytes_owner
import pytest
from bytes_owner import BytesOwner

MODULES = {"mooncake": "mooncake", "nixl": "nixl_cu12"}

# Before the owner's own code.  All that an engine is told happens when the state becomes ready.
ENGINE = '''
import base64, ctypes, json, mmap, os, sys, time
from sglang_weight_hook.layout import header as header_format
from sglang_weight_hook.publisher import header as publisher_header

ENGINE, HOST = os.environ["TEST_ENGINE"], os.environ.get("TEST_HOST", "127.0.0.1")
DIRECTORY = os.environ["SGLANG_WEIGHT_HOOK_DIR"]
page = mmap.mmap(-1, 4096)
PAGE = ctypes.addressof(ctypes.c_char.from_buffer(page))
CALLS = []

if ENGINE == "mooncake":
    from mooncake.engine import TransferEngine
    engine = TransferEngine()
    assert engine.initialize(HOST, "P2PHANDSHAKE", "tcp", "") == 0
    def register(ptr, size):
        CALLS.append("register")
        assert engine.register_memory(ptr, size) == 0
    def unregister(ptr, size):
        CALLS.append("unregister")
        assert engine.unregister_memory(ptr) == 0
    def described():
        return {"session": f"{HOST}:{engine.get_rpc_port()}", "protocol": "tcp"}
else:
    for name in ("libnl-3.so.200", "libnl-route-3.so.200"):
        try: ctypes.CDLL(name)
        except OSError: pass
    from nixl_cu12._api import nixl_agent, nixl_agent_config
    import logging
    logging.getLogger("nixl").setLevel(logging.ERROR)
    agent = nixl_agent(f"owner-{os.getpid()}", nixl_agent_config(True, False, 0, backends=["UCX"]))
    handles = {}
    def register(ptr, size):
        CALLS.append("register")
        handles[ptr] = agent.register_memory([(ptr, size, 0, "")], "DRAM")
    def unregister(ptr, size):
        CALLS.append("unregister")
        agent.deregister_memory(handles.pop(ptr))
    def described():
        return {"agent": agent.name, "metadata": base64.b64encode(agent.get_agent_metadata())
                .decode(), "backend": "UCX", "module": "nixl_cu12", "memory": "DRAM",
                "device_id": 0}

register(PAGE, 4096)
CALLS.clear()
registered = {}

def publish(header):
    with open(os.path.join(DIRECTORY, "weight_layout_0.json")) as file:
        layout = json.load(file)
    wanted = {region["ptr"]: region["size"] for region in layout["regions"]}
    for ptr, size in list(registered.items()):
        if wanted.get(ptr) != size:
            unregister(ptr, registered.pop(ptr))
    for ptr, size in wanted.items():
        if ptr not in registered:
            register(ptr, size)
            registered[ptr] = size
    identity = layout["identity"]
    document = {
        "schema": "sglang-weight-transport", "schema_version": 1, "slot": "0",
        "instance": header.instance, "updated_at": time.time(),
        **{name: identity[name]
           for name in ("pid", "process_start_ticks", "boot_id", "hostname", "pid_namespace")},
        "engines": {ENGINE: {
            "state": "registered", "problem": None, "warnings": [],
            "layout_generation": header.layout_generation,
            "content_generation": header.content_generation,
            "physical_epoch": header.physical_epoch,
            "regions": len(registered), "bytes": sum(registered.values()),
            "header": {"ptr": PAGE, "size": 128}, **described()}}}
    path = os.path.join(DIRECTORY, "weight_transport_0.json")
    with open(os.open(path + ".tmp", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(document, file)
    os.rename(path + ".tmp", path)

class Mirrored(publisher_header.HeaderFile):
    """Written to the page as to the file; and what is registered comes before it is ready."""
    def __init__(self, path, first):
        super().__init__(path, first)
        self._mirror()
    def write(self, header):
        if header.state == "ready" and self.last.state != "ready":
            publish(header)
        super().write(header)
        self._mirror()
    def _mirror(self):
        data = header_format.pack(self.last)
        page[8:16] = (self.last.sequence - 1).to_bytes(8, "little")
        page[0:8], page[16:128] = data[:8], data[16:]
        page[8:16] = data[8:16]

publisher_header.HeaderFile = Mirrored
from sglang_weight_hook.publisher import publication
for module in list(sys.modules.values()):
    if getattr(module, "__name__", "").startswith("sglang_weight_hook.publisher"):
        for name, value in list(vars(module).items()):
            if value is Mirrored.__mro__[1]:
                setattr(module, name, Mirrored)
'''


def needs(engine: str) -> None:
    """Skip where ``engine`` is not installed."""
    if importlib.util.find_spec(MODULES[engine]) is None:
        pytest.skip(f"{engine} is not installed: pip install sglang-weight-hook[{engine}]")
    if engine == "mooncake":
        pytest.importorskip("mooncake.engine", exc_type=ImportError)


def started(
    start_python: Callable[..., Any], directory: Path, engine: str, kind: str, **environment: str
) -> BytesOwner:
    settings = {
        "SGLANG_WEIGHT_HOOK_DIR": str(directory),
        "SGLANG_WEIGHT_HOOK_CHECK_SECONDS": "10000",
        "TEST_ENGINE": engine,
        "MC_LOG_LEVEL": "ERROR",
        **environment,
    }
    code = ENGINE + bytes_owner.OWNER
    return BytesOwner(start_python(code, kind, **settings), directory)
