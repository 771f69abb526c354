"""Mooncake's transfer engine in the server: anybody who reaches its port reads, and can write.

It listens on all interfaces and knows no authentication: for trusted networks only
(docs/security.md).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib import metadata
from types import MappingProxyType
from typing import Any, Optional

from ...layout.engines import BY_NAME, for_gpus
from ...layout.transport_document import MOONCAKE
from .. import settings
from .reachability import has_peer_memory, rdma_devices
from .registration import DRAM, HOST, VRAM, EngineFailed, Registration, Span

# What its functions answer (mooncake-transfer-engine/include/error.h).
_ANSWERS = {
    -1: "invalid argument",
    -6: "the address is registered already",
    -101: "the metadata cannot be written",
    -200: "a call of the system failed; for RDMA, see ulimit -l and the kernel's log",
    -201: "no memory, or no more of it may be locked (ulimit -l)",
}


class Mooncake(Registration):
    """The subscriber ``mooncake``."""

    def __init__(self) -> None:
        super().__init__(_Engine())


class _Engine:
    name = MOONCAKE
    # Over TCP it answers a reader with an error where memory of the host is no more.  How it is
    # with memory of a GPU was not seen.
    survives: Mapping[str, bool] = MappingProxyType({DRAM: True, VRAM: False})
    deregistering_is_fence = True  # seen: it refuses what is in no registered span

    def __init__(self) -> None:
        configured = settings.load()
        self._host = configured.transfer_host
        self._protocol = configured.mooncake_protocol
        self._device = configured.mooncake_device
        self._engine: Any = None
        self._problem: Optional[str] = None
        try:
            self.open()  # while the model loads
        except EngineFailed:
            pass  # tried again, and told, when there is something to register

    def open(self) -> None:
        if self._engine is not None:
            return
        (module,) = BY_NAME[MOONCAKE].modules
        try:
            engine = importlib.import_module(module).TransferEngine()
        except Exception as error:
            raise EngineFailed(_why_not_imported(error)) from error
        status = engine.initialize(self._host, "P2PHANDSHAKE", self._protocol, self._device)
        if status != 0:
            raise EngineFailed(
                f"mooncake could not be opened ({_meaning(status)}) with host {self._host!r}, "
                f"protocol {self._protocol!r}, devices {self._device or 'any'!r}"
            )
        self._engine = engine

    def exchange(self, old: list[Span], new: list[Span]) -> None:
        if old:
            status = self._engine.batch_unregister_memory([span.ptr for span in old])
            if status != 0:
                raise EngineFailed(
                    f"{len(old)} spans could not be deregistered: {_meaning(status)}"
                )
        for device in sorted({span.device for span in new}):
            here = [span for span in new if span.device == device]
            sizes = [span.size for span in here]
            location = "*" if device == HOST else f"cuda:{here[0].device_id}"
            pointers = [span.ptr for span in here]
            status = self._engine.batch_register_memory(pointers, sizes, location)
            if status != 0:
                raise EngineFailed(
                    f"{len(here)} spans ({sum(sizes)} bytes, {device}) could not be registered: "
                    f"{_meaning(status)}"
                )

    def close(self) -> None:
        self._engine = None

    def fields(self) -> dict[str, Any]:
        if self._engine is None:
            return {"protocol": self._protocol}
        session = f"{self._host}:{self._engine.get_rpc_port()}"
        return {"session": session, "protocol": self._protocol}

    def facts(self) -> dict[str, Any]:
        return {
            "rdma": self._protocol == "rdma",
            "cuda": _knows_cuda(),
            "devices": rdma_devices(),
            "peer_memory": has_peer_memory(),
        }


def _meaning(status: int) -> str:
    return f"{status}, {_ANSWERS[status]}" if status in _ANSWERS else f"error {status}"


def _knows_cuda() -> Optional[bool]:
    """Whether the installed build reaches memory of a GPU; None: not known."""
    engine = BY_NAME[MOONCAKE]
    known = {engine.package: False, **dict.fromkeys(engine.packages_for_gpus, True)}
    for package, knows in known.items():
        try:
            metadata.distribution(package)
        except metadata.PackageNotFoundError:
            continue
        return knows
    return None


def _why_not_imported(error: Exception) -> str:
    engine = BY_NAME[MOONCAKE]
    for library, package in engine.libraries:
        if library in str(error):
            return f"mooncake cannot be imported, {library} is missing (Debian: {package})"
    if isinstance(error, ModuleNotFoundError):
        return (
            f"mooncake is not installed: pip install {engine.package}, or "
            f"{for_gpus(engine)} on a machine with a GPU"
        )
    return f"mooncake cannot be imported: {error}"
