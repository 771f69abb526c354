"""Which slot, directory or saved copy a command reads, and what it says where there is none.

On documents of the real recorder; facts are asserted, not screens.  ``tests/real_sglang`` has a
real server.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from ended_command import Run, sentence
from fake_sglang import FakeRunner
from small_model import a_runner

from sglang_weight_hook.layout import files
from sglang_weight_hook.reader import open_slot


def test_with_several_slots_one_must_be_named(run: Run, runner: FakeRunner, maps: Path) -> None:
    second = a_runner(gpu_id=1)
    for command in (["show"], ["regions"]):
        err = sentence(run(*command), 2)
        assert "there are slots 0, 1 in" in err
    assert "in any of 2 slots" in run("lookup", "0x10").out  # looks in all of them
    assert run("show", "1").status == 0
    assert run("verify").status == 0
    assert len(run("report", "--json").json["slots"]) == 2
    del second


@pytest.mark.parametrize("command", [["show"], ["regions"], ["lookup", "0x10"], ["verify"]])
def test_a_slot_that_is_not_there_is_one_sentence(
    command: list[str], run: Run, layout: Any
) -> None:
    ended = run(*command, "7")
    if command == ["verify"]:
        assert ended.status == 3
        assert "readable" in ended.out
    else:
        assert "there is no slot 7" in sentence(ended, 1)


@pytest.mark.parametrize(
    "command", [["show"], ["regions"], ["lookup", "1"], ["diff", "0", "1"], ["report"], ["verify"]]
)
def test_a_directory_that_is_not_there_is_one_sentence(
    command: list[str], run: Run, maps: Path
) -> None:
    assert "SGLANG_WEIGHT_HOOK_DIR" in sentence(run(*command), 1)
    maps.mkdir()
    sentence(run(*command), 1)


def test_a_saved_copy_stands_for_a_slot(run: Run, layout: Any, maps: Path, tmp_path: Path) -> None:
    saved = tmp_path / "copy.json"
    shutil.copy(maps / files.LAYOUT.format(0), saved)
    ended = run("show", saved, "--json", "--dir", "/nowhere")
    assert ended.json["tensors"].keys() == layout["tensors"].keys()
    assert ended.json["owner_alive"] is None
    assert "does not exist" in sentence(run("show", tmp_path / "no.json"), 1)
    saved.write_text("{}")
    assert "not written by the hook" in sentence(run("show", saved), 1)


@pytest.mark.parametrize("command", ["watch", "history", "scrub", "save"])
def test_a_saved_copy_is_refused_where_only_a_slot_will_do(
    command: str, run: Run, layout: Any, maps: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "before.json"
    shutil.copy(maps / files.LAYOUT.format(0), saved)
    more = [tmp_path / "out.safetensors"] if command == "save" else []
    refusal = sentence(run(command, saved, *more), 2)
    assert f"{saved} is a saved file, which has no " in refusal
    assert "name" in refusal.partition(";")[2]


def test_a_dead_owner_is_told_on_stderr(run: Run, maps: Path, run_python: Any) -> None:
    run_python("-c", "from small_model import a_runner; kept = a_runner(); import os; os._exit(0)")
    ended = run("show")
    assert ended.status == 3
    assert run("show", "--allow-stale").status == 0
    assert "has exited, so its addresses are invalid" in ended.err
    assert run("show", "--json").json["owner_alive"] is False


def test_the_slot_is_readable_all_the_while(run: Run, layout: Any, maps: Path) -> None:
    """No command holds the lock or leaves anything behind."""
    before = sorted(path.name for path in maps.iterdir())
    for command in (["show"], ["regions"], ["lookup", "1"], ["report"], ["verify"], ["doctor"]):
        run(*command)
    assert sorted(path.name for path in maps.iterdir()) == before
    with open_slot(str(maps), "0").weights_held(timeout=0):
        pass
