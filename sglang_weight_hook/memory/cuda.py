"""The memory of a GPU server on this machine, opened by this process through the CUDA driver.

The server (SGLANG_WEIGHT_HOOK_SHARE=1) hands over what an allocation is opened with when a tensor
in it is first asked for; from then on it notices nothing.  What cannot be opened, as memory of the
memory saver, is left to the way ``owner``.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Optional

from ..layout.sharing import FABRIC, NO_EXPORT
from ..reader import Document, Tensor
from . import dlpack
from .backend import Run, Span, fetch_one_by_one
from .cuda_calls import CudaError, Device, Driver
from .cuda_mapping import Mappings, Range
from .cuda_share import Owner, allocations_under, is_current
from .cuda_transfer import Rows, Transfer, rows_of
from .errors import Changed, NotReadable

NAME = "cuda"

# What regions say of memory that no process is handed anything to open with.
_NOT_OPENED = frozenset({FABRIC, NO_EXPORT})


class CudaMemory:
    """Opens what the owner of ``document`` shares.

    A context of CUDA's own is made on the GPU when the first memory is opened, unless torch has
    made it in this process already; it takes some hundred megabytes there until this is closed.
    To find out whether there is anything to be opened takes none.
    """

    name = NAME

    def __init__(self, document: Document) -> None:
        """Find the GPU and ask the server whether it shares; nothing is opened on the device.

        Raises NotReadable, Changed, and ControlError where the server could not be asked.
        """
        self._document = document
        self._views = dlpack.Views()
        self._driver: Optional[Driver] = None
        self._device: Optional[Device] = None
        self._mappings: Optional[Mappings] = None
        self._transfer: Optional[Transfer] = None
        self._owner: Optional[Owner] = None
        self._tensor: Optional[Tensor] = None  # that was asked for last
        self._by_tensor: Optional[dict[str, set[Optional[str]]]] = None
        self._proven: set[Optional[str]] = set()  # kinds of export that can be opened
        self._refused: dict[Optional[str], str] = {}  # and those that cannot, with the reason
        try:
            self._start(document)
        except BaseException:
            self.close()
            raise

    def _start(self, document: Document) -> None:
        gpu_uuid = document.identity.get("gpu_uuid")
        if not isinstance(gpu_uuid, str):
            raise NotReadable(
                f"the document of slot {document.slot.name} does not say which GPU the weights are "
                f"on; have the server copy them with open_memory(via='owner')"
            )
        exports = {region.export for region in document.iter_regions()}
        if exports and exports <= _NOT_OPENED:
            raise NotReadable(
                f"no memory of slot {document.slot.name} can be opened by another process; have "
                f"the server copy it with open_memory(via='owner')"
            )
        self._owner = Owner(document)
        if self._owner.is_this_process:
            raise NotReadable(
                "a process cannot open its own GPU memory a second time, and this one is the "
                "server itself; read in another process"
            )
        with contextlib.closing(allocations_under(document, 0, 0)) as groups:
            next(groups)  # which says that the server shares
        try:
            self._driver = Driver()
            self._device = Device(self._driver, gpu_uuid)
        except CudaError as error:
            raise NotReadable(str(error)) from error
        self._mappings = Mappings(self._driver, self._device)
        self._transfer = Transfer(self._driver)

    # -- whether

    def reaches(self, tensor: Tensor) -> bool:
        if not tensor.resident:
            return False
        self._tensor = tensor
        if not tensor.span:
            return True
        exports = self._exports_of(tensor)
        if exports & _NOT_OPENED:
            raise NotReadable(
                f"the memory of {tensor.name} cannot be opened by another process; have the server "
                f"copy it with open_memory(via='owner')"
            )
        # Whether the driver goes along turns out with the first of each kind, and what an older
        # release's document does not say with every tensor.
        for export in exports - self._proven:
            if export not in self._refused:
                self._try(tensor, export)
            if export in self._refused:
                raise NotReadable(self._refused[export])
        return True

    def _try(self, tensor: Tensor, export: Optional[str]) -> None:
        """Open a tensor, to learn whether others like it can be opened.  Raises NotReadable."""
        try:
            with self._working():
                self._open(tensor.ptr, tensor.end)
        except NotReadable as error:
            if export is None:
                raise
            self._refused[export] = str(error)
            return
        if export is not None:
            self._proven.add(export)

    def _exports_of(self, tensor: Tensor) -> set[Optional[str]]:
        """What the regions under a tensor say; None among it where one does not."""
        if self._by_tensor is None:
            found: dict[str, set[Optional[str]]] = {}
            for region in self._document.iter_regions():
                for name in region.tensors:
                    found.setdefault(name, set()).add(region.export)
            self._by_tensor = found
        return self._by_tensor.get(tensor.name, {None})

    # -- bytes

    def view(self, tensor: Tensor) -> Optional[Any]:
        assert self._device is not None
        if not dlpack.can_view(tensor) or not _torch_sees(self._device.ordinal):
            return None
        device = (dlpack.CUDA, self._device.ordinal)
        if not tensor.span:
            return dlpack.View(tensor, 0, device, self._views)
        with self._working():
            found = self._open(tensor.ptr, tensor.end)
        if found is None:
            return None  # it lies in several allocations that are not side by side here
        return dlpack.View(tensor, found.address_of(tensor.ptr), device, self._views)

    def fetch_at(self, spans: Sequence[Span], target: memoryview) -> None:
        fetch_one_by_one(self, spans, target)

    def buffer(self, size: int) -> memoryview:
        return memoryview(bytearray(size))

    def fetch(self, runs: Sequence[Run], target: memoryview) -> None:
        assert self._transfer is not None
        assert self._owner is not None
        if not any(length for _, length in runs):
            self._owner.require()  # nothing is opened for an empty tensor
            return
        with self._working():
            self._transfer.copy(list(self._rows(runs)), target)

    def _rows(self, runs: Sequence[Run]) -> Iterator[Rows]:
        """The runs where they are in this process's context."""
        for rows in rows_of(runs):
            found = self._open(rows.address, rows.address + rows.reach)
            if found is not None:
                yield rows._replace(address=found.address_of(rows.address))
                continue
            for number in range(rows.height):
                yield from self._parts(rows.address + number * rows.pitch, rows.width)

    def _parts(self, address: int, size: int) -> Iterator[Rows]:
        """A run over several allocations that are not side by side here."""
        assert self._mappings is not None
        end = address + size
        while address < end:
            found = self._mappings.holding(address)
            if found is None:
                raise self._nothing_at(address)
            length = min(end, found.end) - address
            yield Rows(found.address_of(address), length, 1, length)
            address += length

    def _open(self, start: int, end: int) -> Optional[Range]:
        """The range that holds ``start`` to ``end``, opened if it is not.

        The whole tensor at a time, if they are a part of the one that was asked for.  None: they
        are open, in several ranges.
        """
        assert self._mappings is not None
        found = self._mappings.at(start, end)
        if found is not None:
            return found
        if not self._is_open(start, end):
            first, last = start, end
            tensor = self._tensor
            if tensor is not None and tensor.ptr <= start and end <= tensor.end:
                first, last = tensor.ptr, tensor.end
            with contextlib.closing(allocations_under(self._document, first, last)) as groups:
                self._mappings.open(groups)
        return self._mappings.at(start, end)

    def _is_open(self, start: int, end: int) -> bool:
        """Whether ranges that follow each other hold all of it."""
        assert self._mappings is not None
        while start < end:
            found = self._mappings.holding(start)
            if found is None:
                return False
            start = found.end
        return True

    # -- around the driver

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        """The GPU's context is current inside.  What fails comes out as NotReadable or Changed."""
        assert self._device is not None
        assert self._owner is not None
        try:
            with self._device.current():
                yield
        except CudaError as error:
            self._owner.require()
            if not is_current(self._document):
                raise self._nothing_at(None) from error
            raise NotReadable(str(error)) from error
        self._owner.require()

    def _nothing_at(self, address: Optional[int]) -> Changed:
        where = "its memory" if address is None else f"the memory at {address:#x}"
        return Changed(
            f"slot {self._document.slot.name} is not as the document says, so {where} cannot be "
            f"read; read the document again"
        )

    def close(self) -> None:
        """Unmap and close everything.  Views must not be used any more."""
        owner, self._owner = self._owner, None
        if owner is not None:
            owner.close()
        device, self._device = self._device, None
        if device is None or self._driver is None:
            return
        if not device.has_context:
            return  # so nothing was opened
        try:
            with device.current():
                if self._views.made:
                    # What torch was told to do with them is done before the memory goes.
                    self._driver.status("cuCtxSynchronize")
                for part in (self._transfer, self._mappings):
                    if part is not None:
                        part.close()
        except CudaError:
            pass  # the context is lost, and everything in it with it
        finally:
            device.close()
        if self._views.alive:  # last, for it may be made an exception
            warnings.warn(
                f"{self._views.alive} tensors are still in use that are views of the server's GPU "
                f"memory, and must not be touched any more: it is closed; clone what is to be kept",
                ResourceWarning,
                stacklevel=4,
            )


def _torch_sees(ordinal: int) -> bool:
    """Whether torch, in this process, has the GPU of that number."""
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available() and torch.cuda.device_count() > ordinal)
