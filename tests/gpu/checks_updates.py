"""Checks of updates without a file, and of weights that are quantised while they load."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

from tests.gpu.gpu_server import ROOT, GpuServer
from tests.gpu.map_checks import Report, check_bytes, check_geometry
from tests.real_sglang.hooked import assert_true_map


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
                # A stream or session of buckets is one generation; so is each update from disk.
                assert after.content_generation > before.content_generation
                assert after.state["event"]["success"] is True
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
