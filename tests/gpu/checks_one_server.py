"""Checks of one server: its load, updates from disk, and the memory saver."""

from __future__ import annotations

from pathlib import Path

import sglang_weight_hook as hook
from tests.gpu.gpu_server import GpuServer
from tests.gpu.map_checks import Report, check_bytes, check_geometry, check_memory


def plain(report: Report, python: Path, a: Path, b: Path, folder: Path) -> None:
    """One server: bytes, geometry, accounting, updates, memory saver."""
    with GpuServer(python, a, folder, ["--enable-memory-saver"]) as server:
        print(f"server up after {server.startup_seconds:.0f} s", flush=True)
        slot = server.maps.slot("0")
        _loaded(report, server, slot, a)
        _updated(report, server, slot, b, folder / "missing")
        _released(report, server, slot, a)
        said = [line for line in server._log_text().splitlines() if "SGLang weight hook" in line]
        print("\n".join(said), flush=True)
    with report.check("stale after the server has exited"):
        assert not slot.owner_alive()


def _loaded(report: Report, server: GpuServer, slot: hook.Slot, model: Path) -> None:
    with report.check("ready after the scheduler is built") as seen:
        document = slot.read()
        assert document.state["state"] == "ready", document.state
        identity = document.raw["identity"]
        seen.update(event=document.state["event"], gpu=identity["gpu_uuid"])
        assert identity["gpu_uuid"].startswith("GPU-")
        assert identity["pci_bus_id"]
        seen.update(pci=identity["pci_bus_id"], sglang=identity["sglang_version"])
    with report.check("regions") as seen:
        check_geometry(slot.read(), seen)
    with report.check("accounting adds up") as seen:
        check_memory(slot.read(), seen)
    with report.check("bytes of checkpoint A") as seen:
        check_bytes(server, "0", model, seen)


def _updated(
    report: Report, server: GpuServer, slot: hook.Slot, model: Path, missing: Path
) -> None:
    with report.check("bytes of checkpoint B after an update from disk") as seen:
        before = slot.read()
        status, answer = server.update_weights_from_disk(model)
        assert status == 200, answer
        after = slot.read()
        assert after.content_generation == before.content_generation + 1
        check_bytes(server, "0", model, seen)
        seen.update(event=after.state["event"], layout=after.layout_generation)
    with report.check("a failing update") as seen:
        status, answer = server.update_weights_from_disk(missing)
        assert status == 400, answer
        assert slot.read().state["state"] == "failed"
        check_bytes(server, "0", model, seen)


def _released(report: Report, server: GpuServer, slot: hook.Slot, model: Path) -> None:
    with report.check("release of the weights' memory") as seen:
        before = slot.read()
        server.wait_idle()
        status, answer = server.post("/release_memory_occupation", {"tags": ["weights"]})
        assert status == 200, answer
        released = slot.read()
        assert released.state["state"] == "released", released.state
        assert released.state["residency"]["weights"] == "released"
        assert released.layout_generation == before.layout_generation
        memory = released.raw["memory"]
        seen.update(unbacked=memory["unbacked_bytes"], free=memory["device_free_bytes"])
        check_memory(released, {})
    with report.check("resume, and an update: the bytes are right again") as seen:
        status, answer = server.post("/resume_memory_occupation", {"tags": ["weights"]})
        assert status == 200, answer
        resumed = slot.read()
        assert resumed.state["physical_epoch"] == before.state["physical_epoch"] + 1
        assert resumed.layout_generation == before.layout_generation
        assert resumed.state["state"] in ("ready", "failed"), resumed.state
        status, answer = server.update_weights_from_disk(model)
        assert status == 200, answer
        assert slot.read().state["state"] == "ready"
        check_bytes(server, "0", model, seen)
    with report.check("release and resume of everything") as seen:
        for route in ("/release_memory_occupation", "/resume_memory_occupation"):
            server.wait_idle() if "release" in route else None
            status, answer = server.post(route)
            assert status == 200, answer
            document = slot.read()
            seen[route] = (document.state["state"], document.state["residency"])
        assert document.state["kv_physical_epoch"] == 1
