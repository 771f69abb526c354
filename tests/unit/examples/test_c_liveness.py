"""The C example: whose lock is held, and whether that process lives; as the Python reader has it.

Each case is judged by both, which must agree.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from documents_by_hand import LAYOUT, LINE, ME, OWNER, STATE
from example_programs import Publisher

from sglang_weight_hook.layout import files, process
from sglang_weight_hook.reader import open_slot

Run = Callable[..., subprocess.CompletedProcess[str]]
Write = Callable[[str, str], Path]


def an_exited_process() -> str:
    """What documents say of a process of this boot that is no more."""
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        ticks = process.start_ticks(child.pid)
    return f'"pid": {child.pid}, "process_start_ticks": {ticks}, "boot_id": "{ME["boot_id"]}"'


def agree(folder: Path, run_c: Run) -> subprocess.CompletedProcess[str]:
    """The C example's answer, which says what the Python reader says."""
    found = open_slot(str(folder), "0").liveness()
    done = run_c(folder)
    if not found.alive:
        assert (done.returncode, done.stdout) == (3, "")
        assert done.stderr == f"print_regions: slot 0 is stale: its owner has exited: {found.why}\n"
    else:
        assert (done.returncode, done.stdout) == (0, LINE), done.stderr
        says = f"print_regions: whether the owner of slot 0 lives is not certain: {found.why}\n"
        assert done.stderr == ("" if found.certain else says)
    return done


def test_a_lock_that_a_stranger_holds_does_not_make_a_dead_owner_live(
    publisher: Publisher, run_c: Run
) -> None:
    publisher.process.kill()
    publisher.process.wait()
    with open(publisher.slot.path(files.OWNER_LOCK), "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = agree(publisher.maps, run_c)
    assert "its process has exited; what holds its lock is another one" in done.stderr


@pytest.mark.parametrize(
    ("state", "layout", "says"),
    [
        ("", "", ""),
        ("another boot", "another boot", "on another host"),
        ("no boot id", "no boot id", ""),
        ("no boot id, another host", "no boot id", "on another host"),
        ("exited", "exited", "what holds its lock is another one"),
        ("exited", "exited, another namespace", "in another pid namespace"),
        ("exited", "exited, no namespace", "in another pid namespace"),
        ("later", "later", "what holds its lock is another one"),
        ("no ticks", "no ticks", "cannot be looked at"),
        ("pid 0", "pid 0", "what holds its lock is another one"),
        ("pid 2^31", "pid 2^31", "what holds its lock is another one"),
    ],
)
def test_the_owner_is_the_process_that_the_state_names(
    state: str, layout: str, says: str, by_hand: Write, run_c: Run
) -> None:
    exited = an_exited_process()

    def changed(document: str, how: str) -> str:
        for part in filter(None, how.split(", ")):
            ticks, boot = f'"process_start_ticks": {ME["process_start_ticks"]}', str(ME["boot_id"])
            old, new = {
                "another boot": (boot, boot[::-1]),
                "no boot id": (f'"{boot}"', "null"),
                "another host": (f'"{socket.gethostname()}"', '"elsewhere"'),
                "exited": (OWNER, exited),
                "another namespace": (str(ME["pid_namespace"]), "pid:[1]"),
                "no namespace": (f'"{ME["pid_namespace"]}"', "null"),
                "later": (ticks, ticks + "0"),
                "no ticks": (ticks, '"process_start_ticks": null'),
                "pid 0": (f'"pid": {ME["pid"]},', '"pid": 0,'),
                "pid 2^31": (f'"pid": {ME["pid"]},', '"pid": 2147483648,'),
            }[part]
            assert old in document
            document = document.replace(old, new)
        return document

    done = agree(by_hand(changed(LAYOUT, layout), changed(STATE, state)), run_c)
    assert says in done.stderr
    assert bool(says) == bool(done.stderr)


def test_a_process_that_waits_for_its_parent_has_exited(by_hand: Write, run_c: Run) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        zombie = (
            f'"pid": {child.pid}, "process_start_ticks": {process.start_ticks(child.pid)}, '
            f'"boot_id": "{ME["boot_id"]}"'
        )
        folder = by_hand(LAYOUT.replace(OWNER, zombie), STATE.replace(OWNER, zombie))
        assert agree(folder, run_c).returncode == 3


@pytest.fixture
def no_lock(by_hand: Write) -> Path:
    """Living documents whose owner lock is to be put there."""
    folder = by_hand(LAYOUT, STATE)
    (folder / "weight_owner_0.lock").unlink()
    return folder


@pytest.mark.parametrize("kind", ["absent", "free", "pipe", "folder", "link", "dangling"])
def test_what_lies_in_the_owner_locks_place(kind: str, no_lock: Path, run_c: Run) -> None:
    path = no_lock / "weight_owner_0.lock"
    if kind == "free":
        path.touch()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind in ("link", "dangling"):
        if kind == "link":
            (no_lock / "other").touch()
        path.symlink_to("other")
    done = agree(no_lock, run_c)
    assert done.returncode == (3 if kind in ("absent", "free") else 0)


def test_an_unreadable_lock_and_no_process_here_is_no_owner(by_hand: Write, run_c: Run) -> None:
    exited = an_exited_process()
    layout = re.sub(r'"pid_namespace": "[^"]*"', '"pid_namespace": null', LAYOUT)
    folder = by_hand(layout.replace(OWNER, exited), STATE.replace(OWNER, exited))
    (folder / "weight_owner_0.lock").unlink()
    (folder / "weight_owner_0.lock").mkdir()
    assert "there is no such process here" in agree(folder, run_c).stderr


def test_a_free_lock_of_another_host_is_as_far_as_this_host_can_see(
    no_lock: Path, run_c: Run
) -> None:
    (no_lock / "weight_owner_0.lock").touch()
    state = STATE.replace(str(ME["boot_id"]), "another")
    (no_lock / "weight_state_0.json").write_text(state)
    assert "as far as this host can see" in agree(no_lock, run_c).stderr


def test_the_layout_is_of_the_process_that_the_state_names(by_hand: Write, run_c: Run) -> None:
    ticks = f'"process_start_ticks": {ME["process_start_ticks"]}'
    for layout in (
        LAYOUT.replace(ticks, ticks + "0"),
        LAYOUT.replace(str(ME["boot_id"]), "another"),
        LAYOUT.replace(OWNER, '"pid": 1, ' + OWNER.split(", ", 1)[1]),
    ):
        done = run_c(by_hand(layout, STATE))
        assert (done.returncode, done.stdout) == (3, "")
        assert "no settled map" in done.stderr
