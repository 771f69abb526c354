"""What a reader makes of an agent's answers: who answers may be anybody."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hostile_server import STATE, Reply, Server, Stopwatch, Told, a_listing, an_entry

from sglang_weight_hook import HookError, Slot, Unreachable, open_directory
from sglang_weight_hook.fleet import remote_agent
from sglang_weight_hook.fleet.access import Access, TokenInClear
from sglang_weight_hook.fleet.remote_agent import RemoteAgent
from sglang_weight_hook.fleet.remote_directory import RemoteDirectory
from sglang_weight_hook.fleet.remote_slot import RemoteSlot
from sglang_weight_hook.reader import Directory

Says = Callable[..., Server]


@pytest.fixture
def says() -> Iterator[Says]:
    """A server that answers paths with what it is given."""
    made: list[Server] = []

    def start(slots: Told = b"{}", **more: Told) -> Server:
        said = {"/slots": slots, **{path.replace("__", "/"): what for path, what in more.items()}}
        made.append(Server(said))
        return made[-1]

    yield start
    for one in made:
        one.close()


# --- the interface ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("local", "remote"),
    [(Slot, RemoteSlot), (Directory, RemoteDirectory)],
)
def test_nothing_that_a_local_one_does_is_left_as_it_is(local: type, remote: type) -> None:
    public = {name for name, value in vars(local).items() if not name.startswith("_")}
    assert public - {"header"}  # there are some
    assert {name for name in public if name not in vars(remote)} == set()


def test_what_is_only_on_the_slots_own_host_says_so(says: Says) -> None:
    slot = open_directory(says(a_listing(an_entry())).url).slots()[0]

    def held() -> None:
        with slot.weights_held():
            raise AssertionError

    for what in (slot.header, slot.open_header, slot.check, held):
        with pytest.raises(HookError, match=r"own host.*run this there"):
            what()


# --- what is not believed -----------------------------------------------------------------

NO_LISTINGS: dict[str, Told] = {
    "no JSON": b"<html>",
    "a list": b"[]",
    "nothing": b"",
    "deep": b"[" * 100_000,
    "another schema": a_listing(schema="sglang-weight-layout"),
    "a later version": a_listing(schema_version=2),
    "no slots": a_listing(slots=None),
    "a slot that is none": a_listing("0"),
    "a path": a_listing(an_entry("../0")),
    "a slash": a_listing(an_entry("a/b")),
    "the folder": a_listing(an_entry("..")),
    "a NUL": a_listing(an_entry("a\0b")),
    "no name": a_listing(an_entry("")),
    "a long name": a_listing(an_entry("a" * 256)),
    "twice": a_listing(an_entry(), an_entry()),
    "an owner that is neither": a_listing(an_entry(owner_alive=None)),
    "an owner in words": a_listing(an_entry(owner_alive="true")),
    "a state that is none": a_listing(an_entry(state="ready")),
    "a problem that is none": a_listing(an_entry(problem=3)),
    "too many": a_listing(*(an_entry(str(n)) for n in range(remote_agent.MOST_SLOTS + 1))),
    "an error": Reply(b'{"error": "busy"}', 503),
    "a redirect": Reply(b"", 302, {"Location": "http://127.0.0.1:1/slots"}),
    "cut short": Reply(b'{"schema": "sglang-weight-agent"}', cut=10),
    "an unknown coding": Reply(b"{}", headers={"Content-Encoding": "br"}),
    "no gzip": Reply(b"{}", headers={"Content-Encoding": "gzip"}),
    "half a gzip": Reply(gzip.compress(b"{}" * 999)[:-9], headers={"Content-Encoding": "gzip"}),
}


@pytest.mark.parametrize("what", NO_LISTINGS)
def test_what_is_no_listing_leaves_everything_unknown(says: Says, what: str) -> None:
    server = says(NO_LISTINGS[what])
    with pytest.raises(Unreachable, match=re.escape(server.url)):
        open_directory(server.url).slots()


def test_a_state_that_is_none_is_refused_where_it_is_read(says: Says) -> None:
    slots = [
        an_entry("0", state={**STATE, "schema": "x"}),
        an_entry("1", state={**STATE, "pid": "1"}),
        an_entry("2", problem="the disk is on fire"),
        an_entry("3", state=None),
    ]
    for slot in open_directory(says(a_listing(*slots)).url).slots():
        with pytest.raises(HookError):
            slot.read_state()


def test_an_owner_that_the_agent_could_not_ask_is_not_called_dead(says: Says) -> None:
    unknown = an_entry(owner_alive=False, certain=False, problem="permission denied")
    slot = open_directory(says(a_listing(unknown)).url).slots()[0]
    with pytest.raises(HookError, match="does not know"):
        slot.owner_alive()


def test_the_size_of_an_answer_is_bounded_also_once_unpacked(
    says: Says, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_agent, "_LISTING_BYTES", 100_000)
    bomb = Reply(gzip.compress(b" " * 50_000_000), headers={"Content-Encoding": "gzip"})
    for answer in (bomb, b" " * 100_001):
        with pytest.raises(Unreachable, match="more than 100000 bytes"):
            open_directory(says(answer).url).slots()


def test_who_sends_byte_by_byte_gains_no_time(says: Says, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_agent, "LISTING_TIMEOUT", 0.5)
    slow = Reply(json.dumps(a_listing(an_entry())).encode(), pause=0.05)
    directory = open_directory(says(slow).url)
    with Stopwatch() as took, pytest.raises(Unreachable, match=r"no answer within 0\.5 s"):
        directory.slots()
    assert took.seconds < 2.0


def test_a_redirect_is_not_followed_so_no_token_goes_astray(
    says: Says, monkeypatch: pytest.MonkeyPatch
) -> None:
    thief = says(a_listing())
    server = says(Reply(b"", 307, {"Location": f"{thief.url}/slots"}))
    monkeypatch.setenv("SGLANG_WEIGHT_HOOK_TOKEN", "secret")
    with pytest.raises(Unreachable, match="not followed"):
        open_directory(server.url).slots()
    assert server.asked[0][1]["authorization"] == "Bearer secret"
    assert thief.asked == []


def test_a_failure_counts_for_a_moment_and_is_not_waited_for_again(
    says: Says, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_agent, "REQUEST_TIMEOUT", 0.5)
    server = says(a_listing(*(an_entry(str(n)) for n in range(20))))
    slots = open_directory(server.url).slots()
    server.said.update({f"/slots/{n}/state": Reply(b" " * 100, pause=10.0) for n in range(20)})
    with Stopwatch() as took:
        for slot in slots:
            with pytest.raises(Unreachable):
                slot.read()
    assert took.seconds < 5.0  # and not 20 times half a second


# --- conversations ------------------------------------------------------------------------


def test_a_connection_that_was_closed_meanwhile_is_opened_again(says: Says) -> None:
    server = says(a_listing(an_entry()))
    directory = open_directory(server.url)
    assert len(directory.slots()) == 1
    for connection in directory.agent._peer._idle:  # type: ignore[attr-defined]
        connection.sock._sock.shutdown(2)
    assert len(directory.slots()) == 1


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http://user:secret@node:1",
        "http://node:70000",
        "http://node/path",
        "http://node?q=1",
        "http://no de",
        "https://node\r\nX: y",
        "etcd://",
        "etcd://a/b",
    ],
)
def test_what_is_no_address_is_refused_before_anybody_is_asked(url: str) -> None:
    with pytest.raises(HookError, match="give"):
        open_directory(url)


def test_an_address_without_a_scheme_is_a_folder(tmp_path: Path) -> None:
    assert not isinstance(open_directory(str(tmp_path / "http")), RemoteDirectory)


# --- tokens -------------------------------------------------------------------------------


def test_a_token_is_warned_about_where_it_goes_without_tls() -> None:
    with pytest.warns(TokenInClear, match="192.0.2.1"):
        RemoteAgent("http://192.0.2.1:1", Access(token="secret"))


def test_no_token_goes_without_tls_to_an_address_that_only_the_registry_names() -> None:
    agent = RemoteAgent("http://192.0.2.1:1", Access(token="secret"), is_named_by_registry=True)
    assert agent._authorization() == {}
    assert "not sent without TLS" in agent._unauthorized()
    encrypted = RemoteAgent("https://192.0.2.1:1", Access(token="secret"), True)
    assert encrypted._authorization() == {"Authorization": "Bearer secret"}


def test_a_token_comes_from_a_file_and_is_never_shown(
    says: Says, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text("from-a-file\n")
    monkeypatch.setenv("SGLANG_WEIGHT_HOOK_TOKEN_FILE", str(file))
    server = says(a_listing(an_entry()))
    directory = open_directory(server.url)
    assert len(directory.slots()) == 1
    assert server.asked[0][1]["authorization"] == "Bearer from-a-file"
    assert "from-a-file" not in repr(Access(token="from-a-file"))
    assert "from-a-file" not in repr(directory) + repr(directory.slots()[0])


@pytest.mark.parametrize("content", ["two words", "a\r\nX: y", "ü", "x" * 5000])
def test_what_is_no_token_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str
) -> None:
    file = tmp_path / "token"
    file.write_text(content, encoding="utf-8", newline="")
    monkeypatch.setenv("SGLANG_WEIGHT_HOOK_TOKEN_FILE", str(file))
    with pytest.raises(HookError, match="is no token") as caught:
        open_directory("http://127.0.0.1:1")
    assert content not in str(caught.value)


def test_a_token_file_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_WEIGHT_HOOK_TOKEN_FILE", "/nowhere/token")
    with pytest.raises(HookError, match="/nowhere/token"):
        open_directory("http://127.0.0.1:1")


def test_without_a_token_an_agent_that_wants_one_is_named(says: Says) -> None:
    server = says(Reply(b'{"error": "a token"}', 401))
    with pytest.raises(Unreachable, match="set SGLANG_WEIGHT_HOOK_TOKEN"):
        open_directory(server.url).slots()


# --- threads ------------------------------------------------------------------------------


def test_many_threads_ask_one_agent_over_connections_of_their_own(says: Says) -> None:
    from sglang_weight_hook.reader.gathering import gather

    server = says(a_listing(*(an_entry(str(n)) for n in range(8))))
    directory = open_directory(server.url)
    found = gather(dict.fromkeys(range(40), directory.slots), 20.0)
    assert {len(slots) for slots in found.values() if isinstance(slots, list)} == {8}
    assert len(directory.agent._peer._idle) <= 32  # type: ignore[attr-defined]


def test_who_hangs_in_a_thread_is_left_behind() -> None:
    import threading

    from sglang_weight_hook.reader.gathering import gather

    never = threading.Event()
    with Stopwatch() as took:
        found = gather({"a": lambda: 1, "b": never.wait}, 0.3)
    assert found["a"] == 1
    assert isinstance(found["b"], Unreachable)
    assert took.seconds < 2.0
    never.set()


def test_a_fault_of_our_own_is_no_answer() -> None:
    from sglang_weight_hook.reader.gathering import gather

    def wrong() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        gather({"a": lambda: 1, "b": wrong}, 5.0)


def test_reading_imports_nothing_that_is_installed(says: Says) -> None:
    import subprocess
    import sys

    server = says(a_listing(an_entry()))
    code = (
        "import sys; from sglang_weight_hook import open_directory\n"
        "print(len(open_directory(sys.argv[1]).slots()))\n"
        "print([name for name in ('starlette', 'uvicorn', 'typer', 'rich', 'torch', 'numpy')"
        " if name in sys.modules])"
    )
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code, server.url],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.stdout.split("\n")[:2] == ["1", "[]"]
