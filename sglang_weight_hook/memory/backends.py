"""Which way leads to a tensor's bytes, and what to say where none does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Optional

from ..reader import Document, HookError, Tensor
from . import cuda, owner, process
from .backend import Backend
from .errors import NotReadable

# Every way by its name, in the order in which they are tried.
WAYS: dict[str, Callable[[Document], Backend]] = {
    process.NAME: process.ProcessMemory,
    cuda.NAME: cuda.CudaMemory,
    owner.NAME: owner.OwnerMemory,
}

# Which of them can reach memory of a device type.
REACH: dict[str, tuple[str, ...]] = {
    "cpu": (process.NAME, owner.NAME),
    "cuda": (cuda.NAME, owner.NAME),
}


class Backends:
    """The ways to one document's bytes, each opened when it is first needed."""

    def __init__(self, document: Document, via: Optional[str] = None) -> None:
        """``via``: insist on one of `WAYS`.  Raises HookError where there is no such way."""
        if via is not None and via not in WAYS:
            raise HookError(
                f"there is no way {via!r} to a server's memory; give one of {', '.join(WAYS)}"
            )
        self._document = document
        self._via = via
        self._open: dict[str, Backend] = {}
        self._refused: dict[str, str] = {}  # why not, by name

    def reaching(self, tensor: Tensor) -> Backend:
        """The first way that reaches ``tensor``.  Raises NotReadable with every way's reason."""
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
