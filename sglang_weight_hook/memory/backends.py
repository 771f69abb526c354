"""Which way leads to a tensor's bytes, and what to say where none does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Optional

from ..reader import Document, HookError, Tensor
from . import cuda, mooncake, nixl, owner, process
from .backend import Backend
from .bracket import HeaderSource
from .engine import EngineMemory
from .errors import Changed, NotReadable
from .transport import ENGINES, content_generation_of, is_transferred

# Every way on the owner's own machine by its name, in the order in which they are tried.
WAYS: dict[str, Callable[[Document], Backend]] = {
    process.NAME: process.ProcessMemory,
    cuda.NAME: cuda.CudaMemory,
    owner.NAME: owner.OwnerMemory,
}

# And from another one, through what runs in the owner.
TRANSFERS: dict[str, Callable[[Document, Optional[str]], EngineMemory]] = {
    mooncake.NAME: mooncake.MooncakeMemory,
    nixl.NAME: nixl.NixlMemory,
}
assert tuple(TRANSFERS) == ENGINES

# Which of them can reach memory of a device type.
REACH: dict[str, tuple[str, ...]] = {
    "cpu": (process.NAME, owner.NAME),
    "cuda": (cuda.NAME, owner.NAME),
}


def readable(document: Document, via: Optional[str]) -> Document:
    """The document, as it is read by ``via``.  Raises NotReadable where there is no memory.

    What a saved map knows of contents is as old as its addresses, for updates in place write no
    new map; what lies beside it of the transfer engine may be newer.
    """
    if document.is_live:
        return document
    if via not in TRANSFERS:
        raise NotReadable(
            f"a saved copy of a map has no memory behind it on this machine; give the slot itself, "
            f"or read it from afar with via={' or '.join(TRANSFERS)} and a copy of its "
            f"weight_transport_….json beside it"
        )
    state = {**document.state, "content_generation": content_generation_of(document, via)}
    return Document(document.slot, document.raw, state, is_live=False)


class Backends:
    """The ways to one document's bytes, each opened when it is first needed."""

    def __init__(
        self, document: Document, via: Optional[str] = None, address: Optional[str] = None
    ) -> None:
        """``via``: insist on one of `WAYS` or `TRANSFERS`.

        Opens a transfer engine at once.  Raises HookError where there is no such way.
        """
        if via is not None and via not in WAYS and via not in TRANSFERS:
            raise HookError(
                f"there is no way {via!r} to a server's memory; give one of "
                f"{', '.join((*WAYS, *TRANSFERS))}"
            )
        if address is not None and via != mooncake.NAME:
            raise HookError(
                f"an address is one of mooncake's; give via={mooncake.NAME} with it, or leave it "
                f"out"
            )
        self._document = document
        self._via = via
        self._open: dict[str, Backend] = {}
        self._refused: dict[str, str] = {}  # why not, by name
        self._transfer: Optional[EngineMemory] = None
        if is_transferred(document, via):
            self._transfer = self._transferring(via, address)
            self._open[self._transfer.name] = self._transfer

    def header(self) -> Optional[HeaderSource]:
        """What the slot's header is looked at through; None: its file."""
        return None if self._transfer is None else self._transfer.header

    def _transferring(self, via: Optional[str], address: Optional[str]) -> EngineMemory:
        """The first engine that reaches the owner.  Raises NotReadable with every one's reason."""
        reasons = []
        for name in [via] if via is not None else TRANSFERS:
            try:
                return TRANSFERS[name](self._document, address)
            except Changed:
                raise
            except NotReadable as error:
                reasons.append(str(error))
        raise NotReadable("; ".join(dict.fromkeys(reasons)))

    def reaching(self, tensor: Tensor) -> Backend:
        """The first way that reaches ``tensor``.  Raises NotReadable with every way's reason."""
        if self._transfer is not None:
            if not tensor.resident:
                raise NotReadable(
                    f"{tensor.name} is on device {tensor.device}, whose memory cannot be read"
                )
            self._transfer.reaches(tensor)
            return self._transfer
        kind = tensor.device.partition(":")[0]
        ways = REACH.get(kind, ())
        if self._via is not None:
            ways = tuple(way for way in ways if way == self._via)
        if not ways:
            by = f" by {self._via}" if self._via else ""
            raise NotReadable(
                f"{tensor.name} is on device {tensor.device}, whose memory cannot be read{by}"
            )
        reasons = []
        for way in ways:
            backend = self._opened(way)
            if backend is None:
                reasons.append(self._refused[way])
                continue
            try:
                if backend.reaches(tensor):
                    return backend
            except NotReadable as error:
                reasons.append(str(error))
        raise NotReadable(
            "; ".join(reasons) or f"{tensor.name} cannot be reached by {' or '.join(ways)}"
        )

    def _opened(self, way: str) -> Optional[Backend]:
        if way in self._refused:
            return None
        if way not in self._open:
            try:
                self._open[way] = WAYS[way](self._document)
            except NotReadable as error:
                self._refused[way] = str(error)
                return None
        return self._open[way]

    def close(self) -> None:
        backends, self._open = list(self._open.values()), {}
        with contextlib.ExitStack() as stack:  # each of them, whatever another raises
            for backend in backends:
                stack.callback(backend.close)
