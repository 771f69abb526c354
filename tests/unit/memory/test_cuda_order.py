"""What is known of the device's work before GPU memory is handed out, and what an event waits for.

Over a stand-in for the CUDA driver: there is no GPU here (`fake_cuda/processes.py`).
"""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from tests.unit.memory.fake_cuda import processes
from tests.unit.memory.fake_cuda.processes import Gpu

gpu = processes.gpu

# A server's process without a server: streams of its own, and marks on them.
SERVER = """
import torch
from sglang_weight_hook.publisher import devices, sharing
from sglang_weight_hook.publisher.devices import cuda_copy, cuda_driver, cuda_order
os.environ["SGLANG_WEIGHT_HOOK_SHARE"] = "1"
cuda_driver.is_initialised = lambda: True
context = ctypes.c_void_p()
assert driver.cuInit(0) == 0
assert driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
assert driver.cuCtxSetCurrent(context) == 0
memory, host = ctypes.c_uint64(), ctypes.c_void_p()
assert driver.cuMemAlloc_v2(ctypes.byref(memory), ctypes.c_size_t(4096)) == 0
assert driver.cuMemHostAlloc(ctypes.byref(host), ctypes.c_size_t(4096), 0) == 0
def a_stream():
    made = ctypes.c_void_p()
    assert driver.cuStreamCreate(ctypes.byref(made), 1) == 0
    return made
def work(stream):
    size = ctypes.c_size_t(64)
    assert driver.cuMemcpyDtoHAsync_v2(host, memory, size, stream) == 0
def ends_on(stream):
    cuda_order.current_stream = lambda: stream.value
    cuda_order.mark()
def written(stream):
    assert driver.cuStreamSynchronize(stream) == 0
"""


@pytest.mark.parametrize(
    "fails", ["cuCtxGetCurrent", "cuStreamIsCapturing", "cuEventCreate", "cuEventRecord"]
)
def test_where_the_end_of_a_call_cannot_be_marked_it_is_not_taken_as_done(
    gpu: Gpu, fails: str
) -> None:
    code = f"""
mine, another = a_stream(), a_stream()
os.environ["FAKE_CUDA_FAIL"] = "{fails}:999"
work(mine)
ends_on(mine)
del os.environ["FAKE_CUDA_FAIL"]
assert not cuda_order.is_done()
assert "{fails} with error 999" in cuda_order.why_not_done(), cuda_order.why_not_done()
assert "Errno" not in cuda_order.why_not_done()
ends_on(another)  # which proves nothing of the first
assert not cuda_order.is_done()
ends_on(mine)
assert not cuda_order.is_done()  # it is still writing
written(mine)
# Where not even the stream was known, no later mark is one of the same.
assert cuda_order.is_done() is {fails != "cuCtxGetCurrent"}
"""
    gpu.read(SERVER + code)


def test_a_stream_that_cannot_be_told_is_not_taken_as_done(gpu: Gpu) -> None:
    code = """
def none():
    raise AttributeError("torch has no such thing")
cuda_order.current_stream = none
cuda_order.mark()
assert not cuda_order.is_done()
assert "torch has no such thing" in cuda_order.why_not_done()
"""
    gpu.read(SERVER + code)


@pytest.mark.parametrize(("capture", "done"), [(1, True), (2, False)])
def test_a_captured_call_writes_nothing_now_and_a_broken_capture_proves_nothing(
    gpu: Gpu, capture: int, done: bool
) -> None:
    code = f"""
class Capturing:
    def __getattr__(self, name):
        return getattr(driver, name)
    def cuStreamIsCapturing(self, stream, status):
        status._obj.value = {capture}
        return 0
cuda_driver._library = Capturing
mine = a_stream()
recorded = driver.fake_cuda_calls(b"cuEventRecord")
ends_on(mine)
assert driver.fake_cuda_calls(b"cuEventRecord") == recorded
assert cuda_order.is_done() is {done}
cuda_driver._library = lambda: driver
ends_on(mine)
assert cuda_order.is_done()
"""
    gpu.read(SERVER + code)


def test_streams_beyond_the_most_take_the_marks_that_are_done(gpu: Gpu) -> None:
    code = """
cuda_order._MOST = 3
first, second, third, fourth, fifth = streams = [a_stream() for _ in range(5)]
for stream in first, second, third:
    work(stream)
    ends_on(stream)
written(second)
work(fourth)
ends_on(fourth)  # in the place of the second
assert open_here()["events"] == 3
for stream in first, third:
    written(stream)
assert not cuda_order.is_done()
written(fourth)
assert cuda_order.is_done()
for stream in streams[1:4]:
    work(stream)
    ends_on(stream)
work(first)
ends_on(first)  # three others are at work
assert "on more than 3 streams" in cuda_order.why_not_done()
for stream in streams:
    written(stream)
assert not cuda_order.is_done()
ends_on(fifth)
assert not cuda_order.is_done()
ends_on(first)
assert cuda_order.is_done()
assert open_here()["events"] == 3
"""
    gpu.read(SERVER + code)


def test_a_reader_is_told_why_nothing_is_handed_out(gpu: Gpu) -> None:
    owner = gpu.owner()
    owner.tell("fail cuEventRecord:999")
    owner.tell("fill")
    owner.tell("fail nothing:0")
    code = """
from sglang_weight_hook.memory import cuda_share
cuda_share._PATIENCE = 0.1
with refused(Changed, "not known whether the device has written .* cuEventRecord with error 999"):
    slot.read().open_memory(via="cuda").read("ipc.plain")
pause("marked again")
slot.read().open_memory(via="cuda").read("ipc.plain")
slot.read().open_memory(via="owner").read("ipc.plain")
"""
    reader = gpu.reader(code)
    assert reader.said() == "marked again"
    owner.tell("fill")
    reader.go()
    reader.ends()


def test_what_a_copy_takes_is_made_while_no_event_can_wait_for_it(gpu: Gpu) -> None:
    """cuMemHostAlloc and cuStreamCreate may take as long as the device has work."""
    code = """
from types import SimpleNamespace
held = {}
class Watched:
    def __getattr__(self, name):
        held.setdefault(name, []).append(sharing._copying.locked())
        return getattr(driver, name)
watched = Watched()
cuda_driver._library = lambda: watched
driver.fake_cuda_calls.argtypes = [ctypes.c_char_p]
sharing._spans_of = lambda tracked: SimpleNamespace(hold=lambda *run: True)
def slot_in(context, whole=True):
    return SimpleNamespace(
        instance="i", device=devices.of("cuda"), context=context, is_whole=whole, state="updating"
    )
def copy(tracked, runs):
    answer = sharing.answer(tracked, {"instance": "i", "op": "copy", "runs": runs})
    return getattr(answer, "answer", answer)
run = [memory.value, 64]
before = driver.fake_cuda_calls(b"cuMemHostAlloc"), driver.fake_cuda_calls(b"cuStreamCreate")
def made():
    return (driver.fake_cuda_calls(b"cuMemHostAlloc") - before[0],
            driver.fake_cuda_calls(b"cuStreamCreate") - before[1])
assert copy(slot_in(context.value, whole=False), [run])["error"] == "busy"
assert copy(slot_in(context.value), [])["ok"] is True
assert made() == (0, 0)  # for what copies nothing
assert copy(slot_in(context.value), [run]) == {"ok": True, "bytes": 64}
assert copy(slot_in(context.value), [run])["ok"] is True
assert made() == (1, 1)
another = ctypes.c_void_p()
assert driver.cuDevicePrimaryCtxRetain(ctypes.byref(another), 1) == 0
assert copy(slot_in(another.value), [run])["ok"] is True
assert made() == (1, 2)
assert held["cuMemHostAlloc"] == [False]
assert held["cuStreamCreate"] == [False, False]
assert held["cuMemcpyDtoHAsync_v2"] == [True] * 3
"""
    gpu.read(SERVER + code, FAKE_CUDA_UUIDS=processes.UUID + "," + "f" * 32)
