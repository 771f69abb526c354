"""A diffusion worker as a runner: its components are one slot, wherever SGLang keeps their weights.

The worker is a fake with the attributes of SGLang's; the modules are real.  The real one is in
``tests/real_sglang/diffusion``.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_sglang import event
from published_files import generations, layout_of, state_of

import sglang_weight_hook_patch_core as core
from sglang_weight_hook.publisher import capture, diffusion, events, recorder

torch = pytest.importorskip("torch")


class GPUWorker:
    """What SGLang's has."""

    def __init__(self, **modules: Any) -> None:
        self.local_rank = 3
        self.tp_group = SimpleNamespace(rank_in_group=1, world_size=2)
        self.server_args = SimpleNamespace(dp_size=1, node_rank=0)
        self.pipeline = TinyPipeline(modules)


GPUWorker.__module__ = "sglang.multimodal_gen.runtime.managers.gpu_worker"


class CPUWorker(GPUWorker):
    pass


class TinyPipeline:
    model_path = "/models/FLUX.1-dev"

    def __init__(self, modules: dict[str, Any]) -> None:
        self.modules = modules


class Offloaded:
    """A layerwise offload manager: the values are here, a placeholder is in the module."""

    def __init__(self, module: Any, names: list[str]) -> None:
        self.enabled = True
        self.held = {}
        for name in names:
            parameter = module.get_parameter(name)
            self.held[name] = parameter.detach().clone()
            parameter.data = torch.empty(1)

    def iter_cpu_weights(self) -> Iterator[tuple[str, Any]]:
        yield from self.held.items()


@pytest.fixture
def worker(maps: Path) -> CPUWorker:
    worker = CPUWorker(
        transformer=torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)),
        vae=torch.nn.BatchNorm2d(2),
        tokenizer=object(),
        scheduler=SimpleNamespace(sigmas=torch.ones(3)),
    )
    event("pipeline_ready", "build", [worker])
    return worker


def addresses(maps: Path) -> dict[str, int]:
    return {name: found["ptr"] for name, found in layout_of(maps, "3")["tensors"].items()}


def truth(worker: GPUWorker) -> dict[str, int]:
    return {
        f"{component}.{name}": tensor.data_ptr()
        for component in ("transformer", "vae")
        for name, tensor in worker.pipeline.modules[component].state_dict(keep_vars=True).items()
    }


def test_components_are_one_slot_under_their_names(worker: CPUWorker, maps: Path) -> None:
    assert addresses(maps) == truth(worker)
    assert state_of(maps, "3")["state"] == "ready"
    identity = layout_of(maps, "3")["identity"]
    assert identity["model_class"] == "TinyPipeline"
    assert identity["model_path"] == "/models/FLUX.1-dev"
    ranks = {
        name: identity[name] for name in ("gpu_id", "tp_rank", "tp_size", "dp_size", "pp_size")
    }
    assert ranks == {"gpu_id": 3, "tp_rank": 1, "tp_size": 2, "dp_size": 1, "pp_size": None}


def test_the_components_of_a_pipeline_of_diffusers_are_found_inside_it(maps: Path) -> None:
    unet = torch.nn.Linear(2, 2)
    inner = SimpleNamespace(components={"unet": unet, "tokenizer": object()})
    worker = GPUWorker(diffusers_pipeline=inner)
    event("pipeline_ready", "build", [worker])
    assert addresses(maps) == {
        "unet.weight": unet.weight.data_ptr(),
        "unet.bias": unet.bias.data_ptr(),
    }


def test_a_component_that_a_stage_loads_late_is_published_with_its_request(
    worker: CPUWorker, maps: Path
) -> None:
    (entry,) = (entry for entry in core.ENTRY_POINTS if entry.event == "late_component")

    def add_module(pipeline: TinyPipeline, module_name: str, module: Any) -> None:
        pipeline.modules[module_name] = module

    before = generations(maps, "3")
    late = torch.nn.Linear(2, 2)
    core.make_wrapper(add_module, entry)(worker.pipeline, "video_vae", late)
    assert addresses(maps) == {
        **truth(worker),
        "video_vae.weight": late.weight.data_ptr(),
        "video_vae.bias": late.bias.data_ptr(),
    }
    layouts, contents = before
    assert generations(maps, "3") == (layouts + 1, contents)
    state = state_of(maps, "3")
    assert (state["state"], state["event"]["kind"]) == ("ready", "late_component")


def test_modules_that_moved_are_published_where_they_are_and_hold_the_same(
    worker: CPUWorker, maps: Path
) -> None:
    before = generations(maps, "3")
    modules = [worker.pipeline.modules["transformer"], worker.pipeline.modules["vae"]]
    # Kept, so that the new places are others.
    kept = [t.data for module in modules for t in module.state_dict(keep_vars=True).values()]

    def move() -> None:
        for module in modules:
            for tensor in module.state_dict(keep_vars=True).values():
                tensor.data = tensor.data.clone()

    answer = {"success": True, "sleeping": True, "message": "moved"}
    event("release_memory_occupation", "adapt", [worker], during=move, result=answer)
    assert addresses(maps) == truth(worker)
    assert set(addresses(maps).values()).isdisjoint(t.data_ptr() for t in kept)
    assert state_of(maps, "3")["state"] == "ready"
    layouts, contents = before
    assert generations(maps, "3") == (layouts + 1, contents)
    refused = {"success": False, "sleeping": False, "message": "no"}
    event("resume_memory_occupation", "adapt", [worker], result=refused)
    told = state_of(maps, "3")["event"]
    assert (told["success"], told["message"]) == (False, "no")


def test_offloaded_layers_are_published_where_their_values_are(
    worker: CPUWorker, maps: Path
) -> None:
    transformer = worker.pipeline.modules["transformer"]
    manager = Offloaded(transformer, ["1.weight"])
    transformer.layerwise_offload_managers = [manager]
    event("update_weights_from_disk", "update", [worker], result=(True, "ok"))
    held = manager.held["1.weight"]
    found = layout_of(maps, "3")["tensors"]["transformer.1.weight"]
    assert (found["ptr"], found["shape"]) == (held.data_ptr(), [2, 3])

    before = state_of(maps, "3")
    transformer.get_parameter("1.weight").data = held.clone()  # a forward has it on the device
    tracked = recorder._tracked[id(worker)]
    assert tracked.still_holds(thoroughly=True) is True
    assert not tracked.find_unannounced()
    assert state_of(maps, "3") == before

    manager.enabled = False  # the offload ends: what the module has is what counts
    event("update_weights_from_disk", "update", [worker], result=(True, "ok"))
    assert addresses(maps) == truth(worker)


def test_an_offloaded_layer_is_found_behind_the_layer_of_an_adapter(
    worker: CPUWorker, maps: Path
) -> None:
    transformer = worker.pipeline.modules["transformer"]
    manager = Offloaded(transformer, ["1.weight"])
    transformer.layerwise_offload_managers = [manager]
    wrapped = torch.nn.Module()
    wrapped.base_layer = transformer[1]
    transformer[1] = wrapped
    event("set_lora", "partial", [worker])
    found = addresses(maps)
    assert found["transformer.1.base_layer.weight"] == manager.held["1.weight"].data_ptr()


@pytest.mark.parametrize("store", ["_parked_non_layer_weight_store", "_offload_weight_snapshot"])
def test_weights_that_visit_the_device_are_published_where_they_stay(
    store: str, worker: CPUWorker, maps: Path
) -> None:
    vae = worker.pipeline.modules["vae"]
    home = vae.weight.detach().clone()
    vae.__dict__[store] = {"weight": home}
    event("update_weights_from_disk", "update", [worker], result=(True, "ok"))
    assert addresses(maps)["vae.weight"] == home.data_ptr()


def test_nothing_of_a_pipeline_is_kept_alive_and_its_end_takes_the_files_away(
    worker: CPUWorker, maps: Path
) -> None:
    dropped = weakref.ref(worker.pipeline.modules.pop("vae"))
    gc.collect()
    assert dropped() is None
    event("update_weights_from_disk", "update", [worker], result=(True, "ok"))
    assert {name.partition(".")[0] for name in addresses(maps)} == {"transformer"}
    tracked = recorder._tracked[id(worker)]
    assert tracked.runner() is not None


def test_a_worker_that_is_gone_is_withdrawn(maps: Path) -> None:
    worker = GPUWorker(vae=torch.nn.Linear(2, 2))
    event("pipeline_ready", "build", [worker])
    assert (maps / "weight_layout_3.json").exists()
    del worker
    gc.collect()
    assert not (maps / "weight_layout_3.json").exists()


def test_nothing_moved_is_told_without_a_capture(
    worker: CPUWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("captured")

    monkeypatch.setattr(capture, "capture", fail)
    tracked = recorder._tracked[id(worker)]
    assert tracked.still_holds(thoroughly=True) is True


def test_an_answer_of_the_worker_is_understood() -> None:
    refused = SimpleNamespace(error="Lora is not enabled", output=None)
    assert events.outcome(refused, None) == (False, "Lora is not enabled")
    assert events.outcome(SimpleNamespace(error=None, output=[]), None) == (True, None)
    assert events.outcome({"success": False, "message": "no"}, None) == (False, "no")
    assert events.outcome({"sha256": "1"}, None) == (True, None)


def test_other_objects_are_no_workers() -> None:
    class GPUWorker:  # of somebody else's
        pass

    assert not diffusion.is_worker(GPUWorker())
    runner = SimpleNamespace(model=None)
    assert diffusion.runner_of(runner) is runner
