"""Runs inside the server, beside the hook and knowing nothing of it: where do the weights lie?

Test equipment.  A `.pth` line of the test venv imports this in every interpreter; with
``WEIGHT_PROBE_DIR`` set, a thread waits for ``request-N`` files there and answers each, in
processes that hold a ModelRunner, with ``answer-N-PID.json``: what torch itself says about
every parameter and buffer of every live runner, found through the garbage collector.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_started: list[bool] = []  # a venv runs each .pth line twice


def _runners() -> list[Any]:
    gc = sys.modules["gc"]
    module = sys.modules.get("sglang.srt.model_executor.model_runner")
    cls = getattr(module, "ModelRunner", None)
    if cls is None:
        return []
    gc.unfreeze()  # SGLang freezes what it has built, and gc.get_objects() leaves that out
    return [found for found in gc.get_objects() if type(found) is cls and hasattr(found, "model")]


def _describe(runner: Any) -> dict[str, Any]:
    tensors = {}
    for kind, named in (
        ("parameter", runner.model.named_parameters(remove_duplicate=False)),
        ("buffer", runner.model.named_buffers(remove_duplicate=False)),
    ):
        for name, tensor in named:
            tensors[name] = {
                "kind": kind,
                "ptr": tensor.data_ptr(),
                "size": tensor.numel() * tensor.element_size(),
                "device": str(tensor.device),
                "dtype": str(tensor.dtype),
                "shape": list(tensor.shape),
                "stride": list(tensor.stride()),
                "storage_ptr": tensor.untyped_storage().data_ptr(),
                "storage_size": tensor.untyped_storage().nbytes(),
            }
    return {
        "gpu_id": runner.gpu_id,
        "draft": bool(runner.is_draft_worker),
        "tensors": tensors,
        "named_parameters": [name for name, _ in runner.model.named_parameters()],
        "checksum": sum(float(p.double().abs().sum()) for p in runner.model.parameters()),
    }


def _serve(directory: str) -> None:
    json, time = sys.modules["json"], sys.modules["time"]
    answered: set[str] = set()
    while True:
        time.sleep(0.05)
        try:
            requests = [name for name in os.listdir(directory) if name.startswith("request-")]
        except OSError:
            continue
        for request in set(requests) - answered:
            found = [_describe(runner) for runner in _runners()]
            answered.add(request)
            if found:
                number = request.partition("-")[2]
                path = os.path.join(directory, f"answer-{number}-{os.getpid()}.json")
                with open(path + ".part", "w") as file:
                    json.dump(found, file)
                os.rename(path + ".part", path)


def start() -> None:
    directory = os.environ.get("WEIGHT_PROBE_DIR")
    # multiprocessing's resource tracker and the like have no weights and no need of a thread.
    if directory and not _started:
        # Here, not in the thread: one that imports while SGLang does may wait for it for ever.
        import gc  # noqa: F401
        import json  # noqa: F401
        import threading
        import time  # noqa: F401

        _started.append(True)
        threading.Thread(target=_serve, args=(directory,), daemon=True).start()
