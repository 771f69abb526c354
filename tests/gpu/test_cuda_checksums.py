"""Checksums computed on the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sglang_weight_hook.layout import variables
from sglang_weight_hook.publisher import checksum
from tests.gpu.cuda_model import MIB, a_model, layout_in, live_tensors, load, noise
from tests.unit.fake_sglang import update

torch: Any = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("maps"),
]


def test_checksums_on_the_device_equal_those_on_the_host(
    maps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variables.CHECKSUM, "1")
    runner = load(a_model())
    layout = layout_in(maps)
    live = live_tensors(runner)
    on_host = checksum.checksums([(name, tensor.detach().cpu()) for name, tensor in live.items()])
    on_device = {name: tensor["checksum"] for name, tensor in layout["tensors"].items()}
    differ = {name for name in on_host if on_device.get(name) != on_host[name]}
    assert on_device == on_host, sorted(differ)
    assert layout["checksums"]["content_generation"] == layout["content_generation"]
    runner.model.big.view(torch.uint8)[12345] ^= 4
    update(runner)
    again = {n: t["checksum"] for n, t in layout_in(maps)["tensors"].items()}
    assert {name for name in again if again[name] != on_device[name]} == {"big"}


def test_checksums_need_no_more_than_a_few_pieces_of_device_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checksum, "PIECE", MIB)
    tensors = [("flat", noise(torch.uint8, 96 * MIB)), ("t", noise(torch.uint8, 4096, 8192).t())]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    checksum.checksums(tensors)
    peak = torch.cuda.max_memory_allocated() - before
    # One byte becomes a word of eight four times over, and its index: some 20 bytes a byte.
    assert peak <= 40 * MIB, f"{peak / MIB:.1f} MiB of scratch memory for pieces of 1 MiB"
