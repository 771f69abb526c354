"""Runs inside the server: what bytes lie at the published addresses, by the CUDA driver alone?

Test equipment, imported by a `.pth` line of the test's environment.  With ``BYTE_PROBE_DIR``
set, a thread answers each ``request-N`` file there with ``answer-N-PID.json``: for every
resident tensor of every layout document that this process published, the SHA-256 of the bytes
from ``ptr`` to ``ptr + span``, copied with cuMemcpyDtoH.  No torch: only the document's word for
where the tensor is.
"""

from __future__ import annotations

import os
import sys

import weight_probe  # beside this file, where both are installed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class _Driver:
    """The few driver calls needed, on the primary context that torch made."""

    def __init__(self, ctypes: Any, ordinal: int) -> None:
        self.ctypes = ctypes
        self.library = ctypes.CDLL("libcuda.so.1")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._check(self.library.cuDeviceGet(ctypes.byref(device), ctypes.c_int(ordinal)))
        self._check(self.library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
        self._check(self.library.cuCtxSetCurrent(context))

    def read(self, address: int, size: int) -> bytes:
        buffer = self.ctypes.create_string_buffer(size)
        self._check(
            self.library.cuMemcpyDtoH_v2(
                buffer, self.ctypes.c_uint64(address), self.ctypes.c_size_t(size)
            )
        )
        data: bytes = buffer.raw
        return data

    def _check(self, status: int) -> None:
        if status:
            raise RuntimeError(f"CUDA driver error {status}")


def _answer(directory: str) -> dict[str, Any]:
    if "sglang.srt.model_executor.model_runner" not in sys.modules:
        return {}
    maps = os.path.join(os.path.dirname(directory), "weights_metadata")
    ctypes, hashlib, json = (sys.modules[name] for name in ("ctypes", "hashlib", "json"))
    found: dict[str, Any] = {}
    for name in sorted(os.listdir(maps)):
        if not name.startswith("weight_layout_"):
            continue
        with open(os.path.join(maps, name)) as file:
            layout = json.load(file)
        if layout["identity"]["pid"] != os.getpid():
            continue
        driver = _Driver(ctypes, layout["identity"]["gpu_id"])
        found[name[len("weight_layout_") : -len(".json")]] = {
            tensor: hashlib.sha256(driver.read(entry["ptr"], entry["span"])).hexdigest()
            for tensor, entry in layout["tensors"].items()
            if entry["resident"] and entry["span"]
        }
    return found


def start() -> None:
    weight_probe.start_thread("BYTE_PROBE_DIR", _answer, ("ctypes", "hashlib"))
