"""Reading GPU memory while the owner changes it, releases it or dies, and when the driver refuses.

Over a stand-in for the CUDA driver: there is no GPU here (`fake_cuda/processes.py`).  Whatever
happens, what comes out is right or refused in one sentence, and nothing stays open on either side.
"""

from __future__ import annotations

import json

import pytest
from bytes_owner import BytesOwner

pytest.importorskip("torch")

from tests.unit.memory.fake_cuda import processes
from tests.unit.memory.fake_cuda.processes import Gpu, Reader, digests

gpu = processes.gpu


# --- events -------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["ipc", "fd", "saver"])
@pytest.mark.parametrize(
    ("event", "says"),
    [("fill", "have changed since"), ("pause", "is updating"), ("release", "is released")],
)
def test_an_event_since_the_document_was_read_is_told(
    gpu: Gpu, part: str, event: str, says: str
) -> None:
    owner = gpu.owner()
    before = owner.descriptors()
    code = f"""
ours = descriptors()
document = slot.read()
with document.open_memory() as memory:
    memory.read("{part}.plain")
    pieces = memory.pieces("{part}.big", 4096)
    next(pieces)
    pause("opened")
    with refused(Changed, "{says}"):
        list(pieces)
    with refused(Changed, "{says}"):
        memory.read("{part}.large")
assert open_here() == NOTHING, open_here()
assert descriptors() == ours
with refused(Changed, "read (it|the document) again"):
    document.open_memory()
"""
    reader = gpu.reader(code)
    assert reader.said() == "opened"
    assert owner.tell(event) == ("updating" if event == "pause" else "done")
    reader.go()
    reader.ends()
    if event == "pause":
        assert owner.tell("go on") == "done"
    processes.descriptors_settle(owner, before)


@pytest.mark.parametrize("way", ["cuda", "owner"])
def test_no_read_is_mixed_under_a_server_that_updates_without_pause(gpu: Gpu, way: str) -> None:
    """Each tensor holds one number all over, another one after each update."""
    owner = gpu.owner()
    owner.tell("fill")
    owner.tell("spin")
    code = f"""
whole = changed = 0
end = time.monotonic() + 40
while whole < {150 if way == "cuda" else 60} and time.monotonic() < end:
    try:
        with slot.read().open_memory(via="{way}") as memory:
            first = memory.read("ipc.big")[:1]
            for name in "ipc.large", "fd.large", "ipc.big", "fd.big":
                data = memory.read(name)
                assert data == first * len(data), (name, first, set(data))
                whole += 1
    except Changed:
        changed += 1
assert whole > 50, (whole, changed)
assert changed > 3, changed  # or it would not have been tried
assert open_here() == NOTHING, open_here()
"""
    gpu.read(code)
    owner.tell("rest")


def test_an_update_waits_for_no_reader_that_has_memory_open(gpu: Gpu) -> None:
    owner = gpu.owner()
    reader = gpu.reader("memory = slot.read().open_memory()\nmemory.read('fd.big')\npause('open')")
    assert reader.said() == "open"
    assert owner.tell("fill") == "done"
    reader.go()
    reader.ends()


@pytest.mark.parametrize(
    ("way", "kind", "says"),
    [
        ("cuda", "Changed", "is not as the document says"),
        ("owner", "Busy", "has no time for a copy"),
    ],
)
def test_what_an_update_has_queued_is_waited_for_before_memory_is_handed_out(
    gpu: Gpu, way: str, kind: str, says: str
) -> None:
    """SGLang's call returns, and the map is published, before the device has written the values."""
    owner = gpu.owner()
    owner.tell("queue")
    assert owner.read().state["state"] == "ready"
    code = f"""
from sglang_weight_hook.memory import cuda_share, owner
from sglang_weight_hook.reader import Busy
cuda_share._PATIENCE = owner._TIMEOUT = 0.3
with refused({kind}, "{says} .the device is still writing"):
    slot.read().open_memory(via="{way}").read("ipc.plain")
cuda_share._PATIENCE = owner._TIMEOUT = 10
pause("again")
with slot.read().open_memory(via="{way}") as memory:
    memory.read("ipc.plain")
"""
    reader = gpu.reader(code)
    assert reader.said() == "again"
    reader.go()
    owner.tell("written")
    reader.ends()


# --- deaths -------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["ipc", "fd", "saver"])
def test_an_owner_that_dies_while_it_is_read_is_told(gpu: Gpu, part: str) -> None:
    owner = gpu.owner()
    code = f"""
ours = descriptors()
with slot.read().open_memory() as memory:
    pieces = memory.pieces("{part}.big", 4096)
    next(pieces)
    pause("opened")
    with refused(Changed, "has exited.*start the server again"):
        list(pieces)
    with refused(Changed, "has exited.*start the server again"):
        memory.read("{part}.large")
assert open_here() == NOTHING, open_here()
assert descriptors() == ours
"""
    reader = gpu.reader(code)
    assert reader.said() == "opened"
    owner.kill()
    reader.go()
    reader.ends()


def test_a_reader_killed_with_everything_open_leaves_the_owner_as_it_was(gpu: Gpu) -> None:
    owner = gpu.owner()
    before, handles = owner.descriptors(), owner.tell("open handles")
    for when in ("memory.read('ipc.plain'); memory.read('fd.large')", "memory.via('fd.plain')"):
        for _ in range(3):
            code = f"memory = slot.read().open_memory()\n{when}\npause('open')\n"
            reader = gpu.reader(code)
            assert reader.said() == "open"
            reader.process.kill()
            reader.process.wait()
    # One that asks, and goes before it has taken the answer.
    ask = """
import json
from sglang_weight_hook.reader.conversation import Conversation
document = slot.read()
tensor = document.tensor("fd.large")
line = json.dumps({"op": "share", "slot": "0", "instance": document.instance,
                   "ptr": tensor.ptr, "size": tensor.size}).encode() + b"\\n"
conversation = Conversation(slot, document.state, 5)
conversation._peer.sendall(line * 20)
pause("asked")
"""
    reader = gpu.reader(ask)
    assert reader.said() == "asked"
    reader.process.kill()
    reader.process.wait()
    processes.descriptors_settle(owner, before)
    assert owner.tell("open handles") == handles
    assert gpu.read("print(len(slot.read().open_memory().read('fd.large')))") == f"{5 << 20}\n"


# --- what the driver refuses --------------------------------------------------------------

CALLS = (
    "cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetUuid_v2", "cuDevicePrimaryCtxRetain",
    "cuCtxPushCurrent_v2", "cuIpcOpenMemHandle_v2", "cuMemGetAddressRange_v2",
    "cuMemImportFromShareableHandle", "cuMemAddressReserve", "cuMemMap", "cuMemSetAccess",
    "cuStreamCreate", "cuEventCreate", "cuMemHostAlloc", "cuMemcpyDtoHAsync_v2",
    "cuMemcpy2DAsync_v2", "cuEventRecord", "cuEventSynchronize",
)  # fmt: skip


def test_whatever_the_driver_refuses_a_reader_says_it_and_leaves_nothing_open(gpu: Gpu) -> None:
    owner = gpu.owner()
    before = owner.descriptors()
    code = f"""
ours = descriptors()
for call in {CALLS!r}:
    for status in 1, 2, 3, 201, 304, 400, 700, 999:
        for number in "", ":2", ":4":
            os.environ["FAKE_CUDA_FAIL"] = f"{{call}}:{{status}}{{number}}"
            try:
                with slot.read().open_memory(via="cuda") as memory:
                    for name in "ipc.steps", "fd.steps", "ipc.large", "fd.large":
                        memory.read(name)
                assert number, call  # else it was never called
            except NotReadable as error:
                assert call.partition("_")[0] in str(error), (call, str(error))
                assert f"error {{status}}" in str(error)
                assert "open_memory(via='owner')" in str(error)
                assert "\\n" not in str(error)
            del os.environ["FAKE_CUDA_FAIL"]
            assert open_here() == NOTHING, (call, open_here())
            assert descriptors() == ours, call
"""
    gpu.read(code)
    processes.descriptors_settle(owner, before)


def test_where_the_driver_refuses_to_open_memory_the_server_copies_it(gpu: Gpu) -> None:
    """As between containers that share no IPC namespace."""
    owner = gpu.owner()
    code = """
import json
expected = json.loads(pause("ready"))
os.environ["FAKE_CUDA_FAIL"] = "cuIpcOpenMemHandle_v2:205"
with slot.read().open_memory() as memory:
    for name, digest in expected.items():
        assert sha(memory.read(name)) == digest, name
    assert [memory.via(f"{part}.plain") for part in ("ipc", "fd")] == ["owner", "cuda"]
    assert driver.fake_cuda_calls(b"cuIpcOpenMemHandle_v2") == 1  # and is not tried again
with slot.read().open_memory(via="cuda") as memory:
    with refused(NotReadable, "cuIpcOpenMemHandle with error 205.*share its IPC namespace"):
        memory.read("ipc.plain")
    with refused(NotReadable, "saver.plain cannot be opened by another process"):
        memory.read("saver.plain")
assert open_here() == NOTHING
"""
    reader = gpu.reader(code)
    assert reader.said() == "ready"
    reader.go(json.dumps(digests(owner)))
    reader.ends()


def test_a_call_that_close_makes_may_fail_and_the_others_are_made(gpu: Gpu) -> None:
    gpu.owner()
    for call, left in {
        "cuIpcCloseMemHandle": {"ipc": 1},
        "cuMemUnmap": {"mapped": 1, "handles": 1},
        "cuStreamDestroy_v2": {"streams": 1},
        "cuEventDestroy_v2": {"events": 1},
        "cuMemFreeHost": {"pinned": 1},
        "cuMemRelease": {"handles": 1},
    }.items():
        code = f"""
memory = slot.read().open_memory(via="cuda")
os.environ["FAKE_CUDA_FAIL"] = "{call}:1:1"
memory.read("ipc.plain"), memory.read("fd.plain")
memory.close()
memory.close()
assert open_here() == {{**NOTHING, **{left}}}, open_here()
"""
        gpu.read(code)


@pytest.mark.parametrize(
    ("fails", "name", "says"),
    [
        ("cuIpcGetMemHandle:1", "ipc.plain", "cannot be opened by another process"),
        ("cuMemExportToShareableHandle:801", "fd.plain", "cannot be opened by another process"),
        ("cuMemGetAddressRange_v2:500", "fd.plain", "knows no memory at 0x"),
    ],
)
def test_what_the_servers_driver_refuses_to_share_is_said(
    gpu: Gpu, fails: str, name: str, says: str
) -> None:
    owner = gpu.owner()
    before = owner.descriptors()
    owner.tell(f"fail {fails}")
    code = f"""
with slot.read().open_memory(via="cuda") as memory:
    with refused(NotReadable, {says!r}):
        memory.read("{name}")
assert open_here() == NOTHING
"""
    gpu.read(code)
    owner.tell("fail nothing:0")
    gpu.read(f"slot.read().open_memory(via='cuda').read('{name}')")
    processes.descriptors_settle(owner, before)


@pytest.mark.parametrize(
    "fails",
    [
        "cuMemHostAlloc:2", "cuStreamCreate:2", "cuMemcpyDtoHAsync_v2:700",
        "cuStreamSynchronize:700", "cuMemGetAddressRange_v2:500", "cuPointerGetAttribute:1",
    ],
)  # fmt: skip
def test_a_copy_that_the_servers_driver_refuses_is_said_and_the_server_goes_on(
    gpu: Gpu, fails: str
) -> None:
    owner = gpu.owner()
    owner.tell(f"fail {fails}")
    code = """
with slot.read().open_memory(via="owner") as memory:
    with refused(NotReadable, "could not copy: the weights cannot be copied: the CUDA driver"):
        memory.read("saver.plain")
"""
    gpu.read(code)
    owner.tell("fail nothing:0")
    reads_all(gpu, owner)
    assert owner.tell("fill") == "done"


def test_pages_that_were_taken_away_without_a_word_are_not_touched(gpu: Gpu) -> None:
    """As when the memory saver is paused by something that the hook does not see."""
    owner = gpu.owner()
    owner.tell("unmap saver.large")
    code = """
with slot.read().open_memory() as memory:
    with refused(NotReadable, "could not copy.*knows no memory at 0x"):
        memory.read("saver.large")
    memory.read("ipc.large")
"""
    gpu.read(code)
    assert owner.tell("names")


def reads_all(gpu: Gpu, owner: BytesOwner) -> None:
    reader: Reader = gpu.reader("""
import json
expected = json.loads(pause("ready"))
with slot.read().open_memory() as memory:
    for name, digest in expected.items():
        assert sha(memory.read(name)) == digest, name
""")
    assert reader.said() == "ready"
    reader.go(json.dumps(digests(owner)))
    reader.ends()
