"""Faults of the place: what the file system, the kernel and the clock can do to a server."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sglang_weight_hook as hook
from sglang_weight_hook.layout import files
from sglang_weight_hook.reader.watch import DirectoryWatch
from tests.stress import processes
from tests.stress.processes import FAIL, LOSE_ANSWER, SHORTEN, ForkServer, whole_files

pytestmark = pytest.mark.usefixtures("in_this_process")

ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES, errno.EMFILE)
# What a rename over NFS can answer: the first two also though it was done, when the server's
# reply was lost and the client asked again.
NFS_ERRORS = (errno.ENOENT, errno.EIO, errno.ESTALE, errno.EXDEV, errno.EBUSY)
FOR_EVER = -1


def check(told: dict[str, Any], case: str) -> None:
    """Whatever failed: no old address was shown as current, all is said once, all heals."""
    assert told["wrong"] == [], case
    assert told["healed"], case
    assert told["left"] == [], case
    assert told["descriptors"] <= 1, case
    assert len(told["said"]) == len(set(told["said"])) <= 4, (case, told["said"])


def test_an_error_at_any_file_operation(
    fork_server: ForkServer, tmp_path: Path, is_long: bool
) -> None:
    counted = fork_server.run("fault", directory=str(tmp_path / "0"), at=0, action=0, code=0)
    check(counted, "no fault")
    assert counted["said"] == []
    every = list(itertools.product(range(1, counted["operations"] + 1), ERRORS, (1, 3, FOR_EVER)))
    # The worst: not even the state file can be written, or taken away.
    worst = [(1, errno.EROFS, FOR_EVER), (2, errno.EIO, FOR_EVER)]
    cases = every if is_long else worst + every[::97]
    for number, (at, code, times) in enumerate(cases):
        maps = str(tmp_path / f"maps{number}")
        told = fork_server.run("fault", directory=maps, at=at, action=FAIL, code=code, times=times)
        check(told, f"{errno.errorcode[code]} at {at}, times {times}")
    print(f"{len(cases)} of {len(every)} faults")


def test_renames_that_fail_as_over_nfs(
    fork_server: ForkServer, tmp_path: Path, is_long: bool
) -> None:
    every = list(itertools.product(range(1, 25), NFS_ERRORS, (FAIL, LOSE_ANSWER), (1, 2, FOR_EVER)))
    cases = every if is_long else every[::37]
    for number, (at, code, action, times) in enumerate(cases):
        maps = str(tmp_path / f"maps{number}")
        case = {"at": at, "code": code, "action": action, "times": times}
        told = fork_server.run("fault", directory=maps, mask=processes.RENAME, **case)
        check(told, str(case))
    print(f"{len(cases)} of {len(every)} faults of rename")


def test_other_answers_that_get_lost_over_nfs(
    fork_server: ForkServer, tmp_path: Path, is_long: bool
) -> None:
    answers = (
        (processes.OPEN, errno.EEXIST),
        (processes.CLOSE, errno.EIO),
        (processes.CLOSE, errno.ENOSPC),
        (processes.UNLINK, errno.ENOENT),
    )
    for number, (mask, code) in enumerate(answers):
        for at in range(1, 20) if is_long else (2, 9):
            maps = str(tmp_path / f"maps{number} {at}")
            told = fork_server.run(
                "fault", directory=maps, mask=mask, code=code, at=at, action=LOSE_ANSWER
            )
            check(told, f"operation {mask}, {at}")


def test_every_write_is_a_short_one(fork_server: ForkServer, tmp_path: Path) -> None:
    told = fork_server.run(
        "fault",
        directory=str(tmp_path / "maps"),
        at=1,
        action=SHORTEN,
        code=0,
        mask=processes.WRITE,
        times=FOR_EVER,
    )
    check(told, "short writes")
    assert told["said"] == []


def test_a_start_on_a_faulty_place(fork_server: ForkServer, tmp_path: Path, is_long: bool) -> None:
    """Where the claim itself fails nothing is published, and that is said; else it heals."""
    outcomes: Counter[str] = Counter()
    every = list(itertools.product(range(1, 37), ERRORS, (1, 3, FOR_EVER)))
    for number, (at, code, times) in enumerate(every if is_long else every[::31]):
        maps = tmp_path / f"maps{number}"
        told = fork_server.run(
            "faulty_start", directory=str(maps), at=at, action=FAIL, code=code, times=times
        )
        assert len(told["said"]) == len(set(told["said"])) <= 4, told["said"]
        if maps.exists():
            whole_files(maps)
        outcomes["healed" if told["slot"] else "nothing published"] += 1
        assert told["slot"] or told["said"]
        assert not hook.open_slot(str(maps), "0").owner_alive()
    print(dict(outcomes))


# --- real ones ------------------------------------------------------------------------------


@pytest.fixture
def mounted(maps: Path) -> Iterator[Path]:
    """A small file system of its own."""
    maps.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k,nr_inodes=64", "tmpfs", str(maps)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield maps
    subprocess.run(["umount", "--lazy", str(maps)], check=True)


def a_server(maps: Path, timeout: float = 0.05) -> Any:
    """A runner in this very process."""
    pytest.importorskip("torch")
    from tests.stress import simulated_server

    simulated_server.fresh(str(maps), timeout)
    return simulated_server.SimulatedServer()


def read_true(maps: Path, server: Any) -> hook.Document:
    document = hook.open_slot(str(maps), "0").read(timeout=0)
    assert document.owner_alive()
    found = {name: [t["ptr"], t["shape"]] for name, t in document.tensors.items()}
    assert found == server.truth()
    return document


def test_a_disk_that_turns_read_only_shows_nobody_alive(maps: Path, tmp_path: Path) -> None:
    """ext4 after an error of its own: the old files stay, for nobody can take them away."""
    image = tmp_path / "image"
    with open(image, "wb") as file:
        file.truncate(8 * 1024**2)
    maps.mkdir()
    for command in (
        ["mkfs.ext4", "-q", "-F", str(image)],
        ["mount", "-o", "loop", str(image), str(maps)],
    ):
        try:
            subprocess.run(command, capture_output=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no loop file system here: {error}")
    slot = hook.open_slot(str(maps), "0")
    try:
        server = a_server(maps)
        server.load()
        server.move()
        read_true(maps, server)
        # What errors=remount-ro does: it asks nobody, unlike an administrator's remount.
        subprocess.run(["mount", "-o", "remount,abort", maps], check=True)
        for _ in range(3):
            server.move()
            assert not slot.owner_alive()
            assert not slot.read(timeout=0).owner_alive()
    finally:
        subprocess.run(["umount", "--lazy", maps], check=True)
    server.move()
    assert read_true(maps, server).state["lock"] == "held"


def test_a_disk_without_a_free_inode(mounted: Path) -> None:
    server = a_server(mounted)
    server.load()
    number = 0
    with contextlib.suppress(OSError):
        for number in range(100):
            (mounted / f"other{number}").touch()
    assert number < 99
    for _ in range(3):
        server.move()
        whole_files(mounted)
        document = hook.open_slot(str(mounted), "0")
        assert not (mounted / "weight_state_0.json").exists() or document.read_state()["problem"]
    for other in range(number):
        (mounted / f"other{other}").unlink()
    server.move()
    read_true(mounted, server)


def test_a_directory_removed_over_and_over_while_the_server_publishes(
    fork_server: ForkServer, maps: Path, is_long: bool
) -> None:
    publisher = fork_server.start("publish_for_ever", directory=str(maps))
    removed = 0
    for _ in range(1000 if is_long else 50):
        for _ in range(500):
            if (maps / "weight_state_0.json").exists():
                break
            threading.Event().wait(0.01)
        shutil.rmtree(maps, ignore_errors=True)
        removed += 1
    for _ in range(500):
        if (maps / "weight_layout_0.json").exists():
            break
        threading.Event().wait(0.01)
    slots = hook.open_directory(str(maps)).slots()
    alive = [slot.name for slot in slots if slot.owner_alive()]
    fork_server.kill(publisher)
    assert len(alive) == 1, [slot.name for slot in slots]
    document = hook.open_slot(str(maps), alive[0]).read(timeout=0)
    assert not processes.is_mixed(document.raw)
    print(f"removed {removed} times")


def test_no_descriptor_left_to_open_a_file(maps: Path) -> None:
    """RLIMIT_NOFILE for real: descriptors that are open stay so, and no other can be had."""
    server = a_server(maps)
    server.load()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, hard))
    taken = []
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        for _ in range(3):
            server.move()
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert whole_files(maps).keys() <= {"weight_update_summary_0.json"}
    server.move()
    read_true(maps, server)


def test_a_clock_that_goes_backwards(fork_server: ForkServer, maps: Path) -> None:
    told = fork_server.run("clock_backwards", directory=str(maps))
    generations, times, locks = zip(*told["states"])
    assert list(generations) == list(range(generations[0], generations[0] + 10))
    assert list(times) == sorted(times, reverse=True)
    assert set(locks) == {"held"}
    assert told["followed"] == [generations[-1]]
    assert told["true"]
    assert told["said"] == []


def test_a_full_inotify_queue_still_wakes_up(tmp_path: Path) -> None:
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if limit > 100_000:
        pytest.skip(f"a queue of {limit} events takes too long to fill")
    with DirectoryWatch(str(tmp_path)) as watch:
        assert watch.kernel
        # Events of one file after the other; equal ones in a row would be merged.
        for number in range(limit // 2 + 100):
            name = str(tmp_path / f"{number % 2}")
            os.close(os.open(name, os.O_CREAT | os.O_WRONLY))
            os.unlink(name)
        woken = 0
        while watch.wait(0.0):
            woken += 1
        assert woken > 0
        assert watch.kernel
        (tmp_path / "new").touch()
        assert watch.wait(5.0)


def test_without_a_free_inotify_instance_changes_are_polled_for(tmp_path: Path) -> None:
    libc = ctypes.CDLL(None)
    taken: list[int] = []
    try:
        while (descriptor := libc.inotify_init1(os.O_CLOEXEC)) >= 0 and len(taken) < 5000:
            taken.append(descriptor)
        if len(taken) == 5000:
            pytest.skip("there are more inotify instances than can be used up")
        with DirectoryWatch(str(tmp_path)) as watch:
            assert not watch.kernel
            (tmp_path / "new").touch()
            assert watch.wait(5.0)
    finally:
        for descriptor in taken:
            os.close(descriptor)


def test_ten_thousand_stale_files(fork_server: ForkServer, maps: Path, is_long: bool) -> None:
    """Of dead servers, of killed publications, of others: the slot is claimed and found."""
    fork_server.run("successor", directory=str(maps))
    count = 10_000 if is_long else 2_000
    names = processes.published_names(maps)
    dead = {name: data for name in names if (data := (maps / name).read_bytes())}
    for number in range(100, 100 + count // 10):
        for name, data in dead.items():
            (maps / name.replace("_0.", f"_{number}.")).write_bytes(data)
        (maps / files.OWNER_LOCK.format(number)).touch()
        (maps / f".weight_state_0.json.tmp-{number}").write_bytes(b"{")
        (maps / f"unrelated{number}").touch()
        (maps / f"weight_state_{number}.json.bak").touch()
    assert len(os.listdir(maps)) >= count
    told = fork_server.run("successor", directory=str(maps))
    assert (told["slot"], told["said"]) == ("0", [])
    assert not [name for name in os.listdir(maps) if name.startswith(".")]
    directory = hook.open_directory(str(maps))
    slots = directory.slots()
    assert len(slots) == 1 + count // 10
    assert not any(slot.owner_alive() for slot in slots)
    events = list(directory.events(timeout=0))
    assert len(events) == len(slots)
    done = subprocess.run(
        [sys.executable, "-m", "sglang_weight_hook", "report", "--dir", str(maps)],
        cwd=processes.ROOT,
        env=processes.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, done.stderr  # all are stale
    assert "Traceback" not in done.stderr
    random.shuffle(slots)
    for slot in slots[:20]:
        assert not slot.read(timeout=0).owner_alive()
