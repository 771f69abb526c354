"""Answers, in a server without a GPU, two things that SGLang always asks of CUDA.

Test equipment.  A `.pth` line of the test venv imports this; it waits for SGLang's import, as the
hook's own loader does.  Nothing of SGLang is edited.

* Its loader from a remote instance registers those blocks of CUDA's allocator that begin with a
  weight (``register_memory_region_v2``).  Here a block is a tensor's storage.
* Its actor of Ray sets the current device (``SchedulerActor.run_event_loop``).  There is one.
"""

from __future__ import annotations

import gc
import importlib
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Waiting:
    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name == "sglang" and Waiting in sys.meta_path:
            sys.meta_path.remove(Waiting)
            torch: Any = importlib.import_module("torch")
            torch._C._cuda_memorySnapshot = _snapshot
            torch._C._cuda_setDevice = _set_device


def _snapshot(*arguments: object) -> dict[str, Any]:
    torch: Any = importlib.import_module("torch")
    storages = {}
    for found in gc.get_objects():
        if isinstance(found, torch.nn.Parameter) and found.device.type == "cpu":
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    blocks = [
        {"address": address, "size": size, "state": "active_allocated"}
        for address, size in sorted(storages.items())
        if address and size
    ]
    return {"segments": [{"blocks": [block]} for block in blocks]}


def _set_device(index: int) -> None:
    pass


def start() -> None:
    if Waiting not in sys.meta_path:
        sys.meta_path.insert(0, Waiting)
