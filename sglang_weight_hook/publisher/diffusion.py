"""What SGLang's diffusion worker (``sglang.multimodal_gen``) is in the terms of a model runner.

The worker has a pipeline of several modules instead of one model, says in other attributes which
device and which rank it is, and may keep weights in the host's memory, with a placeholder of one
element in the module.  All of that is here; the rest of the package sees a `WorkerAsRunner`.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Optional

from ..layout.documents import BUFFER, PARAMETER
from .walk import Walk

_WORKER = "sglang.multimodal_gen.runtime.managers.gpu_worker"
_PLATFORMS = "sglang.multimodal_gen.runtime.platforms"

# Where SGLang keeps the host's copies of parameters that visit the device: in the component's
# __dict__, by the parameter's name in it (layerwise_offload.py, weight_snapshot.py).
_HOST_COPIES = ("_parked_non_layer_weight_store", "_offload_weight_snapshot")


def is_worker(runner: Any) -> bool:
    """Whether it is a ``GPUWorker`` or of one of its subclasses (``CPUWorker``, a plug-in's)."""
    return any(
        kind.__name__ == "GPUWorker" and kind.__module__ == _WORKER for kind in type(runner).__mro__
    )


def runner_of(runner: Any) -> Any:
    """``runner`` itself; for a diffusion worker, what a model runner would be in its place."""
    return WorkerAsRunner(runner) if is_worker(runner) else runner


def reference(runner: Any) -> Callable[[], Any]:
    """A weak reference to ``runner``, which answers with `runner_of` or None."""
    held = weakref.ref(runner)
    if not is_worker(runner):
        return held

    def worker() -> Any:
        found = held()
        return None if found is None else WorkerAsRunner(found)

    return worker


class WorkerAsRunner:
    """Made anew for each question: it refers to the pipeline's modules, so nobody may keep it."""

    def __init__(self, worker: Any) -> None:
        pipeline = getattr(worker, "pipeline", None)
        group = getattr(worker, "tp_group", None)
        self._components = dict(_components(pipeline))
        self.server_args = getattr(worker, "server_args", None)
        self.model = _together(type(pipeline).__name__, self._components)
        self.model_config = self
        self.model_path = getattr(pipeline, "model_path", None)
        self.quantization = getattr(self.server_args, "quantization", None)
        self.gpu_id: int = worker.local_rank
        self.device = _device(worker.local_rank)
        self.tp_rank = getattr(group, "rank_in_group", None)
        self.tp_size = getattr(group, "world_size", None)

    def homes(self) -> dict[str, Any]:
        """The tensors of the host that hold parameters which only visit the device, by name."""
        return {
            f"{component}.{name}": tensor
            for component, module in self._components.items()
            for name, tensor in _homes(module)
        }


def at_home(runner: Any, walk: Walk) -> Walk:
    """``walk`` with the host's tensors in place of parameters that only visit the device.

    Between the visits the module has a placeholder of one element, on the device, for them.
    """
    homes = runner.homes() if isinstance(runner, WorkerAsRunner) else {}
    if homes:
        for kind in (PARAMETER, BUFFER):
            walk.tensors[kind][:] = [(n, homes.get(n, t)) for n, t in walk.tensors[kind]]
    return walk


def _device(index: int) -> Optional[str]:
    platform = getattr(sys.modules.get(_PLATFORMS), "current_platform", None)
    kind = getattr(platform, "device_type", None)
    if not kind:
        return None
    return str(kind) if kind == "cpu" else f"{kind}:{index}"


def _components(pipeline: Any) -> Iterator[tuple[str, Any]]:
    """The pipeline's modules by component, as SGLang's weights updater sees them.

    With the backend of diffusers, SGLang's pipeline holds diffusers' one, and that the components.
    """
    import torch

    for name, component in dict(getattr(pipeline, "modules", None) or {}).items():
        if isinstance(component, torch.nn.Module):
            yield name, component
            continue
        inner = getattr(component, "components", None)
        if isinstance(inner, dict):
            yield from ((n, m) for n, m in inner.items() if isinstance(m, torch.nn.Module))


_classes: dict[str, Any] = {}


def _together(name: str, components: dict[str, Any]) -> Any:
    """One module, of a class of that name, whose children are the components."""
    import torch

    if name not in _classes:
        _classes[name] = type(name, (torch.nn.Module,), {"__module__": __name__})
    module = _classes[name]()
    module.__dict__["_modules"] = components
    return module


def _homes(component: Any) -> Iterator[tuple[str, Any]]:
    for manager in getattr(component, "layerwise_offload_managers", None) or ():
        if getattr(manager, "enabled", False):
            for name, tensor in manager.iter_cpu_weights():
                yield name, tensor
                head, dot, leaf = name.rpartition(".")
                yield f"{head}{dot}base_layer.{leaf}", tensor  # with a LoRA layer around it
    for store in _HOST_COPIES:
        yield from dict(component.__dict__.get(store) or {}).items()
