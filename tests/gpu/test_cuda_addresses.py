"""Published addresses and regions, held against the driver's and torch's own answers."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from sglang_weight_hook.publisher.devices import cuda_driver
from tests.gpu.cuda_model import (
    IN_CHILD,
    Driver,
    expandable_segments,
    fixed,
    layout_in,
    live_tensors,
    load,
    noise,
    state_in,
)
from tests.unit.fake_sglang import FakeRunner, stream, update

torch: Any = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("maps"),
]


def test_every_tensor_is_published_where_torch_has_it(runner: FakeRunner, layout: Any) -> None:
    live = live_tensors(runner)
    assert set(layout["tensors"]) == set(live)
    for name, tensor in live.items():
        published = layout["tensors"][name]
        assert published["ptr"] == tensor.data_ptr(), name
        assert published["storage_ptr"] == tensor.untyped_storage().data_ptr(), name
        assert published["storage_size"] == tensor.untyped_storage().nbytes(), name
        assert published["device"] == f"cuda:{runner.gpu_id}", name
        assert published["resident"] is True, name
    assert layout["tensors"]["embed.weight"]["aliases"] == ["head.weight"]


def test_every_byte_of_every_tensor_is_read_back_through_its_published_address(
    runner: FakeRunner, layout: Any, driver: Driver
) -> None:
    torch.cuda.synchronize()
    for name, tensor in live_tensors(runner).items():
        published = layout["tensors"][name]
        if tensor.numel() == 0:
            assert published["span"] == 0
            continue
        raw = torch.frombuffer(driver.read(published["ptr"], published["span"]), dtype=torch.uint8)
        dtype = getattr(torch, published["dtype"].rpartition(".")[2])
        seen = raw.view(dtype).as_strided(published["shape"], published["stride"])
        expected = tensor.detach().cpu()
        same = torch.equal(
            seen.contiguous().view(-1).view(torch.uint8),
            expected.contiguous().view(-1).view(torch.uint8),
        )
        assert same, f"{name} at {published['ptr']:#x} reads differently: {published}"


def test_every_region_can_be_read_from_its_first_to_its_last_byte(
    layout: Any, driver: Driver
) -> None:
    for region in layout["regions"]:
        assert len(driver.read(region["ptr"], region["size"])) == region["size"]


def test_each_region_lies_in_one_driver_allocation(layout: Any, driver: Driver) -> None:
    assert layout["regions"]
    for region in layout["regions"]:
        first, last = region["ptr"], region["ptr"] + region["size"] - 1
        said = (region["allocation_ptr"], region["allocation_size"])
        assert region["allocation_source"] == "driver", region
        assert driver.address_range(first) == driver.address_range(last) == said, region
        assert said[0] <= first, region
        assert last < sum(said), region


def test_the_regions_cover_every_tensor_and_nothing_twice(layout: Any) -> None:
    regions = layout["regions"]
    for one, following in zip(regions, regions[1:]):
        assert one["ptr"] + one["size"] <= following["ptr"], (one, following)
    for name, tensor in layout["tensors"].items():
        start, end = tensor["ptr"], tensor["ptr"] + tensor["span"]
        held = [region for region in regions if name in region["tensors"]]
        covered = sum(
            max(0, min(end, region["ptr"] + region["size"]) - max(start, region["ptr"]))
            for region in held
        )
        assert covered == tensor["span"], (name, tensor, held)


def test_the_kind_of_each_allocation_is_as_the_driver_and_the_allocator_have_it(
    runner: FakeRunner, layout: Any, driver: Driver
) -> None:
    expandable = expandable_segments(runner.gpu_id)
    assert bool(expandable) == bool(os.environ.get(IN_CHILD)), "the allocator is not as it was set"
    for region in layout["regions"]:
        mapped = driver.is_mapped(region["ptr"])
        in_expandable = any(start <= region["ptr"] < start + size for start, size in expandable)
        assert region["allocation_kind"] == ("vmm" if mapped else "cuda_malloc"), (
            f"{region} lies in memory of cuMemMap: {mapped}; in an expandable segment: "
            f"{in_expandable}; allocation_kind() now: "
            f"{cuda_driver.allocation_kind(region['ptr'])}"
        )
        assert mapped == in_expandable, region


def test_a_tensor_over_several_driver_allocations_has_a_region_in_each(
    runner: FakeRunner, layout: Any, driver: Driver
) -> None:
    big = layout["tensors"]["big"]
    pieces = []
    position, end = big["ptr"], big["ptr"] + big["span"]
    while position < end:
        pieces.append(driver.address_range(position))
        position = sum(pieces[-1])
    held = [region for region in layout["regions"] if "big" in region["tensors"]]
    assert [(r["allocation_ptr"], r["allocation_size"]) for r in held] == pieces
    if expandable_segments(runner.gpu_id):
        assert len(pieces) > 1, f"torch no longer maps in pieces: {pieces}"


def test_a_weight_on_the_host_is_never_a_device_address(maps: Path) -> None:
    model = torch.nn.Module()
    model.here = fixed(noise(torch.float32, 4))
    model.offloaded = fixed(torch.zeros(4))
    model.pinned = fixed(torch.zeros(4).pin_memory())
    model.nowhere = fixed(torch.zeros(4, device="meta"))
    runner = load(model)
    layout = layout_in(maps)
    for name in ("offloaded", "pinned", "nowhere"):
        published = layout["tensors"][name]
        assert (published["ptr"], published["resident"]) == (0, False), name
    assert sorted(layout["validation"]["not_resident"]) == ["nowhere", "offloaded", "pinned"]
    assert [region["tensors"] for region in layout["regions"]] == [["here"]]
    assert runner.model.here.data_ptr() == layout["regions"][0]["ptr"]


def test_a_thread_without_a_cuda_context_of_its_own_publishes_the_same_regions(
    runner: FakeRunner, layout: Any, maps: Path
) -> None:
    thread = threading.Thread(target=update, args=(runner,))
    thread.start()
    thread.join()
    after = layout_in(maps)
    assert after["event"]["kind"] == "update_weights_from_disk"
    assert after["regions"] == layout["regions"]
    assert after["layout_generation"] == layout["layout_generation"]
    assert after["content_generation"] == layout["content_generation"] + 1


def test_a_weight_that_moved_in_one_bucket_is_published_at_its_new_address(
    runner: FakeRunner, layout: Any, maps: Path, driver: Driver
) -> None:
    stream(runner)
    assert state_in(maps)["layout_generation"] == layout["layout_generation"]
    old = runner.model.embed.weight.data
    runner.model.embed.weight.data = old.clone()
    stream(runner)
    after = layout_in(maps)
    assert after["layout_generation"] == layout["layout_generation"] + 1
    assert after["tensors"]["embed.weight"]["ptr"] == runner.model.embed.weight.data_ptr()
    assert after["tensors"]["embed.weight"]["ptr"] != old.data_ptr()
    assert after["event"]["moved"] == 1
