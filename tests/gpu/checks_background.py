"""Checks of the thread that compares the map with memory, in servers that do what nobody announces.

A forward that binds a buffer anew, memory that is released while it looks, a LoRA pool that is
refilled, weights that are swapped while they are used.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.gpu.gpu_server import ROOT, GpuServer, hooked_venv, make_checkpoint
from tests.gpu.map_checks import Report, check_bytes, check_geometry, check_memory

OFTEN = {"SGLANG_WEIGHT_HOOK_CHECK_SECONDS": "0.1"}
UNANNOUNCED = "unannounced_change"


def unannounced(report: Report, python: Path, a: Path, b: Path, folder: Path) -> None:
    """Models whose first forward binds the rotary cache anew, with SGLang's own first request."""
    folder.mkdir(parents=True)
    models = {}
    for architecture in ("mixtral", "qwen2_vl"):
        models[architecture] = folder / f"{architecture}-checkpoint"
        shape = ("--hidden", "64", "--heads", "4", "--kv-heads", "2")
        make_checkpoint(python, models[architecture], 3, "--architecture", architecture, *shape)
    # Also one server of each that never compares: what a second CUDA context took would be seen.
    never = {"SGLANG_WEIGHT_HOOK_CHECK_SECONDS": "0"}
    wanted: dict[str, tuple[Path, Mapping[str, str]]] = {
        **{name: (model, {}) for name, model in models.items()},
        **{f"{name}, never compared": (model, never) for name, model in models.items()},
    }
    small = ["--max-total-tokens", "8192"]
    with ExitStack() as running, ThreadPoolExecutor(len(wanted)) as starting:
        started = {
            name: starting.submit(
                GpuServer(
                    python, model, folder / name.partition(",")[0] / str(len(variables)),
                    small, variables, fraction=0.6, warm_up=True,
                ).start
            )
            for name, (model, variables) in wanted.items()
        }  # fmt: skip
        servers = {}
        for name, future in started.items():
            with report.check(f"{name}: the server answers its first request") as seen:
                servers[name] = future.result()
                running.callback(servers[name].stop)
                seen.update(startup=round(servers[name].startup_seconds or 0))
        for name in models:
            if name in servers:
                _moved(report, servers[name], name)
        with report.check("device memory with and without comparing") as seen:
            seen.update({name: f"{server.device_mib()} MiB" for name, server in servers.items()})
        for name in models:
            without = servers.get(f"{name}, never compared")
            if without is not None:
                with report.check(f"{name}: without comparing the map is untrue") as seen:
                    assert not _unannounced(without)
                    seen.update(untrue=_untrue(without))


def _moved(report: Report, server: GpuServer, name: str) -> None:
    slot = server.maps.slot("0")
    with report.check(f"{name}: what a forward moved is published without being announced") as seen:
        deadline = time.monotonic() + 15
        while not _unannounced(server) and time.monotonic() < deadline:
            time.sleep(0.05)
        events = _unannounced(server)
        assert events, server.events()
        moves = [
            json.loads(line)
            for path in server.motion.glob("moves-*.jsonl")
            for line in path.read_text().splitlines()
        ]
        assert [move for move in moves if "cos_sin_cache" in move["name"]], moves
        # The log has the end of a long name.
        names = [one for event in events for one in event["tensors"]]
        ends = [one.removeprefix("...") for one in names]
        assert any(move["name"].endswith(one) for move in moves for one in ends), names
        seen.update(
            names=names,
            moved=[event["moved"] for event in events],
            seconds_until_published=[
                round(event["updated_at"] - move["at"], 3) for move in moves for event in events
            ],
            moves=[(move["name"], move["from"], move["to"]) for move in moves],
            publication_seconds=[
                round(event["updated_at"] - event["started_at"], 4) for event in events
            ],
        )
    with report.check(f"{name}: every published address and dtype is the process's own") as seen:
        assert _untrue(server) == []
        document = slot.read()
        assert document.state["state"] == "ready"
        seen.update(tensors=len(document.raw["tensors"]), layout=document.layout_generation)
    with report.check(f"{name}: the bytes there are the tensor's") as seen:
        here = _motion(server)["tensors"]
        by_driver = server.bytes_by_slot()["0"]
        shared = {one for one in here.keys() & by_driver.keys() if here[one]["contiguous"]}
        assert not [one for one in shared if here[one]["sha256"] != by_driver[one]]
        assert any("cos_sin_cache" in one for one in shared)
        seen.update(equal=len(shared))
    with report.check(f"{name}: regions and accounting, as written by the thread") as seen:
        document = slot.read()
        check_geometry(document, seen)
        check_memory(document, seen)
        _same_allocations(document.raw, _motion(server)["tensors"], seen)
        devices = {tensor["device"] for tensor in document.raw["tensors"].values()}
        assert devices == {f"cuda:{document.raw['identity']['gpu_id']}"}
    with report.check(f"{name}: a check on demand says equal") as seen:
        took = []
        for _ in range(20):
            answer, seconds = server.check_now()
            assert answer.get("equal") is True, answer
            took.append(seconds)
        seen.update(milliseconds=_milliseconds(took), layout=answer["layout_generation"])
    with report.check(f"{name}: the log says so once, and nothing else") as seen:
        seen.update(said=_no_fault_but(server, "have moved without a call"))


def _same_allocations(
    raw: Mapping[str, Any], here: Mapping[str, Any], seen: dict[str, Any]
) -> None:
    """The allocation that is published around each tensor is the driver's own answer."""
    compared = 0
    for region in raw["regions"]:
        for name in region["tensors"]:
            if name in here and region["ptr"] <= here[name]["ptr"]:
                published = [region["allocation_ptr"], region["allocation_size"]]
                assert published == here[name]["allocation"], (name, published, here[name])
                compared += 1
                if "cos_sin_cache" in name:
                    assert region["allocation_source"] == "driver"
                    seen["cos_sin_cache_in"] = (*published, region["allocation_kind"])
    assert compared
    seen["allocations_compared"] = compared


def saver(report: Report, python: Path, a: Path, b: Path, folder: Path) -> None:
    """Memory that is released and resumed while the thread looks ten times a second."""
    with GpuServer(python, a, folder, ["--enable-memory-saver"], OFTEN) as server:
        slot = server.maps.slot("0")
        for tags in (["weights"], None):
            body = {"tags": tags} if tags else {}
            with report.check(f"released ({tags or 'all'}), and looked at for two seconds") as seen:
                server.wait_idle()
                status, answer = server.post("/release_memory_occupation", body)
                assert status == 200, answer
                first = server.header()
                time.sleep(2)
                last = server.header()
                assert (first.state, last.state) == ("released", "released")
                assert server.alive
                assert last.layout_generation == first.layout_generation
                answer, seconds = server.check_now()
                seen.update(checked=(first.checked_at, last.checked_at), answer=answer)
                seen.update(milliseconds=_milliseconds([seconds]))
                assert answer.get("equal") is True, answer
            with report.check(f"resumed ({tags or 'all'}), updated, and the bytes right") as seen:
                status, answer = server.post("/resume_memory_occupation", body)
                assert status == 200, answer
                time.sleep(1)
                status, answer = server.update_weights_from_disk(b)
                assert status == 200, answer
                assert server.header().state == "ready"
                check_bytes(server, "0", b, seen)
                check_geometry(slot.read(), {})
                check_memory(slot.read(), {})
                server.generate()
        with report.check("released and resumed: nothing unannounced, no fault") as seen:
            assert _unannounced(server) == []
            seen.update(events=[event["kind"] for event in server.events()])
            seen.update(said=_no_fault_but(server))


def lora(report: Report, python: Path, a: Path, b: Path, folder: Path) -> None:
    """Requests with and without an adapter, while the thread looks ten times a second."""
    folder.mkdir(parents=True)
    adapter = folder / "adapter"
    command = [str(python), "-m", "cpu_sglang.tiny_adapter", str(adapter), "--model", str(a)]
    subprocess.run(command, cwd=ROOT, check=True)
    arguments = ["--lora-paths", f"probe={adapter}", "--max-loras-per-batch", "2"]
    with GpuServer(python, a, folder / "server", arguments, OFTEN) as server:
        slot = server.maps.slot("0")
        with report.check("the LoRA pool is published as such") as seen:
            pool = _lora_of(slot.read().raw)
            assert pool
            assert all(tensor["volatile"] for tensor in pool.values())
            check_geometry(slot.read(), seen)
            check_memory(slot.read(), seen)
            assert slot.read().raw["memory"]["lora_bytes"] > 0
            seen.update(lora_tensors=len(pool))
        with report.check("an adapter is in use: another answer, no other map") as seen:
            before = slot.read()
            plain, adapted = server.generate(), _adapted(server)
            assert plain != adapted
            with ThreadPoolExecutor(16) as clients:
                for _ in range(10):
                    asked = [
                        clients.submit(_adapted, server) if k % 2 else
                        clients.submit(server.generate) for k in range(16)
                    ]  # fmt: skip
                    for future in asked:
                        future.result()
            time.sleep(0.5)
            answer, seconds = server.check_now()
            assert answer.get("equal") is True, answer
            after = slot.read()
            assert after.layout_generation == before.layout_generation
            assert after.content_generation == before.content_generation
            assert _lora_of(after.raw) == _lora_of(before.raw)
            assert _unannounced(server) == []
            seen.update(milliseconds=_milliseconds([seconds]))
            seen.update(said=_no_fault_but(server))


def offload(report: Report, python: Path, a: Path, b: Path, folder: Path) -> None:
    """Weights that lie on the host and are swapped in during a forward."""
    with GpuServer(python, a, folder, ["--cpu-offload-gb", "1"], OFTEN) as server:
        slot = server.maps.slot("0")
        with report.check("offloaded weights are published as not resident and volatile") as seen:
            tensors = slot.read().raw["tensors"]
            away = {name: one for name, one in tensors.items() if not one["resident"]}
            assert away
            assert all(one["volatile"] and one["ptr"] == 0 for one in away.values()), away
            assert not [name for name, one in tensors.items() if one["resident"] and
                        one.get("volatile")]  # fmt: skip
            check_geometry(slot.read(), seen)
            seen.update(offloaded=len(away), resident=len(tensors) - len(away))
        with report.check("swapped in and out by requests: no other map") as seen:
            before, first = slot.read(), server.header().checked_at
            answers = []
            with ThreadPoolExecutor(17) as clients:
                for _ in range(10):
                    asked = [clients.submit(server.generate, max_new_tokens=32) for _ in range(16)]
                    answers.append(clients.submit(server.check_now).result()[0])
                    for future in asked:
                        future.result()
            time.sleep(0.5)
            after = slot.read()
            assert _unannounced(server) == []
            assert after.raw["tensors"] == before.raw["tensors"]
            assert after.layout_generation == before.layout_generation
            assert [one for one in answers if one["ok"]]
            assert all(one["equal"] for one in answers if one["ok"]), answers
            seen.update(
                on_demand=[one.get("equal", one.get("error")) for one in answers],
                checked_over_seconds=round((server.header().checked_at or 0) - (first or 0), 1),
                said=_no_fault_but(server),
            )


def hooked_for_measuring(python: Path, folder: Path) -> Path:
    """A hooked venv in which nothing else runs, once the thread's id is written down."""
    return hooked_venv(python, folder, (Path(__file__).with_name("thread_probe.py"),))


def _adapted(server: GpuServer) -> Any:
    sampling = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    body = {"input_ids": [75, 104, 111, 111, 114], "sampling_params": sampling}
    status, answer = server.post("/generate", {**body, "lora_path": "probe"})
    assert status == 200, answer
    return answer.get("output_ids") or answer["text"]


def _lora_of(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {name: one for name, one in raw["tensors"].items() if one["kind"] == "lora"}


def _unannounced(server: GpuServer) -> list[dict[str, Any]]:
    return [event for event in server.events() if event["kind"] == UNANNOUNCED]


def _motion(server: GpuServer) -> dict[str, Any]:
    (found,) = server.ask(server.motion)
    assert isinstance(found, dict)
    return found


def _untrue(server: GpuServer) -> list[str]:
    """Tensors that the map gives another address, size or dtype than torch does."""
    published = server.maps.slot("0").read().raw["tensors"]
    aliases = {alias: name for name, one in published.items() for alias in one["aliases"]}
    ((runner,),) = server.ask(server.places)
    fields = ("ptr", "size", "dtype", "shape", "stride", "storage_ptr", "storage_size")
    wrong = []
    for name, real in runner["tensors"].items():
        mine = published[aliases.get(name, name)]
        if not mine["resident"]:
            continue
        if any(mine[field] != real[field] for field in fields):
            wrong.append(f"{name}: {[(mine[one], real[one]) for one in fields[:3]]}")
    return wrong


def _no_fault_but(server: GpuServer, *expected: str) -> list[str]:
    """What the hook has said in the log; each of ``expected`` once, and nothing else."""
    said = server.said()
    for part in expected:
        assert len([line for line in said if part in line]) == 1, said
    usual = (*expected, "tensors of slot")
    odd = [line for line in said if not any(part in line for part in usual)]
    assert not odd, odd
    return [line[-160:] for line in said]


def _milliseconds(seconds: list[float]) -> str:
    shown = [round(one * 1e3, 2) for one in (seconds[0], statistics.median(seconds), max(seconds))]
    return f"first {shown[0]}, median {shown[1]}, worst {shown[2]} (n {len(seconds)})"
