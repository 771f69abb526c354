"""What is asked of a device's driver, by torch's name for the kind of device.

`of` chooses; `device.Device` is the interface, and what is answered where only torch can be asked.
To add a kind of device: one file here with a subclass of `Device`, one entry in `_DEVICES`
(docs/architecture.md).
"""

from __future__ import annotations

import sys
from typing import Any

from .cpu import Cpu
from .cuda import Cuda
from .device import Device, Export

__all__ = ["Device", "Export", "in_use", "of"]

# By torch's name for the kind of device; what is not in here is asked of torch alone.
_DEVICES: dict[str, Device] = {"cpu": Cpu("cpu"), "cuda": Cuda("cuda")}
# torch calls AMD's GPUs "cuda", too, but they have no CUDA driver.
_ROCM = "rocm"


def of(device: str) -> Device:
    """The device that ``device`` ("cuda", "cuda:1", "npu:0", ...) is a kind of."""
    kind = device.partition(":")[0]
    name = _ROCM if kind == "cuda" and _is_rocm() else kind
    found = _DEVICES.get(name)
    if found is None:
        found = _DEVICES[name] = Device(kind)
    return found


def in_use() -> str:
    """The kind of device of a runner that does not say: what torch has initialised already."""
    torch: Any = sys.modules.get("torch")
    if of("cuda").is_in_use() or (_is_rocm() and torch.cuda.is_initialized()):
        return "cuda"
    return "cpu"


def _is_rocm() -> bool:
    version: Any = getattr(sys.modules.get("torch"), "version", None)
    return getattr(version, "hip", None) is not None
