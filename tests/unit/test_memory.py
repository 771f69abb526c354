"""The memory figures add up, and what several slots share is counted once.

The allocator's snapshots are synthetic, in the form that ``torch.cuda.memory_snapshot`` gives
(``tests/gpu`` has real ones); where slots are published, the runners are fakes, their tensors
and the recorder are real.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fake_sglang import FakeRunner, load, settle, update
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memory_figures import sum_of_parts

from sglang_weight_hook.layout import files
from sglang_weight_hook.publisher import memory, recorder
from sglang_weight_hook.publisher.devices import cuda_driver
from sglang_weight_hook.publisher.devices.torch_memory import Allocator, DeviceMemory, allocator
from sglang_weight_hook.publisher.memory import account, reconcile

torch = pytest.importorskip("torch")
nn = torch.nn

LIVE = ("active_allocated", "active_pending_free")
KINDS = ("weights", "lora", "kv_cache", "siblings")


class World(NamedTuple):
    """A device, what is on it, and the truth about it."""

    segments: list[dict[str, Any]]
    named: dict[str, dict[int, int]]  # kind -> storage -> bytes
    inside: int  # bytes of named storages in live blocks
    outside: int  # bytes of named storages that are not the allocator's
    context: int  # bytes of what is neither
    released: int  # bytes whose pages the memory saver took from the allocator's segments
    free: int

    @property
    def reserved(self) -> int:
        return sum(segment["total_size"] for segment in self.segments)

    @property
    def live(self) -> int:
        blocks = [block for segment in self.segments for block in segment["blocks"]]
        return sum(block["size"] for block in blocks if block["state"] in LIVE)

    @property
    def total(self) -> int:
        return self.reserved - self.released + self.outside + self.context + self.free

    @property
    def device(self) -> DeviceMemory:
        return DeviceMemory(self.total, self.free, allocator(self.segments))

    def account(self) -> dict[str, Any]:
        return account(self.device, *(self.named[kind] for kind in KINDS))


@st.composite
def worlds(draw: st.DrawFn, with_addresses: bool = True, releasing: bool = False) -> World:
    address = 1 << 40
    segments: list[dict[str, Any]] = []
    named: dict[str, dict[int, int]] = {kind: {} for kind in KINDS}
    inside = outside = 0
    for _ in range(draw(st.integers(0, 4))):
        address += 512 * draw(st.integers(0, 3))  # 0: right behind the one before
        blocks, start = [], address
        for _ in range(draw(st.integers(1, 5))):
            block: dict[str, Any] = {
                "size": 512 * draw(st.integers(1, 6)),
                "state": draw(st.sampled_from([*LIVE, "inactive"])),
            }
            if with_addresses:
                block["address"] = address
            blocks.append(block)
            if block["state"] in LIVE and draw(st.booleans()):
                size = draw(st.integers(1, block["size"]))
                named[draw(st.sampled_from(KINDS))][address] = size
                inside += size
            address += block["size"]
        segments.append({"address": start, "total_size": address - start, "blocks": blocks})
    address += 4096
    for _ in range(draw(st.integers(0, 3))):
        size = draw(st.integers(1, 9000))
        named[draw(st.sampled_from(KINDS))][address] = size
        outside += size
        address += size
    reserved = sum(segment["total_size"] for segment in segments)
    return World(
        draw(st.permutations(segments)),
        named,
        inside,
        outside,
        draw(st.integers(0, 5000)),
        draw(st.integers(0, reserved)) if releasing else 0,
        draw(st.integers(0, 9000)),
    )


def adds_up(figures: dict[str, Any]) -> bool:
    return bool(sum_of_parts(figures) == figures["device_total_bytes"])


# --- one device ---------------------------------------------------------------------------


@given(worlds())
def test_each_figure_is_what_is_really_there(world: World) -> None:
    figures = world.account()
    assert figures == {
        **{f"{kind}_bytes": sum(world.named[kind].values()) for kind in KINDS},
        "other_live_bytes": world.live - world.inside,
        "reserved_free_bytes": world.reserved - world.live,
        "other_bytes": world.context,
        "unbacked_bytes": 0,
        "device_free_bytes": world.free,
        "device_total_bytes": world.total,
    }


@given(worlds(releasing=True))
def test_the_figures_add_up_to_the_devices_total_and_none_is_negative(world: World) -> None:
    figures = world.account()
    assert adds_up(figures)
    assert min(figures.values()) >= 0


@given(worlds(releasing=True))
def test_pages_taken_away_are_never_more_than_unbacked_and_what_hides_them(world: World) -> None:
    # The driver tells only what is used, so the pages that are released and what else is on the
    # device can't be told apart: one of the two figures is their difference, the other 0.
    figures = world.account()
    assert figures["other_bytes"] - figures["unbacked_bytes"] == world.context - world.released
    assert 0 in (figures["other_bytes"], figures["unbacked_bytes"])


@given(worlds())
def test_blocks_without_addresses_follow_one_another(world: World) -> None:
    plain = [
        {
            **segment,
            "blocks": [
                {key: value for key, value in block.items() if key != "address"}
                for block in segment["blocks"]
            ],
        }
        for segment in world.segments
    ]
    assert allocator(plain) == allocator(world.segments)


@given(worlds())
def test_an_address_is_held_exactly_where_a_live_block_is(world: World) -> None:
    found = allocator(world.segments)
    assert (found.reserved, found.live) == (world.reserved, world.live)
    for segment in world.segments:
        assert not found.holds(segment["address"] - 1) or any(
            other["address"] + other["total_size"] == segment["address"] for other in world.segments
        )
        for block in segment["blocks"]:
            for address in (block["address"], block["address"] + block["size"] - 1):
                assert found.holds(address) is (block["state"] in LIVE)


def test_an_allocator_without_a_segment_holds_nothing() -> None:
    found = allocator([])
    assert found == Allocator(0, 0, [], [])
    assert not found.holds(0)
    assert not found.holds(1 << 40)


@given(worlds())
def test_what_is_live_is_explained_or_not_and_what_lies_outside_is_counted(world: World) -> None:
    named = {start: size for kind in world.named.values() for start, size in kind.items()}
    found = reconcile(world.device, named)
    assert found is not None
    assert found["live_bytes"] == world.live
    assert found["explained_bytes"] == world.inside
    assert found["unexplained_bytes"] == world.live - world.inside >= 0
    beyond = max((s["address"] + s["total_size"] for s in world.segments), default=0)
    assert found["storages_outside"] == sum(start >= beyond for start in named)


def test_without_a_device_its_figures_are_null_and_the_others_stand() -> None:
    figures = account(None, {1: 10, 2: 20}, {3: 3}, {4: 4}, {5: 5})
    assert figures == {
        "weights_bytes": 30,
        "lora_bytes": 3,
        "kv_cache_bytes": 4,
        "siblings_bytes": 5,
        **dict.fromkeys(
            (
                "other_live_bytes",
                "reserved_free_bytes",
                "other_bytes",
                "unbacked_bytes",
                "device_free_bytes",
                "device_total_bytes",
            )
        ),
    }
    assert reconcile(None, {1: 10}) is None


def test_a_runner_on_no_gpu_and_a_process_without_cuda_have_no_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert memory.device("cuda") is None
    monkeypatch.setattr(cuda_driver, "is_initialised", lambda: True)
    assert memory.device("cpu") is None


def test_the_snapshot_of_the_current_device_alone_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def segment(device: int, address: int) -> dict[str, Any]:
        blocks = [{"size": 512, "state": "active_allocated"}]
        return {"device": device, "address": address, "total_size": 2048, "blocks": blocks}

    monkeypatch.setattr(cuda_driver, "is_initialised", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (1000 + index, 9000))
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: [segment(0, 4096), segment(1, 8192)])
    assert memory.device("cuda") == DeviceMemory(9000, 1001, Allocator(2048, 512, [8192], [8704]))


# --- several slots of one process, through the recorder -----------------------------------


class Pool:
    """A fake of SGLang's MHATokenToKVPool: one buffer a layer."""

    def __init__(self, layers: int = 2) -> None:
        self.k_buffer = [torch.zeros(8, 4, 2) for _ in range(layers)]
        self.v_buffer = [torch.zeros(8, 4, 2) for _ in range(layers)]


def a_target_and_a_draft() -> tuple[Any, Any]:
    """As speculative decoding has them: the draft has the target's embedding and KV pool."""
    target: Any = FakeRunner(nn.Module())
    target.model.embed_tokens, target.model.layer = nn.Embedding(50, 4), nn.Linear(4, 4)
    target.token_to_kv_pool = Pool()
    draft: Any = FakeRunner(nn.Module(), draft=True)
    draft.model.embed_tokens, draft.model.layer = nn.Embedding(50, 4), nn.Linear(4, 4)
    load(target)
    load(draft)
    # SGLang: set_embed_and_head, after load_model; and the shared allocator.
    draft.model.embed_tokens.weight = target.model.embed_tokens.weight
    draft.token_to_kv_pool = target.token_to_kv_pool
    settle()
    return target, draft


def storages(*tensors: Any) -> dict[int, int]:
    found = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


def layout_of(maps: Path, slot: str) -> Any:
    return json.loads((maps / files.LAYOUT.format(slot)).read_bytes())


def test_a_shared_embedding_and_kv_pool_are_counted_once(maps: Path) -> None:
    target, draft = a_target_and_a_draft()
    documents = [layout_of(maps, slot)["memory"] for slot in ("0", "0_draft")]
    models = [*target.model.parameters(), *draft.model.parameters()]
    weights = storages(*models)
    pool = target.token_to_kv_pool
    cache = storages(*pool.k_buffer, *pool.v_buffer)
    assert sum(m["weights_bytes"] - m["shared_bytes"] for m in documents) == sum(weights.values())
    assert sum(m["kv_cache_bytes"] - m["shared_kv_cache_bytes"] for m in documents) == sum(
        cache.values()
    )
    assert [m["shared_bytes"] for m in documents] == [0, 50 * 4 * 4]
    assert [m["shared_kv_cache_bytes"] for m in documents] == [0, sum(cache.values())]
    assert [m["shared_with"] for m in documents] == [["0_draft"], ["0"]]
    # Each document counts what is its own, and what only the other has, so never both twice.
    for figures in documents:
        named = sum(figures[f"{kind}_bytes"] for kind in KINDS)
        assert named == sum(weights.values()) + sum(cache.values())


def test_slots_that_share_nothing_say_so(maps: Path) -> None:
    runners = [FakeRunner(nn.Linear(3, 3)), FakeRunner(nn.Linear(3, 3), draft=True)]
    for runner in runners:
        load(runner)
    settle()
    for slot in ("0", "0_draft"):
        figures = layout_of(maps, slot)["memory"]
        assert figures["shared_with"] == []
        assert figures["shared_bytes"] == figures["shared_kv_cache_bytes"] == 0
        assert figures["siblings_bytes"] == 48


def test_a_draft_that_stops_sharing_counts_its_own(maps: Path) -> None:
    target, draft = a_target_and_a_draft()
    update(
        draft,
        during=lambda: setattr(draft.model.embed_tokens, "weight", nn.Embedding(50, 4).weight),
    )
    documents = [layout_of(maps, slot)["memory"] for slot in ("0", "0_draft")]
    weights = storages(*target.model.parameters(), *draft.model.parameters())
    assert sum(m["weights_bytes"] - m["shared_bytes"] for m in documents) == sum(weights.values())
    assert [m["shared_with"] for m in documents] == [[], []]


def a_device_that_holds(*tensors: Any) -> DeviceMemory:
    """A fake GPU whose allocator has these CPU storages, in blocks of 512 bytes."""
    segments = []
    for start, size in storages(*tensors).items():
        rounded = -(-size // 512) * 512
        block = {"address": start, "size": rounded, "state": "active_allocated"}
        segments.append({"address": start, "total_size": rounded + 1024, "blocks": [block]})
    found = allocator(segments)
    return DeviceMemory(found.reserved + 7000 + 9000, 9000, found)


def test_every_slots_figures_add_up_to_the_same_total(
    maps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, draft = a_target_and_a_draft()
    pool = target.token_to_kv_pool
    everything = [
        *target.model.parameters(),
        *draft.model.parameters(),
        *pool.k_buffer,
        *pool.v_buffer,
    ]
    device = a_device_that_holds(*everything)
    monkeypatch.setattr(memory, "device", lambda device_type, index: device)
    update(target)
    update(draft)
    named = sum(storages(*everything).values())
    for slot in ("0", "0_draft"):
        layout = layout_of(maps, slot)
        assert adds_up(layout["memory"])
        assert layout["memory"]["other_bytes"] == 7000
        assert layout["memory"]["other_live_bytes"] == device.allocator.live - named
        assert layout["validation"]["allocator"] == {
            "live_bytes": device.allocator.live,
            "explained_bytes": named,
            "unexplained_bytes": device.allocator.live - named,
            "storages_outside": 0,
        }


@settings(
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.lists(
        st.lists(
            st.tuples(st.integers(0, 5), st.sampled_from(["parameter", "attribute", "view", "kv"])),
            max_size=5,
        ),
        min_size=1,
        max_size=3,
    )
)
def test_however_slots_share_their_storages_the_sum_counts_each_once(
    tmp_path: Path, plan: list[list[tuple[int, str]]]
) -> None:
    recorder._after_fork_in_child()  # every example begins with a fresh hook
    pool = [torch.zeros(number + 2, 3) for number in range(6)]
    runners = []
    for place, uses in enumerate(plan):
        runner: Any = FakeRunner(nn.Module(), gpu_id=7, draft=place > 0)
        runner.token_to_kv_pool = cache = Pool(0)
        for number, (which, how) in enumerate(uses):
            tensor = pool[which]
            if how == "parameter":
                runner.model.register_parameter(f"p{number}", nn.Parameter(tensor))
            elif how == "kv":
                cache.k_buffer.append(tensor)
            else:
                setattr(runner.model, f"a{number}", tensor if how == "attribute" else tensor[1:])
        runners.append(runner)
    directory = Path(os.environ["SGLANG_WEIGHT_HOOK_DIR"])
    for runner in runners:
        load(runner)
    settle()
    names = ["7", "7_draft", "7_draft1"][: len(runners)]
    documents = [layout_of(directory, name)["memory"] for name in names]
    used = storages(*(pool[which] for uses in plan for which, _ in uses))
    counted = sum(
        figures["weights_bytes"]
        - figures["shared_bytes"]
        + figures["kv_cache_bytes"]
        - figures["shared_kv_cache_bytes"]
        for figures in documents
    )
    assert counted == sum(used.values())
    for figures in documents:
        assert sum(figures[f"{kind}_bytes"] for kind in KINDS) == sum(used.values())
