"""A real SGLang on a real GPU, hooked: every check in one run, as a short table.

    python3 tests/gpu/real_server.py --python PY [--only NAME ...] [--json FILE]

``PY`` is the interpreter of an environment that holds SGLang; the hook is installed into a thin
venv over it and nothing else is touched.  ``pytest -m gpu tests/gpu`` does the same with
``SGLANG_PYTHON`` naming that interpreter.  Exit status 0 if every check that ran held.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Optional

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import sglang_weight_hook as hook  # noqa: E402
from cpu_sglang.environment import Environment  # noqa: E402
from cpu_sglang.server import Server  # noqa: E402
from tests.gpu import checkpoint_bytes  # noqa: E402
from tests.real_sglang.hooked import assert_true_map  # noqa: E402

# Triton's attention and torch's sampling: no kernel package beyond what SGLang itself needs.
GPU_FLAGS = (
    "--attention-backend", "triton",
    "--sampling-backend", "pytorch",
    "--disable-cuda-graph",
    "--skip-server-warmup",
)  # fmt: skip
MODEL = ("--architecture", "qwen2", "--hidden", "256", "--heads", "4", "--kv-heads", "2")


class GpuServer(Server):
    """`cpu_sglang`'s server control around a GPU server's command line."""

    def __init__(
        self,
        python: Path,
        model: Path,
        folder: Path,
        arguments: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
        fraction: float = 0.3,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.probe = folder / "probe"
        self.probe.mkdir()
        self._asked = 0
        super().__init__(
            Environment("0.5.23", folder),
            model,
            cwd=folder,
            log_path=folder / "server.log",
            start_timeout=420,
        )
        self.command = [
            str(python), "-m", "sglang.launch_server",
            "--model-path", str(model), "--host", "127.0.0.1", "--port", str(self.port),
            "--mem-fraction-static", str(fraction), *GPU_FLAGS, *arguments,
        ]  # fmt: skip
        self.variables = {
            **os.environ,
            "BYTE_PROBE_DIR": str(self.probe),
            "HF_HUB_OFFLINE": "1",
            "SGLANG_DISABLE_CUDNN_CHECK": "1",
            "SGLANG_ENABLE_JIT_DEEPGEMM": "0",  # it would compile for minutes
            "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",  # /health is to run no kernel
            **(variables or {}),
        }
        self.maps = hook.open_directory(str(folder / "weights_metadata"))

    def bytes_by_slot(self, processes: int = 1) -> dict[str, dict[str, str]]:
        """SHA-256 of every published tensor's bytes, read inside the server by the driver."""
        self._asked += 1
        (self.probe / f"request-{self._asked}").touch()
        deadline = time.monotonic() + 60
        while True:
            answers = list(self.probe.glob(f"answer-{self._asked}-*.json"))
            if len(answers) >= processes:
                break
            assert time.monotonic() < deadline, "the probe does not answer"
            time.sleep(0.05)
        found: dict[str, dict[str, str]] = {}
        for path in answers:
            content = json.loads(path.read_text())
            assert "error" not in content, content
            found.update(content)
        return found


class Report:
    """Checks by name, with what was seen; printed as they are made."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    @contextmanager
    def check(self, name: str) -> Iterator[dict[str, Any]]:
        seen: dict[str, Any] = {}
        started = time.monotonic()
        try:
            yield seen
            held, why = True, ""
        except Exception as error:
            held, why = False, f"{type(error).__name__}: {error}"
            traceback.print_exc()
        seconds = round(time.monotonic() - started, 2)
        self.rows.append({"check": name, "held": held, "why": why, "seen": seen, "s": seconds})
        shown = ", ".join(f"{key} {value}" for key, value in seen.items())
        print(f"{'ok  ' if held else 'FAIL'} {name}: {shown} {why}".rstrip(), flush=True)


# --- the checks ---------------------------------------------------------------------------


def check_geometry(document: hook.Document, seen: dict[str, Any]) -> None:
    """Every tensor in regions, every region in one driver allocation, none overlap."""
    raw = document.raw
    previous_end = 0
    covered: dict[str, int] = {}
    for region in raw["regions"]:
        start, end = region["ptr"], region["ptr"] + region["size"]
        base = region["allocation_ptr"]
        assert region["allocation_source"] == "driver", region
        assert base <= start, region
        assert end <= base + region["allocation_size"], region
        assert start >= previous_end, "regions overlap"
        previous_end = end
        for name in region["tensors"]:
            tensor = raw["tensors"][name]
            first, last = tensor["ptr"], tensor["ptr"] + tensor["span"]
            covered[name] = covered.get(name, 0) + min(end, last) - max(start, first)
    for name, tensor in raw["tensors"].items():
        if tensor["resident"]:
            assert covered.get(name, 0) == tensor["span"], name
    kinds = {region["allocation_kind"] for region in raw["regions"]}
    seen.update(
        tensors=len(raw["tensors"]), regions=len(raw["regions"]), kinds=sorted(map(str, kinds))
    )


def check_memory(document: hook.Document, seen: dict[str, Any]) -> None:
    memory = document.raw["memory"]
    parts = ("weights", "lora", "kv_cache", "siblings", "other_live", "reserved_free", "other")
    total = sum(memory[f"{part}_bytes"] for part in parts)
    total += memory["device_free_bytes"] - memory["unbacked_bytes"]
    assert total == memory["device_total_bytes"], memory
    seen.update({part: memory[f"{part}_bytes"] for part in parts})
    seen.update(document.raw["validation"]["allocator"])


def check_bytes(
    server: GpuServer, slot: str, folder: Path, seen: dict[str, Any], rank: int = 0, ranks: int = 1
) -> None:
    """Bytes through the published addresses equal the checkpoint's."""
    held = server.bytes_by_slot(ranks)[slot]
    wanted = checkpoint_bytes.expected(folder, rank, ranks)
    compared = wanted.keys() & held.keys()
    wrong = sorted(name for name in compared if held[name] != wanted[name])
    assert not wrong, wrong
    missing = sorted(wanted.keys() - held.keys())
    seen.update(equal=len(compared), not_published=missing)
    assert not missing


def plain(report: Report, python: Path, a: Path, b: Path, folder: Path) -> None:
    """One server: bytes, geometry, accounting, updates, memory saver."""
    with GpuServer(python, a, folder, ["--enable-memory-saver"]) as server:
        print(f"server up after {server.startup_seconds:.0f} s", flush=True)
        slot = server.maps.slot("0")
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
            check_bytes(server, "0", a, seen)
        with report.check("bytes of checkpoint B after an update from disk") as seen:
            before = slot.read()
            status, answer = server.update_weights_from_disk(b)
            assert status == 200, answer
            after = slot.read()
            assert after.content_generation == before.content_generation + 1
            check_bytes(server, "0", b, seen)
            seen.update(event=after.state["event"], layout=after.layout_generation)
        with report.check("a failing update") as seen:
            status, answer = server.update_weights_from_disk(folder / "missing")
            assert status == 400, answer
            assert slot.read().state["state"] == "failed"
            check_bytes(server, "0", b, seen)
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
            status, answer = server.update_weights_from_disk(a)
            assert status == 200, answer
            assert slot.read().state["state"] == "ready"
            check_bytes(server, "0", a, seen)
        with report.check("release and resume of everything") as seen:
            for route in ("/release_memory_occupation", "/resume_memory_occupation"):
                server.wait_idle() if "release" in route else None
                status, answer = server.post(route)
                assert status == 200, answer
                document = slot.read()
                seen[route] = (document.state["state"], document.state["residency"])
            assert document.state["kv_physical_epoch"] == 1
        said = [line for line in server._log_text().splitlines() if "SGLang weight hook" in line]
        print("\n".join(said), flush=True)
    with report.check("nobody's after the server is gone"):
        assert not slot.owner_alive()


def speculative(report: Report, python: Path, a: Path, b: Path, folder: Path) -> None:
    """A draft in the same process: two slots, both right, shared storage counted once."""
    arguments = [
        "--speculative-algorithm", "STANDALONE",
        "--speculative-draft-model-path", str(b),
        "--speculative-num-steps", "2",
        "--speculative-eagle-topk", "1",
        "--speculative-num-draft-tokens", "3",
    ]  # fmt: skip
    with GpuServer(python, a, folder, arguments) as server:
        print(f"server up after {server.startup_seconds:.0f} s", flush=True)
        slots = {slot.name: slot for slot in server.maps.slots()}
        with report.check("target and draft have a slot each") as seen:
            assert set(slots) == {"0", "0_draft"}
            documents = {name: slot.read() for name, slot in slots.items()}
            for document in documents.values():
                assert document.state["state"] == "ready"
                check_geometry(document, seen)
            seen.update({name: len(document.tensors) for name, document in documents.items()})
            seen.update(shared=documents["0_draft"].raw["memory"]["shared_with"])
        with report.check("target's and draft's bytes") as seen:
            check_bytes(server, "0", a, seen)
            held = server.bytes_by_slot()["0_draft"]
            wanted = checkpoint_bytes.expected(b)
            target = checkpoint_bytes.expected(a)
            for name, found in held.items():
                if name in wanted:
                    assert found in (wanted[name], target[name]), name
            seen["draft tensors that are the target's own"] = sum(
                1 for name, found in held.items() if target.get(name) == found != wanted.get(name)
            )
        with report.check("accounting of both") as seen:
            for document in documents.values():
                check_memory(document, seen)


def eagle(report: Report, python: Path, a: Path, b: Path, folder: Path) -> None:
    """A draft that serves with the target's own embedding and head."""
    folder.mkdir(parents=True)
    target, draft = folder / "target", folder / "draft"
    make_checkpoint(python, target, 1, "--architecture", "llama")
    make_checkpoint(python, draft, 2, "--architecture", "llama_eagle", "--layers", "1")
    arguments = [
        "--speculative-algorithm", "EAGLE",
        "--speculative-draft-model-path", str(draft),
        "--speculative-num-steps", "2",
        "--speculative-eagle-topk", "1",
        "--speculative-num-draft-tokens", "3",
    ]  # fmt: skip
    with GpuServer(python, target, folder / "server", arguments) as server:
        slots = {slot.name: slot for slot in server.maps.slots()}
        with report.check("EAGLE: target and draft have a slot each, both settled") as seen:
            assert set(slots) == {"0", "0_draft"}
            documents = {name: slot.read() for name, slot in slots.items()}
            for name, document in documents.items():
                assert document.state["state"] == "ready"
                check_geometry(document, {})
                seen[name] = len(document.tensors)
        with report.check("EAGLE: target's and draft's bytes") as seen:
            check_bytes(server, "0", target, seen)
            held = server.bytes_by_slot()["0_draft"]
            own = checkpoint_bytes.expected(draft)
            wanted = {f"model.{name}": found for name, found in own.items()}
            assert {name: held[name] for name in wanted} == wanted
            seen["draft equal"] = len(wanted)
        with report.check("EAGLE: shared embedding and head are counted once") as seen:
            one, other = (documents[name] for name in ("0", "0_draft"))
            for name in ("model.embed_tokens.weight", "lm_head.weight"):
                assert one.tensors[name]["ptr"] == other.tensors[name]["ptr"], name
            storages = {
                (tensor["storage_ptr"], tensor["storage_size"])
                for document in documents.values()
                for tensor in document.tensors.values()
            }
            counted = sum(
                document.memory["weights_bytes"] - document.memory["shared_bytes"]
                for document in documents.values()
            )
            assert counted == sum(size for _, size in storages)
            seen.update(counted=counted, shared=other.memory["shared_bytes"])
        with report.check("EAGLE: both right after an update of the target") as seen:
            status, answer = server.update_weights_from_disk(target)
            assert status == 200, answer
            for name, slot in slots.items():
                document = slot.read()
                assert document.state["state"] == "ready", document.state
                assert document.layout_generation == documents[name].layout_generation
                check_geometry(document, {})
            check_bytes(server, "0", target, seen)


def online(report: Report, python: Path, a: Path, b: Path, folder: Path) -> None:
    """Updates without a file, in buckets: tensors, flattened buckets, a process group."""
    with GpuServer(python, a, folder) as server:
        slot = server.maps.slot("0")
        for route in ("tensor", "flattened", "distributed"):
            with report.check(f"updates by {route}, in buckets") as seen:
                status, answer = server.update_weights_from_disk(a)
                assert status == 200, answer
                before = slot.read()
                command = [python, "-m", "cpu_sglang.online_updates", a, b, "--routes", route]
                client = subprocess.run(
                    [*map(str, command), "--port", str(server.port), "--buckets", "4"],
                    cwd=ROOT,
                    stdout=subprocess.PIPE,
                    text=True,
                    timeout=240,
                    check=False,
                )
                steps = [json.loads(line) for line in client.stdout.splitlines()]
                assert any(step["speaks_as_b"] for step in steps), steps
                after = slot.read()
                assert after.layout_generation == before.layout_generation
                assert after.content_generation > before.content_generation + 3
                seen.update(content=after.content_generation - before.content_generation)
                check_bytes(server, "0", a, seen)  # the client has put A back
        sender = Path(__file__).with_name("ipc_update.py")
        if subprocess.run([python, "-c", "import checkpoint_engine"], check=False).returncode:
            print("no updates by IPC: checkpoint-engine is not installed", flush=True)
            return
        for number, model in enumerate((b, a)):
            with report.check(f"update by IPC {number + 1} of 2, from checkpoint-engine") as seen:
                before = slot.read()
                client = subprocess.run(
                    [str(python), str(sender), str(model), "--port", str(server.port)],
                    env=server.variables,
                    stdout=subprocess.PIPE,
                    text=True,
                    timeout=240,
                    check=False,
                )
                assert client.returncode == 0, client.stdout
                after = slot.read()
                assert after.state["event"]["kind"] == "update_weights_from_ipc"
                assert after.state["state"] == "ready"
                assert after.layout_generation == before.layout_generation
                assert after.content_generation == before.content_generation + 1
                check_bytes(server, "0", model, seen)
        with report.check("a failing update by IPC") as seen:
            status, answer = server.post("/update_weights_from_ipc", {"zmq_handles": {}})
            state = slot.read_state()
            assert (status, state["state"]) == (400, "failed"), (answer, state)
            seen.update(message=state["event"]["message"])


def quantised(report: Report, python: Path, a: Path, b: Path, folder: Path) -> None:
    """FP8 made while loading: post-processing replaces parameters, and again in an update."""
    probe = folder / "live"
    probe.mkdir(parents=True)
    variables = {"WEIGHT_PROBE_DIR": str(probe)}
    with GpuServer(python, a, folder / "server", ["--quantization", "fp8"], variables) as server:
        slot = server.maps.slot("0")
        for number, what in enumerate(("the load", "an update from disk"), 1):
            with report.check(f"FP8 addresses after {what}") as seen:
                if number == 2:
                    try:
                        status, answer = server.update_weights_from_disk(b)
                    except OSError:
                        # 0.5.15.post1 loads into weights that it has transposed, fails, fails
                        # again rolling back, and its scheduler ends: the map says so.
                        state = slot.read_state()
                        assert state["state"] == "failed"
                        seen["SGLang itself failed"] = state["event"]["message"]
                        break
                    assert status == 200, answer
                (probe / f"request-{number}").touch()
                deadline = time.monotonic() + 60
                while not (answers := list(probe.glob(f"answer-{number}-*.json"))):
                    assert time.monotonic() < deadline, "the probe does not answer"
                    time.sleep(0.05)
                (live,) = json.loads(answers[0].read_text())
                document = slot.read()
                assert_true_map(document, {**live, "pid": document.state["pid"]})
                check_geometry(document, seen)
                dtypes = sorted({entry["dtype"] for entry in document.tensors.values()})
                seen.update(dtypes=dtypes, event=document.state["event"])


def serving(report: Report, python: Path, a: Path, b: Path, folder: Path) -> None:
    """Requests and updates of servers that run side by side, taking turns.

    Two without anything, two with the hook, and, where ``SEED_PROTOTYPE`` names its folder, one
    with the prototype.  Each figure is compared with the first bare server's of the same turn;
    the second bare one shows how far two equal servers differ.
    """
    folder.mkdir(parents=True)
    bare = thin_venv(python, folder / "bare")
    # Without the probes: their threads wake twenty times a second.
    hooked = hooked_venv(bare, folder / "hooked", probes=False)
    interpreters = {
        "without": bare, "with": hooked, "without, again": bare, "with, again": hooked
    }  # fmt: skip
    if prototype := os.environ.get("SEED_PROTOTYPE"):
        # It imports torch when the interpreter starts: what makes torch importable goes first.
        interpreters["prototype"] = thin_venv(python, folder / "prototype", "aa")
        purelib = next((folder / "prototype").glob("lib/python*/site-packages"))
        for name in (
            "sglang_injector.pth",
            "sglang_patch_loader.py",
            "sglang_weight_hook_patch_core.py",
        ):
            shutil.copy(Path(prototype, name), purelib)
    servers: dict[str, GpuServer] = {}
    with ExitStack() as running, ThreadPoolExecutor(len(interpreters)) as starting:
        # A small cache under a large fraction: each start sees the others take memory.
        small = ["--max-total-tokens", "8192"]
        started = {
            name: starting.submit(GpuServer(each, a, folder / name, small, fraction=0.6).start)
            for name, each in interpreters.items()
        }
        for name, future in started.items():
            try:
                servers[name] = future.result()
                running.callback(servers[name].stop)
            except Exception as error:
                if name != "prototype":
                    raise
                print(f"the prototype's server did not start: {str(error)[-1500:]}", flush=True)
        figures: dict[str, dict[str, list[float]]] = {
            "32 tokens": {}, "first token": {}, "16 requests at once": {}, "update from disk": {}
        }  # fmt: skip
        for server in servers.values():
            for _ in range(4):
                server.generate(max_new_tokens=32)
                server.generate(max_new_tokens=1)
        for what, tokens in (("32 tokens", 32), ("first token", 1)):
            _take_turns(figures[what], servers, 60, lambda server, _: server.generate(
                max_new_tokens=tokens  # noqa: B023
            ))  # fmt: skip
        with ThreadPoolExecutor(16) as clients:

            def burst(server: GpuServer, _: int) -> None:
                list(clients.map(lambda _: server.generate(max_new_tokens=32), range(16)))

            for server in servers.values():
                burst(server, 0)
            _take_turns(figures["16 requests at once"], servers, 30, burst)

        def update(server: GpuServer, turn: int) -> None:
            model = (b, a)[turn % 2]
            status, answer = server.post("/update_weights_from_disk", {"model_path": str(model)})
            assert status == 200, answer

        ours = {name: server for name, server in servers.items() if name != "prototype"}
        for server in ours.values():
            server.wait_idle()
        _take_turns(figures["update from disk"], ours, 60, update)
        if "prototype" in servers:
            try:
                servers["prototype"].wait_idle()
                only = {"prototype": servers["prototype"]}
                _take_turns(figures["update from disk"], only, 60, update)
            except (OSError, AssertionError, RuntimeError) as error:
                figures["update from disk"].pop("prototype", None)
                print(f"the prototype's update: {error}", flush=True)
                print(servers["prototype"].log_tail(40), flush=True)
        for what, times in figures.items():
            with report.check(f"serving: {what}") as seen:
                first = times["without"]
                seen["without"] = f"{statistics.median(first) * 1e3:.2f} ms"
                if what == "16 requests at once":
                    seen["requests per second"] = {
                        name: round(16 / statistics.median(mine), 1) for name, mine in times.items()
                    }
                for name in [name for name in times if name != "without"]:
                    ratios = [mine / its for mine, its in zip(times[name], first)]
                    low, middle, high = statistics.quantiles(ratios)
                    seen[name] = (
                        f"{statistics.median(times[name]) * 1e3:.2f} ms, ratio {middle:.3f}"
                        f" (quartiles {low:.3f} to {high:.3f}, n {len(ratios)})"
                    )
        with report.check("serving: device memory of each server") as seen:
            for name, server in servers.items():
                seen[name] = f"{_device_mib(server)} MiB"


def _take_turns(
    times: dict[str, list[float]],
    servers: Mapping[str, GpuServer],
    turns: int,
    act: Callable[[GpuServer, int], object],
) -> None:
    """``act`` on each server, one at a time, the first one changing from turn to turn."""
    for turn in range(turns):
        names = list(servers)
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            started = time.perf_counter()
            act(servers[name], turn)
            times.setdefault(name, []).append(time.perf_counter() - started)


def _device_mib(server: GpuServer) -> Optional[int]:
    """What nvidia-smi says the server's processes hold; None where it does not say."""
    said = subprocess.run(
        ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    mine = set(server.group_pids())
    held = [line.split(",") for line in said.splitlines()]
    sizes = [int(size) for pid, size in held if int(pid) in mine and size.strip().isdigit()]
    return sum(sizes) if sizes else None


def tensor_parallel(report: Report, python: Path, a: Path, b: Path, folder: Path) -> None:
    """Two GPUs: two slots, right devices and ranks, together the one GPU's model."""
    with GpuServer(python, a, folder / "one") as server:
        whole = server.maps.slot("0").read()
    arguments = ["--tp-size", "2", "--enable-memory-saver"]
    with GpuServer(python, a, folder / "two", arguments) as server:
        slots = server.maps.slots()
        with report.check("two slots with their own GPUs and ranks") as seen:
            assert [slot.name for slot in slots] == ["0", "1"]
            documents = [slot.read() for slot in slots]
            uuids = {document.raw["identity"]["gpu_uuid"] for document in documents}
            assert len(uuids) == 2
            assert [d.raw["identity"]["tp_rank"] for d in documents] == [0, 1]
            for document in documents:
                check_geometry(document, seen)
                check_memory(document, {})
            seen.update(uuids=len(uuids))
        with report.check("the two ranks together are the one GPU's model") as seen:
            seen.update(check_shards(whole, documents))
        for what, model in (("the load", a), ("an update from disk", b)):
            with report.check(f"every rank's bytes after {what}") as seen:
                if model is b:
                    status, answer = server.update_weights_from_disk(b)
                    assert status == 200, answer
                for rank, slot in enumerate(slots):
                    check_bytes(server, slot.name, model, seen, rank, len(slots))
        with report.check("release and resume on both ranks, and an update") as seen:
            epochs = [slot.read_state()["physical_epoch"] for slot in slots]
            server.wait_idle()
            status, answer = server.post("/release_memory_occupation", {"tags": ["weights"]})
            assert status == 200, answer
            assert [slot.read_state()["state"] for slot in slots] == ["released"] * 2
            status, answer = server.post("/resume_memory_occupation", {"tags": ["weights"]})
            assert status == 200, answer
            now = [slot.read_state()["physical_epoch"] for slot in slots]
            assert now == [epoch + 1 for epoch in epochs]
            status, answer = server.update_weights_from_disk(a)
            assert status == 200, answer
            for rank, slot in enumerate(slots):
                assert slot.read_state()["state"] == "ready"
                check_bytes(server, slot.name, a, seen, rank, len(slots))


def check_shards(whole: hook.Document, ranks: Sequence[hook.Document]) -> dict[str, int]:
    """Each tensor is whole on every rank, or split along one dimension without a rest."""
    seen = {"split": 0, "replicated": 0, "bytes": 0}
    assert all(document.tensors.keys() == whole.tensors.keys() for document in ranks)
    for name, tensor in whole.tensors.items():
        shards = [document.tensors[name] for document in ranks]
        if all(shard["shape"] == tensor["shape"] for shard in shards):
            seen["replicated"] += 1
            seen["bytes"] += tensor["size"]
            continue
        differing = [
            dimension
            for dimension, size in enumerate(tensor["shape"])
            if any(shard["shape"][dimension] != size for shard in shards)
        ]
        assert len(differing) == 1, (name, differing)
        (dimension,) = differing
        assert sum(shard["shape"][dimension] for shard in shards) == tensor["shape"][dimension]
        assert sum(shard["size"] for shard in shards) == tensor["size"], name
        seen["split"] += 1
        seen["bytes"] += sum(shard["size"] for shard in shards)
    assert seen["bytes"] == sum(tensor["size"] for tensor in whole.tensors.values())
    assert seen["split"] > seen["replicated"] > 0
    return seen


def real_size(config: Mapping[str, Any], *arguments: str) -> Callable[..., None]:
    """A real model's tensors without its weights: ``--load-format dummy``."""

    def run(report: Report, python: Path, a: Path, b: Path, folder: Path) -> None:
        model = folder / "model"
        model.mkdir(parents=True)
        (model / "config.json").write_text(json.dumps(config))
        options = ["--load-format", "dummy", "--skip-tokenizer-init", *arguments]
        with (
            GpuServer(python, model, folder / "server", options, fraction=0.85) as server,
            report.check(f"{config['architectures'][0]} at real size") as seen,
        ):
            document = server.maps.slot("0").read()
            raw = document.raw
            check_geometry(document, seen)
            check_memory(document, seen)
            event = raw["event"]
            seen.update(
                model_class=raw["identity"]["model_class"],
                captured=raw["validation"]["captured"],
                left_out=raw["validation"]["left_out"],
                capture_seconds=event["capture_seconds"],
                event_seconds=round(event["finished_at"] - event["started_at"], 3),
                startup_seconds=round(server.startup_seconds or 0),
            )

    return run


# Meta's and DeepSeek's published configurations, with fewer layers: what one card holds.
LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192,
    "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8,
    "num_hidden_layers": 40, "vocab_size": 128256, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
    "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_attention_heads": 128, "num_key_value_heads": 128, "num_hidden_layers": 8,
    "first_k_dense_replace": 3, "n_routed_experts": 256, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc",
    "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "vocab_size": 129280, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6, "rope_theta": 10000, "hidden_act": "silu", "moe_layer_freq": 1,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 0,
    "eos_token_id": 1, "attention_bias": False, "num_nextn_predict_layers": 0,
    "quantization_config": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
}  # fmt: skip

CHECKS: dict[str, Callable[..., None]] = {
    "plain": plain,
    "speculative": speculative,
    "eagle": eagle,
    "online": online,
    "quantised": quantised,
    "serving": serving,
    "tensor_parallel": tensor_parallel,
    "llama": real_size(LLAMA_70B),
    "deepseek": real_size(DEEPSEEK_V3),
}
ON_ONE_GPU = tuple(name for name in CHECKS if name != "tensor_parallel")


def thin_venv(python: Path, folder: Path, prefix: str = "zz") -> Path:
    """A venv over ``python``'s environment; ``prefix`` sorts the line that leads there."""
    ask = [
        str(python),
        "-c",
        "import json, sys; print(json.dumps([sys.path, sys._base_executable]))",
    ]
    said = subprocess.run(ask, check=True, stdout=subprocess.PIPE, text=True).stdout
    path, base = json.loads(said.splitlines()[-1])
    subprocess.run([base, "-m", "venv", "--without-pip", str(folder)], check=True)
    purelib = next(folder.glob("lib/python*/site-packages"))
    # Also what .pth files there have added, which are not read when this one is; not the hook,
    # where ``python`` is itself such a venv.
    sites = [
        entry
        for entry in path
        if "-packages" in entry and not Path(entry, "sglang_injector.pth").exists()
    ]
    (purelib / f"{prefix}_shared.pth").write_text("\n".join(sites) + "\n")
    return folder / "bin" / "python"


def hooked_venv(python: Path, folder: Path, probes: bool = True) -> Path:
    """A thin venv with the hook and, unless told otherwise, the probes."""
    hooked = thin_venv(python, folder)
    purelib = next(folder.glob("lib/python*/site-packages"))
    live_probe = ROOT / "tests" / "real_sglang" / "weight_probe.py"
    for probe in (Path(__file__).with_name("byte_probe.py"), live_probe) if probes else ():
        shutil.copy(probe, purelib)
        name = probe.stem
        (purelib / f"{name}.pth").write_text(f"import {name}; {name}.start()\n")
    script = ROOT / "install_sglang_hook_patch.sh"
    subprocess.run([str(script), "--python", str(hooked)], check=True)
    return hooked


def make_checkpoint(python: Path, path: Path, seed: int, *options: str) -> None:
    command = [str(python), "-m", "cpu_sglang.tiny_model", str(path), "--seed", str(seed)]
    subprocess.run([*command, *MODEL, *options], cwd=ROOT, check=True)


def run(python: Path, names: Sequence[str], result: Path | None = None) -> Report:
    """Make two checkpoints and a hooked venv, run the named checks, print them."""
    report = Report()
    folder = Path(tempfile.mkdtemp(prefix="hook-gpu-"))
    hooked = hooked_venv(python, folder / "venv")
    checkpoints = [folder / f"checkpoint-{seed}" for seed in (1, 2)]
    for seed, path in enumerate(checkpoints, 1):
        make_checkpoint(hooked, path, seed)
    for name in names:
        print(f"--- {name}", flush=True)
        try:
            CHECKS[name](report, hooked, *checkpoints, folder / name)
        except Exception as error:
            with report.check(f"{name}: the server"):
                raise RuntimeError(str(error)[-1500:]) from None
        if result is not None:
            result.write_text(json.dumps(report.rows, indent=1))
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description="Check the hook with SGLang on a real GPU.")
    parser.add_argument("--python", type=Path, default=Path(sys.executable))
    parser.add_argument("--only", nargs="+", choices=sorted(CHECKS), default=list(ON_ONE_GPU))
    parser.add_argument("--json", type=Path, help="write the rows there too")
    options = parser.parse_args()
    rows = run(options.python, options.only, options.json).rows
    failed = [row["check"] for row in rows if not row["held"]]
    print(f"{len(rows) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
