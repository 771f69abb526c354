"""Whole files by rename, locks that are never deleted, slots that die with their owner."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_weight_hook.layout import files
from sglang_weight_hook.publisher import publish
from sglang_weight_hook.publisher.publish import Slot

StartPython = Callable[..., "subprocess.Popen[str]"]

NAMES = [name.format(0) for name in files.DOCUMENTS]
TEMPORARY = f".weight_state_0.json.tmp-{os.getpid()}"
OWN = f"0.{socket.gethostname()}-{os.getpid()}"


@pytest.fixture
def slot(maps: Path) -> Iterator[Slot]:
    slot = Slot(str(maps), "0", 0.01)
    yield slot
    slot.abandon()


# --- bytes --------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(JSON, st.booleans())
def test_what_is_encoded_reads_back_the_same(document: Any, indent: bool) -> None:
    data = publish.encode(document, indent)
    assert json.loads(data) == document
    assert data.decode("utf-8")


@pytest.mark.parametrize("document", [{"a": [1, 2], "b": {}}, [], {"ä": "\udc80"}])
def test_both_encoders_write_the_same_document(
    document: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_orjson = publish.encode(document)
    monkeypatch.setitem(__import__("sys").modules, "orjson", None)
    assert json.loads(publish.encode(document)) == json.loads(with_orjson)


# --- whole files --------------------------------------------------------------------------


def test_a_document_is_replaced_by_a_new_file_and_never_written_through(
    slot: Slot, maps: Path
) -> None:
    slot.write(files.STATE, {"generation": 1})
    path = maps / "weight_state_0.json"
    os.link(path, maps / "hard link")
    with open(path, "rb") as file:
        slot.write(files.STATE, {"generation": 2})
        assert json.loads(file.read()) == {"generation": 1}
    assert json.loads((maps / "hard link").read_bytes()) == {"generation": 1}
    assert json.loads(path.read_bytes()) == {"generation": 2}
    assert path.stat().st_ino != (maps / "hard link").stat().st_ino
    assert path.stat().st_nlink == 1


def test_a_document_can_be_read_by_others_and_written_by_the_owner_alone(
    slot: Slot, maps: Path
) -> None:
    mask = os.umask(0)
    try:
        slot.write(files.STATE, {})
    finally:
        os.umask(mask)
    assert stat.S_IMODE((maps / "weight_state_0.json").stat().st_mode) == 0o644


@pytest.mark.parametrize("target", ["victim", "nowhere"])
@pytest.mark.parametrize("planted", ["weight_state_0.json", TEMPORARY], ids=["final", "temporary"])
def test_a_planted_link_is_replaced_and_never_followed(
    planted: str, target: str, slot: Slot, maps: Path, tmp_path: Path
) -> None:
    (tmp_path / "victim").write_text("precious")
    (maps / planted).symlink_to(tmp_path / target)
    slot.write(files.STATE, {"a": 1})
    assert (tmp_path / "victim").read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()
    assert not (maps / "weight_state_0.json").is_symlink()
    assert json.loads((maps / "weight_state_0.json").read_bytes()) == {"a": 1}
    assert not os.path.lexists(maps / TEMPORARY)


def test_a_directory_in_the_temporary_files_place_fails_and_stays(slot: Slot, maps: Path) -> None:
    (maps / TEMPORARY).mkdir()
    slot_path = maps / "weight_state_0.json"
    with pytest.raises(OSError, match="directory"):
        slot.write(files.STATE, {})
    assert not slot_path.exists()
    assert (maps / TEMPORARY).is_dir()


@pytest.mark.parametrize("call", ["write", "rename", "close"])
def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(
    call: str, slot: Slot, maps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot.write(files.STATE, {"generation": 1})
    really = getattr(os, call)

    def fail(*arguments: Any) -> None:
        if call == "close":
            really(*arguments)
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match="disk full"):
            slot.write(files.STATE, {"generation": 2})
    assert json.loads((maps / "weight_state_0.json").read_bytes()) == {"generation": 1}
    assert not (maps / TEMPORARY).exists()


def test_removing_what_is_not_there_is_no_error(slot: Slot, maps: Path) -> None:
    slot.write(files.STATE, {})
    slot.remove(files.STATE)
    slot.remove(files.STATE)
    assert not (maps / "weight_state_0.json").exists()


# --- lock files ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fifo", "directory", "dangling link", "link", "socket"])
def test_something_that_is_no_file_is_no_lock_file(kind: str, tmp_path: Path) -> None:
    path, victim = tmp_path / "lock", tmp_path / "victim"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "socket":
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(os.path.relpath(path))
        listening.close()
    else:
        path.symlink_to(victim)
        if kind == "link":
            victim.write_text("precious")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match=r".+"):
        publish.open_lock_file(str(path))
    assert len(os.listdir("/proc/self/fd")) == before
    assert not victim.exists() or victim.read_text() == "precious"


def test_the_lock_files_are_the_same_ones_for_ever(maps: Path) -> None:
    seen = set()
    for _ in range(3):
        slot = Slot(str(maps), "0", 0.01)
        slot.lock()
        slot.unlock()
        seen.add(tuple((maps / name).stat().st_ino for name in LOCKS))
        slot.abandon()
    assert len(seen) == 1


LOCKS = ["weight_owner_0.lock", "weight_saving_0.lock"]


def test_no_descriptor_of_a_slot_reaches_a_program_that_is_executed(slot: Slot, maps: Path) -> None:
    slot.lock()
    done = subprocess.run(
        ["ls", "-l", "/proc/self/fd"], capture_output=True, text=True, check=True, close_fds=False
    )
    assert str(maps) not in done.stdout


def test_a_lock_file_that_was_deleted_is_made_again_for_the_next_event(
    slot: Slot, maps: Path
) -> None:
    slot.lock()
    slot.unlock()
    (maps / "weight_saving_0.lock").unlink()
    slot.lock()
    assert slot.lock_status == "held"
    with open(maps / "weight_saving_0.lock", "rb") as reader, pytest.raises(BlockingIOError):
        fcntl.flock(reader, fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_a_file_system_without_locks_is_said_and_survived(
    slot: Slot, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import errno

    def no_locks(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    for _ in range(3):
        slot.lock()
        assert slot.lock_status == "unavailable: No locks available"
        slot.unlock()
    assert len(caplog.messages) == 1


# --- slots --------------------------------------------------------------------------------

OWNER = """
import os, sys
from sglang_weight_hook.layout import files
from sglang_weight_hook.publisher import publish
slot = publish.Slot(os.environ["SGLANG_WEIGHT_HOOK_DIR"], "0", 0.01)
slot.lock()
for name in files.DOCUMENTS:
    slot.write(name, {"pid": os.getpid()})
open(os.path.join(slot.directory, f".weight_layout_{slot.name}.json.tmp-{os.getpid()}"), "w")
print(slot.name, flush=True)
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""


def tell(process: subprocess.Popen[str], line: str) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_slot_of_a_live_process_sends_the_newcomer_elsewhere_and_says_so(
    maps: Path, start_python: StartPython, caplog: pytest.LogCaptureFixture
) -> None:
    owner = start_python(OWNER)
    assert first_line(owner) == "0"
    newcomer = Slot(str(maps), "0", 0.01)
    assert newcomer.name == OWN
    assert len(caplog.messages) == 1
    assert "slot 0" in caplog.messages[0]
    assert OWN in caplog.messages[0]
    newcomer.write(files.STATE, {"pid": os.getpid()})
    assert json.loads((maps / "weight_state_0.json").read_bytes()) == {"pid": owner.pid}
    assert len(list(maps.glob("*_0.json"))) == 6
    newcomer.abandon()


def test_a_killed_owner_frees_its_slot_and_its_leftovers_are_cleared(
    maps: Path, start_python: StartPython, caplog: pytest.LogCaptureFixture
) -> None:
    owner = start_python(OWNER)
    assert first_line(owner) == "0"
    (maps / "notes.txt").write_text("mine")
    (maps / ".weight_layout_1.json.tmp-77").write_text("of another slot")
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    assert len(list(maps.glob("*_0.json"))) == 6
    successor = Slot(str(maps), "0", 0.01)
    assert successor.name == "0"
    assert caplog.messages == []
    successor.lock()
    assert successor.lock_status == "held"
    assert sorted(path.name for path in maps.iterdir()) == [
        ".weight_layout_1.json.tmp-77",
        "notes.txt",
        *LOCKS,
    ]
    successor.abandon()


def test_three_of_one_name_in_one_process_have_three_slots(maps: Path) -> None:
    slots = [Slot(str(maps), "0", 0.01) for _ in range(3)]
    assert [slot.name for slot in slots] == ["0", OWN, OWN + "-2"]
    for slot in slots:
        slot.abandon()


def test_a_claim_that_gives_way_leaves_no_descriptor_open(maps: Path) -> None:
    first = Slot(str(maps), "0", 0.01)
    before = len(os.listdir("/proc/self/fd"))
    second = Slot(str(maps), "0", 0.01)
    second.abandon()
    assert len(os.listdir("/proc/self/fd")) == before
    first.abandon()


def test_a_reader_that_looks_whether_the_owner_lives_is_not_taken_for_an_owner(
    maps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Slot.owner_alive() of the reader holds the lock, shared, for the moment of its look.
    Slot(str(maps), "0", 0.01).abandon()
    with open(maps / "weight_owner_0.lock", "rb") as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        monkeypatch.setattr("time.sleep", lambda seconds: fcntl.flock(reader, fcntl.LOCK_UN))
        newcomer = Slot(str(maps), "0", 0.01)
    assert newcomer.name == "0"
    newcomer.abandon()


def test_a_slot_whose_owner_file_was_deleted_is_claimed_again(slot: Slot, maps: Path) -> None:
    (maps / "weight_owner_0.lock").unlink()
    slot.reclaim_if_lost()
    assert slot.name == "0"
    other = Slot(str(maps), "0", 0.01)
    assert other.name == OWN
    other.abandon()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_does_not_keep_the_slot_of_a_killed_parent(
    maps: Path, start_python: StartPython
) -> None:
    parent = start_python(
        """
import os, sys, signal
from fake_sglang import FakeRunner
from sglang_weight_hook.publisher import recorder
runner = FakeRunner()
recorder.begin("load_model", "load", [runner])
child = os.fork()
if child == 0:
    sys.stdout.write(f"{os.getpid()}\\n"); sys.stdout.flush()
    sys.stdin.read()
    os._exit(0)
signal.pause()
"""
    )
    child = int(first_line(parent))
    assert (maps / "weight_state_0.json").exists()
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    os.kill(child, 0)
    successor = Slot(str(maps), "0", 0.01)
    successor.lock()
    assert (successor.name, successor.lock_status) == ("0", "held")
    successor.abandon()
    os.kill(child, signal.SIGKILL)


def test_two_processes_in_one_directory_never_mix_their_files(
    maps: Path, start_python: StartPython
) -> None:
    first, second = start_python(OWNER), start_python(OWNER)
    names = {first.pid: first_line(first), second.pid: first_line(second)}
    assert sorted(map(len, names.values()))[0] == 1
    for _ in range(20):
        for process in (first, second):
            code = "[slot.write(name, {'pid': os.getpid()}) for name in files.DOCUMENTS]"
            assert tell(process, code) == "done"
    for pid, name in names.items():
        for document in files.DOCUMENTS:
            path = maps / document.format(name)
            assert json.loads(path.read_bytes()) == {"pid": pid}


def test_hostile_leftovers_at_every_name_of_a_slot_are_cleared_without_following(
    maps: Path, tmp_path: Path
) -> None:
    maps.mkdir()
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in NAMES:
        (maps / name).symlink_to(victim)
        (maps / f".{name}.tmp-1").symlink_to(tmp_path)
    slot = Slot(str(maps), "0", 0.01)
    assert [path.name for path in maps.iterdir()] == ["weight_owner_0.lock"]
    assert victim.read_text() == "precious"
    slot.abandon()
