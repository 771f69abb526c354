"""Weights of real servers pulled over the network by a reader that has copied documents only.

Two ranks; the reader in another network namespace, where this machine allows one.  What is pulled
is held against SGLang's own checksums (`/weights_checker`) and against the same memory read by the
kernel, after the load and after each way to update; and a server that is stopped, killed or
started again on the same ports is never taken for the one that it was.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import sglang_weight_hook as hook
from cpu_sglang.environment import Environment
from tests.real_sglang.hooked import HookedServer, make_venv, pid_of, run_client, wait_for_end
from tests.real_sglang.network import HERE, NoNamespaces, second_namespace
from tests.real_sglang.truth.sglang_answers import checksum

pytestmark = [pytest.mark.real_sglang, pytest.mark.transfer]

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("mooncake-transfer-engine-non-cuda==0.3.13.post1", "nixl-cu12==1.5.1")
PULLS = 500  # of each rank, while the server updates
# A port a rank, and the next server has to take the same ones.
PORTS = {"MC_MIN_RPC_PORT": "15870", "MC_MAX_RPC_PORT": "15873"}


@pytest.fixture(scope="module")
def engines(environment: Environment) -> Path:
    """A folder with both engines for the server's Python, installed on first use."""
    folder = environment.purelib.parents[3] / "engines"
    if not (folder / "nixl_cu12").is_dir() or not (folder / "mooncake").is_dir():
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", "--no-deps", "--target", folder, *PACKAGES],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"the engines cannot be installed: {done.stderr.strip()[-300:]}")
    return folder


@pytest.fixture(scope="module")
def python(
    environment: Environment, engines: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An interpreter with the hook, SGLang and the engines."""
    found = make_venv(tmp_path_factory.mktemp("with_engines") / "venv", environment)
    (purelib,) = found.parents[1].glob("lib/python*/site-packages")
    (purelib / "zzz_engines.pth").write_text(f"{engines}\n")
    return found


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[list[str]]:
    """What puts a command on the other side of a network."""
    with ExitStack() as stack:
        try:
            prefix = stack.enter_context(second_namespace())
        except NoNamespaces as error:
            pytest.skip(f"no second network namespace here: {error}")
        yield prefix


class FarReader:
    """Copies documents and pulls in another process."""

    def __init__(self, engine: str, prefix: list[str], folder: Path, engines: Path) -> None:
        self._engine, self._prefix, self._folder, self._engines = engine, prefix, folder, engines
        self._copies = 0

    def copy(self, server: HookedServer) -> Path:
        self._copies += 1
        target = self._folder / f"copy-{self._copies}"
        target.mkdir(parents=True)
        for path in Path(server.maps.path).glob("*.json"):
            shutil.copy(path, target)
        return target

    def pull(self, copy: Path) -> list[dict[str, Any]]:
        return self._run("pull_everything.py", copy, 240)

    def pull_repeatedly(self, live: Path, pulls: int, seconds: float) -> list[dict[str, Any]]:
        """Of the server's own directory: what it publishes is seen, as over a shared volume."""
        return self._run("pull_repeatedly.py", live, seconds + 120, str(pulls), f"{seconds}")

    def _run(
        self, program: str, directory: Path, timeout: float, *more: str
    ) -> list[dict[str, Any]]:
        done = subprocess.run(
            [*self._prefix, sys.executable, str(ROOT / "tests/real_sglang" / program),
             self._engine, str(directory), *more],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(self._engines)]),
                 "UCX_TLS": "tcp"},  # and not the kernel's way around the network
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
        return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("engine", ["mooncake", "nixl"])
def test_what_is_pulled_from_two_ranks_is_what_sglang_says(
    engine: str,
    environment: Environment,
    python: Path,
    checkpoint: Callable[..., Path],
    engines: Path,
    elsewhere: list[str],
    tmp_path: Path,
) -> None:
    a, b = checkpoint(1), checkpoint(2)
    reader = FarReader(engine, elsewhere, tmp_path / "copies", engines)

    def serve() -> HookedServer:
        variables = {
            "SGLANG_WEIGHT_HOOK_SUBSCRIBERS": engine,
            "SGLANG_WEIGHT_HOOK_TRANSFER_HOST": HERE,
            "UCX_TLS": "tcp",
            **PORTS,
        }
        arguments = ["--tp", "2"]
        server = HookedServer(environment, python, a, tmp_path, arguments, variables)
        server.start_timeout = 900.0  # two ranks that import as much beside whatever else runs here
        return server

    with serve() as server:
        before = assert_pulled(server, reader)
        status, _ = server.update_weights_from_disk(b)
        assert status == 200
        old = reader.copy(server)
        assert assert_pulled(server, reader) != before  # by disk
        steps = run_client(
            environment, a, b, "--port", server.port, "--routes", "tensor", "--tp", 2,
            "--buckets", 2,
        )  # fmt: skip
        assert any(step["success"] for step in steps)
        assert_pulled(server, reader)  # by buckets, in sessions and without
        for said in reader.pull(old):
            assert said["raised"] == "Changed", said
        server.wait_idle()
        for route in ("/release_memory_occupation", "/resume_memory_occupation"):
            assert server.post(route)[0] == 200
        assert_pulled(server, reader)
        assert server.generate()
        assert_no_pull_is_mixed(server, reader, a, b)
        good = reader.copy(server)
        assert_stopped_is_told(server, reader, good)
        pids = [pid_of(slot) for slot in server.maps.slots()]
        os.killpg(server.pid, signal.SIGKILL)
        for pid in pids:
            wait_for_end(pid)
        for said in reader.pull(good):
            assert said["raised"] == "NotReadable", said
    wait_for_ports()
    with serve() as server:  # other runners in other processes, on the same ports
        for said in reader.pull(good):
            assert said["raised"] in ("NotReadable", "Changed"), said
        assert assert_pulled(server, reader) == before


def wait_for_ports() -> None:
    """Until the kernel has forgotten the connections of so many pulls (TIME_WAIT, 60 s): Mooncake
    binds its port without SO_REUSEADDR."""
    first, last = int(PORTS["MC_MIN_RPC_PORT"]), int(PORTS["MC_MAX_RPC_PORT"])
    deadline = time.monotonic() + 120
    while True:
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        busy = [row[1] for row in rows if first <= int(row[1].rpartition(":")[2], 16) <= last]
        if not busy:
            return
        assert time.monotonic() < deadline, busy
        time.sleep(1)


def assert_pulled(server: HookedServer, reader: FarReader) -> list[dict[str, str]]:
    """Both ranks by the engine, by the kernel, and by SGLang's own word; the checksums."""
    deadline = time.monotonic() + 30
    while True:  # the owner may still be publishing what it has registered
        said = reader.pull(reader.copy(server))
        if all("sums" in each for each in said) or time.monotonic() > deadline:
            break
    status, answer = server.post("/weights_checker", {"action": "checksum"})
    assert status == 200
    own = {
        who["tp_rank"]: info["checksums"]
        for info in answer["ranks"]
        for who in info["parallelism_info"]
    }
    slots = server.maps.slots()
    assert len(said) == len(slots) == len(own) == 2
    for slot, pulled in zip(slots, said):
        assert "sums" in pulled, pulled
        document = slot.read()
        known = 0
        with document.open_memory(via="process") as memory:
            names = [tensor.name for tensor in document.iter_tensors() if not tensor.volatile]
            assert sorted(names) == sorted(pulled["sums"])
            for name in names:
                assert pulled["sums"][name] == checksum(memory.read(name)), name
        for name, theirs in own[document.identity["tp_rank"]].items():
            tensor = document.tensor(name)
            assert pulled["sums"][tensor.name] == theirs, name
            known += 1
        assert known > 10
    return [each["sums"] for each in said]


def assert_no_pull_is_mixed(server: HookedServer, reader: FarReader, a: Path, b: Path) -> None:
    """Two checkpoints in turn, without a pause, and the ranks stopped for a moment now and then:
    each pull is wholly of the one or of the other."""
    live = Path(server.maps.path)
    known: list[set[str]] = [set(), set()]
    for checkpoint in (b, a):
        assert server.update_weights_from_disk(checkpoint)[0] == 200
        for rank, quiet in enumerate(reader.pull_repeatedly(live, 1, 60)):
            known[rank].update(quiet["contents"])
    assert [len(each) for each in known] == [2, 2]
    over = threading.Event()
    updates: list[int] = []

    def update_without_pause() -> None:
        while not over.is_set():
            for checkpoint in (b, a):
                updates.append(server.update_weights_from_disk(checkpoint)[0])

    def stop_now_and_then() -> None:
        pids = [pid_of(slot) for slot in server.maps.slots()]
        while not over.wait(1.7):
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            time.sleep(0.3)
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    threads = [threading.Thread(target=each) for each in (update_without_pause, stop_now_and_then)]
    for thread in threads:
        thread.start()
    try:
        said = reader.pull_repeatedly(live, PULLS, 150)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    print(f"{len(updates)} updates:", *said)
    assert set(updates) == {200}
    assert len(updates) >= 10
    for rank, each in enumerate(said):
        assert set(each["contents"]) <= known[rank], (each, known[rank])
        assert sum(each["contents"].values()) >= PULLS / 10, each
        assert each["raised"], "no pull met an update"


def assert_stopped_is_told(server: HookedServer, reader: FarReader, copy: Path) -> None:
    pids = [pid_of(slot) for slot in server.maps.slots()]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        for said in reader.pull(copy):
            assert said["raised"] == "NotReadable", said
            assert "stopped" in said["message"]
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    for said in reader.pull(copy):
        assert "sums" in said, said


def test_nothing_of_it_is_in_a_server_that_was_not_asked(
    environment: Environment,
    python: Path,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """No engine, no thread, no document; and a reader is told what to start the server with."""
    with HookedServer(environment, python, checkpoint(1), tmp_path) as server:
        (slot,) = server.maps.slots()
        pid = pid_of(slot)
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert "mooncake" not in maps
        assert "nixl" not in maps
        assert not Path(slot.path("weight_transport_{}.json")).exists()
        assert "subscribers" not in slot.read_state()
        with pytest.raises(hook.NotReadable, match="SGLANG_WEIGHT_HOOK_SUBSCRIBERS"):
            slot.read().open_memory(via="mooncake")
