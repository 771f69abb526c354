"""What the agent answers about real maps, beside what a reader on the machine finds in them."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import documents_by_hand
import pytest
from agent_process import ROOT, Agent, Publisher, eventually

from sglang_weight_hook.reader import open_directory

Publish = Callable[..., Publisher]
Serve = Callable[..., Agent]


def command(*arguments: object) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "sglang_weight_hook", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


# One server and one agent for all tests that end neither.


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("published") / "maps"


@pytest.fixture(scope="module")
def publisher(maps: Path) -> Iterator[Publisher]:
    made = Publisher(maps, 2)
    yield made
    made.kill()


@pytest.fixture(scope="module")
def agent(
    publisher: Publisher, maps: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Agent]:
    made = Agent(tmp_path_factory.mktemp("agent"), "--dir", maps)
    yield made
    assert made.end() == 0
    assert made.said() == ""


def test_slots_are_those_of_the_directory(agent: Agent, publisher: Publisher, maps: Path) -> None:
    found = agent.get("/slots")
    assert (found["schema"], found["schema_version"]) == ("sglang-weight-agent", 1)
    assert found["directories"] == [{"path": str(maps), "problem": None}]
    slots = open_directory(str(maps)).slots()
    assert [slot["id"] for slot in found["slots"]] == [slot.name for slot in slots] == ["0", "1"]
    for told, slot in zip(found["slots"], slots):
        document = slot.read()
        assert told["state"] == slot.read_state()
        assert (told["owner_alive"], told["certain"], told["problem"]) == (True, True, None)
        assert told["summary"]["pid"] == publisher.process.pid
        assert told["summary"]["gpu_id"] == document.identity["gpu_id"]
        assert told["summary"]["weights_bytes"] == document.memory["weights_bytes"] > 0
        assert told["checked_at"] == document.checked_at
        assert agent.get(f"/slots/{slot.name}") == told


@pytest.mark.parametrize("document", ["state", "layout"])
def test_a_document_is_the_published_file_byte_for_byte(
    agent: Agent, maps: Path, document: str
) -> None:
    data = (maps / f"weight_{document}_1.json").read_bytes()
    answer = agent.ask(f"/slots/1/{document}")
    assert (answer.status, answer.body) == (200, data)
    assert answer.headers["etag"] == f'"sha256-{hashlib.sha256(data).hexdigest()}"'
    packed = agent.ask(f"/slots/1/{document}", accept_encoding="gzip")
    assert packed.headers["content-encoding"] == "gzip"
    assert gzip.decompress(packed.body) == data
    head = agent.ask(f"/slots/1/{document}", "HEAD")
    assert (head.status, head.body) == (200, b"")
    assert head.headers["content-length"] == str(len(data))


@pytest.mark.parametrize("change", ["update", "move"])
def test_the_slot_tells_the_layouts_tag_and_each_generation_has_one(
    agent: Agent, publisher: Publisher, change: str
) -> None:
    def tag() -> str:
        return agent.ask("/slots/0/layout").headers["etag"].strip('"')

    first = tag()
    assert agent.slot()["layout"]["etag"] == first
    publisher.tell(change)
    eventually(lambda: agent.slot()["state"] == publisher.state())
    assert agent.slot()["layout"]["etag"] == tag() != first


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/slots", "/slots/0", "/slots/0/state", "/slots/0/layout", "/slots/0/regions"),
        *("/slots/0/history", "/lookup/0x1000", "/openapi.json"),
    ],
)
def test_what_a_client_has_is_not_sent_again_until_it_changes(
    agent: Agent, publisher: Publisher, path: str
) -> None:
    known = agent.ask(path).headers["etag"]
    for tag in (known, f"W/{known}", f'"other", {known}', "*"):
        again = agent.ask(path, if_none_match=tag)
        assert (again.status, again.body, again.headers["etag"]) == (304, b"", known)
    assert agent.ask(path, if_none_match='"other"').status == 200
    publisher.tell("move")
    if path not in ("/lookup/0x1000", "/openapi.json"):
        eventually(lambda: agent.ask(path, if_none_match=known).status == 200)


def test_parts_of_a_layout(agent: Agent, maps: Path) -> None:
    data = (maps / "weight_layout_0.json").read_bytes()
    size = len(data)
    path = "/slots/0/layout"
    for asked, first, end in (
        ("bytes=0-99", 0, 100),
        (f"bytes={size - 7}-", size - 7, size),
        ("bytes=-10", size - 10, size),
        (f"bytes=10-{size + 1000}", 10, size),
        (f"bytes=-{size + 1}", 0, size),
    ):
        part = agent.ask(path, range=asked, accept_encoding="gzip")
        assert (part.status, part.body) == (206, data[first:end]), asked
        assert part.headers["content-range"] == f"bytes {first}-{end - 1}/{size}"
    beyond = agent.ask(path, range=f"bytes={size}-")
    assert (beyond.status, beyond.headers["content-range"]) == (416, f"bytes */{size}")
    for not_understood in ("bytes=5-2", "bytes=0-1,4-5", "lines=1-2", "bytes=-", "bytes=x-"):
        assert agent.ask(path, range=not_understood).body == data
    tag = agent.ask(path).headers["etag"]
    assert agent.ask(path, range="bytes=0-3", if_range=tag).status == 206
    assert agent.ask(path, range="bytes=0-3", if_range='"old"').body == data


def test_regions_and_lookup_are_the_commands_answers(agent: Agent, maps: Path) -> None:
    regions = agent.get("/slots/1/regions")
    assert regions.pop("id") == "1"
    assert regions == command("regions", "1", "--json", "--dir", maps)
    place = regions["regions"][0]["ptr"] + 5
    for address in (hex(place), hex(place).upper(), str(place)):
        (found,) = agent.get(f"/lookup/{address}")["addresses"]
        assert (found["address"], found["found"]) == (place, True)
        (hit,) = found["slots"]
        assert (hit.pop("id"), hit.pop("directory")) == ("1", str(maps))
        assert hit == command("lookup", hex(place), "--slot", "1", "--json", "--dir", maps)
    assert agent.get(f"/lookup/{place}?slot=0")["addresses"][0]["slots"] == []
    assert agent.ask(f"/lookup/{place}?slot=7").status == 404


@pytest.mark.parametrize(
    "address", ["x", "-1", "0x", str(1 << 64), "0x1" + "0" * 16, "1_000", "%D9%A1", "1" * 5000]
)
def test_what_is_no_address_is_refused(agent: Agent, address: str) -> None:
    answer = agent.ask(f"/lookup/{address}")
    assert (answer.status, list(answer.json)) == (400, ["error"])


def test_history_is_the_log(agent: Agent, publisher: Publisher) -> None:
    for _ in range(3):
        publisher.tell("update")
    events = agent.get("/slots/0/history")["events"]
    kinds = [event["kind"] for event in events]
    assert kinds[:2] == ["load_model", "scheduler_ready"]
    assert kinds[-3:] == ["update_weights_from_disk"] * 3
    assert agent.get("/slots/0/history?kind=update_*&limit=2")["events"] == events[-2:]
    since = events[-1]["updated_at"]
    assert agent.get(f"/slots/0/history?since={since}")["events"] == events[-1:]
    for wrong in ("limit=0", "limit=1.5", "limit=10001", "limit=x", "since=nan", "since=inf"):
        assert agent.ask(f"/slots/0/history?{wrong}").status == 400
    assert agent.ask("/slots/0/history?kind=" + "x" * 201).status == 400


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("/slots/0/history?knid=update_*", "no query parameter 'knid'"),
        ("/slots/0/history?limit=1&limit=2", "limit is given 2 times"),
        ("/lookup/0x1000?slots=0", "/lookup/{address} has slot"),
        ("/slots?slot=0", "/slots has none"),
        ("/healthz?x", "no query parameter 'x'"),
    ],
)
def test_a_filter_that_would_be_ignored_is_refused(agent: Agent, asked: str, says: str) -> None:
    answer = agent.ask(asked)
    assert answer.status == 400
    assert says in answer.json["error"]


def test_the_page_shows_all_slots_and_fetches_nothing(agent: Agent) -> None:
    answer = agent.ask("/")
    assert answer.headers["content-type"].startswith("text/html")
    page = answer.body.decode()
    assert "Content-Security-Policy" in page
    assert '"label":"0"' in page
    assert '"label":"1"' in page


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_but_reading(agent: Agent, method: str) -> None:
    for path in ("/slots", "/slots/0/layout", "/events"):
        answer = agent.ask(path, method)
        assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize(
    "path",
    [
        *("/slots/../../etc/passwd", "/slots/..%2F..%2F..%2Fetc%2Fpasswd/state"),
        *("/slots/%2e%2e/state", "/slots/.%00/state", "/slots/0%2F..%2F1/layout", "/slots//state"),
        *("/slots/0/layout/", "//slots", "/slots/0/../1", "/weight_state_0.json", "/slots/2"),
        *("/slots/0%0d%0aX-Y:1", "/slots/" + "a" * 10000, "/slots/%FF%FE"),
    ],
)
def test_no_path_leads_out_of_the_directory(agent: Agent, path: str) -> None:
    answer = agent.ask(path)
    assert (answer.status, list(answer.json)) == (404, ["error"])


def test_an_owner_that_is_killed_is_told_at_once(
    publish: Publish, serve: Serve, tmp_path: Path
) -> None:
    publisher = publish(1, tmp_path / "maps")
    agent = serve("--dir", tmp_path / "maps")
    publisher.kill()
    slot = eventually(lambda: (s := agent.slot()) and not s["owner_alive"] and s)
    assert (slot["certain"], slot["state"]["state"]) == (True, "ready")
    # What it has published is still shown, and that it is stale.
    assert agent.get("/slots/0/regions")["owner_alive"] is False


def test_a_slot_that_cannot_be_read_hides_none_of_the_others_and_one_without_files_is_gone(
    publish: Publish, serve: Serve, tmp_path: Path
) -> None:
    maps = tmp_path / "maps"
    publish(2, maps)
    agent = serve("--dir", maps)
    os.replace(maps / "weight_layout_1.json", maps / "kept")
    (maps / "weight_state_1.json").write_text("{")
    slot = eventually(lambda: (s := agent.slot("1")) and s["problem"] and s)
    assert "is not JSON" in slot["problem"]
    assert agent.ask("/slots/1/regions").status == 503
    assert agent.ask("/slots/1/layout").status == 404
    assert agent.slot("0")["problem"] is None
    assert agent.ask("/").status == 200
    lookup = agent.get("/lookup/4096")
    assert [one["id"] for one in lookup["problems"]] == ["1"]
    for path in maps.glob("weight_*_1.*"):
        path.unlink()
    eventually(lambda: agent.slot("1") is None, 20)
    assert agent.slot("0") is not None
    assert agent.ask("/slots/1").status == 404


def test_what_is_no_number_in_json_is_null(serve: Serve, tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.mkdir()
    state = documents_by_hand.STATE.replace(
        "{", '{"checked_at": NaN, "event": {"x": -Infinity}, ', 1
    )
    (maps / "weight_state_0.json").write_text(state)
    (maps / "weight_layout_0.json").write_text(documents_by_hand.LAYOUT)
    (maps / "weight_events_0.jsonl").write_text('{"updated_at": 1, "kind": "x", "y": NaN}\n')
    agent = serve("--dir", maps)

    def none(name: str) -> None:
        raise AssertionError(name)

    for path in ("/slots", "/slots/0", "/slots/0/history"):
        json.loads(agent.ask(path).body, parse_constant=none)
    assert agent.slot()["state"]["event"] == {"x": None}
    assert agent.ask("/metrics").status == 200
    # Its layout is no map that could be drawn, which is no failure of the agent's.
    assert agent.ask("/").status in (200, 503)
    assert "Traceback" not in agent.said()


def test_slots_of_one_name_in_two_directories(
    publish: Publish, serve: Serve, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    publish(2, one)
    publish(1, two)
    agent = serve("--dir", one, "--dir", two)
    found = agent.get("/slots")["slots"]
    assert [(slot["id"], slot["slot"], slot["directory"]) for slot in found] == [
        ("0", "0", str(one)),
        ("1", "1", str(one)),
        ("0@2", "0", str(two)),
    ]
    assert agent.ask("/slots/0@2/state").body == (two / "weight_state_0.json").read_bytes()


def test_a_directory_that_comes_later(publish: Publish, serve: Serve, tmp_path: Path) -> None:
    agent = serve("--dir", tmp_path / "maps")
    assert "does not exist yet" in agent.said()
    found = agent.get("/slots")
    assert found["slots"] == []
    assert "No such file" in found["directories"][0]["problem"]
    assert agent.ask("/").status == 404
    publish(1, tmp_path / "maps")
    eventually(lambda: agent.slot() is not None)
    eventually(lambda: agent.get("/slots")["directories"][0]["problem"] is None)
