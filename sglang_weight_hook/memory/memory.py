"""The bytes behind one document."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Optional

from ..reader import Document, HookError, SpanIndex, Tensor
from . import boxes
from .backend import Backend, Span
from .bracket import Bracket

if TYPE_CHECKING:
    import numpy
    import torch

PIECE = 8 << 20  # bytes that are fetched at a time


class _Kept:
    """A buffer that is used again and again, by one backend after another."""

    def __init__(self) -> None:
        self._backend: Optional[Backend] = None
        self._buffer = memoryview(b"")

    def of(self, backend: Backend, size: int) -> memoryview:
        if backend is not self._backend or self._buffer.nbytes < size:
            self._backend, self._buffer = backend, backend.buffer(size)
        return self._buffer


class Memory:
    """The bytes behind one document; made by `Document.open_memory`.

        with slot.weights_held():
            document = slot.read()
            with document.open_memory() as memory:
                values = memory.array("model.embed_tokens.weight")

    Every read either gives values of the document's generations or raises `Changed`, also without
    the lock; what is `volatile` in the document is the exception: SGLang rewrites it in a forward.
    Names are canonical names or aliases.  Nothing is ever written into the owner's memory.

    Not thread-safe: open one for each thread.
    """

    def __init__(
        self,
        document: Document,
        via: Optional[str] = None,
        allow: Collection[str] = (),
        address: Optional[str] = None,
    ) -> None:
        """Look whether the document is still true; a way to its bytes is opened at first use.

        ``via``: ``process``, ``cuda``, ``owner``, ``mooncake`` or ``nixl``; None takes for each
        tensor the first that reaches it, a transfer engine only where the owner is on another
        machine.  ``allow``: further states of the slot than ``ready`` in which it may be read.
        ``address``: ``host`` or ``host:port`` of the server's mooncake, instead of the one that
        it has published.  Raises HookError.
        """
        from . import backends

        self.document = backends.readable(document, via)
        self._backends = backends.Backends(self.document, via, address)
        try:
            self._bracket = Bracket(self.document, allow, self._backends.header())
        except BaseException:
            self._backends.close()
            raise
        # Kept, for the kernel takes longer to give new pages than to fill old ones.
        self._scratch = _Kept()  # what was fetched and is not in order yet
        self._piece = _Kept()  # what `pieces` hands out
        self._closed = False

    # -- reading

    def read(self, name: str) -> bytes:
        """The values of a tensor, row-major and without gaps, whatever its strides.

        Raises `Changed`, `NotReadable`, HookError.
        """
        tensor = self.document.tensor(name)
        target = bytearray(tensor.size)
        self._read(tensor, memoryview(target))
        return bytes(target)

    def read_into(self, name: str, buffer: Any) -> int:
        """Write the values into ``buffer`` (writable, contiguous); how many bytes that are.

        ``buffer`` may be longer than the values.  What it holds after an exception is undefined.
        Raises `Changed`, `NotReadable`, HookError.
        """
        tensor = self.document.tensor(name)
        try:
            target = memoryview(buffer)
            if target.nbytes:
                target = target.cast("B")
        except (TypeError, ValueError) as error:
            raise HookError(
                f"values cannot be written into it ({error}); give a bytearray or a "
                f"contiguous array"
            ) from error
        if target.readonly:
            raise HookError("values cannot be written into it, it is read-only; give a bytearray")
        if target.nbytes < tensor.size:
            raise HookError(
                f"{tensor.name} takes {tensor.size} bytes and the buffer has {target.nbytes}; give "
                f"a larger one"
            )
        self._read(tensor, target[: tensor.size])
        return tensor.size

    def pieces(self, name: str, limit: int = PIECE) -> Iterator[memoryview]:
        """The values of a tensor in row-major order, at most ``limit`` bytes at a time.

        Each piece is valid until the next is asked for, of this or another tensor, for all lie in
        one buffer: that is all the memory it takes, however large the tensor.  Each is of the
        document's generations when it is handed out.  Raises `Changed`, `NotReadable`, HookError.
        """
        tensor = self.document.tensor(name)
        backend = self._backend_of(tensor)
        size = min(max(limit, tensor.itemsize), tensor.size)
        buffer = self._piece.of(backend, size)
        for box in boxes.boxes(tensor, limit):
            target = buffer[: box.size]
            with self._bracket.read():
                self._fetch(backend, tensor, box, target)
            yield target

    def array(self, name: str) -> numpy.ndarray[Any, Any]:
        """The values as a numpy array of the tensor's shape: a copy.

        bfloat16 and 8-bit floats have the types of ml_dtypes.  Raises `Changed`, `NotReadable`,
        HookError.
        """
        from . import arrays

        tensor = self.document.tensor(name)
        found, target = arrays.empty(tensor)
        self._read(tensor, target)
        return found

    def tensor(self, name: str) -> torch.Tensor:
        """The values as a torch tensor.

        On the GPU where they lie a view without a copy, with the tensor's own strides, which must
        not be used once this memory is closed; from a CPU server a copy.  Raises `Changed`,
        `NotReadable`, HookError.
        """
        from . import torch_tensors

        tensor = self.document.tensor(name)
        backend = self._backend_of(tensor)
        with self._bracket.read():
            view = backend.view(tensor)
            if view is not None:
                return torch_tensors.from_dlpack(view)
        copy, target = torch_tensors.empty(tensor)
        self._read(tensor, target)
        return copy

    def read_spans(self, tensors: Sequence[Tensor], spans: Sequence[Span]) -> memoryview:
        """The stretches under the tensors in a buffer of their own: `pull` is made of it.

        Raises `Changed`, `NotReadable`, HookError.
        """
        self._raise_if_closed()
        size = max((span.offset + span.size for span in spans), default=0)
        with self._bracket.read():
            ways = {backend.name: backend for backend in map(self._backend_of, tensors)}
            if len(ways) == 1:
                backend = next(iter(ways.values()))
                buffer = backend.buffer(size)
                backend.fetch_at(spans, buffer)
                return buffer
            buffer = memoryview(bytearray(size))
            index = SpanIndex((s.address, s.address + s.size, s) for s in spans)
            for tensor in tensors:  # as on some servers, of which a part is in host memory
                for span in index.at(tensor.ptr) if tensor.span else ():
                    start = span.offset + tensor.ptr - span.address
                    run = [(tensor.ptr, tensor.span)]
                    self._backend_of(tensor).fetch(run, buffer[start : start + tensor.span])
            return buffer

    def check(self) -> None:
        """Raises `Changed` where the weights are no longer those of the document."""
        self._raise_if_closed()
        self._bracket.check()

    def via(self, name: str) -> str:
        """Which way a tensor comes: `process`, `cuda`, `owner`, `mooncake` or `nixl`."""
        return self._backend_of(self.document.tensor(name)).name

    # -- how

    def _backend_of(self, tensor: Tensor) -> Backend:
        self._raise_if_closed()
        return self._backends.reaching(tensor)

    def _read(self, tensor: Tensor, target: memoryview) -> None:
        backend = self._backend_of(tensor)
        with self._bracket.read():
            start = 0
            for box in boxes.boxes(tensor, PIECE):
                self._fetch(backend, tensor, box, target[start : start + box.size])
                start += box.size

    def _fetch(self, backend: Backend, tensor: Tensor, box: boxes.Box, target: memoryview) -> None:
        fetch = boxes.plan(box)
        runs = [(tensor.ptr + start, length) for start, length in fetch.runs]
        if fetch.is_in_order:
            backend.fetch(runs, target)
            return
        fetched = self._scratch.of(backend, fetch.size)[: fetch.size]
        backend.fetch(runs, fetched)
        boxes.gather(box, fetch, fetched, target)

    def _raise_if_closed(self) -> None:
        if self._closed:
            raise HookError("this memory was closed; open it again with document.open_memory()")

    # -- closing

    def close(self) -> None:
        """Let go of everything.  Views made by `tensor` must not be used any more."""
        if not self._closed:
            self._closed = True
            try:
                self._backends.close()
            finally:
                self._bracket.close()

    def __enter__(self) -> Memory:
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Memory of {self.document!r}>"
