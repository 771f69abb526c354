"""Sums: what is shared counts once, and on a GPU the parts add up to the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_sglang import settle
from small_model import Model, a_runner

from sglang_weight_hook.reader import Document, HookError, Slot, open_slot, totals

GIB = 1 << 30


def a_tensor(ptr: int, size: int, **more: Any) -> dict[str, Any]:
    return {
        "ptr": ptr,
        "size": size,
        "device": "cuda:0",
        "dtype": "torch.uint8",
        "shape": [size],
        "stride": [1],
        "kind": "parameter",
        **more,
    }


def a_buffer(ptr: int, size: int) -> dict[str, Any]:
    return {"name": "k", "ptr": ptr, "size": size, "device": "cuda:0", "shape": [size]}


def gpu_document(
    slot: str,
    tensors: dict[str, Any],
    pid: int = 1,
    gpu: str = "GPU-1",
    at: float = 0.0,
    cache: Any = (),
    residency: Any = None,
    **memory: Any,
) -> Document:
    """What a CUDA server's document says; no recorder makes one without a GPU."""
    figures = {
        "weights_bytes": sum(tensor["size"] for tensor in tensors.values()),
        "kv_cache_bytes": sum(buffer["size"] for buffer in cache),
        "lora_bytes": 0,
        "siblings_bytes": 0,
        "other_live_bytes": 0,
        "reserved_free_bytes": 0,
        **memory,
    }
    raw = {
        "identity": {
            "hostname": "node",
            "boot_id": "b",
            "pid": pid,
            "process_start_ticks": pid,
            "gpu_id": 0,
            "gpu_uuid": gpu,
            "device": "cuda",
        },
        "tensors": tensors,
        "regions": [],
        "memory": {**figures, "kv_cache": list(cache)},
        "updated_at": at,
    }
    return Document(Slot("/maps", slot), raw, {"state": "ready", "residency": residency})


def whole(gpu: totals.Gpu) -> int:
    parts = (gpu.weights, gpu.lora, gpu.kv_cache, gpu.other_live, gpu.reserved_free)
    return sum(part or 0 for part in (*parts, gpu.outside, gpu.free)) - (gpu.unbacked or 0)


def test_a_cpu_server_is_summed_and_its_device_is_not_known(maps: Path) -> None:
    runner = a_runner()
    document = open_slot(str(maps), "0").read()
    (gpu,) = totals.per_gpu([document])
    assert gpu.weights == document.memory["weights_bytes"]
    assert gpu.kv_cache == document.memory["kv_cache_bytes"] == 2 * 8 * 2 * 4 * 4
    assert (gpu.total, gpu.free, gpu.outside, gpu.other_live) == (None,) * 4
    assert gpu.slots == ("0",)
    del runner


def test_a_draft_that_shares_its_targets_storages_adds_only_its_own(maps: Path) -> None:
    target = a_runner()
    draft_model = Model()
    draft_model.embed_tokens = target.model.embed_tokens
    draft_model.lm_head = target.model.lm_head
    draft = a_runner(draft_model, draft=True)
    settle()
    slots = [open_slot(str(maps), name).read() for name in ("0", "0_draft")]
    (gpu,) = totals.per_gpu(slots)
    shared = target.model.embed_tokens.weight.nbytes
    assert gpu.weights == sum(slot.memory["weights_bytes"] for slot in slots) - shared
    assert gpu.slots == ("0", "0_draft")
    # The same documents twice change nothing.
    assert totals.per_gpu([*slots, *slots])[0].weights == gpu.weights
    del draft


def test_the_parts_of_a_gpu_add_up(maps: Path) -> None:
    document = gpu_document(
        "0",
        {"w": a_tensor(4096, 3 * GIB)},
        cache=[a_buffer(8 * GIB, 2 * GIB)],
        other_live_bytes=GIB,
        reserved_free_bytes=GIB,
        device_free_bytes=2 * GIB,
        device_total_bytes=10 * GIB,
    )
    (gpu,) = totals.per_gpu([document])
    assert (gpu.weights, gpu.kv_cache, gpu.outside, gpu.unbacked) == (3 * GIB, 2 * GIB, GIB, 0)
    assert whole(gpu) == gpu.total == 10 * GIB


def test_two_servers_on_one_gpu_are_one_row_and_the_newest_tells_what_is_free() -> None:
    device = {"device_total_bytes": 10 * GIB}
    one = gpu_document("0", {"w": a_tensor(4096, GIB)}, 1, device_free_bytes=8 * GIB, **device)
    two = gpu_document(
        "0.b", {"w": a_tensor(4096, GIB)}, 2, at=1.0, device_free_bytes=7 * GIB, **device
    )
    (gpu,) = totals.per_gpu([one, two])
    assert gpu.weights == 2 * GIB  # the same address in two processes is two storages
    assert gpu.free == 7 * GIB
    assert whole(gpu) == 10 * GIB


def test_slots_of_a_gpu_come_by_number() -> None:
    names = ["0_draft10", "0_draft2", "0", "0_draft"]
    (gpu,) = totals.per_gpu([gpu_document(name, {"w": a_tensor(4096, GIB)}) for name in names])
    assert gpu.slots == ("0", "0_draft", "0_draft2", "0_draft10")


def test_gpus_of_several_hosts_are_rows_and_a_sum() -> None:
    documents = [
        gpu_document(
            "0",
            {"w": a_tensor(4096, GIB)},
            gpu=f"GPU-{n}",
            device_free_bytes=GIB,
            device_total_bytes=4 * GIB,
        )
        for n in range(3)
    ]
    gpus = totals.per_gpu(documents)
    assert len(gpus) == 3
    total = totals.together(gpus)
    assert (total.weights, total.free, total.total) == (3 * GIB, 3 * GIB, 12 * GIB)
    assert whole(total) == total.total


def test_released_memory_is_said_to_be_so() -> None:
    document = gpu_document(
        "0",
        {"w": a_tensor(4096, 3 * GIB)},
        cache=[a_buffer(8 * GIB, GIB)],
        residency={"weights": "released", "kv_cache": "resident"},
        device_free_bytes=9 * GIB,
        device_total_bytes=10 * GIB,
    )
    (gpu,) = totals.per_gpu([document])
    assert gpu.released == 3 * GIB
    assert gpu.unbacked == 3 * GIB
    assert whole(gpu) == 10 * GIB


def test_a_release_hides_no_memory_of_other_processes() -> None:
    document = gpu_document(
        "0",
        {"w": a_tensor(4096, 30 * GIB)},
        residency={"weights": "released"},
        device_free_bytes=60 * GIB,
        device_total_bytes=80 * GIB,
    )
    (gpu,) = totals.per_gpu([document])
    assert (gpu.outside, gpu.unbacked) == (20 * GIB, 30 * GIB)
    assert whole(gpu) == 80 * GIB


def test_offloaded_weights_are_counted_apart() -> None:
    tensors = {
        "w": a_tensor(4096, GIB),
        "off": a_tensor(1 << 40, 2 * GIB, device="cpu", resident=False),
        "meta": a_tensor(0, GIB, device="meta", resident=False),
    }
    (gpu,) = totals.per_gpu([gpu_document("0", tensors)])
    assert (gpu.weights, gpu.elsewhere) == (GIB, 2 * GIB)


def test_a_storage_under_several_headings_counts_once() -> None:
    tensors = {"w": a_tensor(4096, GIB), "l": a_tensor(4096, GIB, kind="lora")}
    (gpu,) = totals.per_gpu([gpu_document("0", tensors, cache=[a_buffer(4096, GIB)])])
    assert (gpu.weights, gpu.lora, gpu.kv_cache) == (GIB, 0, 0)


def test_a_document_of_an_earlier_release_is_summed_without_the_rest() -> None:
    document = gpu_document("0", {"w": a_tensor(4096, GIB)})
    document.raw["memory"] = {}
    (gpu,) = totals.per_gpu([document])
    assert (gpu.weights, gpu.total, gpu.outside) == (GIB, None, None)


def test_nothing_sums_to_nothing() -> None:
    assert totals.per_gpu([]) == []
    assert totals.together([]).total is None


def test_a_figure_that_is_none_is_one_error() -> None:
    document = gpu_document("0", {}, other_live_bytes="many")
    with pytest.raises(HookError, match="memory has no valid 'other_live_bytes'"):
        totals.per_gpu([document])
