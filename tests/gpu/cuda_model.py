"""A model in real CUDA memory, published by the real recorder, and the driver's own answers.

The tests over it (``test_cuda_*.py``) need torch, a CUDA device and pytest, and nothing else:
``python3 -m pytest -m gpu tests/gpu -k cuda``.  Only the runner is a fake; tensors, allocator,
driver and the recorder are real.
"""

from __future__ import annotations

import ctypes
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.unit import fake_sglang
from tests.unit.fake_sglang import FakeRunner

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a torch that warns while it is imported is torch's affair
    torch: Any = pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
IN_CHILD = "SGLANG_WEIGHT_HOOK_GPU_TEST_CHILD"  # set in the run with expandable segments


class Driver:
    """libcuda through ctypes, independent of the hook's own calls.  Statuses are returned."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")

    def address_range(self, address: int) -> tuple[int, int]:
        """Base and size of the allocation at ``address`` (cuMemGetAddressRange)."""
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        status = self.library.cuMemGetAddressRange_v2(
            ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address)
        )
        assert status == 0, f"cuMemGetAddressRange({address:#x}) says {status}"
        return base.value, size.value

    def is_mapped(self, address: int) -> bool:
        """Whether ``address`` was mapped with cuMemMap (cuMemRetainAllocationHandle)."""
        handle = ctypes.c_uint64()
        status = self.library.cuMemRetainAllocationHandle(
            ctypes.byref(handle), ctypes.c_void_p(address)
        )
        if status == 0:
            self.library.cuMemRelease(handle)
        return int(status) == 0

    def read(self, address: int, size: int) -> bytearray:
        """``size`` bytes of device memory (cuMemcpyDtoH)."""
        data = bytearray(size)
        if size:
            target = (ctypes.c_ubyte * size).from_buffer(data)
            status = self.library.cuMemcpyDtoH_v2(
                ctypes.byref(target), ctypes.c_uint64(address), ctypes.c_size_t(size)
            )
            assert status == 0, f"cuMemcpyDtoH({address:#x}, {size}) says {status}"
        return data


def noise(dtype: Any, *shape: int) -> Any:
    """Random bytes as a tensor; no NaN trouble, since only bytes are ever compared."""
    count = 1
    for length in shape:
        count *= length
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, device="cuda").to(torch.bool)
    size = count * torch.empty(0, dtype=dtype).element_size()
    data = torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda")
    return data.view(dtype).view(shape)


def fixed(tensor: Any) -> Any:
    return torch.nn.Parameter(tensor, requires_grad=False)


def a_model() -> Any:
    """Of everything: tied, transposed, padded, sliced, shared, tiny, and larger than a piece."""
    model = torch.nn.Module()
    model.embed = torch.nn.Module()
    model.embed.weight = fixed(noise(torch.bfloat16, 5003, 64))
    model.head = torch.nn.Module()
    model.head.weight = model.embed.weight
    model.layers = torch.nn.ModuleList()
    for _ in range(3):
        layer = torch.nn.Module()
        layer.qweight = fixed(noise(torch.float8_e4m3fn, 512, 1024).t())
        layer.scale = fixed(noise(torch.float32, 3))
        layer.padded = fixed(noise(torch.float16, 64, 40)[:, :33])
        layer.register_buffer("mask", noise(torch.bool, 7, 5))
        layer.register_buffer("zeros", noise(torch.int8, 1))
        both = noise(torch.bfloat16, 16, 96, 32)
        layer.w_kc, layer.w_vc = both[:, :64].transpose(1, 2), both[:, 64:]
        layer.pieces = [noise(torch.float32, 5), None]
        model.layers.append(layer)
    # Larger than the 20 MiB pieces of an expandable segment.
    model.big = fixed(noise(torch.uint8, 50 * MIB + 12345))
    model.empty = fixed(torch.empty(0, 8, device="cuda"))
    return model


def event(kind: str, effect: str, **details: Any) -> None:
    """An event of every runner of the process."""
    fake_sglang.event(kind, effect, result=(True, "ok"), details=details)


def load(model: Any) -> FakeRunner:
    runner = FakeRunner(model, gpu_id=torch.cuda.current_device(), device="cuda")
    fake_sglang.load(runner)
    fake_sglang.settle()
    return runner


def layout_in(maps: Path) -> Any:
    (path,) = maps.glob("weight_layout_*.json")
    return json.loads(path.read_bytes())


def state_in(maps: Path) -> Any:
    (path,) = maps.glob("weight_state_*.json")
    return json.loads(path.read_bytes())


def live_tensors(runner: FakeRunner) -> dict[str, Any]:
    """Every tensor of `a_model` under the name that is published, found by the test itself."""
    model = runner.model
    found = dict(model.named_parameters())
    found.update(model.named_buffers())
    for number, layer in enumerate(model.layers):
        for name in ("w_kc", "w_vc"):
            found[f"layers.{number}.{name}"] = getattr(layer, name)
        found[f"layers.{number}.pieces.0"] = layer.pieces[0]
    return found


def expandable_segments(device: int) -> list[tuple[int, int]]:
    return [
        (segment["address"], segment["total_size"])
        for segment in torch.cuda.memory_snapshot()
        if segment["device"] == device and segment.get("is_expandable")
    ]
