"""What runs beside the soak's server: a follower, a scrubber, etcd, an agent and a reader of it.

Imported where it is used: where the agent's packages are missing, importing it skips the test.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import sglang_weight_hook as hook
from sglang_weight_hook.fleet.etcd import PREFIX, Etcd
from tests.stress.processes import ROOT, environment

sys.path.insert(0, str(ROOT / "tests" / "unit"))

from agent_process import Agent, eventually  # type: ignore[import-not-found]
from etcd_process import EtcdServer  # type: ignore[import-not-found]

PATIENCE = 120.0  # seconds, on a machine that is busy with other things


@contextmanager
def running_etcd(folder: Path) -> Iterator[EtcdServer]:
    etcd = EtcdServer(folder)
    try:
        yield etcd
    finally:
        etcd.kill()


class Follower(threading.Thread):
    """A reader that sees every state there is, one after the other.

    Events in quicker succession than it gets a core for would be skipped, as they may be: so each
    is waited for before the next is asked for.
    """

    def __init__(self, slot: hook.Slot) -> None:
        super().__init__(daemon=True)
        self.slot = slot
        self.last: dict[str, Any] = slot.read_state()
        self.pids = {self.last["pid"]}
        self.generations: list[int] = [self.last["content_generation"]]
        self.errors: list[str] = []
        self.enough = threading.Event()

    def catch_up(self) -> None:
        """Until whatever was done is over, and was seen."""
        deadline = time.monotonic() + PATIENCE
        while True:
            now = self.slot.read_state()
            if now["state"] != "updating" and self.last == now:
                return
            assert time.monotonic() < deadline, f"{now} is there, {self.last} was seen"
            time.sleep(0.01)

    def stop(self) -> None:
        self.enough.set()
        self.join()

    def run(self) -> None:
        while not self.enough.is_set():
            try:
                state = self.slot.wait_for_change(self.last, timeout=1.0)
                if state is not None:
                    self.pids.add(state["pid"])
                    self.generations.append(state["content_generation"])
                    self.last = state
                    if state["state"] == "ready":
                        self.slot.read()
            except hook.HookError as error:
                self.errors.append(str(error))


class AgentReader(threading.Thread):
    """What the agent's ``/events`` tell of the slot, until the agent ends."""

    def __init__(self, agent: Agent) -> None:
        super().__init__(daemon=True)
        self._stream = agent.events()
        self.generations: list[int] = []
        self.seen: Counter[str] = Counter()
        self.errors: list[str] = []
        self.is_over = False  # the slot's owner is known to have exited

    def run(self) -> None:
        try:
            while (event := self._stream.next()) is not None:
                self.seen[event.kind] += 1
                if event.kind == "reset":
                    self.errors.append("fell behind")
                elif event.kind == "removed" or (
                    event.kind == "state" and not event.data["owner_alive"]
                ):
                    self.is_over = True
                elif event.kind == "state" and event.data["problem"]:
                    self.errors.append(event.data["problem"])
                elif event.kind == "state":
                    self.generations.append(event.data["state"]["content_generation"])
        except Exception as error:
            self.errors.append(repr(error))
        finally:
            self._stream.close()


class Scrub:
    """``sglang-weight-hook scrub`` over the directory."""

    def __init__(self, folder: Path, maps: str) -> None:
        self._said, self._complained = folder / "scrub.jsonl", folder / "scrub.log"
        command = [sys.executable, "-m", "sglang_weight_hook", "scrub", "--dir", maps, "--json"]
        with open(self._said, "wb") as said, open(self._complained, "wb") as complained:
            self.process = subprocess.Popen(
                [*command, "--rate", "20", "--every", "0.5"],
                env=environment(),
                stdout=said,
                stderr=complained,
            )

    def events(self) -> list[dict[str, Any]]:
        """Whole lines of it: the last one may be half there."""
        lines = self._said.read_text().rpartition("\n")[0]
        return [json.loads(line) for line in lines.splitlines()]

    def end(self) -> tuple[int, str]:
        """Exit status, and what it has complained of."""
        self.process.terminate()
        return self.process.wait(PATIENCE), self._complained.read_text()


class Beside:
    """All of it over one slot; ended with the `with` block."""

    def __init__(self, slot: hook.Slot, etcd: EtcdServer, folder: Path) -> None:
        self.etcd = etcd
        self.follower = Follower(slot)
        maps = slot.directory
        self.agent = Agent(folder / "agent", "--dir", maps, "--etcd", etcd.url, "--node", "n")
        try:
            self.reader = AgentReader(self.agent)
            self.scrub = Scrub(folder, maps)
        except BaseException:
            self.agent.end()
            raise
        self.follower.start()
        self.reader.start()

    def __enter__(self) -> Beside:
        eventually(lambda: self.registered(), PATIENCE)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.follower.stop()
        if self.scrub.process.poll() is None:
            self.scrub.process.kill()
            self.scrub.process.wait()
        self.agent.end(timeout=PATIENCE)
        self.reader.join()

    def pids(self) -> dict[str, int]:
        return {
            "agent": self.agent.process.pid,
            "scrub": self.scrub.process.pid,
            "etcd": self.etcd.process.pid,
        }

    def registered(self) -> dict[str, dict[str, Any]]:
        """What etcd holds, by the end of the key."""
        with Etcd([self.etcd.url]) as client:
            found = client.under(PREFIX)[0]
        return {one.key.removeprefix(PREFIX): json.loads(one.value) for one in found}

    def leases(self) -> int:
        return len(self.etcd.post("lease/leases").get("leases", []))

    def assert_all_have_seen(self, generation: int) -> None:
        """While the server lives: everybody knows this generation, and has seen none twice over."""
        self.follower.catch_up()
        assert self.follower.errors == []
        seen = self.follower.generations
        assert seen[-1] == generation
        # Every one, in order, none left out.
        assert seen == sorted(seen)
        assert sorted(set(seen)) == list(range(seen[0], generation + 1))
        eventually(lambda: self.reader.generations[-1] == generation, PATIENCE)
        assert self.reader.generations == sorted(self.reader.generations)
        assert not self.reader.is_over
        eventually(
            lambda: self.registered().get("n/0", {}).get("content_generation") == generation,
            PATIENCE,
        )
        assert set(self.registered()) == {"n/0"}
        assert self.leases() == 1
        eventually(
            lambda: any(
                event["event"] == "pass" and event["content_generation"] == generation
                for event in self.scrub.events()
            ),
            PATIENCE,
        )

    def assert_all_know_of_the_end(self) -> None:
        """Once the server has ended."""
        eventually(lambda: not self.registered() and not self.leases(), PATIENCE)
        eventually(lambda: self.reader.is_over, PATIENCE)
        eventually(lambda: "exited" in str(self.scrub.events()[-1].get("why")), PATIENCE)
        assert self.scrub.end() == (0, "")
        scrubbed = Counter(event["event"] for event in self.scrub.events())
        assert scrubbed["corruption"] == 0
        assert scrubbed["pass"] > 0
        assert self.agent.end(timeout=PATIENCE) == 0
        self.reader.join()
        assert self.reader.errors == []
        (said,) = self.agent.said().splitlines()
        assert "only readers on this machine reach it" in said
        print(
            f"the follower saw {len(self.follower.generations)} states, generations "
            f"{self.follower.generations[0]} to {self.follower.generations[-1]}; the reader of the "
            f"agent {len(self.reader.generations)} states, {len(set(self.reader.generations))} "
            f"generations; scrub: {dict(scrubbed)}"
        )
