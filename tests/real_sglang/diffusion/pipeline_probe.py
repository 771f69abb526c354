"""Runs inside a diffusion server, beside the hook and knowing nothing of it: where do weights lie?

Test equipment.  A `.pth` line of the test venv imports this in every interpreter; with
``PIPELINE_PROBE_DIR`` set, a thread waits for ``request-N`` files there and answers each, in the
process that holds SGLang's worker, with ``answer-N-PID.json``: what torch itself says about every
tensor of the pipeline's modules, its values included.
"""

from __future__ import annotations

import sys
from typing import Any

import truth_probe  # type: ignore[import-not-found, unused-ignore]
import weight_probe  # type: ignore[import-not-found, unused-ignore]


class Component:
    """One module of the pipeline, in place of a model runner."""

    def __init__(self, module: Any) -> None:
        self.model = module


def workers() -> list[Any]:
    gc = sys.modules["gc"]
    module = sys.modules.get("sglang.multimodal_gen.runtime.managers.gpu_worker")
    cls = getattr(module, "GPUWorker", None)
    if cls is None:
        return []
    gc.unfreeze()  # SGLang freezes what it has built, and gc.get_objects() leaves that out
    return [
        found
        for found in gc.get_objects()
        if isinstance(found, cls) and getattr(found, "pipeline", None) is not None
    ]


def components(worker: Any) -> dict[str, Any]:
    """By SGLang's own function for it."""
    updater: Any = sys.modules["sglang.multimodal_gen.runtime.post_training.weights_updater"]
    found: dict[str, Any] = updater.get_updatable_modules(worker.pipeline)
    return found


def describe(worker: Any) -> dict[str, Any]:
    torch, sha256 = sys.modules["torch"], sys.modules["hashlib"].sha256
    tensors = {}
    for component, module in components(worker).items():
        for kind, name, tensor in truth_probe._tensors(Component(module)):
            storage = tensor.untyped_storage()
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            tensors[f"{component}.{name}"] = {
                "kind": kind,
                "ptr": tensor.data_ptr(),
                "size": tensor.numel() * tensor.element_size(),
                "device": str(tensor.device),
                "dtype": str(tensor.dtype),
                "shape": list(tensor.shape),
                "stride": list(tensor.stride()),
                "storage_ptr": storage.data_ptr(),
                "storage_size": storage.nbytes(),
                "sha256": sha256(memoryview(flat.view(torch.uint8).numpy())).hexdigest(),
            }
    return {
        "rank": worker.rank,
        "components": {name: type(module).__name__ for name, module in components(worker).items()},
        "tensors": tensors,
    }


def answer(directory: str) -> list[dict[str, Any]]:
    return [describe(worker) for worker in workers()]


def start() -> None:
    weight_probe.start_thread("PIPELINE_PROBE_DIR", answer, ("gc", "hashlib"))
