"""A device as the hook sees it: what its driver is asked, and what is answered without one.

`Device` itself is for every kind of device that no file here knows.  It asks torch alone and says
None to the rest, so a map is right in what torch tells: addresses, sizes, shapes, strides.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Optional

from .torch_memory import DeviceMemory, told_by_torch


class Export(NamedTuple):
    """What a region says of its allocation; None: not known."""

    export: Optional[str] = None  # one of the words in layout.sharing
    rdma_capable: Optional[bool] = None


UNKNOWN = Export()


class HandedOver(NamedTuple):
    """Allocations for an answer, and the descriptors that go with it, in order."""

    allocations: list[dict[str, Any]]
    descriptors: tuple[int, ...]
    end: int  # one past the last byte asked for that they hold


class Device:
    """One kind of device.  A file for another overrides what that device's driver tells.

    Nothing here may begin to use the device, wait for it or allocate on it, except where it says
    so.  What raises costs the published document what was asked for, or the whole map.
    """

    # What a region says whose allocation is not known.
    export_otherwise = UNKNOWN
    # Why other processes cannot open its memory; None: they can (`handed_over`).
    unshared: Optional[str] = "no other process can open the memory of this kind of device"

    def __init__(self, kind: str) -> None:
        """``kind``: torch's name for it ("cuda", "xpu", ...)."""
        self.kind = kind

    # -- for the map

    def is_in_use(self) -> bool:
        """Whether the questions about allocations can be answered now."""
        return False

    def allocations_under(self, address: int, size: int) -> list[tuple[int, int]]:
        """Address and size of the driver's allocations under a storage; empty: not known."""
        return []

    def allocation_kind(self, base: int) -> Optional[str]:
        """How the allocation at ``base`` came to be: a word of `allocation_kind` in the layout."""
        return None

    def export_of(self, base: int, kind: Optional[str]) -> Export:
        """How another process could open the allocation at ``base``, of that `allocation_kind`."""
        return UNKNOWN

    def identity(self, index: int) -> tuple[Optional[str], Optional[str]]:
        """UUID and PCI bus id of the device with that ordinal."""
        return None, None

    def memory(self, index: Optional[int]) -> Optional[DeviceMemory]:
        """The memory of the device with that ordinal, or of this thread's current one."""
        return told_by_torch(self.kind, index)

    # -- for other threads than SGLang's

    def current_context(self) -> Optional[int]:
        """What another thread needs to ask the same questions, if anything (a CUDA context)."""
        return None

    def using_context(self, context: Optional[int]) -> AbstractContextManager[None]:
        """Ask with another thread's `current_context`."""
        return contextlib.nullcontext()

    # -- where weights are shared (SGLANG_WEIGHT_HOOK_SHARE) or subscribers are named

    def mark(self) -> None:
        """A call that may have written weights ends, on this thread.  Never raises, never waits."""

    def handing_out(self, context: Optional[int]) -> AbstractContextManager[None]:
        """Around all of the following, on the background thread."""
        return self.using_context(context)

    def current_uuid(self) -> Optional[str]:
        return None

    def why_not_done(self) -> Optional[str]:
        """Why memory cannot be handed out yet; None where it can.  Raises OSError."""
        return None

    def prepare_copy(self) -> None:
        """Make what `copied` takes, which may wait for the device.  Raises OSError."""

    def copied(self, runs: Sequence[tuple[int, int]]) -> bytes:
        """The bytes of runs (address, length), COPY_BYTES of them at most.  Raises OSError."""
        raise OSError(errno.EOPNOTSUPP, f"the hook copies no memory of a device {self.kind!r}")

    def handed_over(self, address: int, size: int) -> HandedOver:
        """What opens the first allocations under ``size`` bytes at ``address``.  Raises OSError."""
        raise OSError(errno.EOPNOTSUPP, self.unshared or "there is nothing to open it with")
