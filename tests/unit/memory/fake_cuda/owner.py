"""A process of the tests: it publishes a model that lies in the memory of the stand-in driver.

Only the driver and the runner are fakes; the recorder, the socket and the copies are the hook's.
Does what it is told on stdin, a line at a time, and answers a line.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import threading
from typing import Any

import torch
from fake_sglang import FakeRunner, event, load, settle, update

import sglang_weight_hook as hook
from sglang_weight_hook.publisher import background, capture, memory
from sglang_weight_hook.publisher.devices import cuda_driver, cuda_order

PIECE = 65536  # what the stand-in driver maps memory in
READ_WRITE = 3

background.DELAYS = (10_000.0,)  # it looks when it is asked, and not by itself
torch.manual_seed(7)
driver = ctypes.CDLL("libcuda.so.1")
stream = ctypes.c_void_p()  # SGLang's own


def call(name: str, *arguments: Any) -> None:
    status = getattr(driver, name)(*arguments)
    assert status == 0, (name, status)


def number(value: int) -> ctypes.c_uint64:
    return ctypes.c_uint64(value)


class Properties(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("types", ctypes.c_int),
        ("location", ctypes.c_int * 2),
        ("win32", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )


def cuda_malloc(size: int) -> int:
    found = number(0)
    call("cuMemAlloc_v2", ctypes.byref(found), ctypes.c_size_t(size))
    return found.value


def mapped(size: int, types: int) -> int:
    """Pieces side by side, as expandable segments have them, that can be exported as ``types``."""
    size = -(-size // PIECE) * PIECE
    start = number(0)
    call(
        "cuMemAddressReserve",
        ctypes.byref(start),
        ctypes.c_size_t(size),
        ctypes.c_size_t(0),
        number(0),
        number(0),
    )
    asked = Properties(type=1, types=types)
    asked.flags[1] = 1  # gpuDirectRDMACapable
    for at in range(start.value, start.value + size, PIECE):
        handle = number(0)
        piece = ctypes.c_size_t(PIECE)
        call("cuMemCreate", ctypes.byref(handle), piece, ctypes.byref(asked), number(0))
        call("cuMemMap", number(at), piece, ctypes.c_size_t(0), handle, number(0))
        call("cuMemRelease", handle)
    access = (ctypes.c_int * 3)(1, 0, READ_WRITE)
    call("cuMemSetAccess", start, ctypes.c_size_t(size), access, ctypes.c_size_t(1))
    return start.value


class Arena:
    """Device memory from which storages are taken one after the other."""

    def __init__(self, address: int) -> None:
        self.next = address

    def bits(self, *shape: int, dtype: Any) -> Any:
        size = torch.empty(shape, dtype=dtype, device="meta").nbytes
        memory = (ctypes.c_ubyte * size).from_address(self.next)
        self.next += -(-size // 512) * 512
        tensor = torch.frombuffer(memory, dtype=torch.uint8)
        tensor.copy_(torch.randint(0, 256, (size,), dtype=torch.uint8))
        return tensor.view(dtype).view(shape)


class Part(torch.nn.Module):
    """Weights of every kind in one arena."""

    def __init__(self, arena: Arena) -> None:
        super().__init__()
        bits = arena.bits
        self.register_buffer("plain", bits(100, 64, dtype=torch.bfloat16))
        self.register_buffer("one", bits(1, dtype=torch.float32))
        self.padded = bits(64, 96, dtype=torch.bfloat16)[:, :80]
        self.columns = bits(48, 64, dtype=torch.float16).t()
        self.fp8 = bits(512, 300, dtype=torch.uint8).view(torch.float8_e4m3fn)
        self.fp8_columns = bits(300, 200, dtype=torch.uint8).view(torch.float8_e4m3fn).t()
        self.steps = bits(64, 2000, dtype=torch.float32)[:, :70]
        self.expanded = bits(1, 24, dtype=torch.float32).expand(6, 24)
        self.big = bits(5 * PIECE + 123, dtype=torch.uint8)
        self.large = bits(5 << 20, dtype=torch.uint8)
        self.wide = bits(2, 3 << 20, dtype=torch.uint8)[:, : (5 << 19) + 1]
        self.empty = torch.empty(0, 4)


def a_model() -> Any:
    size = 14 << 20
    model = torch.nn.Module()
    model.ipc = Part(Arena(cuda_malloc(size)))
    model.fd = Part(Arena(mapped(size, 1)))
    model.saver = Part(Arena(mapped(size, 0)))
    return model


def on_the_fake_gpu() -> None:
    """What lies in the stand-in's memory is on a CUDA device, as far as the hook can see."""
    cuda_driver.is_initialised = lambda: True
    memory.device = lambda device_type, index: None
    row_of = capture.row_of
    capture.row_of = lambda kind, tensor, device: row_of(kind, tensor, "cpu")._replace(
        device="cuda:0"
    )
    call("cuInit", 0)
    context = ctypes.c_void_p()
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
    call("cuCtxSetCurrent", context)
    call("cuStreamCreate", ctypes.byref(stream), 1)
    cuda_order.current_stream = lambda: stream.value


def enqueue() -> None:
    """Give the stream that weights are written on some work, which is not done by itself."""
    host, source = ctypes.c_void_p(), number(tensors["ipc.plain"].data_ptr())
    call("cuMemHostAlloc", ctypes.byref(host), ctypes.c_size_t(64), 0)
    call("cuMemcpyDtoHAsync_v2", host, source, ctypes.c_size_t(64), stream)


def tensors_of(model: Any) -> dict[str, Any]:
    found = dict(model.named_buffers())
    for part in ("ipc", "fd", "saver"):
        for name, value in vars(getattr(model, part)).items():
            if isinstance(value, torch.Tensor):
                found[f"{part}.{name}"] = value
    return found


on_the_fake_gpu()
runner = FakeRunner(a_model(), device="cuda")
load(runner)
settle()
tensors = tensors_of(runner.model)
round_number = 0
stop = threading.Event()
spinning: list[threading.Thread] = []


def fill() -> None:
    global round_number
    round_number = round_number % 100 + 1
    for tensor in tensors.values():
        flat = tensor if not tensor.is_contiguous() else tensor.view(-1)
        (flat if flat.dtype.itemsize > 1 else flat.view(torch.uint8)).fill_(round_number)


def spin() -> None:
    while not stop.is_set():
        update(runner, during=fill)
        stop.wait(0.05)


def told(what: str, argument: str) -> str:
    if what == "digest":
        tensor = tensors[argument]
        data = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).view(-1)
        data = data.view(torch.uint8) if data.numel() else torch.empty(0, dtype=torch.uint8)
        return hashlib.sha256(bytes(data.numpy().data)).hexdigest()
    if what == "names":
        return " ".join(tensors)
    if what == "fill":
        update(runner, during=fill)
    elif what == "spin":
        spinning.append(threading.Thread(target=spin))
        spinning[0].start()
    elif what == "rest":
        stop.set()
        spinning.pop().join()
        stop.clear()
    elif what == "pause":

        def during() -> None:
            print("updating", flush=True)
            sys.stdin.readline()

        update(runner, during=during)
    elif what == "release":
        details = {"tags": ["weights"], "physical": True}
        event("release_memory_occupation", "release", [runner], result="released", details=details)
    elif what == "queue":  # an update that returns before the device has written it
        update(runner, during=enqueue)
    elif what == "written":
        call("cuStreamSynchronize", stream)
    elif what == "scribble":  # behind the hook's back
        fill()
    elif what == "unmap":  # pages taken away without a word
        start = tensors[argument].data_ptr() // PIECE * PIECE
        call("cuMemUnmap", number(start), ctypes.c_size_t(PIECE))
    elif what == "calls":
        return str(driver.fake_cuda_calls(argument.encode()))
    elif what == "open":
        return str(driver.fake_cuda_open(argument.encode()))
    elif what == "fail":
        os.environ["FAKE_CUDA_FAIL"] = argument
    elif what == "self":  # opens its own memory
        document = hook.open_slot(os.environ["SGLANG_WEIGHT_HOOK_DIR"], "0").read()
        try:
            document.open_memory(via="cuda").read("ipc.plain")
        except hook.HookError as error:
            return f"{type(error).__name__}: {error}"
    return "done"


print("ready", flush=True)
for line in sys.stdin:
    what, _, argument = line.strip().partition(" ")
    with torch.no_grad():
        print(told(what, argument), flush=True)
