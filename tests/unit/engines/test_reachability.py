"""What is slow or impossible is told before a transfer is begun."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sglang_weight_hook.publisher.engines import reachability
from sglang_weight_hook.publisher.engines.reachability import warnings_about


def document(*regions: dict[str, Any]) -> dict[str, Any]:
    base = {"device": "cuda:0", "size": 2**30, "allocation_kind": "cuda_malloc"}
    return {"regions": [{**base, "rdma_capable": True, **region} for region in regions]}


def facts(**more: Any) -> dict[str, Any]:
    return {"rdma": True, "cuda": True, "devices": ["mlx5_0"], "peer_memory": True, **more}


HOST = {"device": "cpu", "allocation_kind": None}


@pytest.mark.parametrize("engine", ["mooncake", "nixl"])
def test_memory_that_rdma_reaches_needs_no_warning(engine: str) -> None:
    assert warnings_about(document({}), engine, facts()) == []
    assert warnings_about(document(HOST), engine, facts()) == []


def test_mooncake_over_tcp_is_slow_for_a_gpu_alone() -> None:
    over_tcp = facts(rdma=False, devices=[])
    assert warnings_about(document(HOST), "mooncake", over_tcp) == []
    (said,) = warnings_about(document({}), "mooncake", over_tcp)
    assert "copies 1 region (1.00 GiB) of a GPU through memory of the host" in said


def test_nixl_without_rdma_is_emulated() -> None:
    (said,) = warnings_about(document(HOST), "nixl", facts(devices=[]))[-1:]
    assert "UCX emulates reading over TCP" in said


@pytest.mark.parametrize("engine", ["mooncake", "nixl"])
def test_allocations_that_rdma_cannot_reach_are_counted(engine: str) -> None:
    regions = document({"rdma_capable": False, "allocation_kind": "imported"}, {}, {})
    (said,) = warnings_about(regions, engine, facts())
    assert said.startswith("1 region (1.00 GiB) cannot be reached by GPUDirect RDMA")
    assert "allocation_kind imported" in said


def test_where_the_driver_did_not_say_that_is_said() -> None:
    (said,) = warnings_about(document({"rdma_capable": None}), "nixl", facts())
    assert said == "whether RDMA reaches 1 region (1.00 GiB) of a GPU is not known"


@pytest.mark.parametrize("engine", ["mooncake", "nixl"])
def test_memory_mapped_piece_by_piece_needs_the_kernel_module_or_dma_buf(engine: str) -> None:
    regions = document({"allocation_kind": "vmm"}, {"allocation_kind": "vmm"})
    (said,) = warnings_about(regions, engine, facts(peer_memory=False))
    assert said.startswith("2 regions (2.00 GiB) were mapped by cuMemMap")
    assert "nvidia_peermem" in said
    assert warnings_about(regions, engine, facts()) == []


def test_a_build_without_cuda_reads_no_gpu() -> None:
    said = warnings_about(document({}), "mooncake", facts(rdma=False, cuda=False))
    assert said[0].startswith("this build of mooncake knows no CUDA: it cannot read 1 region")


def test_rdma_that_is_asked_for_where_there_is_none() -> None:
    said = warnings_about(document(HOST), "mooncake", facts(devices=[]))
    assert said == ["mooncake is to use RDMA, and this machine shows no RDMA device"]


def test_what_this_machine_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlx5_1").mkdir()
    (tmp_path / "mlx5_0").mkdir()
    monkeypatch.setattr(reachability, "RDMA_DEVICES", str(tmp_path))
    assert reachability.rdma_devices() == ["mlx5_0", "mlx5_1"]
    monkeypatch.setattr(reachability, "RDMA_DEVICES", str(tmp_path / "none"))
    assert reachability.rdma_devices() == []
    modules = tmp_path / "modules"
    modules.write_text("nvidia_peermem 16384 0 - Live 0x0\nnvidia 1 0 - Live 0x0\n")
    monkeypatch.setattr(reachability, "KERNEL_MODULES", str(modules))
    assert reachability.has_peer_memory()
    modules.write_text("nvidia 1 0 nvidia_peermem, Live 0x0\n")
    assert not reachability.has_peer_memory()
    monkeypatch.setattr(reachability, "KERNEL_MODULES", str(tmp_path / "none"))
    assert not reachability.has_peer_memory()
