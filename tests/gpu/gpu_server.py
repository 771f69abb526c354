"""A real SGLang server on a GPU, the venvs that it runs in, and checkpoints for it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import sglang_weight_hook as hook
from cpu_sglang.environment import Environment
from cpu_sglang.server import Server

ROOT = Path(__file__).resolve().parents[2]


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
