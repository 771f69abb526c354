"""The calls of the CUDA driver that reading takes, through ctypes: no torch, no CUDA runtime.

Named as in cuda.h, where a ``_v2`` is the version that cuda.h itself gives to its callers.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import uuid
from collections.abc import Iterator
from typing import Any, Optional

from .errors import NotReadable

OUT_OF_MEMORY, NOT_INITIALIZED, NO_DEVICE = 2, 3, 100
INVALID_CONTEXT, INVALID_HANDLE = 201, 400

# What to do about an error, by its code (CUresult in cuda.h).
_REMEDIES = {
    OUT_OF_MEMORY: "free some memory of the GPU or of this machine",
    NOT_INITIALIZED: "read in a process that was not forked after CUDA was used, but spawned",
    34: "install NVIDIA's driver, the library found is a stub to link with",
    46: "another process has the GPU for itself; set its compute mode to default",
    NO_DEVICE: "give this process a GPU (CUDA_VISIBLE_DEVICES, docker run --gpus)",
    101: "give this process the server's GPU (CUDA_VISIBLE_DEVICES, docker run --gpus)",
    INVALID_CONTEXT: "read in another process than the one that owns the memory",
    205: "read in the server's container, or share its IPC namespace (docker run --ipc)",
    208: "close the other Memory of this process that has it open",
    214: "the GPU has reported an uncorrectable memory error; see nvidia-smi -q -d ECC",
    217: "read on the GPU that holds the memory",
    304: "raise the limit of open files (ulimit -n), and see dmesg",
    INVALID_HANDLE: "read in the server's container, or share its IPC namespace (docker run --ipc)",
    700: "this process's CUDA context is lost; read in a new process",
    800: "run where NVIDIA's driver permits it, not under MPS with another user's server",
    801: "this GPU or this driver has no such sharing",
    802: "start NVIDIA's fabric manager and wait until the GPU is ready",
    803: "NVIDIA's kernel module and libcuda are of different releases; restart the machine",
}
_REMEDY = "see dmesg and nvidia-smi"


class CudaError(Exception):
    """A call of the driver that failed."""

    def __init__(self, call: str, code: int, name: str) -> None:
        super().__init__(call, code, name)
        self.call, self.code, self.name = call, code, name

    def __str__(self) -> str:
        remedy = _REMEDIES.get(self.code, _REMEDY)
        return (
            f"the CUDA driver refuses {self.call} with error {self.code} ({self.name}); {remedy}, "
            f"or have the server copy it with open_memory(via='owner')"
        )


class Driver:
    """libcuda, initialised."""

    def __init__(self) -> None:
        """Raises NotReadable where there is none, CudaError where it does not start."""
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise NotReadable(
                f"NVIDIA's driver library is not here ({error}); read where the GPU is visible "
                f"(docker run --gpus), or have the server copy with open_memory(via='owner')"
            ) from None
        self.call("cuInit", ctypes.c_uint(0))

    def call(self, name: str, *arguments: Any) -> None:
        """Raises CudaError."""
        code = self.status(name, *arguments)
        if code != 0:
            raise CudaError(name.partition("_")[0], code, self._name_of(code))

    def status(self, name: str, *arguments: Any) -> int:
        """The same for who goes on whatever it answers."""
        call = getattr(self._library, name, None)
        return 801 if call is None else int(call(*arguments))  # CUDA_ERROR_NOT_SUPPORTED

    def _name_of(self, code: int) -> str:
        text = ctypes.c_char_p()
        self.status("cuGetErrorName", ctypes.c_int(code), ctypes.byref(text))
        return (text.value or b"unknown").decode("ascii", "replace")

    def ordinal_of(self, gpu_uuid: str) -> Optional[int]:
        """Which of the devices that this process sees has that UUID; None: none of them."""
        count = ctypes.c_int()
        self.call("cuDeviceGetCount", ctypes.byref(count))
        for ordinal in range(count.value):
            device, raw = ctypes.c_int(), (ctypes.c_ubyte * 16)()
            self.call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(ordinal))
            self.call("cuDeviceGetUuid_v2", ctypes.byref(raw), device)
            if "GPU-" + str(uuid.UUID(bytes=bytes(raw))) == gpu_uuid:
                return ordinal
        return None

    def pointer_attribute(self, attribute: int, address: int) -> Optional[int]:
        """``cuPointerGetAttribute``; None for memory that the driver does not know."""
        value = ctypes.c_uint64()
        code = self.status(
            "cuPointerGetAttribute",
            ctypes.byref(value),
            ctypes.c_int(attribute),
            ctypes.c_uint64(address),
        )
        return value.value if code == 0 else None


class Device:
    """One GPU, and its primary context, which is torch's in this process, too.

    The context is made when it is first worked in: on a GPU that a server has filled there may be
    no room for it, and who only asks whether there is a way needs none.
    """

    def __init__(self, driver: Driver, gpu_uuid: str) -> None:
        """Raises NotReadable where this process does not see the GPU; CudaError."""
        self._driver = driver
        ordinal = driver.ordinal_of(gpu_uuid)
        if ordinal is None:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            raise NotReadable(
                f"{gpu_uuid}, where the weights are, is none of the GPUs that this process sees "
                f"(CUDA_VISIBLE_DEVICES is {'not set' if visible is None else repr(visible)}); "
                f"start it with CUDA_VISIBLE_DEVICES={gpu_uuid}"
            )
        self.ordinal = ordinal  # here; the server may have another number for it
        self._device = ctypes.c_int()
        driver.call("cuDeviceGet", ctypes.byref(self._device), ctypes.c_int(ordinal))
        self._context: Optional[ctypes.c_void_p] = None

    @property
    def has_context(self) -> bool:
        return self._context is not None

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Its context is this thread's inside, and what was before is again behind."""
        if self._context is None:
            context = ctypes.c_void_p()
            self._driver.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
            self._context = context
        self._driver.call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._driver.status("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def close(self) -> None:
        context, self._context = self._context, None
        if context is not None:
            self._driver.status("cuDevicePrimaryCtxRelease_v2", self._device)
