"""What the hook's thread costs a server with as many tensors as a large model has."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from tests.gpu.checks_background import hooked_for_measuring
from tests.gpu.checks_serving import compare, interleave
from tests.gpu.gpu_server import ROOT, GpuServer, thin_venv
from tests.gpu.map_checks import Report

ROUNDS = 9
TOKENS = 6  # a step of so many layers takes some 200 ms
# As many tensors as DeepSeek-V3 has (1,346), narrow enough for several servers on one card.
DEEP = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 512,
    "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4,
    "num_hidden_layers": 223, "vocab_size": 320, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


def thread(report: Report, python: Path, a: Path, b: Path, folder: Path) -> None:
    """Servers side by side, 16 requests at once, interleaved; then the thread's own time."""
    folder.mkdir(parents=True)
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(DEEP))
    bare = thin_venv(python, folder / "bare")
    hooked = hooked_for_measuring(bare, folder / "hooked")
    every = "SGLANG_WEIGHT_HOOK_CHECK_SECONDS"
    wanted: dict[str, tuple[Path, Mapping[str, str]]] = {
        "without": (bare, {}),
        "every 10 s": (hooked, {}),
        "without, again": (bare, {}),
        "every 0.1 s": (hooked, {every: "0.1"}),
    }
    arguments = ["--load-format", "dummy", "--skip-tokenizer-init", "--max-total-tokens", "8192"]
    with ExitStack() as running, ThreadPoolExecutor(16) as clients:
        started = {
            name: clients.submit(
                GpuServer(
                    interpreter, model, folder / f"server-{number}", arguments, variables,
                    fraction=0.6,
                ).start
            )
            for number, (name, (interpreter, variables)) in enumerate(wanted.items())
        }  # fmt: skip
        servers = {name: future.result() for name, future in started.items()}
        for server in servers.values():
            running.callback(server.stop)

        def burst(server: GpuServer, _: int) -> None:
            list(clients.map(lambda _: server.generate(max_new_tokens=TOKENS), range(16)))

        for server in servers.values():
            burst(server, 0)
            burst(server, 0)
        times: dict[str, list[float]] = {}
        interleave(times, servers, ROUNDS, burst)
        compare(report, "16 requests at once", times)
        with report.check("device memory of each server") as seen:
            seen.update({name: f"{server.device_mib()} MiB" for name, server in servers.items()})
        _thread_time(report, servers, clients)


def _thread_time(
    report: Report, servers: Mapping[str, GpuServer], clients: ThreadPoolExecutor
) -> None:
    """What the thread itself takes, and that it found nothing that was not announced."""
    with report.check("a look of the thread, on an idle server") as seen:
        often = servers["every 0.1 s"]
        seen.update(tensors=len(often.maps.slot("0").read().raw["tensors"]))
        looks, cpu, seconds = _looks(often, 10.0)
        assert looks > 20
        seen.update(looks=looks, milliseconds=round(cpu / looks * 1e3, 2),
                    share=f"{cpu / seconds:.2%}")  # fmt: skip
    with report.check("a look of the thread, while requests are served") as seen:
        busy = clients.submit(lambda: [often.generate(max_new_tokens=TOKENS) for _ in range(4)])
        looks, cpu, seconds = _looks(often, 5.0)
        busy.result()
        seen.update(looks=looks, milliseconds=round(cpu / max(looks, 1) * 1e3, 2),
                    share=f"{cpu / seconds:.2%}")  # fmt: skip
    with report.check("the thread's time of each server so far") as seen:
        for name in ("every 10 s", "every 0.1 s"):
            cpu, where = _cpu(servers[name])
            seen[name] = f"{cpu:.3f} s of CPU ({where})"
            took = [servers[name].check_now()[1] for _ in range(20)]
            seen[f"{name}, a check on demand"] = f"{sorted(took)[10] * 1e3:.1f} ms"
    with report.check("nothing unannounced in any server") as seen:
        for name in ("every 10 s", "every 0.1 s"):
            kinds = [event["kind"] for event in servers[name].events()]
            seen[name] = kinds
            assert "unannounced_change" not in kinds


def _looks(server: GpuServer, seconds: float) -> tuple[int, float, float]:
    """How often the thread looked, its CPU seconds, and in how many seconds that was."""
    seen = set()
    started, before = time.monotonic(), _cpu(server)[0]
    while time.monotonic() < started + seconds:
        seen.add(server.header().checked_at)
        time.sleep(0.01)
    return len(seen) - 1, _cpu(server)[0] - before, time.monotonic() - started


def _cpu(server: GpuServer) -> tuple[float, str]:
    """CPU seconds of the hook's thread, and where the figure is from."""
    (path,) = server.motion.glob("thread-*")
    task = Path("/proc", path.name.partition("-")[2], "task", path.read_text())
    try:
        return int((task / "schedstat").read_text().split()[0]) / 1e9, "schedstat"
    except (OSError, IndexError):
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), "stat"


def streams(report: Report, python: Path, a: Path, b: Path, folder: Path) -> None:
    """Buckets through the recorder, over tensors in CUDA memory, without a server."""
    with report.check("streams of buckets over CUDA tensors") as seen:
        command = [str(python), "-m", "tests.gpu.stream_costs"]
        said = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        seen.update(json.loads(said.stdout.splitlines()[-1]))
        assert seen["further_bucket_us"] < 200
        assert seen["generations_of_1000_buckets"] == 1
