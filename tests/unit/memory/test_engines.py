"""Weights read through a real transfer engine: Mooncake over TCP, NIXL over UCX."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bytes_owner import BytesOwner
from engine_owner import needs, started

from sglang_weight_hook import Changed, HookError, NotReadable, open_directory, open_file
from sglang_weight_hook.memory.errors import TransferWarning

numpy = pytest.importorskip("numpy")
pytest.importorskip("torch")

pytestmark = pytest.mark.filterwarnings(
    "ignore::sglang_weight_hook.memory.errors.TransferWarning"  # they are all on this machine
)
ENGINES = ["mooncake", "nixl"]
Start = Callable[..., BytesOwner]


@pytest.fixture
def start(start_python: Callable[..., Any], maps: Path) -> Start:
    def start_it(engine: str, kind: str = "odd", **environment: str) -> BytesOwner:
        needs(engine)
        return started(start_python, maps, engine, kind, **environment)

    return start_it


def copied(directory: Path, to: Path) -> Path:
    """What somebody takes along to another machine: documents, and none of the locks."""
    to.mkdir()
    for path in directory.glob("*.json"):
        shutil.copy(path, to)
    return to


@pytest.mark.parametrize("engine", ENGINES)
def test_every_tensor_of_every_type_and_stride_comes_whole(start: Start, engine: str) -> None:
    owner = start(engine)
    document = owner.read()
    with document.open_memory(via=engine) as memory:
        names = owner.names()
        assert len(names) > 20
        for name in names:
            assert hashlib.sha256(memory.read(name)).hexdigest() == owner.digest(name), name
            assert memory.via(name) == engine
        whole = memory.read("packed")
        assert b"".join(bytes(piece) for piece in memory.pieces("packed", 1000)) == whole
        buffer = bytearray(len(whole) + 5)
        assert memory.read_into("packed", buffer) == len(whole)
        assert buffer[: len(whole)] == whole
        assert memory.array("packed").tobytes() == whole
        assert memory.tensor("of_bfloat16").view(-1).shape == (240,)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_copied_directory_is_enough(start: Start, engine: str, tmp_path: Path) -> None:
    """On another machine there are no locks, no header file and no process to look at."""
    owner = start(engine)
    expected = owner.digest("columns")
    copy = copied(Path(owner.slot.directory), tmp_path / "copy")
    for document in (
        open_directory(str(copy)).slot("0").read(),
        open_file(str(copy / "weight_layout_0.json")),
    ):
        with document.open_memory(via=engine) as memory:
            assert hashlib.sha256(memory.read("columns")).hexdigest() == expected


@pytest.mark.parametrize("engine", ENGINES)
def test_an_update_since_the_document_is_told(start: Start, engine: str, tmp_path: Path) -> None:
    owner = start(engine, "even")
    document = owner.read()
    copy = copied(Path(owner.slot.directory), tmp_path / "copy")
    with document.open_memory(via=engine) as memory:
        memory.read("part3")
        owner.tell("fill")
        with pytest.raises(Changed, match="content generation"):
            memory.read("part3")
        with pytest.raises(Changed, match="read it again"):
            memory.check()
    for old in (document, open_directory(str(copy)).slot("0").read()):
        with pytest.raises(Changed, match="content generation"):
            old.open_memory(via=engine)
    with owner.read().open_memory(via=engine) as memory:
        assert (memory.array("part3") == 1).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_is_read_while_weights_are_changing(start: Start, engine: str) -> None:
    owner = start(engine)
    memory = owner.read().open_memory(via=engine)
    memory.read("scalar")
    assert owner.tell("pause") == "updating"
    with pytest.raises(Changed, match="is updating"):
        memory.read("scalar")
    with pytest.raises(Changed, match="is updating"):
        owner.read().open_memory(via=engine)
    owner.tell("go on")
    memory.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_under_a_server_that_updates_without_pause_no_read_is_mixed(
    start: Start, engine: str
) -> None:
    """Each tensor of this model holds one number all over, another one after each update."""
    owner = start(engine, "even")
    owner.tell("spin 0.05")
    whole = changed = 0
    began = time.monotonic()
    buffer = numpy.empty(3023, numpy.int32)
    while whole < 400 and time.monotonic() < began + 60:
        try:
            with owner.read().open_memory(via=engine) as memory:
                first = memory.array("part0")[0]
                for n in range(24):
                    count = memory.read_into(f"part{n}", buffer) // 4
                    assert numpy.all(buffer[:count] == first), (n, first)
                    whole += 1
        except Changed:
            changed += 1
    owner.tell("rest")
    assert whole >= 400
    assert changed > 5  # or it would not have been tried


@pytest.mark.parametrize("engine", ENGINES)
def test_a_dead_owner_is_told(start: Start, engine: str) -> None:
    owner = start(engine)
    document = owner.read()
    with document.open_memory(via=engine) as memory:
        memory.read("columns")
        owner.kill()
        with pytest.raises(HookError, match="exited"):
            memory.read("columns")
        with pytest.raises(HookError, match=r"exited|failed before"):
            memory.read("columns")
    with pytest.raises(NotReadable, match="exited"):
        document.open_memory(via=engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_stopped_owner_is_waited_for_no_longer_than_told(
    start: Start, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"sglang_weight_hook.memory.{engine}._TIMEOUT", 0.5)
    owner = start(engine)
    document = owner.read()
    owner.stop()
    began = time.monotonic()
    try:
        with pytest.raises(NotReadable, match="stopped"):
            document.open_memory(via=engine)
        assert time.monotonic() - began < 10
    finally:
        owner.go_on()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_released_model_is_not_read(start: Start, engine: str) -> None:
    owner = start(engine)
    document = owner.read()
    owner.tell("release")
    with pytest.raises(Changed, match="released"):
        document.open_memory(via=engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_metadata_of_another_runner_is_refused(start: Start, engine: str) -> None:
    owner = start(engine)
    path = Path(owner.slot.path("weight_transport_{}.json"))
    good = json.loads(path.read_text())
    document = owner.read()

    def says(change: Callable[[dict[str, Any]], Any]) -> None:
        raw = json.loads(json.dumps(good))
        change(raw)
        path.write_text(json.dumps(raw))

    def entry(raw: dict[str, Any]) -> Any:
        return raw["engines"][engine]

    for match, kind, change in (
        ("another runner", Changed, lambda raw: raw.update(instance="0" * 16)),
        ("layout generation", Changed, lambda raw: entry(raw).update(layout_generation=99)),
        ("physical epoch", Changed, lambda raw: entry(raw).update(physical_epoch=99)),
        ("no more at the moment", Changed, lambda raw: entry(raw).update(state="withdrawn")),
        ("out of RDMA", NotReadable, lambda raw: entry(raw).update(
            state="failed", problem="out of RDMA")),
        ("does not run in the server", NotReadable, lambda raw: raw.update(engines={})),
        ("nothing of", NotReadable, lambda raw: entry(raw).update(header=None)),
        ("no sglang-weight-transport", NotReadable, lambda raw: raw.update(schema_version=2)),
    ):  # fmt: skip
        says(change)
        with pytest.raises(kind, match=match):
            document.open_memory(via=engine)
    path.unlink()
    with pytest.raises(NotReadable, match="SGLANG_WEIGHT_HOOK_SUBSCRIBERS"):
        document.open_memory(via=engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_lies_where_the_header_was_decides(start: Start, engine: str) -> None:
    """The address is of registered memory, and of something else: as after a restart."""
    owner = start(engine)
    path = Path(owner.slot.path("weight_transport_{}.json"))
    raw = json.loads(path.read_text())
    raw["engines"][engine]["header"]["ptr"] = owner.read().tensor("packed").ptr
    path.write_text(json.dumps(raw))
    with pytest.raises(Changed, match="something else"):
        owner.read().open_memory(via=engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_is_never_taken_on_the_servers_own_machine_unless_asked_for(
    start: Start, engine: str
) -> None:
    with start(engine).read().open_memory() as memory:
        assert memory.via("packed") == "process"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_transfer_that_is_not_needed_is_told_beforehand(start: Start, engine: str) -> None:
    document = start(engine).read()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        document.open_memory(via=engine).close()
    assert [each.category for each in told] == [TransferWarning]
    assert "via=process" in str(told[0].message)


def test_an_address_replaces_what_mooncake_has_published(start: Start) -> None:
    owner = start("mooncake")
    path = Path(owner.slot.path("weight_transport_{}.json"))
    raw = json.loads(path.read_text())
    session = raw["engines"]["mooncake"]["session"]
    raw["engines"]["mooncake"]["session"] = f"gpu7.invalid:{session.split(':')[1]}"
    path.write_text(json.dumps(raw))
    document = owner.read()
    for address in (session, "127.0.0.1"):
        with document.open_memory(via="mooncake", address=address) as memory:
            memory.read("scalar")
    with pytest.raises(HookError, match="mooncake's"):
        document.open_memory(via="process", address=session)
    with pytest.raises(NotReadable, match="no address"):
        document.open_memory(via="mooncake", address=":12")


def test_a_server_elsewhere_that_calls_itself_this_machine_is_not_asked(start: Start) -> None:
    owner = start("mooncake")
    document = owner.read()
    document.state["boot_id"] = "00000000-0000-0000-0000-000000000000"
    with pytest.raises(NotReadable, match="SGLANG_WEIGHT_HOOK_TRANSFER_HOST"):
        document.open_memory()


@pytest.mark.parametrize("engine", ENGINES)
def test_memory_that_was_opened_often_keeps_no_descriptors(start: Start, engine: str) -> None:
    import os

    document = start(engine).read()

    def opened() -> int:
        for _ in range(10):
            with document.open_memory(via=engine) as memory:
                memory.read("packed")
                list(memory.pieces("packed", 4096))
        return len(os.listdir("/proc/self/fd"))

    first = opened()
    assert opened() <= first


# Ports that a process listens on, by inode of its descriptors.
LISTENING = """
import os
def listening():
    mine = {os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
            if os.path.exists(f"/proc/self/fd/{n}")}
    found = []
    for table in ("tcp", "tcp6"):
        with open(f"/proc/self/net/{table}") as file:
            rows = [line.split() for line in file][1:]
        found += [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in mine]
    return found
"""
WAITING_READER = """
import importlib, sys, time, warnings
warnings.simplefilter("ignore")
from sglang_weight_hook import open_directory
from sglang_weight_hook.memory.idle import Idle
directory, engine = sys.argv[1:]
reader = importlib.import_module(f"sglang_weight_hook.memory.{engine}")
reader._idle = Idle(seconds=0.5)
for _ in range(2):
    with open_directory(directory).slot("0").read().open_memory(via=engine) as memory:
        memory.read("columns")
        assert listening()
    deadline = time.monotonic() + 20
    while listening():
        assert time.monotonic() < deadline, listening()
        time.sleep(0.05)
print("closed")
"""


@pytest.mark.parametrize("engine", ENGINES)
def test_a_reader_that_has_closed_its_memory_listens_nowhere(
    start: Start, run_python: Callable[..., Any], engine: str
) -> None:
    owner = start(engine)
    done = run_python("-c", LISTENING + WAITING_READER, owner.slot.directory, engine)
    assert done.stdout.split()[-1] == "closed"
