"""What `diff` says where registrations cannot be relied on, and where it cannot know."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from ended_command import Run
from fake_sglang import FakeRunner, stream

from sglang_weight_hook.layout import files


@pytest.fixture
def saved(layout: Any, maps: Path, tmp_path: Path) -> Path:
    path = tmp_path / "before.json"
    shutil.copy(maps / files.LAYOUT.format(0), path)
    return path


def test_two_saved_copies_around_writes_in_place_do_not_claim_equal_contents(
    run: Run, runner: FakeRunner, saved: Path, maps: Path, tmp_path: Path
) -> None:
    stream(runner)
    after = tmp_path / "after.json"
    shutil.copy(maps / files.LAYOUT.format(0), after)
    assert saved.read_bytes() == after.read_bytes()
    ended = run("diff", saved, after)
    assert ended.status == 0
    assert "contents are the same" not in ended.out
    assert "unknown" in ended.out
    assert run("diff", saved, after, "--json").json["content_changed"] is None
    assert run("diff", saved, "0", "--json").json["content_changed"] is True


@pytest.mark.parametrize(
    ("state", "said"), [("updating", "half written"), ("released", "touching the addresses faults")]
)
def test_a_slot_that_is_not_to_be_used_now_holds_no_registration(
    state: str, said: str, run: Run, saved: Path, maps: Path
) -> None:
    path = maps / files.STATE.format(0)
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "state": state}))
    ended = run("diff", saved, "0")
    assert ended.status == 3
    assert "registrations hold" not in ended.out
    assert said in ended.out
    found = run("diff", saved, "0", "--json")
    assert found.status == 3
    assert said in found.json["obstacle"]


@pytest.mark.parametrize("field", ["hostname", "boot_id", "pid_namespace"])
def test_equal_pids_of_two_machines_are_two_processes(
    field: str, run: Run, layout: Any, saved: Path, tmp_path: Path
) -> None:
    layout["identity"][field] = "another"
    after = tmp_path / "after.json"
    after.write_text(json.dumps(layout))
    ended = run("diff", saved, after)
    assert ended.status == 3
    assert "another process" in ended.out
