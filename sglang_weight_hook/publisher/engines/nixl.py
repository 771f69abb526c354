"""NIXL's agent in the server, with UCX.

Through the bindings, not through `nixl_agent`: that one sets ``pthrDelay`` to 0, with which the
progress thread polls without a pause and takes 20 to 70 % of a core (seen); with a delay it sleeps
until there is traffic, takes 0.5 % and is as fast.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import os
import uuid
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Optional

from ...layout.engines import BY_NAME, for_gpus
from ...layout.transport_document import NIXL
from .reachability import has_peer_memory, rdma_devices
from .registration import DRAM, VRAM, EngineFailed, Registration, Span

BACKEND = "UCX"
# How long the progress thread sleeps while nothing comes, in microseconds.
IDLE_MICROSECONDS = 10_000

# What UCX is told by variables, where they are not set, which it reads when it is loaded.
_LOG = {"UCX_LOG_FILE": "stderr"}  # and not stdout, which is SGLang's
# Its modules for RDMA bring the wheel's libnl-route beside the system's one, and the destructors of
# the two crash at the end of the process (seen where Debian's libibverbs1 is installed).  So they
# are left out where there is no RDMA device.
_NO_RDMA = {"UCX_MODULES": "^ib"}


class Nixl(Registration):
    """The subscriber ``nixl``."""

    def __init__(self) -> None:
        super().__init__(_Engine())


class _Engine:
    name = NIXL
    # UCX's emulation of reading over TCP touches any address in the server that it is asked for.
    survives: Mapping[str, bool] = MappingProxyType({DRAM: False, VRAM: False})
    deregistering_is_fence = False  # seen: who has old metadata goes on reading

    def __init__(self) -> None:
        self._module = ""
        self._bindings: Any = None
        self._agent: Any = None
        self._agent_name = ""
        self._backend: Any = None
        self._spans: set[Span] = set()
        self._metadata: Optional[str] = None
        # Imported while the model loads; that it fails is told when there is something to register.
        with contextlib.suppress(EngineFailed):
            self._import()

    def _import(self) -> None:
        problems = []
        _set_ucx_variables()
        for module in BY_NAME[NIXL].modules:
            try:
                self._bindings = importlib.import_module(f"{module}._bindings")
                self._module = module
                return
            except Exception as error:
                problems.append(f"{module}: {error}")
        raise EngineFailed(
            f"nixl cannot be imported (pip install {for_gpus(BY_NAME[NIXL])}): "
            + "; ".join(problems)
        )

    def open(self) -> None:
        if self._agent is not None:
            return
        if self._bindings is None:
            self._import()
        nixl = self._bindings
        try:
            config = nixl.nixlAgentConfig()
            config.useProgThread = True
            config.useListenThread = False
            config.pthrDelay = IDLE_MICROSECONDS
            config.captureTelemetry = False
            config.syncMode = nixl.NIXL_THREAD_SYNC_STRICT
            # A new name each time: what knows the old one must not reach the new one.
            self._agent_name = f"sglang-weight-hook-{os.getpid()}-{uuid.uuid4().hex[:12]}"
            agent = nixl.nixlAgent(self._agent_name, config)
            self._backend = agent.createBackend(BACKEND, {})
        except Exception as error:
            raise EngineFailed(f"nixl's agent could not be opened: {_words(error)}") from error
        self._agent, self._metadata, self._spans = agent, None, set()

    def exchange(self, old: list[Span], new: list[Span]) -> None:
        """To deregister is no fence, so for that the agent is replaced by a new one."""
        if old:
            new = sorted((self._spans - set(old)).union(new))
            self.close()
            self.open()
        nixl = self._bindings
        for device in sorted({span.device for span in new}):
            place = Span(0, 0, device)
            segment = nixl.DRAM_SEG if place.memory == DRAM else nixl.VRAM_SEG
            number = place.device_id
            rows = [(ptr, size, number, b"") for ptr, size, where in new if where == device]
            try:
                self._agent.registerMem(nixl.nixlRegDList(segment, rows), [self._backend])
            except Exception as error:
                size = sum(row[1] for row in rows)
                raise EngineFailed(
                    f"{len(rows)} spans ({size} bytes, {device}) could not be registered: "
                    f"{_words(error)}"
                ) from error
        self._spans.update(new)
        self._metadata = base64.b64encode(self._agent.getLocalMD()).decode("ascii")

    def close(self) -> None:
        # The last reference: its destructor ends connections and threads, and waits for them.
        self._agent = self._backend = self._metadata = None
        self._spans = set()

    def fields(self) -> dict[str, Any]:
        found = {"backend": BACKEND, "module": self._module}
        if self._agent is not None and self._metadata is not None:
            found.update(agent=self._agent_name, metadata=self._metadata)
        return found

    def facts(self) -> dict[str, Any]:
        return {
            "rdma": True,
            "cuda": None,
            "devices": rdma_devices(),
            "peer_memory": has_peer_memory(),
        }


def _set_ucx_variables() -> None:
    """Before UCX is loaded for the first time, and for good.

    To take them back would change the environment while SGLang's threads may read it (`getenv` is
    not safe beside `setenv`), for nothing: UCX has read them.
    """
    for name, value in (_LOG if rdma_devices() else {**_LOG, **_NO_RDMA}).items():
        os.environ.setdefault(name, value)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
