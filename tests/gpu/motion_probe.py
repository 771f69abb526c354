"""Runs inside the server: when does a buffer move, and what does torch say lies in each tensor?

Test equipment, beside the hook and knowing nothing of it.  With ``MOTION_PROBE_DIR`` set, one
thread looks at the addresses of every live runner's buffers each 5 ms and appends a line for each
that has changed to ``moves-PID.jsonl``; another answers ``request-N`` files as `weight_probe`
does: for each tensor its address, dtype, SHA-256 of its values by torch, and the driver's
allocation around it; and the ids of the process's named threads.
"""

from __future__ import annotations

import os
import sys

import weight_probe  # beside this file, where both are installed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def _tensors_of(model: Any) -> dict[str, Any]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _answer(directory: str) -> dict[str, Any]:
    if "sglang.srt.model_executor.model_runner" not in sys.modules:
        return {}
    threading, hashlib = sys.modules["threading"], sys.modules["hashlib"]
    torch: Any = sys.modules["torch"]
    found: dict[str, Any] = {}
    for runner in weight_probe._runners():
        ask = _allocation_of(runner.gpu_id) if runner.device == "cuda" else (lambda address: None)
        for name, tensor in _tensors_of(runner.model).items():
            values = tensor.detach().contiguous().flatten().view(torch.uint8).cpu()
            found[name] = {
                "ptr": tensor.data_ptr(),
                "dtype": str(tensor.dtype),
                "contiguous": tensor.is_contiguous(),
                "sha256": hashlib.sha256(values.numpy().tobytes()).hexdigest(),
                "allocation": ask(tensor.data_ptr()),
            }
    threads = {thread.name: thread.native_id for thread in threading.enumerate()}
    return {"tensors": found, "threads": threads} if found else {}


def _allocation_of(ordinal: int) -> Any:
    """Asks the driver for base and size of the allocation around an address."""
    import byte_probe

    ctypes = sys.modules["ctypes"]
    driver = byte_probe._Driver(ctypes, ordinal)

    def ask(address: int) -> tuple[int, int]:
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        driver._check(
            driver.library.cuMemGetAddressRange_v2(
                ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address)
            )
        )
        return base.value, size.value

    return ask


def _watch(directory: str) -> None:
    json, time, weakref = (sys.modules[name] for name in ("json", "time", "weakref"))
    watched: list[Any] = []
    while not watched:
        time.sleep(0.5)
        try:
            watched = [weakref.ref(runner.model) for runner in weight_probe._runners()]
        except Exception:
            continue
    path = os.path.join(directory, f"moves-{os.getpid()}.jsonl")
    known: dict[str, tuple[int, str]] = {}
    while True:
        time.sleep(0.005)
        now: dict[str, tuple[int, str]] = {}
        try:
            for model in watched:
                for name, tensor in model().named_buffers():
                    now[name] = (tensor.data_ptr(), str(tensor.dtype))
        except Exception:
            continue
        at = time.time()
        for name in now:
            if known and known.get(name) != now[name]:
                with open(path, "a") as file:
                    line = {"at": at, "name": name, "from": known.get(name), "to": now[name]}
                    file.write(json.dumps(line) + "\n")
        known = now


def start() -> None:
    weight_probe.start_thread("MOTION_PROBE_DIR", _answer, ("ctypes", "hashlib", "byte_probe"))
    directory = os.environ.get("MOTION_PROBE_DIR")
    if directory and "motion" not in weight_probe._started:
        import threading
        import weakref  # noqa: F401

        weight_probe._started.append("motion")
        threading.Thread(target=_watch, args=(directory,), daemon=True).start()
