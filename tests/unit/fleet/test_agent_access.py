"""Who is answered: tokens, names, certificates; and what the agent may do itself."""

from __future__ import annotations

import os
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from agent_process import AS_NOBODY, ROOT, TOKEN, Agent, Publisher, eventually
from etcd_process import a_certificate

Publish = Callable[..., Publisher]
Serve = Callable[..., Agent]

PATHS = (
    *("/", "/openapi.json", "/slots", "/slots/0", "/slots/0/state", "/slots/0/layout"),
    *("/slots/0/regions", "/slots/0/history", "/slots/0/transport", "/lookup/1", "/events"),
    *("/metrics", "/no-such-path"),
)


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can come to, which pytest's own are not."""
    with tempfile.TemporaryDirectory() as path:
        os.chmod(path, 0o755)
        yield Path(path)


def refused(*arguments: object, before: str = "") -> tuple[int, str]:
    """Exit status and the one sentence of an agent that does not start."""
    code = f"import sys\n{before}\nfrom sglang_weight_hook.commands.entry import main\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "sys.exit(main())", "serve", "--port", "0"]
        + [str(argument) for argument in arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == ""
    assert done.stderr.startswith("sglang-weight-hook: ")
    assert done.stderr.count("\n") == 1
    return done.returncode, done.stderr


def test_without_the_token_nothing_is_told_but_that_it_runs(
    publish: Publish, serve: Serve, token_file: Path
) -> None:
    publish()
    agent = serve("--token-file", token_file)
    for path in PATHS:
        for given in ({}, {"authorization": f"Bearer {TOKEN}x"}, {"authorization": TOKEN}):
            answer = agent.ask(path, **given)
            assert answer.status == 401, path
            assert answer.headers["www-authenticate"] == "Bearer"
            assert list(answer.json) == ["error"]
    for given in (f"Basic {TOKEN}", f"Bearer {TOKEN[:-1]}", "Bearer", "Bearer ", "\xe9"):
        assert agent.ask("/slots", authorization=given).status == 401
    assert agent.ask(f"/slots?access_token={TOKEN}").status == 401
    assert agent.ask("/healthz").json == {"ok": True}
    agent.token = TOKEN
    assert agent.slot()["owner_alive"] is True
    assert agent.ask("/slots", authorization=f"bearer {TOKEN}").status == 200
    # No file yet; without a token it would be refused.
    assert agent.ask("/slots/0/transport").status == 404


def test_no_secret_is_printed_or_logged_or_told(
    publish: Publish, serve: Serve, token_file: Path, tmp_path: Path
) -> None:
    publish()
    password = tmp_path / "password"
    password.write_text("the-password-of-etcd-5d1c\n")
    agent = serve(
        *("--token-file", token_file, "--etcd", "http://127.0.0.1:9", "--etcd-user", "agent"),
        *("--etcd-password-file", password),
    )
    eventually(lambda: "cannot be registered" in agent.said())
    agent.token = TOKEN
    said = b"".join(agent.ask(path).body for path in PATHS if path != "/events")
    for headers in ({"authorization": f"Bearer {TOKEN}", "range": "bytes=9999999-"}, {}):
        agent.ask("/slots/0/layout", **headers)
    connection = agent.connect()
    connection.sock = None
    connection.connect()
    connection.sock.sendall(f"GET / HTTP/9\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode())
    connection.sock.recv(1000)
    connection.close()
    said += Path(f"/proc/{agent.process.pid}/cmdline").read_bytes()
    assert agent.end() == 0
    said += agent.said().encode()
    assert TOKEN.encode() not in said
    assert b"the-password-of-etcd" not in said
    assert b"Traceback" not in said


def test_what_leads_to_the_weights_is_told_only_with_a_token(
    publish: Publish, serve: Serve, token_file: Path, tmp_path: Path
) -> None:
    publisher = publish()
    transport = publisher.directory / "weight_transport_0.json"
    transport.write_text('{"schema": "sglang-weight-transport"}')
    agent = serve()
    answer = agent.ask("/slots/0/transport")
    assert answer.status == 403
    assert "--token-file" in answer.json["error"]
    other = serve("--token-file", token_file)
    other.token = TOKEN
    assert other.ask("/slots/0/transport").body == transport.read_bytes()


def test_a_page_of_somebody_elses_cannot_ask_through_a_name_of_its_own(
    publish: Publish, serve: Serve, token_file: Path
) -> None:
    publish()
    agent = serve("--name", "maps.example", "--advertise", "https://told.example:1")
    for host in ("evil.example", "evil.example:80", "", "127.0.0.1.evil.example"):
        assert agent.ask("/slots", host=host).status in (400, 403), host
    for host in (
        "127.0.0.1:1",
        "localhost",
        "LOCALHOST:80",
        "[::1]:80",
        "maps.example",
        "told.example:2",
    ):
        assert agent.ask("/slots", host=host).status == 200, host
    assert agent.ask("/healthz", host="evil.example").status == 200
    answer = agent.ask("/slots", origin="http://evil.example")
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_it_listens_on_this_machine_alone_unless_it_is_told(
    publish: Publish, serve: Serve, token_file: Path
) -> None:
    publisher = publish()
    where = ("--dir", publisher.directory)
    status, said = refused(*where, "--host", "0.0.0.0")
    assert status == 2
    assert "--token-file" in said
    agent = serve()
    assert "127.0.0.1" in agent.url
    listening = Path("/proc/net/tcp").read_text().splitlines()
    local = f":{agent.port:04X}"
    mine = [line.split()[1] for line in listening if line.split()[1].endswith(local)]
    assert set(mine) == {f"0100007F{local}"}
    open_to_all = serve("--host", "0.0.0.0", "--token-file", token_file)
    open_to_all.token = TOKEN
    assert open_to_all.slot() is not None
    assert "unencrypted" in open_to_all.said()
    everybody = serve("--host", "0.0.0.0", "--without-token")
    assert everybody.slot() is not None


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "does not exist"), ("", "no token"), ("short", "no token"), ("é" * 40, "no token")],
)
def test_a_token_that_is_none_is_refused(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_text(content)
    status, said = refused("--dir", tmp_path, "--token-file", path)
    assert status == 1
    assert words in said


def test_a_directory_that_cannot_be_read_is_refused(open_folder: Path) -> None:
    closed = open_folder / "closed"
    closed.mkdir(mode=0o700 if os.getuid() == 0 else 0)
    a_file = open_folder / "file"
    a_file.write_text("")
    status, said = refused("--dir", a_file)
    assert status == 1
    assert "is no directory" in said
    status, said = refused("--dir", closed, before=AS_NOBODY)
    assert status == 1
    assert f"{closed} cannot be read by user" in said


def test_wrong_usage_is_said(tmp_path: Path) -> None:
    for arguments in (
        ("--ssl-keyfile", "key"),
        ("--advertise", "node:7411"),
        ("--advertise", "http://a:b@node"),
        ("--etcd-user", "agent"),
        ("--etcd", "http://127.0.0.1:9", "--etcd-user", "agent"),
        ("--etcd", "http://127.0.0.1:9", "--etcd-key", "key"),
    ):
        assert refused("--dir", tmp_path, *arguments)[0] == 2, arguments
    assert refused("--dir", tmp_path, "--etcd", "ftp://one")[0] == 1
    assert refused("--dir", tmp_path, "--ssl-certfile", tmp_path / "none")[0] == 1
    status, said = refused("--dir", tmp_path, "--host", "203.0.113.1", "--without-token")
    assert status == 1
    assert "cannot be listened on" in said


def test_tls_and_certificates_of_clients(
    publish: Publish, serve: Serve, token_file: Path, tmp_path: Path
) -> None:
    publish()
    certificate, key = a_certificate(tmp_path / "tls")
    agent = serve("--ssl-certfile", certificate, "--ssl-keyfile", key, "--token-file", token_file)
    assert agent.scheme == "https"
    agent.context = ssl.create_default_context(cafile=str(certificate))
    agent.token = TOKEN
    assert agent.slot()["owner_alive"] is True
    agent.context = ssl.create_default_context()
    with pytest.raises(ssl.SSLCertVerificationError):
        agent.ask("/healthz")
    theirs, their_key = a_certificate(tmp_path / "tls", "client")
    strict = serve(*("--ssl-certfile", certificate, "--ssl-keyfile", key, "--ssl-ca-certs", theirs))
    strict.context = ssl.create_default_context(cafile=str(certificate))
    with pytest.raises((ssl.SSLError, ConnectionError)):
        strict.ask("/healthz")
    strict.context.load_cert_chain(theirs, their_key)
    assert strict.ask("/healthz").status == 200


def test_nothing_is_written_and_no_right_is_needed(
    publish: Publish, serve: Serve, open_folder: Path
) -> None:
    maps = open_folder / "maps"
    publish(2, maps)

    def everything() -> dict[str, tuple[int, ...]]:
        found = {}
        for path in [maps, *maps.iterdir()]:
            status = path.lstat()
            found[path.name] = (status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
        return found

    before = everything()
    agent = serve("--dir", maps, before=AS_NOBODY)
    assert Path(f"/proc/{agent.process.pid}").stat().st_uid == (os.getuid() or 65534)
    # The page's template lies in the checkout, which may be closed to that user.
    is_open = all(folder.stat().st_mode & 0o1 for folder in ROOT.parents)
    for path in PATHS:
        if path != "/events" and (path != "/" or is_open):
            assert agent.ask(path).status in (200, 403, 404), path
            assert agent.ask(path, "POST").status in (404, 405), path
    stream = agent.events()
    stream.next()
    stream.close()
    assert agent.slot()["owner_alive"] is True
    # Its owner's periodic checks are far apart, so that what is written now, the agent has written.
    assert everything() == before
    status = Path(f"/proc/{agent.process.pid}/status").read_text()
    if os.getuid() == 0:
        assert "CapEff:\t0000000000000000" in status
    assert agent.said() == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_cleanly_with_clients_connected(
    publish: Publish, serve: Serve, number: signal.Signals
) -> None:
    publish()
    agent = serve()
    stream = agent.events()
    stream.next()
    idle = agent.connect()
    idle.connect()
    assert agent.end(number, timeout=15) == 0
    assert agent.said() == ""
    stream.close()
    idle.close()


def test_without_starlette_it_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['starlette'] = None; sys.argv = ['x', 'serve', '--port', '0'];"
        "from sglang_weight_hook.commands.entry import main; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "pip install starlette uvicorn" in done.stderr


def test_its_metrics_are_prometheus_metrics(publish: Publish, serve: Serve) -> None:
    publish(2)
    agent = serve()
    answer = agent.ask("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    text = answer.body.decode()
    assert 'sglang_weight_agent_slot_state{slot="1",state="ready"} 1' in text
    assert 'sglang_weight_agent_slot_owner_alive{slot="0"} 1' in text
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool here: install Debian's prometheus")
    done = subprocess.run(
        [promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("host", "words"),
    [("127.0.0.1", "only readers on this machine"), ("0.0.0.0", "others may not know")],
)
def test_an_address_that_others_may_not_reach_is_registered_with_a_warning(
    host: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from sglang_weight_hook.commands import serve as command
    from sglang_weight_hook.fleet.server import Settings, listen

    with listen(host, 0) as made:
        url = command._own(Settings((), host), made)
    said = capsys.readouterr().err
    assert words in said
    assert url in said
    assert "--advertise" in said
