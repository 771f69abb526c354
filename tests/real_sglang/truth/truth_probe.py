"""Runs inside the server, beside the hook and knowing nothing of it: what do the tensors hold?

Test equipment, and the source for what SGLang's own routes do not answer: buffers that its
checksums leave out, tensors that modules hold as plain attributes, the LoRA pool, stages that
no route reaches.  A `.pth` line of the test venv imports this in every interpreter; a thread
waits for files in ``WEIGHT_PROBE_DIR`` and answers in processes that hold a ModelRunner:

``digest-N``  ``digested-N-PID.json``: place and SHA-256 of every tensor of the runner
``mark-N``    flips a bit at the beginning of each of them, where torch has it now; the same
              again flips it back.  ``marked-N-PID.json``: the addresses
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
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


def _tensors(runner: Any) -> Iterator[tuple[str, str, Any]]:
    """(kind, name, tensor) under every name, by torch's own lists and modules' attributes."""
    model = runner.model
    for name, tensor in model.named_parameters(remove_duplicate=False):
        yield "parameter", name, tensor
    for name, tensor in model.named_buffers(remove_duplicate=False):
        yield "buffer", name, tensor
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, value in vars(module).items():
            if attribute not in ("_parameters", "_buffers", "_modules"):
                name = f"{prefix}.{attribute}" if prefix else attribute
                for found, tensor in _inside(name, value, 1):
                    yield "attribute", found, tensor
    pool = getattr(getattr(runner, "lora_manager", None), "memory_pool", None)
    for attribute, value in vars(pool).items() if pool is not None else ():
        for found, tensor in _inside(f"lora_pool.{attribute}", value, 2):
            yield "lora", found, tensor


def _inside(name: str, value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    if isinstance(value, sys.modules["torch"].Tensor):
        yield name, value
    elif depth and isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _inside(f"{name}.{key}", item, depth - 1)


def _digest(runner: Any) -> dict[str, Any]:
    torch, sha256 = sys.modules["torch"], sys.modules["hashlib"].sha256
    tensors = {}
    for kind, name, tensor in _tensors(runner):
        flat = tensor.detach().contiguous().reshape(-1)
        tensors[name] = {
            "kind": kind,
            "ptr": tensor.data_ptr(),
            "dtype": str(tensor.dtype),
            "shape": list(tensor.shape),
            "stride": list(tensor.stride()),
            "sha256": sha256(memoryview(flat.view(torch.uint8).numpy())).hexdigest(),
        }
    return {"draft": bool(runner.is_draft_worker), "tensors": tensors}


def _mark(runners: list[Any]) -> list[int]:
    places = {
        tensor.data_ptr()
        for runner in runners
        for _, _, tensor in _tensors(runner)
        if tensor.numel()
    }
    for place in places:
        sys.modules["ctypes"].c_ubyte.from_address(place).value ^= 1
    return sorted(places)


def _serve(directory: str) -> None:
    json, time = sys.modules["json"], sys.modules["time"]
    answered: set[str] = set()
    while True:
        time.sleep(0.05)
        try:
            requests = {n for n in os.listdir(directory) if n.startswith(("digest-", "mark-"))}
        except OSError:
            continue
        for request in requests - answered:
            answered.add(request)
            runners = _runners()
            if not runners:
                continue
            what, _, number = request.partition("-")
            try:
                content: Any = (
                    [_digest(one) for one in runners] if what == "digest" else _mark(runners)
                )
            except Exception as error:  # the test is told, or it would wait in vain
                content = repr(error)
            path = os.path.join(directory, f"{what}ed-{number}-{os.getpid()}.json")
            with open(path + ".part", "w") as file:
                json.dump(content, file)
            os.rename(path + ".part", path)


def start() -> None:
    directory = os.environ.get("WEIGHT_PROBE_DIR")
    if directory and not _started:
        # Here, not in the thread: one that imports while SGLang does may wait for it for ever.
        import ctypes  # noqa: F401
        import gc  # noqa: F401
        import hashlib  # noqa: F401
        import json  # noqa: F401
        import threading
        import time  # noqa: F401

        _started.append(True)
        threading.Thread(target=_serve, args=(directory,), daemon=True).start()
