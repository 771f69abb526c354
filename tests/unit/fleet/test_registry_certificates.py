"""An etcd that lets in only who shows a certificate: agents and readers, with one and without."""

from __future__ import annotations

import json
import ssl
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from agent_process import Agent, Publisher, eventually
from etcd_process import EtcdServer, a_certificate, with_users

from sglang_weight_hook import HookError, Unreachable, open_directory
from sglang_weight_hook.fleet.etcd import PREFIX, Etcd, EtcdError, EtcdUnreachable, tls_context

if TYPE_CHECKING:
    from ended_command import Run

VARIABLE = "SGLANG_WEIGHT_HOOK_"


class Pem(NamedTuple):
    certificate: Path
    key: Path


class Guarded(EtcdServer):
    """It knows the certificates of `ours` and `named`, and not that of `others`."""

    def __init__(self, folder: Path) -> None:
        self.own = Pem(*a_certificate(folder / "tls", "registry"))
        self.ours = Pem(*a_certificate(folder / "tls", "reader", False))
        self.named = Pem(*a_certificate(folder / "tls", "named"))
        self.others = Pem(*a_certificate(folder / "tls", "stranger"))
        # etcd's gateway shows the server's own certificate to the server.
        known = folder / "tls" / "known.pem"
        these = (self.own, self.ours, self.named)
        known.write_text("".join(one.certificate.read_text() for one in these))
        super().__init__(folder / "etcd", *self.own, clients=known)

    def post(self, path: str, **asked: Any) -> Any:
        context = ssl.create_default_context(cafile=str(self.own.certificate))
        context.load_cert_chain(*self.ours)
        body = json.dumps(asked).encode()
        request = urllib.request.Request(f"{self.url}/v3/{path}", body, method="POST")
        with urllib.request.urlopen(request, timeout=10, context=context) as response:
            return json.load(response)

    def client(self, shown: Pem | None, *user: str) -> Etcd:
        files = () if shown is None else map(str, shown)
        return Etcd([self.url], *user, context=tls_context(str(self.own.certificate), *files))

    @property
    def directory(self) -> str:
        return self.url.replace("https://", "etcds://")


@pytest.fixture
def guarded(started: list[Any], tmp_path: Path) -> Guarded:
    started.append(Guarded(tmp_path))
    return started[-1]


@pytest.fixture
def show(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> Callable[[Pem | None], None]:
    """From now on a reader shows this certificate."""

    def show(pem: Pem | None) -> None:
        monkeypatch.setenv(f"{VARIABLE}CA_FILE", str(guarded.own.certificate))
        for name, path in zip(("CERT_FILE", "KEY_FILE"), pem or (None, None)):
            if path is None:
                monkeypatch.delenv(VARIABLE + name, raising=False)
            else:
                monkeypatch.setenv(VARIABLE + name, str(path))

    return show


def keys(etcd: Etcd) -> list[str]:
    return [one.key for one in etcd.under(PREFIX)[0]]


def test_an_agent_with_a_certificate_that_is_known_registers(
    guarded: Guarded, publish: Callable[..., Publisher], serve: Callable[..., Agent]
) -> None:
    publish()
    certificate, key = guarded.ours
    agent = serve(
        *("--etcd", guarded.url, "--etcd-ca", guarded.own.certificate, "--node", "node"),
        *("--etcd-cert", certificate, "--etcd-key", key),
    )
    client = guarded.client(guarded.ours)
    eventually(lambda: keys(client) == [f"{PREFIX}node/0"])
    assert agent.end() == 0
    assert keys(client) == []
    assert agent.said().count("\n") == 1  # of the address that is registered


@pytest.mark.parametrize("shown", ["none", "a stranger's"])
def test_an_agent_without_one_is_refused_and_says_what_to_give(
    guarded: Guarded, publish: Callable[..., Publisher], serve: Callable[..., Agent], shown: str
) -> None:
    publish()
    given: tuple[object, ...] = ()
    if shown != "none":
        given = ("--etcd-cert", guarded.others.certificate, "--etcd-key", guarded.others.key)
    agent = serve("--etcd", guarded.url, "--etcd-ca", guarded.own.certificate, *given)
    eventually(lambda: "cannot be registered now" in agent.said())
    [line] = [line for line in agent.said().splitlines() if "registered now" in line]
    assert "--etcd-cert and --etcd-key" in line
    assert guarded.url in line
    assert agent.slot()["state"]["state"] == "ready"  # it goes on
    assert keys(guarded.client(guarded.ours)) == []


@pytest.mark.parametrize("number", range(3))  # the refusal comes before the request or after it
def test_what_a_client_is_told(guarded: Guarded, number: int) -> None:
    for shown in (None, guarded.others):
        with pytest.raises(EtcdUnreachable, match="--etcd-cert and --etcd-key"):
            guarded.client(shown).get("/a")
    with pytest.raises(EtcdUnreachable, match=r"certificate verify failed.*--etcd-ca"):
        Etcd([guarded.url], context=tls_context(None, *map(str, guarded.ours))).get("/a")
    assert guarded.client(guarded.ours).get("/a") is None


def test_readers_with_one_and_without(
    guarded: Guarded, show: Callable[[Pem | None], None], run: Run
) -> None:
    show(guarded.ours)
    assert open_directory(guarded.directory).slots() == []
    for shown in (None, guarded.others) * 3:
        show(shown)
        with pytest.raises(Unreachable, match=f"{VARIABLE}CERT_FILE and {VARIABLE}KEY_FILE"):
            open_directory(guarded.directory).slots()
        ended = run("slots", "--dir", guarded.directory)
        assert (ended.status, ended.out) == (1, "")
        assert f"{VARIABLE}CERT_FILE" in ended.err


def test_a_reader_that_does_not_know_the_registrys_authority_is_told_so(
    guarded: Guarded, show: Callable[[Pem | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    show(guarded.ours)
    monkeypatch.setenv(f"{VARIABLE}CA_FILE", str(guarded.others.certificate))
    with pytest.raises(Unreachable, match=f"certificate verify failed.*{VARIABLE}CA_FILE"):
        open_directory(guarded.directory).slots()


def test_an_agent_that_asks_its_readers_for_a_certificate(
    guarded: Guarded,
    publish: Callable[..., Publisher],
    serve: Callable[..., Agent],
    show: Callable[[Pem | None], None],
) -> None:
    publish()
    certificate, key = guarded.own
    agent = serve(
        *("--ssl-certfile", certificate, "--ssl-keyfile", key),
        *("--ssl-ca-certs", guarded.ours.certificate),
    )
    show(guarded.ours)
    assert len(open_directory(agent.url).slots()) == 1
    for shown in (None, guarded.others) * 3:
        show(shown)
        with pytest.raises(Unreachable, match=f"{VARIABLE}CERT_FILE and {VARIABLE}KEY_FILE"):
            open_directory(agent.url).slots()


def test_users_and_passwords_behind_certificates(
    guarded: Guarded,
    publish: Callable[..., Publisher],
    serve: Callable[..., Agent],
    show: Callable[[Pem | None], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_users(guarded)
    publish()
    password = tmp_path / "password"
    password.write_text("password-of-agent\n")
    certificate, key = guarded.ours
    tls = ("--etcd-ca", guarded.own.certificate, "--etcd-cert", certificate, "--etcd-key", key)
    show(guarded.ours)

    def register(node: str, *user: object) -> Agent:
        return serve("--etcd", guarded.url, "--node", node, *tls, *user)

    client = guarded.client(guarded.ours, "agent", "password-of-agent")
    nobody = register("nobody")
    eventually(lambda: "--etcd-user and --etcd-password-file" in nobody.said(), 20)
    wrong = tmp_path / "wrong"
    wrong.write_text("password-of-nobody\n")
    mistaken = register("mistaken", "--etcd-user", "agent", "--etcd-password-file", wrong)
    eventually(lambda: "--etcd-password-file" in mistaken.said())
    assert "password-of" not in mistaken.said()
    agent = register("node", "--etcd-user", "agent", "--etcd-password-file", password)
    eventually(lambda: keys(client) == [f"{PREFIX}node/0"])

    with pytest.raises(HookError, match=f"{VARIABLE}ETCD_USER"):
        open_directory(guarded.directory).slots()
    monkeypatch.setenv(f"{VARIABLE}ETCD_USER", "agent")
    monkeypatch.setenv(f"{VARIABLE}ETCD_PASSWORD_FILE", str(password))
    [slot] = open_directory(guarded.directory).slots()
    assert slot.name == "node:0"
    assert slot.owner_alive()
    assert agent.end() == 0
    assert open_directory(guarded.directory).slots() == []


def test_a_certificate_that_names_somebody_where_there_are_users(
    guarded: Guarded, show: Callable[[Pem | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """etcd itself takes none such through its gateway."""
    assert guarded.client(guarded.named).get("/a") is None
    with_users(guarded)
    for user in ((), ("agent", "password-of-agent")):
        with pytest.raises(EtcdError, match=r"without a common name \(CN\)"):
            guarded.client(guarded.named, *user).get("/a")
    show(guarded.named)
    for name in ("", "agent"):
        monkeypatch.setenv(f"{VARIABLE}ETCD_USER", name)
        with pytest.raises(HookError, match=r"without a common name \(CN\)"):
            open_directory(guarded.directory).slots()
