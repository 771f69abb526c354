"""A slot that is stale or not ready: every command says so on stderr and exits with 3."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fake_sglang import FakeRunner, event, update

from sglang_weight_hook.reader import open_slot

if TYPE_CHECKING:
    from ended_command import Run

COMMANDS = ["show", "regions", "lookup", "diff", "report", "plot"]


@pytest.fixture
def saved(maps: Path, layout: Any, tmp_path: Path) -> Path:
    """A copy of the map as it was while all was well."""
    path = tmp_path / "before.json"
    shutil.copy(maps / "weight_layout_0.json", path)
    return path


def arguments(command: str, saved: Path, layout: Any, tmp_path: Path) -> list[object]:
    return {
        "lookup": [max(tensor["ptr"] for tensor in layout["tensors"].values())],
        "diff": [saved, "0"],
        "plot": ["--output", tmp_path / "map.html"],
    }.get(command, [])


@pytest.fixture
def dead(maps: Path, tmp_path: Path, layout: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory whose owner has exited: a copy, which nobody has locked."""
    place = tmp_path / "dead"
    shutil.copytree(maps, place)
    monkeypatch.setenv("SGLANG_WEIGHT_HOOK_DIR", str(place))
    return place


@pytest.mark.parametrize("command", COMMANDS)
def test_a_live_slot_is_a_good_answer(
    command: str, run: Run, saved: Path, layout: Any, tmp_path: Path
) -> None:
    ended = run(command, *arguments(command, saved, layout, tmp_path))
    assert (ended.status, ended.complaints) == (0, [])


@pytest.mark.parametrize("command", COMMANDS)
def test_a_dead_owner_is_told_and_exits_with_3(
    command: str, run: Run, saved: Path, layout: Any, dead: Path, tmp_path: Path
) -> None:
    given = arguments(command, saved, layout, tmp_path)
    ended = run(command, *given)
    assert ended.status == 3
    assert "exited" in ended.err
    assert "registrations hold" not in ended.out
    allowed = run(command, *given, "--allow-stale")
    assert allowed.status == 0
    assert "exited" in allowed.err


@pytest.mark.parametrize("state", ["released", "failed"])
@pytest.mark.parametrize("command", COMMANDS)
def test_another_state_than_ready_is_told_and_exits_with_3(
    command: str,
    state: str,
    run: Run,
    runner: FakeRunner,
    saved: Path,
    layout: Any,
    tmp_path: Path,
) -> None:
    if state == "released":
        details = {"tags": ["weights"], "physical": True}
        event("release_memory_occupation", "release", [runner], details=details)
    else:
        event("update_weights_from_disk", "update", [runner], result=(False, "no"))
    given = arguments(command, saved, layout, tmp_path)
    ended = run(command, *given)
    assert ended.status == 3
    assert state in ended.err or "physical memory" in ended.err
    assert run(command, *given, "--allow-stale").status == 0


@pytest.mark.parametrize("command", ["show", "regions", "lookup", "diff"])
def test_json_says_it_at_the_top(
    command: str, run: Run, saved: Path, layout: Any, dead: Path, tmp_path: Path
) -> None:
    ended = run(command, *arguments(command, saved, layout, tmp_path), "--json")
    found = json.loads(ended.out)
    assert ended.status == 3
    assert (found["owner_alive"], found["state"]) == (False, "ready")


def test_saved_copies_are_what_they_are(run: Run, saved: Path) -> None:
    ended = run("show", saved)
    assert (ended.status, ended.complaints) == (0, [])


def test_documents_that_contradict_themselves_are_not_compared(
    run: Run, runner: FakeRunner, saved: Path, tmp_path: Path, maps: Path
) -> None:
    update(runner)
    layout = json.loads((maps / "weight_layout_0.json").read_bytes())
    name = next(n for n, tensor in layout["tensors"].items() if tensor["resident"])
    layout["tensors"][name]["ptr"] = 64
    other = tmp_path / "after.json"
    other.write_text(json.dumps(layout))
    ended = run("diff", saved, other)
    assert (ended.status, ended.out) == (1, "")
    assert f"tensor {name} outside of every region" in ended.err


def test_the_library_says_it_too(maps: Path, dead: Path) -> None:
    document = open_slot(str(dead), "0").read()
    assert not document.owner_alive()


def test_report_names_many_dead_slots_in_one_line(
    run: Run, dead: Path, maps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1, 64):
        for name in ("weight_layout_{}.json", "weight_state_{}.json", "weight_owner_{}.lock"):
            shutil.copy(dead / name.format(0), dead / name.format(number))
    ended = run("report")
    assert ended.status == 3
    (line,) = ended.err.splitlines()
    assert "slots 0, 1, 2, 3, 4, 5 and 58 more" in line
    assert "are left out: their owners have exited" in line
    # A program gets a table without rows, not nothing.
    headings = run("report", "-o", "csv").out.splitlines()
    assert len(headings) == 1
    assert headings[0].startswith("hostname,gpu_id,")
    assert len(run("report", "--gone", "--allow-stale", "-o", "csv").out.splitlines()) > 1


@pytest.mark.parametrize("more", [[], ["--gone"]])
def test_report_watch_names_many_dead_slots_in_one_line(
    more: list[str], run: Run, dead: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang_weight_hook.commands import report

    def sleep(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(report.time, "sleep", sleep)
    monkeypatch.setenv("COLUMNS", "300")
    for number in range(1, 9):
        for name in ("weight_layout_{}.json", "weight_state_{}.json", "weight_owner_{}.lock"):
            shutil.copy(dead / name.format(0), dead / name.format(number))
    told = [line for line in run("report", "--watch", *more).out.splitlines() if "exited" in line]
    assert len(told) == 1
    assert "0, 1, 2, 3, 4, 5 and 3 more" in told[0]
