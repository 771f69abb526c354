"""Values as numpy arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..reader import HookError, Tensor
from .dtypes import ELEMENT_TYPES
from .errors import NotReadable
from .needed import need_numpy

if TYPE_CHECKING:
    import numpy


def numpy_type(dtype: str) -> Any:
    """numpy's type for one of torch's.  Raises NotReadable."""
    need_numpy("an array")
    import numpy

    known = ELEMENT_TYPES.get(dtype)
    if known is None or known.numpy is None:
        raise NotReadable(f"numpy has no type for {dtype}; take the bytes with memory.read()")
    module, _, name = known.numpy.rpartition(".")
    if not module:
        return numpy.dtype(name)
    try:
        import ml_dtypes
    except ImportError:
        raise NotReadable(
            f"numpy itself has no {dtype}; install ml_dtypes, or take the bytes with memory.read()"
        ) from None
    return numpy.dtype(getattr(ml_dtypes, name))


def empty(tensor: Tensor) -> tuple[numpy.ndarray[Any, Any], memoryview]:
    """An array for the values of ``tensor``, and its bytes.  Raises HookError."""
    need_numpy("an array (unlike memory.read(), which gives bytes)")
    import numpy

    found = numpy.empty(tensor.shape, numpy_type(tensor.dtype))
    if found.nbytes != tensor.size:
        raise HookError(
            f"{tensor.name} takes {tensor.size} bytes, and as {tensor.dtype} {found.nbytes}; take "
            f"the bytes with memory.read()"
        )
    # Types of ml_dtypes have no buffer of their own.
    return found, memoryview(found.reshape(-1).view(numpy.uint8).data)
