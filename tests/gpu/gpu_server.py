"""A real SGLang server on a GPU, the venvs that it runs in, and checkpoints for it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import sglang_weight_hook as hook
from cpu_sglang.environment import Environment
from cpu_sglang.server import Server
from sglang_weight_hook.layout.header import Header, unpack

ROOT = Path(__file__).resolve().parents[2]


# Triton's attention and torch's sampling: no kernel package beyond what SGLang itself needs.
GPU_FLAGS = (
    "--attention-backend", "triton",
    "--sampling-backend", "pytorch",
    "--disable-cuda-graph",
)  # fmt: skip
PROBES = (
    Path(__file__).with_name("byte_probe.py"),
    Path(__file__).with_name("motion_probe.py"),
    Path(__file__).parents[1] / "real_sglang" / "weight_probe.py",
)
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
        warm_up: bool = False,
    ) -> None:
        """``warm_up``: whether SGLang sends itself its usual first request."""
        folder.mkdir(parents=True, exist_ok=True)
        self.probe, self.places, self.motion = (
            folder / name for name in ("probe", "places", "motion")
        )
        for directory in (self.probe, self.places, self.motion):
            directory.mkdir()
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
            "--mem-fraction-static", str(fraction), *GPU_FLAGS,
            *(() if warm_up else ("--skip-server-warmup",)), *arguments,
        ]  # fmt: skip
        self.variables = {
            **os.environ,
            "BYTE_PROBE_DIR": str(self.probe),
            "WEIGHT_PROBE_DIR": str(self.places),
            "MOTION_PROBE_DIR": str(self.motion),
            "HF_HUB_OFFLINE": "1",
            "SGLANG_DISABLE_CUDNN_CHECK": "1",
            "SGLANG_ENABLE_JIT_DEEPGEMM": "0",  # it would compile for minutes
            "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",  # /health is to run no kernel
            **(variables or {}),
        }
        self.maps = hook.open_directory(str(folder / "weights_metadata"))

    def bytes_by_slot(self, processes: int = 1) -> dict[str, dict[str, str]]:
        """SHA-256 of every published tensor's bytes, read inside the server by the driver."""
        found: dict[str, dict[str, str]] = {}
        for content in self.ask(self.probe, processes):
            found.update(content)
        return found

    def ask(self, probe: Path, processes: int = 1) -> list[Any]:
        """What one of the probes answers (`probe`, `places`, `motion`), a process each."""
        self._asked += 1
        (probe / f"request-{self._asked}").touch()
        deadline = time.monotonic() + 60
        while True:
            answers = list(probe.glob(f"answer-{self._asked}-*.json"))
            if len(answers) >= processes:
                break
            assert self.alive, "the server has ended"
            assert time.monotonic() < deadline, "the probe does not answer"
            time.sleep(0.05)
        contents = [json.loads(path.read_text()) for path in answers]
        assert not [one for one in contents if "error" in one], contents
        return contents

    def events(self, slot: str = "0") -> list[dict[str, Any]]:
        """The slot's event log, line by line."""
        path = self.cwd / "weights_metadata" / f"weight_events_{slot}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def said(self) -> list[str]:
        """The hook's lines in the server's log, and faults of the device or of a thread.

        Not every traceback: without its first request SGLang 0.5.23 logs one of its own.
        """
        signs = (
            "weight hook", "sglang_weight_hook", "sglang-weight-hook", "Exception in thread",
            "CUDA error", "Segmentation",
        )  # fmt: skip
        return [
            line for line in self._log_text().splitlines() if any(sign in line for sign in signs)
        ]

    def check_now(self, slot: str = "0") -> tuple[dict[str, Any], float]:
        """What the control socket answers to ``check``, and after how many seconds."""
        maps = self.cwd / "weights_metadata"
        state = json.loads((maps / f"weight_state_{slot}.json").read_text())
        folder = os.open(maps, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
                peer.settimeout(30)
                # Not by its whole path, which may be longer than a socket's address.
                peer.connect(f"/proc/self/fd/{folder}/{state['control']}")
                started = time.perf_counter()
                peer.sendall(json.dumps({"op": "check", "slot": slot}).encode() + b"\n")
                answer = b""
                while not answer.endswith(b"\n"):
                    data = peer.recv(65536)
                    assert data, "the owner hung up"
                    answer += data
                return json.loads(answer), time.perf_counter() - started
        finally:
            os.close(folder)

    def header(self, slot: str = "0") -> Header:
        path = self.cwd / "weights_metadata" / f"weight_header_{slot}.bin"
        while True:
            found = unpack(path.read_bytes())
            if found is not None:
                return found

    def device_mib(self) -> Optional[int]:
        """What nvidia-smi says the server's processes hold; None where it does not say."""
        query = ["--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
        said = subprocess.run(
            ["nvidia-smi", *query], stdout=subprocess.PIPE, text=True, check=True
        ).stdout
        mine = set(self.group_pids())
        held = [line.split(",") for line in said.splitlines()]
        sizes = [int(size) for pid, size in held if int(pid) in mine and size.strip().isdigit()]
        return sum(sizes) if sizes else None


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


def hooked_venv(python: Path, folder: Path, probes: Sequence[Path] = PROBES) -> Path:
    """A thin venv with the hook and, unless told otherwise, the probes."""
    hooked = thin_venv(python, folder)
    purelib = next(folder.glob("lib/python*/site-packages"))
    for probe in probes:
        shutil.copy(probe, purelib)
        name = probe.stem
        (purelib / f"{name}.pth").write_text(f"import {name}; {name}.start()\n")
    script = ROOT / "install_sglang_hook_patch.sh"
    subprocess.run([str(script), "--python", str(hooked)], check=True)
    return hooked


def make_checkpoint(python: Path, path: Path, seed: int, *options: str) -> None:
    command = [str(python), "-m", "cpu_sglang.tiny_model", str(path), "--seed", str(seed)]
    subprocess.run([*command, *MODEL, *options], cwd=ROOT, check=True)
