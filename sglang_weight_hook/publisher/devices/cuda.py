"""NVIDIA's GPUs: torch and the CUDA driver asked together.

The questions themselves are in `cuda_driver` and `cuda_export`, copies in `cuda_copy`, and what the
device has done of what it was asked in `cuda_order`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Optional

from . import cuda_copy, cuda_driver, cuda_export, cuda_order
from .device import Device, Export, HandedOver
from .torch_memory import DeviceMemory, told_by


class Cuda(Device):
    unshared = None

    def is_in_use(self) -> bool:
        return cuda_driver.is_initialised()

    def allocations_under(self, address: int, size: int) -> list[tuple[int, int]]:
        return cuda_driver.allocations_under(address, size)

    def allocation_kind(self, base: int) -> Optional[str]:
        return cuda_driver.allocation_kind(base)

    def export_of(self, base: int, kind: Optional[str]) -> Export:
        return cuda_export.export_of(base, kind)

    def identity(self, index: int) -> tuple[Optional[str], Optional[str]]:
        return cuda_driver.device_identity(index) if cuda_driver.is_initialised() else (None, None)

    def memory(self, index: Optional[int]) -> Optional[DeviceMemory]:
        """Asked of ``torch.cuda.memory_snapshot`` and ``cudaMemGetInfo``."""
        if not cuda_driver.is_initialised():
            return None
        import torch

        return told_by(torch.cuda, index)

    def current_context(self) -> Optional[int]:
        return cuda_driver.current_context()

    def using_context(self, context: Optional[int]) -> AbstractContextManager[None]:
        return cuda_driver.using_context(context)

    # As it is, for it is called after each of SGLang's calls.
    mark = staticmethod(cuda_order.mark)

    @contextlib.contextmanager
    def handing_out(self, context: Optional[int]) -> Iterator[None]:
        with cuda_driver.using_context(context), cuda_driver.outside_captures():
            yield

    def current_uuid(self) -> Optional[str]:
        return cuda_driver.current_device_uuid()

    def why_not_done(self) -> Optional[str]:
        return cuda_order.why_not_done()

    def prepare_copy(self) -> None:
        cuda_copy.prepare()

    def copied(self, runs: Sequence[tuple[int, int]]) -> bytes:
        return cuda_copy.copied(runs)

    def handed_over(self, address: int, size: int) -> HandedOver:
        return cuda_export.handed_over(address, size)
