"""A tensor's own memory as an object with ``__dlpack__``, made by hand (dlpack.h, DLPack 1.0).

What torch and others take over without a copy, strides and all.  The memory belongs to whoever
made the view: it counts those that are still in use, and frees nothing.
"""

from __future__ import annotations

import atexit
import ctypes
from typing import Any, Optional

from ..reader import Tensor
from .dtypes import ELEMENT_TYPES

CPU, CUDA = 1, 2  # DLDeviceType

_UNSIGNED = (1, 8)  # an element type that DLPack lacks is handed over as bytes


class _Managed(ctypes.Structure):
    """DLManagedTensor, DLTensor's fields in the place of its first."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


class Views:
    """The views that one memory has given out and that somebody still has."""

    def __init__(self) -> None:
        self.alive = 0
        self.made = 0


class View:
    """One tensor.  ``address``: of its first element, on ``device`` (DLDeviceType, number)."""

    def __init__(self, tensor: Tensor, address: int, device: tuple[int, int], views: Views) -> None:
        self._tensor, self._address = tensor, address
        self._device, self._views = device, views
        known = ELEMENT_TYPES.get(tensor.dtype)
        self._type = (known.dlpack if known is not None else None) or _UNSIGNED
        # What torch is to take the bytes for, where DLPack has no such type.
        self.torch_dtype: Optional[str] = None
        if known is None or known.dlpack is None:
            self.torch_dtype = tensor.dtype

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device

    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: Any = None,
        dl_device: Any = None,
        copy: Optional[bool] = None,
    ) -> Any:
        """A capsule.  Nothing of ours is under way on the memory, so no stream waits for it."""
        if copy or (dl_device is not None and tuple(dl_device) != self._device):
            raise BufferError("this is a view of the memory where it lies; copy it afterwards")
        tensor, rank = self._tensor, len(self._tensor.shape)
        numbers = (ctypes.c_int64 * (2 * rank))(*tensor.shape, *tensor.stride)
        size = ctypes.sizeof(_Managed)
        # In C's own memory: the consumer may let go of it when Python has ended.
        block = _malloc(size + ctypes.sizeof(numbers))
        if not block:
            raise MemoryError
        ctypes.memmove(block + size, numbers, ctypes.sizeof(numbers))
        managed = _Managed.from_address(block)
        managed.data = self._address
        managed.device_type, managed.device_id = self._device
        managed.ndim = rank
        managed.code, managed.bits = self._type
        managed.lanes = 1
        managed.shape = block + size
        managed.strides = block + size + 8 * rank
        managed.byte_offset = 0
        managed.manager_ctx = None
        managed.deleter = ctypes.cast(_deleter, ctypes.c_void_p).value
        capsule = _new_capsule(block, _NAME, ctypes.cast(_destructor, ctypes.c_void_p))
        _alive[block] = self._views
        self._views.alive += 1
        self._views.made += 1
        return capsule


def can_view(tensor: Tensor) -> bool:
    """Whether DLPack, or bytes in its place, can describe the tensor."""
    known = ELEMENT_TYPES.get(tensor.dtype)
    return known is not None and (known.dlpack is not None or known.itemsize == 1)


# --- what C calls back --------------------------------------------------------------------

_NAME = b"dltensor"  # until a consumer has taken it, who renames it

_libc = ctypes.CDLL(None)
_malloc = _libc.malloc
_malloc.restype, _malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
_free = _libc.free
_free.restype, _free.argtypes = None, [ctypes.c_void_p]

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
# A capsule that is being destroyed must not be made an object again: addresses, both.
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)
_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)

_alive: dict[int, Views] = {}  # by address of the block


def _let_go(block: int) -> None:
    """The consumer has let go of it."""
    views = _alive.pop(block, None)
    if views is not None:
        views.alive -= 1
        _free(block)


def _capsule_goes(capsule: int) -> None:
    """The capsule is destroyed; nobody has taken it over if it still has its name."""
    if _is_valid(capsule, _NAME):
        _let_go(_pointer_of(capsule, _NAME))


_deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_let_go)
_destructor = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(_capsule_goes)


@atexit.register
def _leave_to_the_system() -> None:
    """What is let go of from here on calls no Python any more, and its few bytes are not freed."""
    for block in _alive:
        _Managed.from_address(block).deleter = None
