"""All weights of a slot at once, in memory of this process: read again where an update came
between.

What is fetched are the stretches of memory under the tensors, each once, into one buffer that an
engine registers once.  Tensors are views of it, with their own strides; tied ones share memory.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Optional, Union

from ..layout.states import READY
from ..reader import Document, HookError, NotReady, Slot, Tensor
from . import boxes
from .backend import Span
from .errors import Changed, NotReadable
from .needed import need_numpy

if TYPE_CHECKING:
    import numpy
    import torch

ATTEMPTS = 5
_PAUSE, _LONGEST_PAUSE = 0.02, 1.0  # seconds, between two attempts
_ALIGNED = 64  # what lies at such an address there lies at such a one here
_NEAR = 4096  # bytes between two stretches of one region that are read along with them


class Pulled:
    """The weights of one generation; made by `pull`."""

    def __init__(
        self, document: Document, tensors: dict[str, Tensor], places: dict[str, int], buffer: Any
    ) -> None:
        self.document = document
        self.tensors = tensors  # by canonical name
        self.attempts = 1  # how many it took
        self._places = places
        self._buffer = buffer

    @property
    def size(self) -> int:
        """How many bytes were fetched."""
        return int(self._buffer.nbytes)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def read(self, name: str) -> bytes:
        """The values of a tensor, row-major and without gaps.  Raises HookError."""
        tensor = self._tensor(name)
        target = bytearray(tensor.size)
        start = 0
        for box in boxes.boxes(tensor, max(tensor.size, 1)):
            fetch = boxes.plan(box)
            at = self._places[tensor.name]
            runs = [self._buffer[at + first : at + first + size] for first, size in fetch.runs]
            into = memoryview(target)[start : start + box.size]
            if len(runs) == 1 and fetch.is_in_order:
                into[:] = runs[0]
            else:
                fetched = memoryview(b"".join(runs))
                if fetch.is_in_order:
                    into[:] = fetched
                else:
                    boxes.gather(box, fetch, fetched, into)
            start += box.size
        return bytes(target)

    def array(self, name: str) -> numpy.ndarray[Any, Any]:
        """A numpy array over what was fetched: no copy.  Raises HookError."""
        need_numpy("an array")
        import numpy

        from . import arrays

        tensor = self._tensor(name)
        kind = arrays.numpy_type(tensor.dtype)
        if not tensor.size:
            return numpy.empty(tensor.shape, kind)
        steps = tuple(step * tensor.itemsize for step in tensor.stride)
        place = self._places[tensor.name]
        found: numpy.ndarray[Any, Any] = numpy.ndarray(
            tensor.shape, kind, self._buffer, place, steps
        )
        return found

    def tensor(self, name: str) -> torch.Tensor:
        """A torch tensor over what was fetched: no copy, in host memory.  Raises HookError."""
        from . import torch_tensors

        tensor = self._tensor(name)
        if not tensor.size:
            return torch_tensors.empty(tensor)[0]
        at = self._places[tensor.name]
        return torch_tensors.over(tensor, self._buffer[at : at + tensor.span])

    def _tensor(self, name: str) -> Tensor:
        tensor = self.document.tensor(name)
        if tensor.name not in self.tensors:
            raise HookError(f"{name} was not pulled; see `wanted`, and what lies on no device")
        return tensor

    def __repr__(self) -> str:
        return f"<Pulled {len(self.tensors)} tensors, {self.size} bytes, of {self.document!r}>"


def _is_lasting(tensor: Tensor) -> bool:
    return not tensor.volatile


def pull(
    source: Union[Slot, Document],
    wanted: Callable[[Tensor], bool] = _is_lasting,
    attempts: int = ATTEMPTS,
    via: Optional[str] = None,
    address: Optional[str] = None,
) -> Pulled:
    """Every tensor that is ``wanted`` and resident, all of one generation.

    Where an update comes between, the slot is read again and all of it fetched again, ``attempts``
    times at most.  A saved copy of a map (a `Document` of `open_file`) is never read again: it is
    as old afterwards.  Takes as much memory as the weights.  ``via``, ``address``: as for
    `Document.open_memory`.  Raises HookError; `Changed` where updates came between each time.
    """
    pause = _PAUSE
    for attempt in range(1, attempts + 1):
        try:
            found = _once(source, wanted, via, address)
        except (Changed, NotReady) as error:
            if attempt == attempts or isinstance(source, Document):
                if attempt == 1:
                    raise
                raise Changed(
                    f"tried {attempt} times, and each time the weights changed meanwhile: {error}"
                ) from error
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        else:
            found.attempts = attempt
            return found
    raise ValueError("attempts is to be 1 or more")


def _once(
    source: Union[Slot, Document],
    wanted: Callable[[Tensor], bool],
    via: Optional[str],
    address: Optional[str],
) -> Pulled:
    document = source if isinstance(source, Document) else source.read()
    if document.is_live and document.state["state"] != READY:
        raise NotReady(
            f"slot {document.slot.name} is {document.state['state']}, so its weights are not "
            f"whole or not there; wait until it is ready"
        )
    with document.open_memory(via=via, address=address) as memory:
        document = memory.document
        chosen = {t.name: t for t in document.iter_tensors() if t.resident and wanted(t)}
        if not chosen:
            raise NotReadable(f"slot {document.slot.name} has no such tensor; see `wanted`")
        spans = list(_spans(document, chosen))
        buffer = memory.read_spans(list(chosen.values()), spans)
    return Pulled(document, chosen, _places(chosen, spans), buffer)


def _spans(document: Document, chosen: dict[str, Tensor]) -> Iterator[Span]:
    """The stretches under the tensors, none of which reaches out of its region."""
    reaches = sorted((t.ptr, t.ptr + t.span) for t in chosen.values() if t.span)
    offset = 0
    current: Optional[tuple[int, int, int]] = None  # start, end, end of the region
    for start, end in [*reaches, (1 << 64, 1 << 64)]:
        if current is not None and start <= current[1] + _NEAR and end <= current[2]:
            current = current[0], max(current[1], end), current[2]
            continue
        if current is not None:
            offset += (current[0] - offset) % _ALIGNED
            yield Span(current[0], current[1] - current[0], offset)
            offset += current[1] - current[0]
        region = document.region_at(start) if start < 1 << 64 else None
        current = start, end, max(end, region.end if region is not None else 0)


def _places(chosen: dict[str, Tensor], spans: list[Span]) -> dict[str, int]:
    """Where each tensor begins in the buffer."""
    starts = [span.address for span in spans]
    places = {}
    for tensor in chosen.values():
        if tensor.span:
            span = spans[bisect_right(starts, tensor.ptr) - 1]
            places[tensor.name] = span.offset + tensor.ptr - span.address
        else:
            places[tensor.name] = 0
    return places
