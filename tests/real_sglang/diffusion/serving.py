"""A real diffusion server of SGLang's on the CPU, with the hook and a probe beside it."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpu_sglang.environment import Environment
from cpu_sglang.server import HOST, Server
from cpu_sglang.tiny_pipeline import FOLDER
from tests.real_sglang.hooked import ROOT, make_venv

HERE = Path(__file__).parent
TRUTH_PROBE = HERE.parent / "truth" / "truth_probe.py"


def make_probed_venv(path: Path, environment: Environment) -> Path:
    python = make_venv(path, environment)
    purelib = next(path.glob("lib/python*/site-packages"))
    shutil.copy(TRUTH_PROBE, purelib)
    shutil.copy(HERE / "pipeline_probe.py", purelib)
    # After the venv's own line that makes the packages importable.
    (purelib / "zzz_probe.pth").write_text("import pipeline_probe; pipeline_probe.start()\n")
    return python


def make_pipeline(environment: Environment, folder: Path, seed: int) -> Path:
    """A tiny random pipeline, in a folder whose name tells SGLang its family."""
    return _make(environment, folder / str(seed) / FOLDER, "--seed", str(seed))


def make_adapter(environment: Environment, folder: Path) -> Path:
    return _make(environment, folder, "--adapter")


def _make(environment: Environment, path: Path, *options: str) -> Path:
    command = [str(environment.python), "-m", "cpu_sglang.tiny_pipeline", str(path), *options]
    subprocess.run(command, cwd=ROOT, env=environment.env(), check=True, stdout=subprocess.DEVNULL)
    return path


class PipelineServer(Server):
    """``sglang.multimodal_gen``'s launcher: HTTP in one process, the worker in another."""

    ready_line = "Uvicorn running on"

    def __init__(
        self,
        environment: Environment,
        python: Path,
        pipeline: Path,
        folder: Path,
        arguments: Sequence[str] = (),
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.map_directory = folder / "weights_metadata"
        self.probe_directory = folder / "probe"
        self.probe_directory.mkdir()
        self._asked = 0
        super().__init__(
            environment,
            pipeline,
            cwd=folder,
            log_path=folder / "server.log",
            # Beside other work on two cores its two processes take minutes to import SGLang.
            start_timeout=600.0,
            extra_env={"PIPELINE_PROBE_DIR": str(self.probe_directory)},
        )
        launcher = "sglang.multimodal_gen.runtime.launch_server"
        self.command = [str(python), "-m", launcher, "--model-path", str(pipeline)]
        self.command += ["--host", HOST, "--port", str(self.port), *arguments]

    def live(self) -> tuple[int, dict[str, Any]]:
        """What torch says in the process that has the pipeline: its pid, and the probe's answer."""
        self._asked += 1
        (self.probe_directory / f"request-{self._asked}").touch()
        deadline = time.monotonic() + 120
        while True:
            answers = list(self.probe_directory.glob(f"answer-{self._asked}-*.json"))
            if answers:
                break
            assert time.monotonic() < deadline, "no process with a pipeline has answered"
            time.sleep(0.05)
        (path,) = answers
        (worker,) = json.loads(path.read_text())
        return int(path.stem.rpartition("-")[2]), worker

    def draw(self) -> str:
        """An image in two steps, always from the same noise: other weights, other image."""
        status, answer = self.post(
            "/v1/images/generations",
            {
                "prompt": "a cat",
                "size": "64x64",
                "num_inference_steps": 2,
                "seed": 1,
                "response_format": "b64_json",
            },
        )
        assert status == 200, answer
        image: str = answer["data"][0]["b64_json"]
        return image

    def checksums(self) -> dict[str, str]:
        """SGLang's own word: SHA-256 over names and values of each component's parameters."""
        status, answer = self.post("/get_weights_checksum")
        assert status == 200, answer
        found: dict[str, str] = answer
        return found

    def send_tensors(self, pipeline: Path, component: str) -> dict[str, Any]:
        (file,) = (pipeline / component).glob("*.safetensors")
        name = "tests.real_sglang.diffusion.tensor_sender"
        finished = subprocess.run(
            [self.environment.python, "-m", name, self.url, file, component],
            cwd=ROOT,
            env=self.environment.env(),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        answer: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
        return answer

    def hook_warnings(self) -> list[str]:
        lines = self._log_text().splitlines()
        return [
            line for line in lines if "SGLang weight hook" in line and " tensors of " not in line
        ]
