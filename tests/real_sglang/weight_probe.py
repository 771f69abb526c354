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
    from collections.abc import Callable
    from typing import Any

_started: list[str] = []  # a venv runs each .pth line twice


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


def _answer(directory: str) -> list[dict[str, Any]]:
    return [_describe(runner) for runner in _runners()]


def _serve(directory: str, answer: Callable[[str], Any]) -> None:
    json, time = sys.modules["json"], sys.modules["time"]
    answered: set[str] = set()
    while True:
        time.sleep(0.05)
        try:
            requests = [name for name in os.listdir(directory) if name.startswith("request-")]
        except OSError:
            continue
        for request in sorted(set(requests) - answered):
            answered.add(request)
            try:
                content = answer(directory)
            except Exception as error:
                content = {"error": repr(error)}
            if content:
                number = request.partition("-")[2]
                path = os.path.join(directory, f"answer-{number}-{os.getpid()}.json")
                with open(path + ".part", "w") as file:
                    json.dump(content, file)
                os.rename(path + ".part", path)


def start_thread(variable: str, answer: Callable[[str], Any], imports: tuple[str, ...]) -> None:
    """Answer requests in the directory that the environment variable names, if it does.

    ``answer`` says what, or nothing in a process that has nothing to say; it finds ``imports`` in
    ``sys.modules``.  They are imported here, not in the thread: one that imports while SGLang does
    may wait for it for ever.
    """
    directory = os.environ.get(variable)
    # multiprocessing's resource tracker and the like have no weights and no need of a thread.
    if directory and variable not in _started:
        import json  # noqa: F401
        import threading
        import time  # noqa: F401

        for name in imports:
            __import__(name)
        _started.append(variable)
        threading.Thread(target=_serve, args=(directory, answer), daemon=True).start()


def start() -> None:
    start_thread("WEIGHT_PROBE_DIR", _answer, ("gc",))
