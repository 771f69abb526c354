"""Buckets outside of a session: what each writes, and when it looks again.

The runners are fakes (`fake_sglang`), their models are real torch modules, the files are real.
``tests/real_sglang`` has the same events from a real SGLang.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fake_sglang import FakeRunner, event, stream
from published_files import (
    generations,
    inodes,
    layout_file,
    layout_of,
    lock_is_free,
    read,
    state_of,
)

from sglang_weight_hook.layout import files
from sglang_weight_hook.publisher import recorder
from sglang_weight_hook.reader import open_slot

torch = pytest.importorskip("torch")


def test_what_a_call_may_have_written_whose_end_was_never_told_counts_as_changed(
    runner: FakeRunner, maps: Path
) -> None:
    _, content = generations(maps)
    lost = recorder.begin("update_weights_from_disk", "update", [runner])
    runner.model[0].weight.data.fill_(3.0)
    del lost
    event("release_memory_occupation", "release", [runner])
    assert state_of(maps)["state"] == "ready"
    assert generations(maps)[1] == content + 1
    assert read(maps, files.WEIGHTS_META)["0.weight"]["updated"]
    assert lock_is_free(maps)


def test_after_such_a_call_a_bucket_does_not_trust_the_last_capture(
    runner: FakeRunner, maps: Path
) -> None:
    lost = recorder.begin("update_weights_from_disk", "update", [runner])
    del lost
    before = layout_file(maps)
    stream(runner)
    assert layout_file(maps) != before
    before = layout_file(maps)
    stream(runner)
    assert layout_file(maps) == before


def test_a_bucket_written_in_place_replaces_only_the_state_file(
    runner: FakeRunner, maps: Path
) -> None:
    kept = {path.name: open(path, "rb") for path in maps.iterdir()}  # noqa: SIM115
    try:
        for _ in range(3):
            stream(runner, during=lambda: runner.model[0].weight.data.fill_(3.0))
        after = inodes(maps)
        changed = {n for n, file in kept.items() if after[n] != os.fstat(file.fileno()).st_ino}
    finally:
        for file in kept.values():
            file.close()
    assert changed == {"weight_state_0.json"}
    assert set(after) == set(kept)
    assert generations(maps) == (1, 4)
    assert open_slot(str(maps), "0").read().content_generation == 4


def test_a_bucket_that_moves_a_weight_publishes_everything(runner: FakeRunner, maps: Path) -> None:
    def move() -> None:
        runner.model[0].weight.data = torch.zeros(3, 4)

    stream(runner, during=move)
    assert generations(maps) == (2, 2)
    assert (
        layout_of(maps)["tensors"]["0.weight"]["ptr"]
        == read(maps, files.WEIGHTS_META)["0.weight"]["ptr"]
        == runner.model[0].weight.data_ptr()
    )
