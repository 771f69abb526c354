"""Devices that the hook has no file for: what torch tells is right, the rest is null, no CUDA call.

The device of the first tests is a real one of torch's, made up in a process of its own: the backend
PrivateUse1, under which vendors bring their devices, renamed; its tensors lie in this machine's
memory and come by way of DLPack.  No such accelerator was there to be tried.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from fake_sglang import FakeRunner

from sglang_weight_hook.publisher import capture as capture_module
from sglang_weight_hook.publisher import devices, document, identity, memory
from sglang_weight_hook.publisher.devices import cuda_driver

torch = pytest.importorskip("torch")
setup = pytest.importorskip("torch.utils.backend_registration")
RunPython = Callable[..., "subprocess.CompletedProcess[str]"]

needs_backend = pytest.mark.skipif(
    not hasattr(setup, "_setup_privateuseone_for_python_backend"),
    reason="this torch lets no Python program bring a device",
)

STRANGE = """
import ctypes, os, sys
from types import SimpleNamespace
import torch
from fake_sglang import FakeRunner, load, settle, stream, update
from torch.utils import backend_registration
from sglang_weight_hook.memory import dlpack
from sglang_weight_hook.publisher import background
from sglang_weight_hook.reader import open_slot

load_library = ctypes.CDLL
def no_cuda(name, *arguments, **more):
    assert "cuda" not in str(name), name
    return load_library(name, *arguments, **more)
ctypes.CDLL = no_cuda

class Backend:
    figures = {}
    def is_available(self): return True
    def is_initialized(self): return True
    def _is_in_bad_fork(self): return False
    def device_count(self): return 1
    def current_device(self): return 0
    def manual_seed_all(self, seed): pass
    def __getattr__(self, name):
        try:
            return self.figures[name]
        except KeyError:
            raise AttributeError(name) from None

backend_registration._setup_privateuseone_for_python_backend(
    "strange", backend_module=Backend())
EXTERNAL = 12  # kDLExtDev, which torch takes for PrivateUse1
host = []
def tensor(*shape, stride=None):
    memory = torch.arange(4096, dtype=torch.float32)
    host.append(memory)
    if stride is None:
        stride = torch.empty(shape, device="meta").stride()
    described = SimpleNamespace(shape=shape, stride=stride, dtype="torch.float32")
    view = dlpack.View(described, memory.data_ptr(), (EXTERNAL, 0), dlpack.Views())
    made = torch.from_dlpack(view)
    assert str(made.device) == "strange:0" and made.data_ptr() == memory.data_ptr()
    return made

model = torch.nn.Module()
model.first = torch.nn.Module()
model.first.weight = torch.nn.Parameter(tensor(8, 4), requires_grad=False)
model.register_buffer("scales", tensor(6, 5, stride=(1, 6)))
model.plain = tensor(3)
model.offloaded = torch.zeros(2, 2)
runner = FakeRunner(model, device="strange", gpu_id=0)

def read():
    return open_slot(os.environ["SGLANG_WEIGHT_HOOK_DIR"], "0").read().raw

def check(found):
    tensors, regions = found["tensors"], found["regions"]
    for name, live in (("first.weight", model.first.weight), ("scales", model.scales),
                       ("plain", model.plain)):
        row = tensors[name]
        assert row["ptr"] == row["storage_ptr"] == live.data_ptr(), name
        assert row["shape"] == list(live.shape) and row["stride"] == list(live.stride()), name
        assert row["device"] == "strange:0" and row["resident"] is True, name
        assert row["size"] == live.nbytes, name
    assert tensors["offloaded"]["resident"] is False
    assert tensors["offloaded"]["ptr"] == 0
    assert {each["ptr"] for each in regions} == {t.data_ptr() for t in host}
    for each in regions:
        assert each["allocation_source"] == "storage", each
        unknown = ("allocation_kind", "export", "rdma_capable")
        assert [each[name] for name in unknown] == [None] * 3, each
    who = found["identity"]
    assert who["device"] == "strange" and who["gpu_id"] == 0
    assert who["gpu_uuid"] is None and who["pci_bus_id"] is None
    assert found["state"] == "ready" and found["event"]["success"] is not False

UNTOLD = ("other_live_bytes", "reserved_free_bytes", "other_bytes", "unbacked_bytes")
DEVICE = ("device_free_bytes", "device_total_bytes")
"""


def run(run_python: RunPython, code: str, **more: str) -> None:
    assert run_python("-c", STRANGE + code, **more).stderr == ""  # and nothing is warned of


@needs_backend
def test_a_made_up_device_gets_a_map_that_is_right_with_null_for_what_its_driver_would_tell(
    run_python: RunPython,
) -> None:
    code = """
load(runner)
settle()
found = read()
check(found)
figures = found["memory"]
assert [figures[name] for name in UNTOLD + DEVICE] == [None] * 6, figures
assert figures["weights_bytes"] == sum(row["storage_size"] for row in found["tensors"].values()
                                       if row["resident"])
assert figures["off_device_bytes"] == 16
assert found["validation"]["allocator"] is None and found["validation"]["left_out"] == {}
"""
    run(run_python, code)


@needs_backend
def test_its_updates_are_seen_like_those_of_any_device(run_python: RunPython) -> None:
    code = """
load(runner)
settle()
before = read()
model.first.weight = torch.nn.Parameter(tensor(8, 4), requires_grad=False)
host.pop(0)
update(runner)
after = read()
check(after)
assert after["event"]["moved"] == 1
assert after["layout_generation"] == before["layout_generation"] + 1
stream(runner)
"""
    run(run_python, code)


@needs_backend
def test_memory_figures_are_torchs_as_far_as_it_has_them(run_python: RunPython) -> None:
    code = """
Backend.figures = {"mem_get_info": lambda index: (1000 + index, 9000)}
load(runner)
settle()
figures = read()["memory"]
assert [figures[name] for name in UNTOLD] == [None] * 4, figures
assert (figures["device_free_bytes"], figures["device_total_bytes"]) == (1000, 9000)

def snapshot():
    return [{"device": 0, "address": each.data_ptr(), "total_size": 65536, "blocks": [
                {"size": 16384, "state": "active_allocated"}, {"size": 49152, "state": "inactive"}]}
            for each in host]
Backend.figures = {"mem_get_info": lambda index: (1000, 9_000_000), "memory_snapshot": snapshot}
update(runner)
found = read()
figures = found["memory"]
parts = ("weights_bytes", "lora_bytes", "kv_cache_bytes", "siblings_bytes", "other_live_bytes",
         "reserved_free_bytes", "other_bytes", "device_free_bytes")
assert sum(figures[name] for name in parts) - figures["unbacked_bytes"] == 9_000_000, figures
assert figures["reserved_free_bytes"] == 3 * 49152
assert found["validation"]["allocator"]["live_bytes"] == 3 * 16384
"""
    run(run_python, code)


@needs_backend
def test_its_memory_is_handed_out_to_nobody_and_the_reason_is_said(run_python: RunPython) -> None:
    code = """
from sglang_weight_hook.publisher import recorder, sharing
load(runner)
settle()
(tracked,) = recorder._tracked.values()
def ask(**more):
    found = sharing.answer(tracked, {"instance": tracked.instance, **more})
    return found if isinstance(found, dict) else found.answer
address = model.first.weight.data_ptr()
copied = ask(op="copy", runs=[[address, 16]])
assert copied["error"] == "failed" and "'strange'" in copied["message"], copied
shared = ask(op="share", ptr=address, size=16)
assert shared["error"] == "failed" and "no other process" in shared["message"], shared
from sglang_weight_hook.reader import HookError
document = open_slot(os.environ["SGLANG_WEIGHT_HOOK_DIR"], "0").read()
try:
    document.open_memory().read("first.weight")
except HookError as error:
    assert "strange:0" in str(error), error
else:
    raise AssertionError("host memory was read for a device's")
"""
    run(run_python, code, SGLANG_WEIGHT_HOOK_SHARE="1")


# --- AMD's GPUs, which torch calls "cuda" -------------------------------------------------


@pytest.fixture
def rocm(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """torch is one for ROCm, in use; what was asked of the CUDA driver."""
    asked: list[str] = []

    def library() -> Any:
        asked.append("the CUDA driver")

    monkeypatch.setattr(torch.version, "hip", "6.4.43482")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(cuda_driver, "_library", library)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    row = capture_module.row_of

    def on_the_gpu(kind: str, tensor: Any, device_type: str) -> Any:
        return row(kind, tensor, "cpu")._replace(device="cuda:0")

    monkeypatch.setattr(capture_module, "row_of", on_the_gpu)
    return asked


def test_on_rocm_the_map_is_right_and_the_cuda_driver_is_not_asked(
    rocm: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (500 + index, 4000))
    monkeypatch.setattr(torch.cuda, "memory_snapshot", list)
    model = torch.nn.Linear(4, 3)
    runner = FakeRunner(model, device="cuda", gpu_id=1)
    captured = capture_module.capture(runner)
    assert captured.tensors["weight"].ptr == model.weight.data_ptr()
    assert captured.tensors["weight"].resident
    (region, *_) = [document._region(captured, each) for each in document.regions_of(captured)]
    assert region["allocation_source"] == "storage"
    assert region["allocation_kind"] is region["export"] is region["rdma_capable"] is None
    who = identity.identity(runner)
    assert (who["gpu_id"], who["gpu_uuid"], who["pci_bus_id"]) == (1, None, None)
    found = memory.device(captured.device_type, captured.device_index)
    assert found is not None
    assert (found.free, found.total) == (501, 4000)
    device = devices.of("cuda:1")
    device.mark()
    with device.handing_out(device.current_context()):
        assert device.current_uuid() is None
    assert rocm == []


def test_a_runner_that_names_no_device_is_on_what_torch_has_initialised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    silent = SimpleNamespace(device=None)
    assert identity.device_type(silent) == "cpu"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for hip, cuda in ((None, "12.8"), ("6.4", None)):
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert identity.device_type(silent) == "cuda"


# --- the table ----------------------------------------------------------------------------


def test_one_device_is_chosen_by_torchs_name_whatever_its_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert type(devices.of("cuda")) is type(devices.of("cuda:7")) is devices.cuda.Cuda
    assert type(devices.of("cpu")) is devices.cpu.Cpu
    for kind in ("xpu", "npu:3", "musa", "hpu", "mps"):
        assert type(devices.of(kind)) is devices.Device
    assert devices.of("xpu") is devices.of("xpu:1")
    cuda = devices.of("cuda")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert type(devices.of("cuda")) is devices.Device
    assert devices.of("cuda") is not cuda


def test_a_device_of_ones_own_is_one_class_and_one_entry(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Gaudi(devices.Device):
        def is_in_use(self) -> bool:
            return True

        def allocations_under(self, address: int, size: int) -> list[tuple[int, int]]:
            return [(address - 64, size + 128)]

        def allocation_kind(self, base: int) -> str | None:
            return "vmm"

        def identity(self, index: int) -> tuple[str | None, str | None]:
            return f"HPU-{index}", "0000:19:00.0"

    monkeypatch.setitem(devices._DEVICES, "hpu", Gaudi("hpu"))
    row = capture_module.row_of
    monkeypatch.setattr(
        capture_module,
        "row_of",
        lambda kind, tensor, device: row(kind, tensor, "cpu")._replace(device="hpu:0"),
    )
    model = torch.nn.Linear(4, 3, bias=False)
    runner = FakeRunner(model, device="hpu", gpu_id=2)
    captured = capture_module.capture(runner)
    (region,) = [document._region(captured, each) for each in document.regions_of(captured)]
    assert region["allocation_ptr"] == model.weight.data_ptr() - 64
    assert (region["allocation_source"], region["allocation_kind"]) == ("driver", "vmm")
    assert region["export"] is None
    assert identity.identity(runner)["gpu_uuid"] == "HPU-2"
