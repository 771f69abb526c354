"""Released memory of which the CUDA driver knows nothing, and what the layout says meanwhile.

The scheduler, its request and the memory saver are fakes with the names and the order of
SGLang's own (`managers/scheduler_components/weight_updater.py`, 0.5.23), wrapped by the real
patch core; the recorder, the tensors and the files are real.  The CUDA driver is a fake:
``tests/gpu`` takes real pages away.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_sglang import FakeRunner, load, settle, update
from memory_saver import FakeRequest, standing
from published_files import layout_of

from sglang_weight_hook.reader.diff import diff

torch = pytest.importorskip("torch")
nn = torch.nn


def map_everything(known: dict[int, list[tuple[int, int]]], runner: FakeRunner) -> None:
    for tensor in runner.model.parameters():
        base = tensor.data_ptr() - 64
        known[tensor.data_ptr()] = [(base, 4096)]


@pytest.fixture
def on_gpu(driver: dict[int, list[tuple[int, int]]]) -> FakeRunner:
    runner = FakeRunner(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), device="cuda")
    map_everything(driver, runner)
    load(runner)
    settle()
    return runner


def test_the_layout_stands_while_the_driver_knows_nothing_of_the_memory(
    on_gpu: FakeRunner, driver: dict[int, list[tuple[int, int]]], scheduler: Any, maps: Path
) -> None:
    before = layout_of(maps)
    assert {region["allocation_source"] for region in before["regions"]} == {"driver"}
    assert {region["allocation_kind"] for region in before["regions"]} == {"vmm"}
    scheduler.during = driver.clear  # unmapped: of no allocation
    scheduler.release_memory_occupation(FakeRequest(["weights"]))
    released = layout_of(maps)
    assert released["regions"] == before["regions"]
    assert released["tensors"] == before["tensors"]
    assert released["layout_generation"] == before["layout_generation"] == 1
    update(on_gpu)
    assert layout_of(maps)["regions"] == before["regions"]
    scheduler.during = lambda: map_everything(driver, on_gpu)
    scheduler.resume_memory_occupation(FakeRequest(["weights"]))
    after = layout_of(maps)
    assert after["regions"] == before["regions"]
    assert standing(maps)["layout_generation"] == 1
    assert standing(maps)["physical_epoch"] == 1
    assert diff(before, after).repaged


def test_memory_that_comes_back_in_other_allocations_is_another_layout(
    on_gpu: FakeRunner, driver: dict[int, list[tuple[int, int]]], scheduler: Any, maps: Path
) -> None:
    before = layout_of(maps)
    scheduler.during = driver.clear
    scheduler.release_memory_occupation(FakeRequest(["weights"]))
    scheduler.during = lambda: driver.update(
        {t.data_ptr(): [(t.data_ptr(), 512)] for t in on_gpu.model.parameters()}
    )
    scheduler.resume_memory_occupation(FakeRequest(["weights"]))
    after = layout_of(maps)
    assert after["layout_generation"] == 2
    assert {region["allocation_size"] for region in after["regions"]} == {512}
    assert diff(before, after).must_register_again


def test_a_weight_that_moved_while_released_has_none_of_the_old_ones_allocation(
    on_gpu: FakeRunner, driver: dict[int, list[tuple[int, int]]], scheduler: Any, maps: Path
) -> None:
    scheduler.during = driver.clear
    scheduler.release_memory_occupation(FakeRequest(["weights"]))
    kept = on_gpu.model[0].weight.data
    update(on_gpu, during=lambda: setattr(on_gpu.model[0].weight, "data", kept.clone()))
    region = next(r for r in layout_of(maps)["regions"] if "0.weight" in r["tensors"])
    assert region["allocation_source"] == "storage"
    assert region["ptr"] == region["allocation_ptr"] == on_gpu.model[0].weight.data_ptr()
