"""The memory of a server on a trusted network, read with NIXL.

Needs the subscriber `nixl` in the server, whose agent does the work there: this process's agent
has no thread and takes no processor time but in a read.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import ctypes
import importlib
import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, Optional

from ..layout.engines import BY_NAME
from ..layout.transport_document import NIXL
from ..reader import Document, Tensor
from . import environment
from .engine import EngineMemory, Read
from .errors import NotReadable
from .idle import Idle
from .staging import Buffer
from .transport import Transport

NAME = NIXL

_TIMEOUT = 15.0  # seconds, for a read of a few bytes
_SLOWEST = 4 << 20  # bytes a second that more take at least
_SPINS = 200  # looks at a transfer before the processor is given to others between them
_PAUSE = 0.0001

# What is read once, when NIXL and UCX are loaded.  UCX writes its errors to stdout unless told
# otherwise, and stdout is for what was asked for.
_SETTINGS = {"NIXL_LOG_LEVEL": "ERROR", "UCX_LOG_FILE": "stderr"}

# Agents, with the name of the one that they are connected to, by thread and by that one's metadata;
# and those of transfers that have not ended, with what they may write into.
_idle: Idle[tuple[Any, str]] = Idle()
_stuck: list[Any] = []


class NixlMemory(EngineMemory):
    """Reads through NIXL."""

    name = NAME

    def __init__(self, document: Document, address: Optional[str] = None) -> None:
        """Connect.  Raises NotReadable and Changed."""
        if address is not None:
            raise NotReadable(
                "NIXL's metadata has its server's address, which cannot be replaced; leave the "
                "address out"
            )
        super().__init__(document, address, _connected)

    def reaches(self, tensor: Tensor) -> bool:
        kind = "cuda" if self._transport.entry.get("memory") == "VRAM" else "cpu"
        if tensor.device.partition(":")[0] != kind:
            raise NotReadable(
                f"{tensor.name} is on device {tensor.device}, and nixl has registered the memory "
                f"of {kind}"
            )
        return super().reaches(tensor)


class _Connection:
    most_reads = 256
    writes_anywhere = False

    def __init__(self, transport: Transport, may_be_used: bool) -> None:
        entry = transport.entry
        self._slot_path = transport.path
        try:
            metadata = base64.b64decode(str(entry.get("metadata")), validate=True)
        except (ValueError, binascii.Error) as error:
            raise NotReadable(
                f"{transport.path} has no metadata of nixl's; copy it again"
            ) from error
        self._remote = str(entry.get("memory") or "DRAM"), int(entry.get("device_id") or 0)
        backend = str(entry.get("backend") or "UCX")
        self._key = (os.getpid(), threading.get_ident(), backend, metadata)
        known = _idle.take(self._key)
        self.is_used = known is not None and may_be_used
        self._registered: list[Any] = []
        self._kept: list[Buffer] = []
        if known is not None and may_be_used:
            self._agent, self._name = known
            return
        self._agent = _new_agent(backend)
        try:
            name = self._agent.add_remote_agent(metadata)
        except Exception as error:
            raise NotReadable(
                f"nixl cannot use the server's metadata ({error}): the server has exited, cannot "
                f"be reached, or has another release of nixl or UCX"
            ) from error
        self._name = name.decode() if isinstance(name, bytes) else str(name)

    def register(self, buffer: Buffer) -> None:
        try:
            self._registered.append(
                self._agent.register_memory([(buffer.address, buffer.size, 0, "")], "DRAM")
            )
        except Exception as error:
            raise NotReadable(
                f"nixl cannot register {buffer.size} bytes of this process ({error}); see ulimit -l"
            ) from error
        self._kept.append(buffer)

    def read(self, reads: Sequence[Read], is_header: bool = False) -> None:
        memory, device = ("DRAM", 0) if is_header else self._remote
        size = sum(each.size for each in reads)
        agent = self._agent
        try:
            local = agent.get_xfer_descs([(each.local, each.size, 0) for each in reads], "DRAM")
            remote = agent.get_xfer_descs([(r.remote, r.size, device) for r in reads], memory)
            handle = agent.initialize_xfer("READ", local, remote, self._name)
            self._finish(handle, _TIMEOUT + size / _SLOWEST)
        except NotReadable:
            raise
        except Exception as error:
            raise NotReadable(
                f"nixl could not read from {self._name} ({error or type(error).__name__}): the "
                f"server has exited or has withdrawn the memory; copy {self._slot_path} again if "
                f"it is a copy"
            ) from error

    def _finish(self, handle: Any, seconds: float) -> None:
        agent = self._agent
        began = time.monotonic()
        state = agent.transfer(handle)
        looks = 0
        while state == "PROC":
            looks += 1
            if looks > _SPINS:
                time.sleep(_PAUSE)
            if time.monotonic() > began + seconds:
                _stuck.append((self, handle))  # what comes late finds its memory still here
                raise NotReadable(
                    f"the server has not answered nixl within {seconds:.0f} s; it is stopped, or a "
                    f"firewall is in between"
                )
            state = agent.check_xfer_state(handle)
        agent.release_xfer_handle(handle)
        if state != "DONE":
            raise NotReadable(f"nixl could not read from {self._name}: {state}; see its log")

    def close(self, is_good: bool) -> None:
        with contextlib.suppress(Exception):  # of a server that has exited
            if any(self is each for each, _ in _stuck):
                return
            for registered in self._registered:
                self._agent.deregister_memory(registered)
            if not is_good:
                self._agent.remove_remote_agent(self._name)
                return
            _idle.put(self._key, (self._agent, self._name))


def _connected(
    transport: Transport, document: Document, address: Optional[str], may_be_used: bool
) -> _Connection:
    return _Connection(transport, may_be_used)


def _new_agent(backend: str) -> Any:
    """A new agent of this process.  Raises NotReadable."""
    name = f"sglang-weight-hook-{os.uname().nodename}-{os.getpid()}-{time.monotonic_ns()}"
    with environment.defaults(_SETTINGS):
        api = _api()
        try:
            # No thread of its own: the server's serves, this one asks.
            config = api.nixl_agent_config(False, False, 0, backends=[backend])
            return api.nixl_agent(name, config)
        except Exception as error:
            raise NotReadable(
                f"nixl cannot start here with {backend} ({error or type(error).__name__}); "
                f"NIXL_LOG_LEVEL=INFO shows why"
            ) from error


def _api() -> Any:
    """NIXL's Python interface.  Raises NotReadable."""
    _load_netlink()
    reasons = []
    for module in BY_NAME[NIXL].modules:
        try:
            known = f"{module}._api" in sys.modules
            api = importlib.import_module(f"{module}._api")
            if not known:  # it tells of each agent on stdout, which is for what was asked for
                logging.getLogger("nixl").setLevel(logging.ERROR)
            return api
        except ImportError as error:
            reasons.append(str(error))
    raise NotReadable(
        f"nixl cannot be imported ({reasons[0]}); pip install nixl-cu12, or nixl-cu13 where CUDA "
        f"is of release 13"
    )


def _load_netlink() -> None:
    """Load the system's libnl before NIXL loads another copy of it.

    The wheel of 1.5.1 has its own, whose end at the process's exit goes wrong (SIGSEGV) where the
    system's came later, with its libibverbs.
    """
    for name in ("libnl-3.so.200", "libnl-route-3.so.200"):
        with contextlib.suppress(OSError):
            ctypes.CDLL(name)
