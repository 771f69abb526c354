"""kill -9 at every file operation of claim, publish and release."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path

import pytest

import sglang_weight_hook as hook
from sglang_weight_hook.layout import files
from tests.stress.processes import (
    COUNT,
    KILL_AFTER,
    KILL_BEFORE,
    KILL_WITHIN,
    ForkServer,
    is_mixed,
    published_names,
    whole_files,
)

ALL_FILES = {
    name.format("0")
    for name in (
        *files.DOCUMENTS,
        files.HEADER,
        files.EVENTS,
        files.SAVING_LOCK,
        files.OWNER_LOCK,
    )
}


def operations(fork_server: ForkServer, folder: Path) -> list[str]:
    """What one whole life does to files, in order."""
    told = fork_server.run("life", directory=str(folder / "counted"), at=0, action=COUNT)
    assert told["said"] == []
    trail: list[str] = told["trail"]
    assert len(trail) == told["operations"]
    return trail


def look(maps: Path, seen: Counter[str]) -> None:
    """What a reader finds after the kill: whole documents of one generation, and nobody alive."""
    names = whole_files(maps).keys()
    slot = hook.open_slot(str(maps), "0")
    assert not slot.owner_alive()
    try:
        document = slot.read(timeout=0)
    except hook.HookError:
        # It had not published yet, or had removed its documents already.
        assert not {"weight_state_0.json", "weight_layout_0.json"} <= names
        seen["nothing there"] += 1
        return
    assert not is_mixed(document.raw)
    assert not document.owner_alive()
    seen["whole document"] += 1


@pytest.mark.parametrize("how", [KILL_BEFORE, KILL_WITHIN, KILL_AFTER])
def test_after_a_kill_at_any_operation_the_next_process_takes_over(
    how: int, fork_server: ForkServer, tmp_path: Path, is_long: bool
) -> None:
    trail = operations(fork_server, tmp_path)
    seen: Counter[str] = Counter()
    # The short form takes every eighth, starting elsewhere for each way of killing.
    for at in range(1 if is_long else how, len(trail) + 1, 1 if is_long else 8):
        if how == KILL_WITHIN and is_long and not trail[at - 1].startswith("write"):
            continue
        maps = tmp_path / f"maps{at}"
        status, said = fork_server.wait(
            fork_server.start("life", directory=str(maps), at=at, action=how)
        )
        assert status == -signal.SIGKILL, (at, trail[at - 1], said)
        if maps.exists():
            look(maps, seen)
        told = fork_server.run("successor", directory=str(maps))
        assert (told["slot"], told["said"]) == ("0", []), (at, trail[at - 1])
        assert published_names(maps) == ALL_FILES, (at, trail[at - 1])
        document = hook.open_slot(str(maps), "0").read(timeout=0)
        found = {name: [t["ptr"], t["shape"]] for name, t in document.tensors.items()}
        assert found == told["truth"]
        seen["kills"] += 1
    print(f"{dict(seen)} of {len(trail)} operations")
