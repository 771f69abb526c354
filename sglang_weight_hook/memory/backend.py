"""What a way to reach the owner's memory has to offer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Optional, Protocol

from ..reader import Tensor

# (address in the owner's address space, bytes)
Run = tuple[int, int]


class Span(NamedTuple):
    """A stretch of the owner's memory, and where it goes."""

    address: int
    size: int
    offset: int  # in the buffer that it is read into


class Backend(Protocol):
    """One way to reach the memory of one owner.  Copies only; it writes nothing there."""

    name: str

    def reaches(self, tensor: Tensor) -> bool:
        """Whether this way leads to the memory of ``tensor``, as far as can be told beforehand.

        Raises `NotReadable` where there is a reason why not: the next way is tried.
        """

    def view(self, tensor: Tensor) -> Optional[Any]:
        """An object with ``__dlpack__`` over the tensor's own memory; None where there is none."""

    def fetch(self, runs: Sequence[Run], target: memoryview) -> None:
        """Fill ``target`` with the runs, one after the other.

        Raises `NotReadable` where the owner's memory cannot be reached, `Changed` where there is
        nothing at these addresses any more.
        """

    def fetch_at(self, spans: Sequence[Span], target: memoryview) -> None:
        """Read each stretch to its place in ``target``.  Raises as `fetch` does."""

    def buffer(self, size: int) -> memoryview:
        """Memory for ``fetch`` to fill: that in which it takes the least time."""

    def close(self) -> None:
        """Let go of everything; called once."""


def fetch_one_by_one(backend: Backend, spans: Sequence[Span], target: memoryview) -> None:
    """`Backend.fetch_at` of a backend to which it makes no difference."""
    for address, size, offset in spans:
        backend.fetch([(address, size)], target[offset : offset + size])
