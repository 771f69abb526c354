"""The node agent: how soon a change is seen through it, and what it takes at rest."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

from sglang_weight_hook.fleet.etcd import PREFIX, Etcd, EtcdError
from sglang_weight_hook.layout.location import DIRECTORY

from . import table
from .measure import Sample
from .table import Line, Section

ROOT = Path(__file__).resolve().parents[1]
SLOTS, TENSORS = 8, 483

EVENTS_TARGET, ETCD_TARGET = 0.050, 0.200  # seconds
CPU_TARGET, MEMORY_TARGET = 0.01, 80 * 1000 * 1000  # of a core; bytes


def measure(quick: bool) -> Section:
    rounds, rest = (10, 10.0) if quick else (60, 60.0)
    with tempfile.TemporaryDirectory(prefix="agent-") as place, contextlib.ExitStack() as stack:
        folder = Path(place)
        etcd = stack.enter_context(_etcd(folder / "etcd"))
        owner = stack.enter_context(_started("owner", folder / "maps"))
        arguments = ["--dir", str(folder / "maps"), "--port", "0"]
        if etcd is not None:
            arguments += ["--etcd", etcd, "--node", "bench"]
        agent = stack.enter_context(_agent(arguments))
        lines = [*_at_rest(agent, rest), *_seen(agent, owner, etcd, rounds)]
    return Section("The node agent", lines, HOW, LIMITS)


class _Process:
    """A process that answers each line with a line."""

    def __init__(self, process: subprocess.Popen[str], first: str) -> None:
        self.process, self.first = process, first

    def tell(self, what: str) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        self.process.stdout.readline()

    @property
    def port(self) -> int:
        return int(self.first.rpartition(":")[2])


@contextlib.contextmanager
def _run(command: list[str], **environment: str) -> Iterator[_Process]:
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            first = process.stdout.readline().strip()
            if not first:
                raise RuntimeError(f"{command[1:]}: exit status {process.wait()}")
            yield _Process(process, first)
        finally:
            process.send_signal(signal.SIGTERM)


def _started(what: str, directory: Path) -> contextlib.AbstractContextManager[_Process]:
    return _run(
        [sys.executable, "-m", "benchmarks.agent", what],
        **{DIRECTORY: str(directory), "SGLANG_WEIGHT_HOOK_QUIET_MS": "0"},
    )


def _agent(arguments: list[str]) -> contextlib.AbstractContextManager[_Process]:
    return _run([sys.executable, "-m", "sglang_weight_hook", "serve", *arguments])


@contextlib.contextmanager
def _etcd(folder: Path) -> Iterator[Optional[str]]:
    """An etcd's URL; None where there is none on this machine."""
    program = shutil.which("etcd")
    if program is None:
        yield None
        return
    client, peer = (f"http://127.0.0.1:{_free_port()}" for _ in range(2))
    command = [
        *(program, "--data-dir", str(folder), "--log-level", "error"),
        *("--listen-client-urls", client, "--advertise-client-urls", client),
        *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
        *("--initial-cluster", f"default={peer}"),
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    with Etcd([client]) as asked:
                        asked.get("/")
                    break
                except EtcdError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.1)
            yield client
        finally:
            process.kill()


def _free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


# --- how soon --------------------------------------------------------------------------------


class _Arrivals:
    """When each content generation of slot 0 was seen, in ``time.time()``."""

    def __init__(self) -> None:
        self.at: dict[int, float] = {}

    def seen(self, state: dict[str, Any]) -> None:
        if state.get("state") == "ready":
            self.at.setdefault(state["content_generation"], time.time())


def _follow_events(port: int, arrivals: _Arrivals) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/events?slot=0")
    response = connection.getresponse()
    with contextlib.suppress(OSError, http.client.HTTPException):
        while line := response.readline():
            if line.startswith(b"data: "):
                state = json.loads(line[6:]).get("state")  # there is none in who speaks
                if state is not None:
                    arrivals.seen(state)


def _follow_etcd(url: str, arrivals: _Arrivals) -> None:
    with Etcd([url]) as client, contextlib.suppress(EtcdError):
        for changes in client.watch(f"{PREFIX}bench/0", 0):
            for change in changes:
                if change.value is not None:
                    arrivals.seen(json.loads(change.value))


def _seen(agent: _Process, owner: _Process, etcd: Optional[str], rounds: int) -> list[Line]:
    events, registry = _Arrivals(), _Arrivals()
    threads = [threading.Thread(target=_follow_events, args=(agent.port, events), daemon=True)]
    if etcd is not None:
        threads.append(threading.Thread(target=_follow_etcd, args=(etcd, registry), daemon=True))
    for thread in threads:
        thread.start()
    time.sleep(2.0)
    path = Path(owner.first.partition(" ")[2]) / "weight_state_0.json"
    published: dict[int, float] = {}
    for _ in range(rounds):
        owner.tell("update")
        state = json.loads(path.read_bytes())
        published[state["content_generation"]] = path.stat().st_mtime
        time.sleep(0.25)
    time.sleep(1.0)
    return [
        _line("a change, seen through the agent's events", published, events, EVENTS_TARGET),
        _line("a change, seen through etcd", published, registry, ETCD_TARGET)
        if etcd is not None
        else Line("a change, seen through etcd", "not measured", "", "etcd is not installed"),
    ]


def _line(what: str, published: dict[int, float], arrivals: _Arrivals, target: float) -> Line:
    missed = published.keys() - arrivals.at.keys()
    if missed:
        return Line(what, f"{len(missed)} of {len(published)} never", "", "", "all", False)
    sample = Sample([arrivals.at[one] - at for one, at in published.items()])
    return Line(
        what,
        f"{table.timing(sample)} wall",
        "the time of the state file",
        f"95 %: {table.seconds(sample.quantile(0.95))}; all: {table.seconds(max(sample.values))}",
        f"≤ {table.seconds(target)}",
        sample.median <= target,
    )


# --- at rest ---------------------------------------------------------------------------------


def _at_rest(agent: _Process, seconds: float) -> list[Line]:
    pid = agent.process.pid
    time.sleep(3.0)
    used, began = _cpu(pid), time.monotonic()
    time.sleep(seconds)
    share = (_cpu(pid) - used) / (time.monotonic() - began)
    resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return [
        Line(
            f"the agent at rest, {SLOTS} slots: processor",
            f"{share:.2%} of a core",
            "",
            f"over {seconds:.0f} s, its leases in etcd included",
            f"≤ {CPU_TARGET:.0%}",
            share <= CPU_TARGET,
        ),
        Line(
            f"the agent at rest, {SLOTS} slots: resident memory",
            f"{resident / 1e6:.1f} MB",
            "",
            f"{SLOTS} slots of {TENSORS} tensors",
            f"≤ {MEMORY_TARGET / 1e6:.0f} MB",
            resident <= MEMORY_TARGET,
        ),
    ]


def _cpu(pid: int) -> float:
    """Seconds of all its threads."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def _own() -> None:
    """The process whose slots the agent shows."""
    from sglang_weight_hook.publisher import recorder

    from .models import Runner, make_model

    runners = []
    for gpu in range(SLOTS):
        runner = Runner(make_model(TENSORS))
        runner.gpu_id = gpu
        runners.append(runner)
        _event("load_model", "load", [runner])
    _event("scheduler_ready", "settle", [])
    print("owner", os.environ[DIRECTORY], flush=True)
    for _ in sys.stdin:
        begun = recorder.begin("update_weights_from_disk", "update", [runners[0]])
        recorder.finish(begun, (True, "ok"), None)
        print("done", flush=True)


def _event(kind: str, effect: str, runners: list[Any]) -> None:
    from sglang_weight_hook.publisher import recorder

    recorder.finish(recorder.begin(kind, effect, runners), None, None)


HOW = """\
A process publishes 8 slots; `sglang-weight-hook serve` runs beside it and registers them in a real
etcd, all on this machine. At rest: processor time of all threads of the agent
(`/proc/PID/task/TID/schedstat`) and its resident memory. A change: from the modification
time of the new state file (written, not yet renamed into place) to its arrival at a client of
`/events` and of an etcd watch, by the same clock."""
LIMITS = """\
A change waits for inotify, one look at every slot of the directory, the digest of the new layout,
and the event loop; through etcd also for its write to the disk and for the watch. At rest the agent
looks at each slot once a second (for what inotify does not tell), uvicorn wakes ten times a second,
and each lease is begun anew every 3 s. Two thirds of the memory are Python, Starlette, uvicorn and
typer."""

if __name__ == "__main__":
    _own()
