"""Starts a real SGLang server on the CPU, talks to it, and ends all of it.

A server is a tree of processes (HTTP, scheduler ranks, detokenizer).  It gets a
process group of its own, and that group is what is ended: by ``stop``, by leaving the
``with`` block for whatever reason, and by ``orphan_guard`` when the caller is killed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from cpu_sglang import orphan_guard
from cpu_sglang.environment import Environment

HOST = "127.0.0.1"
# Every layer in plain torch, no graph capture, a KV cache of a few hundred kilobytes.
CPU_FLAGS = (
    "--device", "cpu",
    "--attention-backend", "torch_native",
    "--sampling-backend", "pytorch",
    "--disable-cuda-graph",
    "--disable-overlap-schedule",
    "--max-total-tokens", "2048",
)  # fmt: skip
# The same in all releases; SGLang logs it when its own warm-up request has finished.
# /health answers earlier, and an update sent in between is refused.
READY_LINE = "The server is fired up and ready to roll!"
# Five bytes of text as tokens of tiny_model's tokenizer.
PROMPT = (75, 104, 111, 111, 114)

Progress = Callable[[float, str], None]
AServer = TypeVar("AServer", bound="Server")


class ServerFailed(RuntimeError):
    """The server did not start, died, or did not end; the message holds its log's tail."""


class Server:
    """One running SGLang server.

    ``extra_args`` are SGLang's own (``--tp 2``, ``--speculative-algorithm ...``) and
    come last, so they override the defaults.  ``on_progress`` is called about once a
    second while the server starts, with the seconds so far and the last log line.
    """

    ready_line = READY_LINE

    def __init__(
        self,
        environment: Environment,
        model_path: str | os.PathLike[str],
        *,
        extra_args: Sequence[str] = (),
        extra_env: Mapping[str, str] | None = None,
        python_path: Sequence[str | os.PathLike[str]] = (),
        cwd: str | os.PathLike[str] | None = None,
        log_path: str | os.PathLike[str] | None = None,
        command: Sequence[str] | None = None,
        start_timeout: float = 600.0,
        on_progress: Progress | None = None,
    ) -> None:
        self.environment = environment
        self.port = free_port()
        self.url = f"http://{HOST}:{self.port}"
        self.cwd = Path(cwd) if cwd is not None else Path.cwd()
        self.log_path = Path(log_path) if log_path is not None else _new_log_path()
        # ``command`` is what comes before SGLang's arguments; another entry point
        # (a launch wrapper) takes its place there.
        self.command = [
            *(command or (str(environment.python), "-m", "sglang.launch_server")),
            "--model-path", os.fspath(model_path),
            "--host", HOST,
            "--port", str(self.port),
            *CPU_FLAGS,
            *environment.needs.server_flags,
            *extra_args,
        ]  # fmt: skip
        ranks = _number_of_ranks(self.command)
        one_core_each = {"SGLANG_CPU_OMP_THREADS_BIND": _cores_for(ranks)} if ranks > 1 else {}
        self.variables = environment.env(
            {**one_core_each, **(extra_env or {})}, python_path=python_path
        )
        self.start_timeout = start_timeout
        self.startup_seconds: float | None = None
        self._on_progress = on_progress
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[str] | None = None

    # -- life ---------------------------------------------------------------

    def __enter__(self: AServer) -> AServer:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self: AServer) -> AServer:
        """Start the server and return once it answers and its warm-up is over."""
        if self._process is not None:
            raise ServerFailed("this server was started already")
        try:
            self._launch()
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    @property
    def pid(self) -> int:
        """The launched process, and with it the process group."""
        if self._process is None:
            raise ServerFailed("the server is not running")
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def group_pids(self) -> list[int]:
        """The server's processes, zombies left out."""
        return [] if self._process is None else _members(self._process.pid)

    def stop(self, grace: float = 20.0) -> None:
        """End the whole process group: politely, then for certain."""
        process, self._process = self._process, None
        ended = process is None
        try:
            if process is not None:
                _end_group(process, grace)
                ended = True
        finally:
            # A second Ctrl-C lands here with the group alive: the guard finishes it.
            self._dismiss_guard(ended)

    def log_tail(self, lines: int = 25) -> str:
        return "\n".join(self._log_text().splitlines()[-lines:])

    def _launch(self) -> None:
        # The guard is there before the server is, so no moment is unguarded but the
        # one in which the number is written.
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", orphan_guard.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log_path, "wb") as log:
            self._process = subprocess.Popen(
                self.command,
                cwd=self.cwd,
                env=self.variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._tell_guard(str(self._process.pid))

    def _wait_until_ready(self) -> None:
        start = time.monotonic()
        last_report = start
        while True:
            elapsed = time.monotonic() - start
            if not self.alive:
                raise self._failure(f"the server ended after {elapsed:.0f} s without answering")
            if self.ready_line in self._log_text() and self._is_healthy():
                self.startup_seconds = elapsed
                return
            if elapsed > self.start_timeout:
                raise self._failure(f"the server was not ready after {elapsed:.0f} s")
            if self._on_progress is not None and time.monotonic() - last_report >= 1.0:
                last_report = time.monotonic()
                self._on_progress(elapsed, self._last_log_line())
            time.sleep(0.2)

    def _is_healthy(self) -> bool:
        try:
            return self.get("/health", timeout=5.0)[0] == 200
        except OSError:
            return False

    def _failure(self, what: str) -> ServerFailed:
        return ServerFailed(f"{what}; its log ({self.log_path}) ends with:\n{self.log_tail()}")

    def _log_text(self) -> str:
        try:
            return self.log_path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def _last_log_line(self) -> str:
        # Progress bars end their lines with a carriage return.
        lines = self._log_text().replace("\r", "\n").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def _tell_guard(self, line: str) -> None:
        if self._guard is not None and self._guard.stdin is not None:
            self._guard.stdin.write(line + "\n")
            self._guard.stdin.flush()

    def _dismiss_guard(self, server_ended: bool) -> None:
        guard, self._guard = self._guard, None
        if guard is None or guard.stdin is None:
            return
        try:
            if server_ended:
                guard.stdin.write(orphan_guard.STOPPED + "\n")
            guard.stdin.close()
        except OSError:
            pass  # it was killed from outside; nothing depends on it any more
        guard.wait()

    # -- requests -----------------------------------------------------------

    def get(self, path: str, *, timeout: float = 60.0) -> tuple[int, Any]:
        return self._request("GET", path, None, timeout)

    def post(
        self, path: str, body: Mapping[str, Any] | None = None, *, timeout: float = 120.0
    ) -> tuple[int, Any]:
        return self._request("POST", path, dict(body or {}), timeout)

    def generate(
        self, prompt: str | Sequence[int] = PROMPT, *, max_new_tokens: int = 8
    ) -> list[int] | str:
        """What the model says, greedily: token ids, or text where a release gives no ids.

        Equal weights give equal answers, which is how an update is seen from outside.
        """
        question = {"text": prompt} if isinstance(prompt, str) else {"input_ids": list(prompt)}
        sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
        status, answer = self.post("/generate", {**question, "sampling_params": sampling})
        if status != 200:
            raise ServerFailed(f"/generate answered {status}: {answer}")
        ids: list[int] | str = answer.get("output_ids") or answer["text"]
        return ids

    def update_weights_from_disk(
        self, model_path: str | os.PathLike[str], **options: Any
    ) -> tuple[int, Any]:
        """Load another checkpoint into the running server, once it is idle."""
        self.wait_idle()
        body = {"model_path": os.fspath(model_path), **options}
        return self.post("/update_weights_from_disk", body)

    def wait_idle(self, timeout: float = 30.0) -> None:
        """Return once no request is running: flushing the cache is refused until then."""
        deadline = time.monotonic() + timeout
        while True:
            status, answer = self.post("/flush_cache")
            if status == 200:
                return
            if time.monotonic() > deadline:
                raise ServerFailed(f"the server was still busy after {timeout:.0f} s: {answer}")
            time.sleep(0.2)

    def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout: float
    ) -> tuple[int, Any]:
        request = urllib.request.Request(
            self.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with _without_proxy.open(request, timeout=timeout) as response:
                return response.status, _parsed(response.read())
        except urllib.error.HTTPError as refusal:
            with refusal:
                return refusal.code, _parsed(refusal.read())


_without_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def free_port() -> int:
    """A free port below 50,000: SGLang adds 10,000 to it for a port of its own."""
    while True:
        with socket.socket() as probe:
            port = random.randrange(20_000, 50_000)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port


def _parsed(content: bytes) -> Any:
    text = content.decode(errors="replace")
    try:
        return json.loads(text)
    except ValueError:
        return text


def _number_of_ranks(command: Sequence[str]) -> int:
    ranks = 1
    for position, argument in enumerate(command):
        option, _, value = argument.partition("=")
        if option in ("--tp", "--tp-size", "--tensor-parallel-size", "--pp-size", "--dp-size"):
            ranks *= int(value or command[position + 1])
    return ranks


def _cores_for(ranks: int) -> str:
    """Cores for each rank, as SGLang's variable wants them: "0|1".

    Left to itself SGLang gives every rank a NUMA node of its own, and refuses to start
    more ranks than the machine has nodes; most machines have one.
    """
    cores = sorted(os.sched_getaffinity(0))
    return "|".join(str(cores[rank % len(cores)]) for rank in range(ranks))


def _new_log_path() -> Path:
    handle, path = tempfile.mkstemp(prefix="cpu-sglang-", suffix=".log")
    os.close(handle)
    return Path(path)


def _end_group(process: subprocess.Popen[bytes], grace: float) -> None:
    group = process.pid
    for signal_number, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(group, signal_number)
        except ProcessLookupError:
            pass
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            # Reaping the leader matters: as a zombie it would keep the group alive.
            ended = process.poll() is not None
            if ended and not _members(group):
                return
            time.sleep(0.05)
    raise ServerFailed(f"processes of the server would not end: {_members(group)}")


def _members(group: int) -> list[int]:
    """The living processes of a group, from the process table.

    Asking the kernel with signal 0 would count zombies, and a container's first
    process may take its time to bury the server's orphans.
    """
    members = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue  # gone since the listing
        # The name, in parentheses, may itself hold spaces and parentheses.
        state, _parent, its_group = stat.rpartition(")")[2].split()[:3]
        if int(its_group) == group and state not in "ZX":
            members.append(int(entry.name))
    return members
