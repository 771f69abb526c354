"""Reading a real agent like a local directory, and what is said when it is gone."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from agent_process import TOKEN, Agent, Publisher

from sglang_weight_hook import HookError, Unreachable, open_directory
from sglang_weight_hook.fleet import remote_agent, remote_events
from sglang_weight_hook.reader import totals, verify

if TYPE_CHECKING:
    from ended_command import Run

Publish = Callable[..., Publisher]
Serve = Callable[..., Agent]


def later(seconds: float, what: Callable[[], Any]) -> None:
    timer = threading.Timer(seconds, what)
    timer.daemon = True
    timer.start()


# --- as a local directory -----------------------------------------------------------------


def test_documents_and_states_are_those_of_the_files(publish: Publish, serve: Serve) -> None:
    local = open_directory(str(publish(3).directory))
    remote = open_directory(serve().url)
    assert [slot.name for slot in remote.slots()] == [slot.name for slot in local.slots()]
    for here, there in zip(local.slots(), remote.slots()):
        assert there.read_state() == here.read_state()
        assert there.liveness()[:2] == (True, True)
        document, same = here.read(), there.read()
        assert (same.raw, same.state) == (document.raw, document.state)
        assert same.owner_alive()
        assert [event.raw for event in there.history()] == [
            {**event.raw, "slot": there.name} for event in here.history()
        ]
        assert not verify.verify_slot(there).findings
        address = document.regions[0]["ptr"]
        assert [slot.name for slot in remote.slots_at([address])] == [there.name]
    assert totals.per_gpu(slot.read() for slot in remote.slots()) == totals.per_gpu(
        slot.read() for slot in local.slots()
    )
    assert remote.slots_at([4096]) == []


def test_a_summary_adds_up_to_what_the_documents_add_up_to(publish: Publish, serve: Serve) -> None:
    publish(1)
    [slot] = open_directory(serve().url).slots()
    summary = slot.read_for_sums(is_alone=True)
    assert "tensors" not in summary.raw
    assert totals.per_gpu([summary]) == totals.per_gpu([slot.read()])


def test_an_unchanged_layout_is_not_sent_again(
    publish: Publish, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher = publish(1)
    [slot] = open_directory(serve().url).slots()
    statuses: list[int] = []
    asked = remote_agent.Peer.ask

    def ask(self: Any, path: str, *arguments: Any) -> Any:
        answer = asked(self, path, *arguments)
        if path.endswith("/layout"):
            statuses.append(answer.status)
        return answer

    monkeypatch.setattr(remote_agent.Peer, "ask", ask)
    first = slot.read()
    again = slot.read()
    assert again.raw == first.raw
    publisher.tell("move")
    assert slot.read().layout_generation == first.layout_generation + 1
    assert statuses == [200, 304, 200]


def test_a_change_is_seen_at_once(publish: Publish, serve: Serve) -> None:
    publisher = publish(2)
    remote = open_directory(serve().url).slots()[1]
    document = remote.read()
    assert remote.wait_for_change(document, timeout=0.3) is None
    later(0.3, lambda: publisher.tell("update", 1))
    started = time.monotonic()
    state = remote.wait_for_change(document, timeout=20)
    assert state is not None
    assert time.monotonic() - started < 5.0
    assert state["event"]["kind"] == "update_weights_from_disk"


def test_generations_end_with_their_owner(publish: Publish, serve: Serve) -> None:
    publisher = publish(1)
    remote = open_directory(serve().url).slot("0")
    seen = []
    for document in remote.generations(timeout=30):
        seen.append((document.layout_generation, document.content_generation))
        if len(seen) == 1:
            later(0.1, lambda: publisher.tell("move"))
        else:
            later(0.1, publisher.kill)
    assert len(seen) == 2
    assert seen[0] < seen[1]
    assert remote.owner_alive() is False


def test_a_dead_owner_is_stale_also_from_afar(publish: Publish, serve: Serve, run: Run) -> None:
    publisher = publish(1)
    url = serve().url
    assert run("slots", "--dir", url).status == 0
    publisher.kill()
    deadline = time.monotonic() + 10
    while open_directory(url).slots()[0].owner_alive():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for command in (["slots"], ["show"], ["regions"], ["report"], ["verify"]):
        ended = run(*command, "--dir", url)
        assert ended.status == 3, command
    assert "stale" in run("slots", "--dir", url).out


def test_events_are_those_of_the_directory(publish: Publish, serve: Serve) -> None:
    publisher = publish(2)
    changes = open_directory(serve().url).events(timeout=30)
    first = [next(changes), next(changes)]
    assert [(one.slot.name, one.initial, one.alive) for one in first] == [
        ("0", True, True),
        ("1", True, True),
    ]
    later(0.2, lambda: publisher.tell("update", 1))
    change = next(changes)
    assert (change.slot.name, change.initial, change.alive) == ("1", False, True)
    later(0.2, publisher.kill)
    while change.alive:
        change = next(changes)
    assert change.state is not None
    assert change.problem is None
    changes.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "command",
    [
        ["slots"],
        ["show", "0"],
        ["regions", "0"],
        ["report"],
        ["verify"],
        ["history"],
        ["watch", "--timeout", "0.5"],
        ["diff", "0", "0"],
    ],
    ids=lambda command: command[0],
)
def test_a_command_says_the_same_of_an_agent_as_of_its_directory(
    served: tuple[Path, str], run: Run, command: list[str]
) -> None:
    maps, url = served
    local = run(*command, "--json", "--dir", maps)
    remote = run(*command, "--json", "--dir", url)
    assert (remote.status, remote.err.replace(url, str(maps))) == (local.status, local.err)
    assert without_places(remote.out) == without_places(local.out)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A directory with two slots, and an agent over it."""
    folder = tmp_path_factory.mktemp("served")
    publisher = Publisher(folder / "maps", 2)
    agent = Agent(folder / "agent", "--dir", folder / "maps")
    yield folder / "maps", agent.url
    agent.end()
    publisher.kill()


def without_places(text: str) -> list[Any]:
    """JSON, a document or a line each, without what says where it was read, and when."""
    left_out = ("directory", "dir", "owner_why", "checked_at")

    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: cleaned(part) for name, part in value.items() if name not in left_out}
        return [cleaned(part) for part in value] if isinstance(value, list) else value

    try:
        return [cleaned(json.loads(text))]
    except ValueError:
        return [cleaned(json.loads(line)) for line in text.splitlines()]


def test_lookup_and_plot_ask_the_agent(served: tuple[Path, str], run: Run, tmp_path: Path) -> None:
    maps, url = served
    [document] = [open_directory(str(maps)).slot("1").read()]
    found = run("lookup", hex(document.regions[0]["ptr"]), "--json", "--dir", url)
    assert found.status == 0
    assert [slot["slot"] for slot in found.json["addresses"][0]["slots"]] == ["1"]
    assert run("lookup", "4096", "--dir", url).status == 3
    page = tmp_path / "page.html"
    assert run("plot", "-o", page, "--dir", url).status == 0
    assert page.stat().st_size > 10_000


def test_bytes_are_refused_with_what_to_do(served: tuple[Path, str], run: Run) -> None:
    for command in (["compare", "0", "1"], ["checksum", "0"]):
        ended = run(*command, "--dir", served[1])
        assert ended.status == 1
        assert "own host" in ended.err


# --- tokens -------------------------------------------------------------------------------


def test_an_agent_with_a_token_answers_who_has_it(
    publish: Publish, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    publish(1)
    (tmp_path / "token").write_text(TOKEN)
    url = serve("--token-file", tmp_path / "token").url
    missing = run("slots", "--dir", url)
    assert missing.status == 1
    assert "SGLANG_WEIGHT_HOOK_TOKEN" in missing.err
    monkeypatch.setenv("SGLANG_WEIGHT_HOOK_TOKEN", "another-token-than-that")
    wrong = run("slots", "--dir", url)
    assert wrong.status == 1
    assert "does not take this token" in wrong.err
    assert "another-token" not in wrong.err
    monkeypatch.setenv("SGLANG_WEIGHT_HOOK_TOKEN", TOKEN)
    right = run("slots", "--dir", url)
    assert right.status == 0
    assert TOKEN not in right.out + right.err


def test_tls_takes_the_named_authority_and_no_other(
    publish: Publish, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from etcd_process import a_certificate

    publish(1)
    certificate, key = a_certificate(tmp_path / "tls")
    url = serve("--ssl-certfile", certificate, "--ssl-keyfile", key).url
    with pytest.raises(Unreachable, match=r"(?i)certificate"):
        open_directory(url).slots()
    monkeypatch.setenv("SGLANG_WEIGHT_HOOK_CA_FILE", str(certificate))
    assert len(open_directory(url).slots()) == 1
    monkeypatch.setenv("SGLANG_WEIGHT_HOOK_CA_FILE", "/nowhere.pem")
    with pytest.raises(HookError, match=r"/nowhere\.pem"):
        open_directory(url)


# --- an agent that goes -------------------------------------------------------------------


def test_an_agent_that_was_killed_leaves_everything_unknown(
    publish: Publish, serve: Serve, run: Run
) -> None:
    publish(1)
    agent = serve()
    slot = open_directory(agent.url).slots()[0]
    agent.process.kill()
    agent.process.wait()
    time.sleep(remote_agent.FRESH + 0.1)
    for what in (slot.owner_alive, slot.read_state, slot.read, lambda: list(slot.history())):
        with pytest.raises(Unreachable):
            what()
    for command in ("slots", "report", "show", "verify", "history"):
        ended = run(command, "--dir", agent.url)
        assert ended.status != 0, command
        assert agent.url in ended.err
        assert "ready" not in ended.out


def test_an_agent_that_stands_still_is_not_waited_for_long(
    publish: Publish, serve: Serve, run: Run
) -> None:
    publish(1)
    agent, good = serve(), serve()
    os.kill(agent.process.pid, signal.SIGSTOP)
    try:
        started = time.monotonic()
        ended = run("slots", "--dir", agent.url, "--dir", good.url)
        assert time.monotonic() - started < 30.0
    finally:
        os.kill(agent.process.pid, signal.SIGCONT)
    assert ended.status == 3
    assert agent.url in ended.err
    assert " ready " in ended.out  # of the other one
    assert run("slots", "--dir", agent.url).status == 0


def test_watching_goes_on_when_an_agent_is_back(
    publish: Publish, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_events, "LONGEST_PAUSE", 0.3)
    publisher = publish(1)
    agent = serve()
    changes = open_directory(agent.url).events(timeout=60)
    assert next(changes).initial
    agent.process.kill()
    agent.process.wait()
    lost = next(changes)
    assert lost.problem is not None
    assert agent.url in lost.problem
    publisher.tell("update")
    serve("--port", str(agent.port))
    change = next(changes)
    assert change.problem is None
    assert change.state is not None
    assert change.state["content_generation"] == publisher.state()["content_generation"]
    changes.close()  # type: ignore[attr-defined]
