"""``sglang-weight-hook serve``."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import sys
from typing import TYPE_CHECKING, Annotated, Any, Optional
from urllib.parse import urlsplit

import typer

from ..layout import location
from ..layout.location import without_user
from ..reader import Directory, Document, HookError
from ..reader.files import read_bytes
from .app import Misused, command
from .directories import directories_of
from .render.text import complain

if TYPE_CHECKING:
    from ..fleet.application import Presentation
    from ..fleet.etcd import Etcd
    from ..fleet.server import Settings, Tls

PORT = 7411
_SHORTEST_TOKEN = 16
_ANYWHERE = ("0.0.0.0", "::")

_Dirs = Annotated[
    Optional[list[str]],
    typer.Option(
        "--dir",
        metavar="DIR",
        help="A server's output directory on this machine, or a pattern such as '/shared/maps/*', "
        f"filled in once; repeatable.  [default: ${location.DIRECTORY}, else "
        f"./{location.DEFAULT_DIRECTORY}]",
    ),
]
_Host = Annotated[
    str,
    typer.Option(
        "--host",
        metavar="HOST",
        help="Address to listen on; beyond this machine only with --token-file.",
    ),
]
_Port = Annotated[
    int, typer.Option("--port", metavar="PORT", min=0, max=65535, help="0 takes a free one.")
]
_TokenFile = Annotated[
    Optional[str],
    typer.Option(
        "--token-file",
        metavar="FILE",
        help=f"Ask every client for the bearer token in FILE, of {_SHORTEST_TOKEN} characters or "
        "more.",
    ),
]
_WithoutToken = Annotated[
    bool,
    typer.Option(
        "--without-token",
        help="Listen beyond this machine without a token: everybody who can connect is answered.",
    ),
]
_Name = Annotated[
    Optional[list[str]],
    typer.Option(
        "--name",
        metavar="NAME",
        help="A further host name under which clients may ask an agent without a token; "
        "repeatable.",
    ),
]
_Certificate = Annotated[
    Optional[str],
    typer.Option(
        "--ssl-certfile", metavar="FILE", help="Speak TLS, with the certificate in FILE (PEM)."
    ),
]
_Key = Annotated[
    Optional[str],
    typer.Option("--ssl-keyfile", metavar="FILE", help="Private key of the TLS certificate (PEM)."),
]
_KeyPassword = Annotated[
    Optional[str],
    typer.Option(
        "--ssl-keyfile-password-file",
        metavar="FILE",
        help="File with the password of the private key of the TLS certificate.",
    ),
]
_Clients = Annotated[
    Optional[str],
    typer.Option(
        "--ssl-ca-certs",
        metavar="FILE",
        help="Answer only clients with a certificate that a certificate authority (CA) in FILE has "
        "signed (PEM).",
    ),
]
_MaxConnections = Annotated[
    int,
    typer.Option(
        "--max-connections",
        metavar="N",
        min=1,
        help="Largest number of connections at the same time.",
    ),
]
_MaxStreams = Annotated[
    int,
    typer.Option(
        "--max-streams",
        metavar="N",
        min=1,
        help="Largest number of event streams at the same time.",
    ),
]
_Etcd = Annotated[
    Optional[list[str]],
    typer.Option(
        "--etcd",
        metavar="URL",
        help="Register each live slot in etcd, at http://host:2379 or https://...; repeatable, for "
        "the members of one cluster.",
    ),
]
_EtcdUser = Annotated[
    Optional[str], typer.Option("--etcd-user", metavar="NAME", help="User name for etcd.")
]
_EtcdPasswordFile = Annotated[
    Optional[str],
    typer.Option("--etcd-password-file", metavar="FILE", help="File with the password for etcd."),
]
_EtcdCa = Annotated[
    Optional[str],
    typer.Option(
        "--etcd-ca",
        metavar="FILE",
        help="Certificate authorities (CA) that are trusted for etcd's certificate (PEM).  "
        "[default: the system's]",
    ),
]
_EtcdCertificate = Annotated[
    Optional[str],
    typer.Option("--etcd-cert", metavar="FILE", help="Client certificate for etcd (PEM)."),
]
_EtcdKey = Annotated[
    Optional[str],
    typer.Option(
        "--etcd-key", metavar="FILE", help="Private key of the client certificate for etcd (PEM)."
    ),
]
_Advertise = Annotated[
    Optional[str],
    typer.Option(
        "--advertise",
        metavar="URL",
        help="Address at which other machines reach this agent, as registered in etcd.  "
        "[default: its own address]",
    ),
]
_Node = Annotated[
    Optional[str],
    typer.Option(
        "--node",
        metavar="NAME",
        help="Name of this machine in etcd.  [default: its host name]",
    ),
]
_Ttl = Annotated[
    int,
    typer.Option(
        "--ttl",
        metavar="S",
        min=2,
        max=3600,
        help="Seconds after which etcd forgets the slots of an agent that has died.",
    ),
]


@command(
    "serve",
    "sglang-weight-hook serve\n"
    "sglang-weight-hook serve --host 0.0.0.0 --token-file /run/agent/token",
)
def serve(
    directories: _Dirs = None,
    host: _Host = "127.0.0.1",
    port: _Port = PORT,
    token_file: _TokenFile = None,
    without_token: _WithoutToken = False,
    names: _Name = None,
    certificate: _Certificate = None,
    key: _Key = None,
    key_password_file: _KeyPassword = None,
    clients: _Clients = None,
    max_connections: _MaxConnections = 256,
    max_streams: _MaxStreams = 128,
    etcd: _Etcd = None,
    etcd_user: _EtcdUser = None,
    etcd_password_file: _EtcdPasswordFile = None,
    etcd_ca: _EtcdCa = None,
    etcd_certificate: _EtcdCertificate = None,
    etcd_key: _EtcdKey = None,
    advertise: _Advertise = None,
    node: _Node = None,
    ttl: _Ttl = 10,
) -> int:
    """Answer over HTTP what the slots of this machine publish.

    The agent only reads, with the rights of the user who starts it.  /openapi.json describes all
    paths.  SIGTERM and SIGINT end it with status 0.  It needs Starlette and uvicorn (pip install
    starlette uvicorn).
    """
    server = _server()
    settings = server.Settings(
        directories=_readable(directories_of(directories)),
        host=host,
        port=port,
        token=_token(token_file, host, without_token),
        tls=_tls(certificate, key, key_password_file, clients),
        limits=server.Limits.of(max_connections, max_streams),
        hosts=[*(names or ()), *_host_of(advertise)],
    )
    client = _etcd(etcd, etcd_user, etcd_password_file, etcd_ca, etcd_certificate, etcd_key)
    made = server.listen(host, port, settings.limits)
    registration = None
    if client is not None:
        from ..fleet.registration import Registration

        registration = Registration(client, advertise or _own(settings, made), node, ttl)
    _log_to_stderr()
    server.run(settings, made, _presentation(), registration, lambda: _say(settings, made))
    return 0


def _host_of(advertise: Optional[str]) -> list[str]:
    """The name in a URL that readers are given.  Raises Misused."""
    if advertise is None:
        return []
    try:
        parts = urlsplit(advertise)
        if parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc:
            return [parts.hostname]
    except ValueError:
        pass
    raise Misused(
        f"--advertise {without_user(advertise)} is no URL of an agent; give https://node:7411"
    )


def _server() -> Any:
    try:
        from ..fleet import server
    except ImportError as error:
        if (error.name or "").split(".")[0] not in ("starlette", "uvicorn", "h11", "anyio"):
            raise
        raise Misused("serve needs Starlette and uvicorn: pip install starlette uvicorn") from None
    return server


def _tls(
    certificate: Optional[str],
    key: Optional[str],
    key_password_file: Optional[str],
    clients: Optional[str],
) -> Optional[Tls]:
    from ..fleet.server import Tls

    if certificate is None:
        if key or key_password_file or clients:
            raise Misused("--ssl-keyfile and the like need --ssl-certfile")
        return None
    password = None if key_password_file is None else _secret(key_password_file)
    return Tls(certificate, key, password, clients)


def _etcd(
    endpoints: Optional[list[str]],
    user: Optional[str],
    password_file: Optional[str],
    ca: Optional[str],
    certificate: Optional[str],
    key: Optional[str],
) -> Optional[Etcd]:
    """A client of the registry; None without one.  Raises Misused and HookError."""
    from ..fleet.etcd import Etcd, tls_context

    if not endpoints:
        if user or password_file or ca or certificate or key:
            raise Misused("--etcd-user and the like need --etcd")
        return None
    if (user is None) != (password_file is None):
        raise Misused("--etcd-user and --etcd-password-file go together")
    if key is not None and certificate is None:
        raise Misused("--etcd-key needs --etcd-cert")
    password = None if password_file is None else _secret(password_file)
    in_clear = [url for url in endpoints if not _is_private(url)]
    if user is not None and in_clear:
        complain(
            f"etcd's password goes to {without_user(in_clear[0])} without TLS, where everybody "
            f"on the way can read it; give https://"
        )
    wants_tls = any(url.lower().startswith("https:") for url in endpoints)
    context = tls_context(ca, certificate, key) if wants_tls else None
    return Etcd(endpoints, user, password, context)


def _is_private(url: str) -> bool:
    """Whether nobody else reads what goes there: TLS, or this machine."""
    try:
        parts = urlsplit(url)
    except ValueError:  # is refused then
        return True
    return parts.scheme != "http" or _is_loopback(parts.hostname or "")


def _say(settings: Settings, made: socket.socket) -> None:
    sys.stdout.write(f"serving {url_of(settings, made)}\n")
    sys.stdout.flush()
    if settings.token is not None and settings.tls is None and not _is_loopback(settings.host):
        complain("the token travels unencrypted: give --ssl-certfile, or put a TLS proxy in front")


def _own(settings: Settings, made: socket.socket) -> str:
    """What is registered where no URL was told; warns where others may not reach it."""
    url = url_of(settings, made)
    if _is_loopback(made.getsockname()[0]):
        complain(
            f"{url} is registered in etcd, and only readers on this machine reach it: give "
            f"--host and --advertise"
        )
    elif made.getsockname()[0] in _ANYWHERE:
        complain(
            f"{url} is registered in etcd, this machine's host name, which others may not know: "
            f"give --advertise"
        )
    return url


def url_of(settings: Settings, made: socket.socket) -> str:
    """Where the agent is, as far as the agent can tell."""
    host, port = made.getsockname()[:2]
    if host in _ANYWHERE:
        host = socket.gethostname()
    if ":" in host:
        host = f"[{host}]"
    return f"{'https' if settings.tls else 'http'}://{host}:{port}"


def _readable(directories: list[Directory]) -> list[Directory]:
    """All of them, if each can be read or is not there yet.  Raises HookError."""
    for directory in directories:
        if "://" in directory.path:
            raise HookError(
                f"{directory.path} is no directory of this machine, and an agent shows no other; "
                f"run one there"
            )
        if not os.path.lexists(directory.path):
            complain(f"{directory.path} does not exist yet: its slots are shown once it does")
        elif not os.path.isdir(directory.path):
            raise HookError(f"{directory.path} is no directory; give a server's output directory")
        elif not os.access(directory.path, os.R_OK | os.X_OK):
            raise HookError(
                f"{directory.path} cannot be read by user {os.getuid()}; run the agent as a user "
                f"who may read it, or widen the directory's mode"
            )
    return directories


def _token(path: Optional[str], host: str, without: bool) -> Optional[str]:
    """The token that clients are asked for.  Raises Misused and HookError."""
    if path is None:
        if not without and not _is_loopback(host):
            raise Misused(
                f"{host} is reached from other machines: give --token-file, or --without-token to "
                f"answer everybody"
            )
        return None
    token = _secret(path)
    if len(token) < _SHORTEST_TOKEN or not token.isascii() or not token.isprintable():
        raise HookError(
            f"{path} holds no token of {_SHORTEST_TOKEN} printable ASCII characters or more; make "
            f"one with: openssl rand -hex 32"
        )
    return token


def _secret(path: str) -> str:
    """The first line of a file.  Raises HookError."""
    data = read_bytes(path, limit=64 * 1024)
    if data is None:
        raise HookError(f"{path} does not exist; give a file with the secret on its first line")
    return data.decode("utf-8", "replace").partition("\n")[0].strip()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _log_to_stderr() -> None:
    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format="sglang-weight-hook: %(message)s"
    )


def _presentation() -> Presentation:
    """What the commands show, as the agent answers it."""
    from ..fleet.application import Presentation
    from .lookup import answer_at
    from .render import page
    from .selection import heading, is_alive

    def drawn(documents: Any) -> str:
        return page.page(
            [document.raw for document in documents],
            alive=[is_alive(document) for document in documents],
        )

    def regions(document: Document) -> dict[str, Any]:
        return {**heading(document), "regions": document.regions}

    return Presentation(drawn, regions, answer_at)
