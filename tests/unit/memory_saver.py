"""SGLang's memory saver and the scheduler that uses it, as fakes, and what a slot says of them.

The scheduler, its request and the memory saver are fakes with the names and the order of
SGLang's own (`managers/scheduler_components/weight_updater.py`, 0.5.23), wrapped by the real
patch core; the recorder, the tensors and the files are real.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from published_files import layout_of, state_of

import sglang_weight_hook_patch_core as core

TAGS = ("kv_cache", "weights", "cuda_graph")
RESIDENT = dict.fromkeys(("weights", "kv_cache", "cuda_graph"), "resident")


class FakeMemorySaver:
    """A fake of SGLang's TorchMemorySaverAdapter, real or no-op."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.paused: list[str] = []
        self.fails_at: str | None = None

    def pause(self, tag: str) -> None:
        self._may_fail(tag)
        self.paused.append(tag)

    def resume(self, tag: str) -> None:
        self._may_fail(tag)
        self.paused.remove(tag)

    def _may_fail(self, tag: str) -> None:
        if tag == self.fails_at:
            raise RuntimeError("the memory saver failed")


class FakeRequest:
    def __init__(self, tags: Any = None) -> None:
        self.tags = tags


def scheduler_with(memory_saver: FakeMemorySaver) -> Any:
    """A fake scheduler whose two methods the patch core has wrapped."""

    class Manager:
        def __init__(self) -> None:
            self.memory_saver_adapter = memory_saver
            self.offload_tags: set[str] = set()
            self.during: Callable[[], None] = lambda: None

        def release_memory_occupation(self, recv_req: FakeRequest) -> str:
            assert not self.offload_tags & {"busy"}, "release_memory_occupation while busy"
            for tag in recv_req.tags or TAGS:
                self.offload_tags.add(tag)
                self.memory_saver_adapter.pause(tag)
            self.during()
            return "released"

        def resume_memory_occupation(self, recv_req: FakeRequest) -> str:
            for tag in recv_req.tags or TAGS:
                self.offload_tags.remove(tag)  # KeyError where it was not released
                self.memory_saver_adapter.resume(tag)
            self.during()
            return "resumed"

    for entry in core.ENTRY_POINTS:
        if entry.site == core.SCHEDULER_UPDATER:
            wrapped = core.make_wrapper(getattr(Manager, entry.method), entry)
            setattr(Manager, entry.method, wrapped)
    return Manager()


def standing(maps: Path, slot: str = "0") -> dict[str, Any]:
    """What both documents say of states and generations, which must be the same."""
    fields = (
        "state",
        "layout_generation",
        "content_generation",
        "physical_epoch",
        "kv_physical_epoch",
        "residency",
    )
    state, layout = state_of(maps, slot), layout_of(maps, slot)
    assert [state[field] for field in fields] == [layout[field] for field in fields]
    return {field: state[field] for field in fields}


FRESH = {
    "state": "ready",
    "layout_generation": 1,
    "content_generation": 1,
    "physical_epoch": 0,
    "kv_physical_epoch": 0,
    "residency": RESIDENT,
}
