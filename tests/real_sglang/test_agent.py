"""The node agent over two real SGLang servers on the CPU, with a real etcd."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cpu_sglang.environment import Environment
from sglang_weight_hook.fleet.etcd import PREFIX, Etcd
from tests.real_sglang.hooked import HookedServer, pid_of, wait_for_end

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

from agent_process import Agent, eventually  # type: ignore[import-not-found]
from etcd_process import EtcdServer  # type: ignore[import-not-found]

pytestmark = pytest.mark.real_sglang

UPDATE = "/update_weights_from_disk"


@pytest.fixture(scope="module")
def servers(
    environment: Environment,
    hooked_python: Path,
    checkpoint: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[list[HookedServer]]:
    folder = tmp_path_factory.mktemp("agent")
    with (
        HookedServer(environment, hooked_python, checkpoint(1), folder / "one") as one,
        HookedServer(environment, hooked_python, checkpoint(1), folder / "two") as two,
    ):
        yield [one, two]


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    made = EtcdServer(tmp_path_factory.mktemp("etcd"))
    yield made
    made.kill()


@pytest.fixture(scope="module")
def agent(
    servers: list[HookedServer], etcd: EtcdServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Agent]:
    where = [word for server in servers for word in ("--dir", server.maps.path)]
    made = Agent(
        tmp_path_factory.mktemp("log"), *where, "--etcd", etcd.url, "--node", "n", "--ttl", 3
    )
    yield made
    assert made.end() == 0
    (said,) = made.said().splitlines()
    assert "only readers on this machine reach it" in said


def registered(etcd: EtcdServer) -> dict[str, dict[str, object]]:
    with Etcd([etcd.url]) as client:
        found = client.under(PREFIX)[0]
    return {one.key.rpartition("/")[2]: json.loads(one.value) for one in found}


def test_both_servers_are_shown_as_they_themselves_say(
    agent: Agent, servers: list[HookedServer], etcd: EtcdServer
) -> None:
    shown = {slot["id"]: slot for slot in agent.get("/slots")["slots"]}
    assert set(shown) == {"0", "0@2"}
    for id, server in zip(("0", "0@2"), servers):
        (live,) = server.live()
        assert (shown[id]["state"]["state"], shown[id]["certain"]) == ("ready", True)
        assert shown[id]["summary"]["pid"] == live["pid"]
        name, truth = next(iter(live["tensors"].items()))
        (found,) = agent.get(f"/lookup/{truth['ptr']}?slot={id}")["addresses"]
        hits = [hit for one in found["slots"] for hit in one["tensors"]]
        assert name in {name for hit in hits for name in (hit["name"], *hit["aliases"])}
        layout = agent.get(f"/slots/{id}/layout")
        assert layout["identity"]["pid"] == live["pid"]
    eventually(lambda: set(registered(etcd)) == {"0", "0@2"})


def test_an_update_of_one_is_told_of_that_one(
    agent: Agent,
    servers: list[HookedServer],
    etcd: EtcdServer,
    checkpoint: Callable[..., Path],
) -> None:
    before = {slot["id"]: slot["state"] for slot in agent.get("/slots")["slots"]}
    stream = agent.events()
    stream.next(), stream.next()
    status, answer = servers[1].post(UPDATE, {"model_path": str(checkpoint(2))})
    assert status == 200, answer
    (slot,) = servers[1].maps.slots()
    last = stream.until(lambda event: event.data["state"] == slot.read_state())
    stream.close()
    assert last.data["id"] == "0@2"
    assert last.data["state"]["event"]["kind"] == "update_weights_from_disk"
    assert agent.slot("0")["state"] == before["0"]
    generation = last.data["state"]["content_generation"]
    assert generation > before["0@2"]["content_generation"]
    eventually(lambda: registered(etcd)["0@2"]["content_generation"] == generation)
    kinds = [event["kind"] for event in agent.get("/slots/0@2/history")["events"]]
    assert kinds[-1] == "update_weights_from_disk"


def test_a_server_that_ends_is_withdrawn_and_the_other_stays(
    agent: Agent, servers: list[HookedServer], etcd: EtcdServer
) -> None:
    (slot,) = servers[0].maps.slots()
    pid = pid_of(slot)
    servers[0].stop()
    wait_for_end(pid)
    eventually(lambda: set(registered(etcd)) == {"0@2"})
    gone = agent.slot("0")
    assert gone is None or gone["owner_alive"] is False
    assert agent.slot("0@2")["owner_alive"] is True
