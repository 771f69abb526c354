"""Waiting for a directory: woken by the kernel, and by looking where there is no inotify."""

from __future__ import annotations

import doctest
import os
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from sglang_weight_hook.reader import Slot, watch
from sglang_weight_hook.reader.watch import DirectoryWatch

BOTH = pytest.mark.parametrize("kernel", [True, False], ids=["inotify", "polling"])


def replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp-1")
    temporary.write_text(text)
    temporary.rename(path)


@BOTH
def test_a_file_renamed_into_place_wakes(tmp_path: Path, kernel: bool) -> None:
    replace(tmp_path / "state.json", "1")
    with DirectoryWatch(str(tmp_path), kernel) as waiting:
        assert waiting.kernel is kernel
        assert not waiting.wait(0.02)
        replace(tmp_path / "state.json", "2")
        assert waiting.wait(5)
        assert not waiting.wait(0.02)


@BOTH
def test_who_waits_is_woken_long_before_the_timeout(tmp_path: Path, kernel: bool) -> None:
    with DirectoryWatch(str(tmp_path), kernel) as waiting:
        timer = threading.Timer(0.1, replace, (tmp_path / "state.json", "1"))
        timer.start()
        started = time.monotonic()
        assert waiting.wait(30)
        assert time.monotonic() - started < 5
        timer.join()


@BOTH
def test_temporary_files_wake_nobody(tmp_path: Path, kernel: bool) -> None:
    with DirectoryWatch(str(tmp_path), kernel) as waiting:
        (tmp_path / ".state.json.tmp-1").write_text("half")
        assert not waiting.wait(0.02)


@BOTH
def test_a_removed_file_wakes(tmp_path: Path, kernel: bool) -> None:
    (tmp_path / "state.json").touch()
    with DirectoryWatch(str(tmp_path), kernel) as waiting:
        (tmp_path / "state.json").unlink()
        assert waiting.wait(5)


def test_a_lock_file_closed_by_a_process_that_ends_wakes(tmp_path: Path) -> None:
    owner = (tmp_path / "owner.lock").open("w")
    with DirectoryWatch(str(tmp_path)) as waiting:
        assert not waiting.wait(0.02)
        owner.close()
        assert waiting.wait(5)


@BOTH
def test_a_directory_may_come_and_go_and_come_again(tmp_path: Path, kernel: bool) -> None:
    folder = tmp_path / "maps"
    with DirectoryWatch(str(folder), kernel) as waiting:
        assert not waiting.kernel
        assert not waiting.wait(0.02)
        for _ in range(2):
            folder.mkdir()
            (folder / "state.json").touch()
            assert waiting.wait(5)
            assert waiting.kernel is kernel
            (folder / "state.json").unlink()
            folder.rmdir()
            assert waiting.wait(5)
            while waiting.kernel:
                waiting.wait(1)


def test_without_a_free_inotify_instance_it_polls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Used:
        def inotify_init1(self, flags: int) -> int:
            return -1

    monkeypatch.setattr(watch, "_inotify", Used)
    with DirectoryWatch(str(tmp_path)) as waiting:
        assert not waiting.kernel
        replace(tmp_path / "state.json", "1")
        assert waiting.wait(5)


def test_without_ctypes_it_polls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ctypes", None)
    with DirectoryWatch(str(tmp_path)) as waiting:
        assert not waiting.kernel


def test_closing_leaves_no_descriptor(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with DirectoryWatch(str(tmp_path)) as waiting:
            waiting.wait(0)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_examples_of_the_module_hold() -> None:
    result = doctest.testmod(watch)
    assert result.attempted
    assert not result.failed


# --- a slot's own watch, kept from one wait to the next ---------------------------------------


def descriptors() -> int:
    """inotify instances that this process has open."""
    targets = (os.path.realpath(entry) for entry in Path("/proc/self/fd").iterdir())
    return sum("inotify" in target for target in targets)


def test_a_slot_keeps_its_watch_and_lets_go_of_it_in_the_end(tmp_path: Path) -> None:
    before = descriptors()
    slot = Slot(str(tmp_path), "0")
    for _ in range(5):
        assert slot.wait_for_change(timeout=0.0) is None
    assert descriptors() == before + 1
    again = pickle.loads(pickle.dumps(slot))
    assert (again.directory, again.name) == (slot.directory, slot.name)
    del slot
    assert descriptors() == before


def test_a_slot_whose_directory_was_replaced_watches_the_new_one(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.mkdir()
    slot = Slot(str(maps), "0")
    assert slot.wait_for_change(timeout=0.0) is None
    maps.rename(tmp_path / "old")
    maps.mkdir()
    assert slot.wait_for_change(timeout=0.0) is None
    with slot._watching() as waiting:
        while waiting.wait(0.0):
            pass
        replace(maps / "state.json", "1")
        assert waiting.kernel
        assert waiting.wait(5.0)


def test_in_a_forked_child_a_watch_of_the_parent_closes_nobody_elses_file(
    run_python: Any, tmp_path: Path
) -> None:
    code = """
import os, sys
from sglang_weight_hook.reader.watch import DirectoryWatch
watch = DirectoryWatch(sys.argv[1])
if not watch.kernel:
    sys.exit()
number = watch._descriptor
pid = os.fork()
if pid == 0:
    # As a daemon does: everything closed, and the numbers used again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    watch.close()
    os.write(number, b"x")
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
watch.close()
try:
    os.fstat(number)
except OSError:
    sys.exit()
sys.exit("it is still open in the parent")
"""
    run_python("-c", code, str(tmp_path))
