"""GPU memory read from another process, over a stand-in for the CUDA driver: there is no GPU here.

With a real driver: ``tests/gpu/test_cuda_sharing.py``.
"""

from __future__ import annotations

import json

import pytest
from bytes_owner import BytesOwner

pytest.importorskip("torch")

from tests.unit.memory.fake_cuda import processes
from tests.unit.memory.fake_cuda.processes import UUID, Gpu, digests

gpu = processes.gpu


def test_every_tensor_reads_as_it_is_however_its_memory_is_exported(gpu: Gpu) -> None:
    owner = gpu.owner()
    expected = digests(owner)
    before = owner.descriptors()
    code = """
import json
ours = descriptors()
expected = json.loads(pause("ready"))
with slot.weights_held():
    document = slot.read()
    with document.open_memory() as memory:
        for name, digest in expected.items():
            way = "owner" if name.startswith("saver") else "cuda"
            if document.tensor(name).size:
                assert memory.via(name) == way, (name, memory.via(name))
            assert sha(memory.read(name)) == digest, name
            assert sha(b"".join(map(bytes, memory.pieces(name, 1000)))) == digest, name
            buffer = bytearray(document.tensor(name).size + 3)
            assert memory.read_into(name, buffer) == len(buffer) - 3
            assert sha(buffer[:-3]) == digest, name
        opened = open_here()
        # One handle for all tensors in the one allocation; pieces are mapped once a tensor at most.
        assert driver.fake_cuda_calls(b"cuIpcOpenMemHandle_v2") == 1
        assert opened["mapped"] < 2 * (14 << 20) // 65536, opened
assert open_here() == NOTHING, open_here()
assert descriptors() == ours
"""
    reader = gpu.reader(code)
    assert reader.said() == "ready"
    reader.go(json.dumps(expected))
    reader.ends()
    processes.descriptors_settle(owner, before)


READ_ALL = """
import json
expected = json.loads(pause("ready"))
def check(memory, names=expected):
    for name in names:
        assert sha(memory.read(name)) == expected[name], name
"""


def told_all(gpu: Gpu, owner: BytesOwner, code: str, **more: str) -> str:
    """Run a reader that is told the digest of every tensor."""
    reader = gpu.reader(READ_ALL + code, **more)
    assert reader.said() == "ready"
    reader.go(json.dumps(digests(owner)))
    return reader.ends()


def test_the_gpu_is_found_by_its_uuid_whatever_its_number_here(gpu: Gpu) -> None:
    owner = gpu.owner()
    code = """
with slot.read().open_memory(via="cuda") as memory:
    check(memory, ["ipc.plain", "fd.big"])
"""
    told_all(gpu, owner, code, FAKE_CUDA_UUIDS="f" * 32 + "," + UUID)
    code = """
document = slot.read()
with refused(NotReadable, "none of the GPUs that this process sees .*'3,4'.*=GPU-0011"):
    document.open_memory(via="cuda").read("ipc.plain")
with document.open_memory() as memory:
    assert memory.via("ipc.plain") == "owner"
    check(memory)
assert open_here() == NOTHING
"""
    told_all(gpu, owner, code, FAKE_CUDA_UUIDS="f" * 32, CUDA_VISIBLE_DEVICES="3,4")


def test_regions_of_an_older_release_that_say_nothing_are_asked_about(gpu: Gpu) -> None:
    code = """
document = slot.read()
for region in document.regions:
    del region["export"], region["rdma_capable"]
with document.open_memory() as memory:
    ways = {part: memory.via(f"{part}.big") for part in ("ipc", "fd", "saver")}
    assert ways == {"ipc": "cuda", "fd": "cuda", "saver": "owner"}
    check(memory)
assert open_here() == NOTHING
"""
    told_all(gpu, gpu.owner(), code)


def test_what_regions_say_is_what_the_driver_says(gpu: Gpu) -> None:
    document = gpu.owner().read()
    said = {
        region.tensors[0].partition(".")[0]: (region.export, region.rdma_capable)
        for region in document.iter_regions()
    }
    assert said == {
        "ipc": ("legacy_ipc", True),
        "fd": ("posix_fd", True),
        "saver": ("none", True),
    }


def test_a_buffer_that_is_filled_again_and_again_is_pinned_and_given_back(gpu: Gpu) -> None:
    code = """
with slot.read().open_memory(via="cuda") as memory:
    found = hashlib.sha256()
    for number, piece in enumerate(memory.pieces("ipc.large", 1 << 20)):
        found.update(piece)
        assert open_here()["registered"] == (number >= 2)
    assert found.hexdigest() == expected["ipc.large"]
    buffer = bytearray(5 << 20)
    for _ in range(3):
        memory.read_into("ipc.large", buffer)
        assert sha(buffer) == expected["ipc.large"]
    # Memory that the caller has pinned is filled without a detour.
    pinned = ctypes.c_void_p()
    context = ctypes.c_void_p()
    assert driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
    assert driver.cuCtxPushCurrent_v2(context) == 0
    assert driver.cuMemHostAlloc(ctypes.byref(pinned), ctypes.c_size_t(5 << 20), 0) == 0
    target = (ctypes.c_ubyte * (5 << 20)).from_address(pinned.value)
    events = driver.fake_cuda_calls(b"cuEventRecord")
    memory.read_into("fd.large", target)
    assert driver.fake_cuda_calls(b"cuEventRecord") == events
    assert sha(target) == expected["fd.large"]
    assert driver.cuMemFreeHost(pinned) == 0
    assert driver.cuCtxPopCurrent_v2(ctypes.byref(context)) == 0
    assert driver.cuDevicePrimaryCtxRelease_v2(0) == 0
assert open_here() == NOTHING, open_here()
buffer.extend(b"may be resized again")
"""
    told_all(gpu, gpu.owner(), code)


def test_rows_a_regular_step_apart_take_one_call(gpu: Gpu) -> None:
    code = """
with slot.read().open_memory(via="cuda") as memory:
    check(memory, ["ipc.steps", "fd.steps"])
    assert driver.fake_cuda_calls(b"cuMemcpy2DAsync_v2") == 2
    assert driver.fake_cuda_calls(b"cuMemcpyDtoHAsync_v2") == 0
"""
    told_all(gpu, gpu.owner(), code)


def test_a_view_is_the_owners_memory_itself(gpu: Gpu) -> None:
    """The stand-in's memory is the host's: torch is told so, for it sees no GPU here."""
    code = """
import torch
from sglang_weight_hook.memory import cuda, dlpack
cuda._torch_sees = lambda ordinal: True
dlpack.CUDA = dlpack.CPU
def bytes_of(tensor):
    flat = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).view(-1)
    return bytes(flat.view(torch.uint8).numpy().data) if flat.numel() else b""
with slot.weights_held():
    document = slot.read()
    with document.open_memory() as memory:
        for name, digest in expected.items():
            tensor, meta = memory.tensor(name), document.tensor(name)
            assert sha(bytes_of(tensor)) == digest, name
            assert (str(tensor.dtype), tuple(tensor.shape)) == (meta.dtype, meta.shape), name
            if not name.startswith("saver") and meta.size:
                assert tensor.stride() == meta.stride, name
        first = memory.tensor("fd.plain")
        again = memory.tensor("fd.plain")
        assert first.data_ptr() == again.data_ptr()
        one = first[3:5, 1]  # of the same storage, so the view is still in use
        del first, again, tensor
        before = bytes_of(memory.tensor("ipc.plain"))
        watched = memory.tensor("ipc.plain")
        pause("fill")
        assert bytes_of(watched) != before  # it is no copy
        del watched
        try:
            memory.close()
        except ResourceWarning as warning:
            assert "1 tensors are still in use" in str(warning)
        else:
            raise AssertionError("nothing was said of the view")
        assert open_here() == NOTHING, open_here()
        del one
    with slot.read().open_memory() as memory:
        memory.tensor("ipc.plain")
assert driver.fake_cuda_calls(b"cuCtxSynchronize") == 2
"""
    owner = gpu.owner()
    reader = gpu.reader(READ_ALL + code)
    assert reader.said() == "ready"
    reader.go(json.dumps(digests(owner)))
    assert reader.said() == "fill"
    owner.tell("scribble")
    reader.go()
    reader.ends()


def test_the_server_itself_neither_waits_for_its_device_nor_allocates_there(gpu: Gpu) -> None:
    owner = gpu.owner()
    allocations = owner.tell("calls cuMemAlloc_v2"), owner.tell("calls cuMemCreate")
    told_all(gpu, owner, "with slot.read().open_memory() as memory: check(memory)")
    told_all(gpu, owner, "with slot.read().open_memory(via='owner') as memory: check(memory)")
    assert allocations == (owner.tell("calls cuMemAlloc_v2"), owner.tell("calls cuMemCreate"))
    for call in ("cuCtxSynchronize", "cuEventSynchronize", "cuMemHostRegister_v2"):
        assert owner.tell(f"calls {call}") == "0"
    # One buffer, and one stream beside SGLang's, whose copies it waits for; an event of SGLang's.
    opened = [owner.tell(f"open {kind}") for kind in ("pinned", "streams", "events")]
    assert opened == ["1", "2", "1"]
    assert int(owner.tell("calls cuStreamSynchronize")) > 10
    assert int(owner.tell("calls cuThreadExchangeStreamCaptureMode")) > 10


def test_a_process_cannot_open_its_own_memory(gpu: Gpu) -> None:
    said = gpu.owner().tell("self")
    assert said.startswith("NotReadable: a process cannot open its own GPU memory")


def test_a_server_that_does_not_share_says_so(gpu: Gpu) -> None:
    gpu.owner(SGLANG_WEIGHT_HOOK_SHARE="0")
    code = """
with refused(NotReadable, "start the server with SGLANG_WEIGHT_HOOK_SHARE=1"):
    slot.read().open_memory(via="cuda").read("ipc.plain")
assert open_here() == NOTHING
"""
    gpu.read(code)


def test_no_context_is_made_until_memory_is_opened(gpu: Gpu) -> None:
    """It takes some hundred megabytes of a GPU that a server has filled."""
    code = """
from sglang_weight_hook.commands import memory_access
def contexts():
    return driver.fake_cuda_calls(b"cuDevicePrimaryCtxRetain")
level, said = next(memory_access.found_in(os.environ["SGLANG_WEIGHT_HOOK_DIR"]))
assert (level, "read by cuda and by owner" in said) == ("good", True), said
with slot.read().open_memory() as memory:
    check(memory, [name for name in expected if name.startswith("saver")])
    check(memory, ["ipc.empty", "fd.empty"])
    assert memory.via("saver.plain") == "owner"
    assert memory.via("ipc.empty") == "cuda"
assert contexts() == 0
with slot.read().open_memory() as memory:
    check(memory, ["ipc.plain", "fd.plain"])
assert contexts() == 1
assert open_here() == NOTHING, open_here()
# Nor where there is nothing that could be opened, of which the server needs not be asked.
document = slot.read()
for region in document.regions:
    region["export"] = "none"
with document.open_memory() as memory:
    check(memory, ["ipc.plain", "fd.plain", "ipc.empty"])
    assert memory.via("ipc.plain") == "owner"
with document.open_memory(via="cuda") as memory:
    with refused(NotReadable, "no memory of slot 0 can be opened by another process"):
        memory.read("ipc.plain")
assert contexts() == 1
assert open_here() == NOTHING, open_here()
"""
    told_all(gpu, gpu.owner(), code)


def test_doctor_makes_no_context_on_a_gpu_that_it_does_not_see(gpu: Gpu) -> None:
    gpu.owner()
    code = """
from sglang_weight_hook.commands import memory_access
ours = descriptors()
said = [said for _, said in memory_access.found_in(os.environ["SGLANG_WEIGHT_HOOK_DIR"])]
assert said == ["slot 0: its cuda memory can be read by owner"], said
assert driver.fake_cuda_calls(b"cuDevicePrimaryCtxRetain") == 0
assert descriptors() == ours
"""
    gpu.read(code, FAKE_CUDA_UUIDS="f" * 32)
