"""The signatures that SGLang gives the methods of the table, and fake modules that have them."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

import sglang_weight_hook_patch_core as core


class Call(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


# The signature that SGLang gives a method, and one call of it as SGLang makes it: for each
# entry of the table, in each of the forms that it has had.
DISK_1 = ("(self, model_path, load_format)", [Call(("m", "auto"), {})])
DISK_2 = (
    "(self, model_path, load_format, weight_name_filter=None, recapture_cuda_graph=False)",
    [
        Call(("m", "auto"), {}),
        Call(("m", "auto"), {"recapture_cuda_graph": True}),
        Call((), {"model_path": "m", "load_format": "auto", "weight_name_filter": len}),
    ],
)
DISTRIBUTED_1 = ("(self, name, dtype, shape)", [Call(("n", "d", (1,)), {})])
DISTRIBUTED_2 = (
    "(self, names, dtypes, shapes, group_name)",
    [
        Call(([], [], [], "g"), {}),
        Call((), {"names": [], "dtypes": [], "shapes": [], "group_name": "g"}),
    ],
)
DISTRIBUTED_3 = (
    "(self, names, dtypes, shapes, group_name, load_format=None)",
    [Call(([], [], [], "g"), {"load_format": "flattened_bucket"})],
)
DISTRIBUTED_4 = ("(self, named_tensors)", [Call(([],), {}), Call((), {"named_tensors": []})])
TENSOR = (
    "(self, named_tensors, load_format=None)",
    [Call(([],), {}), Call((), {"named_tensors": [], "load_format": "direct"})],
)
NOTHING = ("(self)", [Call((), {})])
REQUEST = ("(self, recv_req)", [Call(("r",), {}), Call((), {"recv_req": "r"})])
EXPERTS_1 = ("(self, new_expert_location_metadata)", [Call(("m",), {})])
EXPERTS_2 = (
    "(self, routed_experts_weights_of_layer, new_expert_location_metadata, update_layer_ids,"
    " nnodes, rank)",
    [Call(({}, "m", [0]), {"nnodes": 1, "rank": 0})],
)
RECOVERY = (
    "(*, model, new_expert_location_metadata, update_layer_ids, tp_rank)",
    [
        Call(
            (),
            {
                "model": "the runner",
                "new_expert_location_metadata": "m",
                "update_layer_ids": [0],
                "tp_rank": 0,
            },
        )
    ],
)
DISK_OF_A_PIPELINE = (
    "(self, model_path, flush_cache=True, target_modules=None)",
    [
        Call(("m",), {}),
        Call((), {"model_path": "m", "flush_cache": True, "target_modules": None}),
        Call((), {"model_path": "m", "flush_cache": True, "target_modules": ["vae"]}),
        Call(("m", True, ["vae"]), {}),
    ],
)
LORA_PATH = ("(self, lora_nickname, lora_path=None)", [Call(("n", "p"), {})])
_BUILDING_A_WORKER = ("local_rank", "rank", "master_port", "server_args")
FORMS: dict[tuple[str, str], list[tuple[str, list[Call]]]] = {
    ("", "update_expert_location_with_recovery"): [RECOVERY],
    ("", "choose_daemon_transport_backend"): [("(state_tensors)", [Call(({},), {})])],
    ("WeightCacheDaemon", "load"): [NOTHING],
    ("ModelRunner", "load_model"): [NOTHING],
    ("ModelRunner", "__init__"): [
        (
            "(self, model_config, gpu_id, server_args)",
            [Call(("m",), {"gpu_id": 0, "server_args": 1})],
        )
    ],
    ("ModelRunner", "alloc_memory_pool"): [
        ("(self, memory_pool_config=None)", [Call((), {}), Call((None,), {})])
    ],
    ("ModelRunner", "finalize_startup_weight_load"): [NOTHING],
    ("Scheduler", "__init__"): [
        ("(self, server_args, port_args, gpu_id)", [Call(("s", "p"), {"gpu_id": 0})])
    ],
    ("MMEncoder", "__init__"): [
        ("(self, server_args, rank=0)", [Call(("s",), {}), Call(("s",), {"rank": 1})])
    ],
    ("ModelRunner", "update_weights_from_disk"): [DISK_1, DISK_2],
    ("WeightUpdater", "update_weights_from_disk"): [DISK_2],
    ("ModelRunner", "update_weights_from_tensor"): [TENSOR],
    ("WeightUpdater", "update_weights_from_tensor"): [TENSOR],
    ("ModelRunner", "update_weights_from_distributed"): [
        DISTRIBUTED_1,
        DISTRIBUTED_2,
        DISTRIBUTED_3,
    ],
    ("WeightUpdater", "update_weights_from_distributed"): [DISTRIBUTED_3],
    ("WeightUpdater", "load_weights_from_distributed"): [DISTRIBUTED_4],
    ("ModelRunner", "update_weights_from_ipc"): [REQUEST],
    ("WeightUpdater", "update_weights_from_ipc"): [REQUEST],
    ("WeightUpdater", "begin_weight_update"): [NOTHING],
    ("WeightUpdater", "end_weight_update"): [
        ("(self, *, run_post_load)", [Call((), {"run_post_load": True})])
    ],
    ("ModelRunner", "update_expert_location"): [EXPERTS_1],
    ("ExpertLocationUpdater", "update"): [EXPERTS_2],
    ("ExpertBackupClient", "update_weights"): [
        ("(self, weight_name_filter=None)", [Call((), {}), Call((len,), {})])
    ],
    ("WeightChecker", "_reset_tensors"): [NOTHING],
    ("ModelRunner", "load_lora_adapter"): [("(self, lora_ref)", [Call(("ref",), {})])],
    ("ModelRunner", "load_lora_adapter_from_tensors"): [
        (
            "(self, lora_ref, tensors, config_dict, added_tokens_config=None)",
            [Call(("ref", {}, {}), {})],
        )
    ],
    ("ModelRunner", "unload_lora_adapter"): [("(self, lora_ref)", [Call(("ref",), {})])],
    ("GPUWorker", "__init__"): [
        (
            "(self, local_rank, rank, master_port, server_args)",
            [Call((0, 0, 1, "s"), {}), Call((), dict.fromkeys(_BUILDING_A_WORKER, 0))],
        )
    ],
    ("ComposedPipelineBase", "add_module"): [
        (
            "(self, module_name, module)",
            [Call(("vae", "m"), {}), Call((), {"module_name": "vae", "module": "m"})],
        )
    ],
    ("GPUWorker", "update_weights_from_disk"): [DISK_OF_A_PIPELINE],
    ("GPUWorkerPostTrainingMixin", "update_weights_from_disk"): [DISK_OF_A_PIPELINE],
    ("GPUWorkerPostTrainingMixin", "update_weights_from_tensor"): [
        ("(self, req)", [Call(("r",), {}), Call((), {"req": "r"})])
    ],
    ("GPUWorker", "set_lora_adapter"): [LORA_PATH],
    ("GPUWorker", "set_lora"): [
        LORA_PATH,
        (
            "(self, lora_nickname, lora_path=None, target='all', strength=1.0, merge_mode=None)",
            [Call(("n", "p", "all", 1.0), {"merge_mode": "auto"})],
        ),
    ],
    ("GPUWorker", "merge_lora_weights"): [
        NOTHING,
        ("(self, target='all', strength=1.0)", [Call(("all", 0.5), {})]),
    ],
    ("GPUWorker", "unmerge_lora_weights"): [
        NOTHING,
        ("(self, target='all')", [Call((), {"target": "all"})]),
    ],
    ("GPUWorker", "release_memory_occupation"): [NOTHING],
    ("GPUWorker", "resume_memory_occupation"): [NOTHING],
    ("Scheduler", "release_memory_occupation"): [REQUEST],
    ("SchedulerUpdateWeightsMixin", "release_memory_occupation"): [REQUEST],
    ("SchedulerWeightUpdaterManager", "release_memory_occupation"): [REQUEST],
    ("Scheduler", "resume_memory_occupation"): [REQUEST],
    ("SchedulerUpdateWeightsMixin", "resume_memory_occupation"): [REQUEST],
    ("SchedulerWeightUpdaterManager", "resume_memory_occupation"): [REQUEST],
}
CASES = [
    pytest.param(entry, signature, call, id=f"{entry.module[11:]}.{entry.name}{number}")
    for entry in core.ENTRY_POINTS
    for number, (signature, call) in enumerate(
        (signature, call)
        for signature, calls in FORMS.get((entry.site[1], entry.method), [])
        for call in calls
    )
]


class Recorded(NamedTuple):
    kind: str
    effect: str
    runners: list[Any]
    details: dict[str, Any]


def method(signature: str, name: str, answer: Callable[..., Any] = lambda arguments: None) -> Any:
    """A function with this very signature, which returns ``answer`` of its arguments."""
    scope: dict[str, Any] = {"_answer": answer}
    exec(f"def {name}{signature}:\n    'As SGLang says.'\n    return _answer(locals())", scope)
    return scope[name]


def fake_module(entry: core.EntryPoint, **methods: Any) -> types.ModuleType:
    """A module named like the entry's, with its class, with ``methods``."""
    module = types.ModuleType(entry.module)
    members = {"get_model_runner": lambda self: "the runner", "model_runner": "the runner"}
    if entry.site[1]:
        setattr(module, entry.site[1], type(entry.site[1], (), {**members, **methods}))
    else:
        vars(module).update(methods)
    return module


def bound(module: types.ModuleType, entry: core.EntryPoint) -> tuple[Any, Any]:
    """The entry's method on a new object of its class, and that object; or the function."""
    if not entry.site[1]:
        return getattr(module, entry.method), None
    cls = getattr(module, entry.site[1])
    owner = object.__new__(cls)
    return getattr(owner, entry.method), owner


def an_entry(name: str, module: str = "") -> core.EntryPoint:
    return next(
        entry for entry in core.ENTRY_POINTS if entry.name == name and entry.module.endswith(module)
    )


LOAD = an_entry("ModelRunner.load_model")
DISK = an_entry("ModelRunner.update_weights_from_disk")
