"""What the matrix asks of a running SGLang, whether it is a server or embedded in a program."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import struct
import subprocess
import threading
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from cpu_sglang.environment import Environment
from cpu_sglang.server import ServerFailed, free_port
from tests.real_sglang.hooked import ROOT, HookedServer, make_venv
from tests.real_sglang.truth.comparison import Probe

HERE = Path(__file__).parent
# Two ranks beside other work on two cores take minutes to import SGLang.
START_TIMEOUT = 900.0


def make_probed_venv(path: Path, environment: Environment) -> Path:
    """A hooked interpreter with the probe that knows values, and what a CPU lacks."""
    python = make_venv(path, environment)
    purelib = next(path.glob("lib/python*/site-packages"))
    for module in ("truth_probe", "absent_hardware"):
        shutil.copy(HERE / f"{module}.py", purelib)
        (purelib / f"{module}.pth").write_text(f"import {module}; {module}.start()\n")
    return python


def an_image(width: int = 56, height: int = 56) -> str:
    """A PNG of noise, as a data URL; random, so that SGLang finds none of them in a cache."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    rows = b"".join(b"\0" + os.urandom(3 * width) for _ in range(height))
    png = b"\x89PNG\r\n\x1a\n" + chunk(
        b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    )
    png += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(png).decode()


class _Lines:
    """A program that is told things, and answers them, one JSON line each."""

    def __init__(self, command: Sequence[str], cwd: Path, env: Mapping[str, str]) -> None:
        self.log = cwd / f"{Path(command[2]).name}-{time.monotonic_ns()}.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=cwd,
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )

    def tell(self, order: Any, timeout: float = 300.0) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self.answer(timeout)

    def answer(self, timeout: float) -> Any:
        """The next line that is JSON; whatever else is printed there is none of ours."""
        assert self.process.stdout is not None
        too_late = threading.Timer(timeout, self._kill)
        too_late.start()
        try:
            for line in self.process.stdout:
                try:
                    return json.loads(line)
                except ValueError:
                    continue
        finally:
            too_late.cancel()
        raise ServerFailed(f"{self.process.args!r} ended:\n{self.log.read_text()[-3000:]}")

    def end(self, grace: float = 20.0) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(grace)
        except subprocess.TimeoutExpired:
            pass
        self._kill()
        self.process.wait()
        self.process.stdout.close()

    def _kill(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


class ServedOverHttp(HookedServer):
    """A server of its own, asked over its HTTP routes."""

    def __init__(self, *args: Any, tp: int, replicas: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.start_timeout = START_TIMEOUT
        self.probe = Probe(self.probe_directory)
        self._sides = ("--tp", str(tp), "--replicas", str(replicas))
        self._sender: _Lines | None = None

    @property
    def map_directory(self) -> Path:
        return self.cwd / "weights_metadata"

    def weights_checker(self) -> dict[str, Any]:
        status, answer = self.post("/weights_checker", {"action": "checksum"})
        assert status == 200, answer
        checked: dict[str, Any] = answer
        return checked

    def get_weights_by_name(self, name: str, truncate_size: int) -> Any:
        status, answer = self.post(
            "/get_weights_by_name", {"name": name, "truncate_size": truncate_size}
        )
        return answer if status == 200 else None

    def ask_adapter(self, name: str) -> Any:
        sampling = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
        body = {"input_ids": [75, 104, 111], "sampling_params": sampling, "lora_path": name}
        status, answer = self.post("/generate", body)
        assert status == 200, answer
        return answer.get("output_ids") or answer["text"]

    def ask_about_image(self) -> Any:
        sampling = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
        text = "<|vision_start|><|image_pad|><|vision_end|>?"
        body = {"text": text, "image_data": [an_image()], "sampling_params": sampling}
        status, answer = self.post("/generate", body)
        assert status == 200, answer
        # The image came to more tokens than its placeholder.
        assert answer["meta_info"]["prompt_tokens"] > 4, answer
        return answer["output_ids"]

    def update_from_disk(self, checkpoint: Path) -> dict[str, Any]:
        status, answer = self.update_weights_from_disk(checkpoint)
        assert status == 200, answer
        updated: dict[str, Any] = answer
        return updated

    def send_buckets(self, checkpoint: Path, *, flattened: bool) -> list[dict[str, Any]]:
        self.wait_idle()
        if self._sender is None:
            command = [str(self.environment.python), "-u", str(HERE / "bucket_sender.py")]
            command += ["--port", str(self.port), *self._sides]
            variables = self.environment.env(python_path=[ROOT])
            self._sender = _Lines(command, self.cwd, variables)
            self._sender.answer(START_TIMEOUT)
        order = {"checkpoint": str(checkpoint), "flattened": flattened, "buckets": 3}
        answers: list[dict[str, Any]] = self._sender.tell(order)
        return answers

    def stop(self, grace: float = 20.0) -> None:
        sender, self._sender = self._sender, None
        if sender is not None:
            sender.end()
        super().stop(grace)


class EmbeddedEngine:
    """`sglang.Engine` in a program of the test's own (embedded_engine.py): no HTTP anywhere."""

    def __init__(
        self,
        environment: Environment,
        python: Path,
        model: Path,
        folder: Path,
        settings: Mapping[str, Any],
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        probe_directory = folder / "probe"
        probe_directory.mkdir()
        self.probe = Probe(probe_directory)
        self.map_directory = folder / "weights_metadata"
        self._settings = {"model_path": str(model), "port": free_port(), **settings}
        self._command = [str(python), "-u", str(HERE / "embedded_engine.py")]
        self._folder = folder
        self._variables = environment.env({"WEIGHT_PROBE_DIR": str(probe_directory)})
        self._program: _Lines | None = None

    def __enter__(self) -> EmbeddedEngine:
        self._program = _Lines(self._command, self._folder, self._variables)
        try:
            assert self._tell(self._settings, timeout=START_TIMEOUT) == "ready"
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        program, self._program = self._program, None
        if program is not None:
            program.end()

    def weights_checker(self) -> dict[str, Any]:
        checked: dict[str, Any] = self._tell({"do": "weights_checker"})
        return checked

    def get_weights_by_name(self, name: str, truncate_size: int) -> Any:
        return self._tell(
            {"do": "get_weights_by_name", "name": name, "truncate_size": truncate_size}
        )

    def generate(self) -> Any:
        return self._tell({"do": "generate"})

    def update_from_disk(self, checkpoint: Path) -> dict[str, Any]:
        updated: dict[str, Any] = self._tell({"do": "disk", "checkpoint": str(checkpoint)})
        return updated

    def send_buckets(self, checkpoint: Path, *, flattened: bool) -> list[dict[str, Any]]:
        order = {"do": "buckets", "checkpoint": str(checkpoint), "flattened": flattened}
        answers: list[dict[str, Any]] = self._tell(order)
        return answers

    def _tell(self, order: Any, timeout: float = 300.0) -> Any:
        assert self._program is not None
        return self._program.tell(order, timeout)
