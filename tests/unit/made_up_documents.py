"""Layouts as a GPU server would publish them, made up for the tests of the page."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

BASE = 0x7F20_0000_0000
MIB = 1 << 20
GIB = 1 << 30
HOSTILE = (
    "</script><script>document.title='owned'</script>",
    "<!--<script>",
    "<img src=x onerror=document.title='owned'>",
    "a&amp;b\u2028c",
    "\ud800 lone",
    "__proto__",
    "@DATA@ @TITLE@",
    '"\\',
)


def a_tensor(ptr: int, shape: list[int], device: str = "cuda:0", **more: Any) -> dict[str, Any]:
    size = 2
    for length in shape:
        size *= length
    return {
        "ptr": ptr,
        "size": size,
        "span": size,
        "device": device,
        "dtype": "torch.bfloat16",
        "shape": shape,
        "stride": [shape[1], 1] if len(shape) == 2 else [1],
        "storage_offset": 0,
        "storage_ptr": ptr,
        "storage_size": size,
        "kind": "parameter",
        "resident": True,
        "aliases": [],
        **more,
    }


MODULES = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


def layer_names(count: int) -> Iterable[str]:
    for index in range(count):
        yield f"model.layers.{index // 4}.{MODULES[index % 4]}.weight"


def a_document(
    names: Iterable[str] = tuple(layer_names(8)),
    rank: int = 0,
    size: tuple[int, int] = (1024, 1024),
    gap: int = 0,
    **more: Any,
) -> dict[str, Any]:
    tensors, regions, ptr = {}, [], BASE
    device = f"cuda:{rank}"
    for name in names:
        tensor = tensors[name] = a_tensor(ptr, list(size), device)
        regions.append(
            {
                "ptr": ptr,
                "size": tensor["size"],
                "device": device,
                "allocation_ptr": ptr,
                "allocation_size": tensor["size"],
                "allocation_source": "driver",
                "allocation_kind": "cuda_malloc",
                "tensors": [name],
            }
        )
        ptr += tensor["size"] + gap
    weights = sum(tensor["size"] for tensor in tensors.values())
    kv = {"name": "k_buffer.0", "layer": 0, "role": "k", "ptr": ptr + GIB, "size": 4 * MIB}
    return {
        "schema": "sglang-weight-layout",
        "schema_version": 1,
        "state": "ready",
        "layout_generation": 1,
        "content_generation": 1,
        "physical_epoch": 0,
        "updated_at": 1795355421.0,
        "identity": {
            "hostname": "node",
            "boot_id": "b",
            "pid": 7,
            "process_start_ticks": 9,
            "gpu_id": rank,
            "role": "target",
            "device": "cuda",
            "tp_rank": rank,
            "tp_size": 4,
            "model_path": "/models/Tiny",
            "model_class": "LlamaForCausalLM",
        },
        "event": {"kind": "load_model", "success": True, "finished_at": 1795355420.0},
        "memory": {
            "weights_bytes": weights,
            "kv_cache_bytes": 4 * MIB,
            "device_total_bytes": 80 * GIB,
            "device_free_bytes": 60 * GIB,
            "kv_cache": [{**kv, "device": device, "dtype": "torch.bfloat16", "shape": [2, 2]}],
        },
        "validation": {"expected": {"parameter": len(tensors)}, "captured": {}, "left_out": {}},
        "regions": regions,
        "tensors": tensors,
        **more,
    }


def changed(document: dict[str, Any]) -> dict[str, Any]:
    """One tensor moved, one of another size, one removed, one new."""
    later = copy.deepcopy(document)
    later["layout_generation"] += 1
    later["content_generation"] += 1
    tensors = later["tensors"]
    names = list(tensors)
    tensors[names[0]]["ptr"] += 5 * GIB
    tensors[names[1]]["shape"] = [512, 1024]
    tensors[names[1]]["size"] //= 2
    del tensors[names[2]]
    tensors["model.new.weight"] = a_tensor(BASE + 6 * GIB, [256, 256])
    return later
