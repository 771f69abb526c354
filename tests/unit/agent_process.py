"""A node agent as a process of its own, over real maps that another process publishes."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import published_files
import pytest

pytest.importorskip("torch")
pytest.importorskip("typer")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

ROOT = Path(__file__).resolve().parents[2]
# Run first in an agent's process: it goes on as a user who has no rights at all, once it has read
# its options, in a Python that this user could not have started.
AS_NOBODY = """
import os
import sglang_weight_hook.commands.lookup, sglang_weight_hook.commands.serve as command
import sglang_weight_hook.commands.render.page, sglang_weight_hook.fleet.registration
import anyio._backends._asyncio, anyio.to_thread, concurrent.futures.thread, encodings.idna
import sglang_weight_hook.fleet.server
import uvicorn.lifespan.off, uvicorn.loops.asyncio
as_told = command.directories_of
def as_nobody(given):
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    return as_told(given)
command.directories_of = as_nobody
"""
TOKEN = "a-token-that-nobody-else-may-see-7f3a"

# Publishes as many slots as it is told, and changes them on a word and a number a line.
OWNER = """
import sys
import torch
from fake_sglang import FakeRunner, event, load, settle, update
from sglang_weight_hook.publisher import background

background.DELAYS = (10_000.0,)  # it looks when it is asked, and not by itself
model = lambda: torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 32))
runners = [FakeRunner(model(), gpu_id=n) for n in range(int(sys.argv[1]))]
for runner in runners:
    load(runner)
settle()
def move(runner):
    runner.model[0].weight.data = torch.zeros(96, 64)
print("ready", flush=True)
for line in sys.stdin:
    what, _, number = line.strip().partition(" ")
    runner = runners[int(number or 0)]
    if what == "update":  # the same addresses, other contents
        update(runner)
    elif what == "move":
        update(runner, during=lambda: move(runner))
    elif what == "fail":
        event("update_weights_from_disk", "update", [runner], result=(False, "no such file"))
    print("done", flush=True)
"""


def eventually(holds: Callable[[], Any], seconds: float = 30.0) -> Any:
    """What it answers at last.  Patient: these tests start many processes, perhaps at once."""
    return published_files.eventually(holds, seconds)


class Publisher:
    """A process that publishes slots 0, 1, ... into a directory."""

    def __init__(self, directory: Path, slots: int = 1) -> None:
        environment = {n: v for n, v in os.environ.items() if not n.startswith("SGLANG_WEIGHT")}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "unit")])
        environment["SGLANG_WEIGHT_HOOK_DIR"] = str(directory)
        environment["SGLANG_WEIGHT_HOOK_QUIET_MS"] = "0"
        environment["SGLANG_WEIGHT_HOOK_CHECK_SECONDS"] = "10000"
        self.directory = directory
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(slots)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == "ready"

    def tell(self, what: str, slot: int = 0) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{what} {slot}\n")
        self.process.stdin.flush()
        assert self._answer() == "done"

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def state(self, slot: str = "0") -> Any:
        return json.loads((self.directory / f"weight_state_{slot}.json").read_bytes())

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def end(self) -> None:
        """As a server ends."""
        self.process.communicate()


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Agent:
    """``sglang-weight-hook serve``, until it is ended.

    ``before``: code that runs first in its process, to shorten times that are long for a test.
    ``prefix``: what its command begins with, to run it elsewhere.
    """

    def __init__(
        self, folder: Path, *arguments: object, before: str = "", prefix: Sequence[str] = ()
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.log = folder / f"agent-{time.monotonic_ns()}.log"
        code = f"import sys\n{before}\nfrom sglang_weight_hook.commands.entry import main\n"
        code += "sys.exit(main())"
        environment = {n: v for n, v in os.environ.items() if not n.startswith("SGLANG_WEIGHT")}
        environment["PYTHONPATH"] = str(ROOT)
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-c", code, "serve", "--port", "0", *map(str, arguments)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        found = re.match(r"serving (https?)://(.*):(\d+)\n", self.process.stdout.readline())
        if found is None:
            self.process.kill()
            self.process.communicate()
            raise AssertionError(self.said())
        self.scheme, self.port = found[1], int(found[3])
        self.url = f"{self.scheme}://{found[2]}:{self.port}"
        self.host = found[2] if prefix else "127.0.0.1"
        self.context: ssl.SSLContext | None = None
        self.token: str | None = None

    def connect(self, timeout: float = 20.0) -> http.client.HTTPConnection:
        if self.scheme == "https":
            return http.client.HTTPSConnection(
                "localhost", self.port, timeout=timeout, context=self.context
            )
        return http.client.HTTPConnection(self.host, self.port, timeout=timeout)

    def ask(self, path: str, method: str = "GET", **headers: str) -> Answer:
        """``headers``: with _ for -."""
        connection = self.connect()
        try:
            connection.request(method, path, headers=self.headers(headers))
            response = connection.getresponse()
            named = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, named, response.read())
        finally:
            connection.close()

    def headers(self, more: Mapping[str, str]) -> dict[str, str]:
        found = {name.replace("_", "-"): value for name, value in more.items()}
        if self.token is not None:
            found.setdefault("authorization", f"Bearer {self.token}")
        return found

    def get(self, path: str) -> Any:
        answer = self.ask(path)
        assert answer.status == 200, answer
        return answer.json

    def slot(self, id: str = "0") -> Any:
        return next((slot for slot in self.get("/slots")["slots"] if slot["id"] == id), None)

    def events(self, path: str = "/events", **headers: str) -> Stream:
        return Stream(self, path, headers)

    def said(self) -> str:
        return self.log.read_text()

    def memory(self) -> int:
        """Resident bytes."""
        statm = Path(f"/proc/{self.process.pid}/statm").read_text()
        return int(statm.split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def end(self, number: int = signal.SIGTERM, timeout: float = 20.0) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(timeout)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return status


class Event(NamedTuple):
    kind: str
    id: str
    data: Any


class Stream:
    """Server-sent events, one after the other."""

    def __init__(self, agent: Agent, path: str, headers: Mapping[str, str]) -> None:
        self.connection = agent.connect()
        self.connection.request("GET", path, headers=agent.headers(headers))
        self.response = self.connection.getresponse()
        self.status = self.response.status
        self.last = ""  # the id that a reader that is cut off would come back with

    def next(self) -> Event | None:
        """The next event; None at the end of the stream."""
        kind, data = "message", ""
        while True:
            line = self.response.readline().decode().rstrip("\n")
            if not line and self.response.isclosed():
                return None
            name, _, value = line.partition(": ")
            if name == "event":
                kind = value
            elif name == "data":
                data = value
            elif name == "id":
                self.last = value
            elif not line and data:
                return Event(kind, self.last, json.loads(data))

    def until(self, holds: Callable[[Event], bool]) -> Event:
        while True:
            event = self.next()
            assert event is not None, "the stream has ended"
            if holds(event):
                return event

    def comment(self) -> str:
        """The next comment."""
        while True:
            line = self.response.readline().decode()
            if line.startswith(":"):
                return line.strip()

    def close(self) -> None:
        self.response.close()
        self.connection.close()
