"""etcd 3.4 or later through its JSON gateway, with the standard library.

No Python client of etcd's that is well kept was found, and the gateway needs none: every call is a
POST of a small JSON object.  Keys and values travel as base64, 64-bit numbers as texts.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import ssl
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn, Optional
from urllib.parse import urlsplit

from ..layout.location import without_user
from ..reader import HookError
from .certificates import ANONYMOUS, advice, is_about_common_name

PREFIX = "/sglang-weight-hook/v1/"
DEFAULT_PORT = 2379

_PAGE = 500  # keys that are asked for at once
_MOST_ANSWER = 16 * 1024 * 1024  # bytes
_MOST_LINE = 8 * 1024 * 1024  # bytes of one message of a watch
_NOT_FOUND, _DENIED, _UNAUTHENTICATED = 5, 7, 16  # of gRPC
# What etcd calls a token that is no longer good; the last one also where another user's role
# was changed.
_STALE_TOKENS = ("invalid auth token", "auth store is old", "user name is empty")


class EtcdError(HookError):
    """etcd cannot be asked, or has refused; the message says which."""


class EtcdUnreachable(EtcdError):
    """None of the endpoints has answered: what was asked may have been done, or not."""


class LeaseGone(EtcdError):
    """The lease has expired or was revoked, and its keys with it."""


class WatchEnded(EtcdError):
    """What a watch would have told next is gone (compacted): list everything again."""


class Value(NamedTuple):
    key: str
    value: bytes
    revision: int  # of its last change
    lease: int


class Change(NamedTuple):
    """Of a watched key: its new value, or that it is gone."""

    key: str
    value: Optional[bytes]
    revision: int


class Etcd:
    """One conversation with a cluster; for one thread at a time, save `close`.

    Every call asks the endpoint that answered last, and the others if it does not.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        user: Optional[str] = None,
        password: Optional[str] = None,
        context: Optional[ssl.SSLContext] = None,
        timeout: float = 3.0,
    ) -> None:
        """``endpoints``: ``http://host:port`` or ``https://host:port``.  Raises EtcdError."""
        self._endpoints = [_Endpoint.of(url) for url in endpoints]
        if not self._endpoints:
            raise EtcdError("no endpoint of etcd was given")
        self._user, self._password, self._context = user, password, context
        self._timeout = timeout
        self._token: Optional[str] = None
        self._connection: Optional[http.client.HTTPConnection] = None

    def __repr__(self) -> str:
        return f"<Etcd {', '.join(map(str, self._endpoints))}>"  # and no password

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def __enter__(self) -> Etcd:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # half made, or at the interpreter's end
            self.close()

    # -- keys

    def get(self, key: str) -> Optional[Value]:
        answer = self._call("kv/range", {"key": _coded(key)})
        return next(map(_value, answer.get("kvs", ())), None)

    def under(self, prefix: str, keys_only: bool = False) -> tuple[list[Value], int]:
        """Everything whose key begins with ``prefix``, and the revision that this is of."""
        found: list[Value] = []
        key, end = prefix.encode(), _end_of(prefix)
        revision = 0
        while True:
            asked = {"key": _coded(key), "range_end": _coded(end), "limit": str(_PAGE)}
            if revision:
                asked["revision"] = str(revision)
            if keys_only:
                asked["keys_only"] = True  # type: ignore[assignment]
            answer = self._call("kv/range", asked)
            revision = revision or int(answer["header"]["revision"])
            page = [_value(each) for each in answer.get("kvs", ())]
            found += page
            if not answer.get("more") or not page:
                return found, revision
            key = page[-1].key.encode("utf-8", "surrogateescape") + b"\0"

    def put_if(self, key: str, value: bytes, lease: int, revision: int) -> Optional[int]:
        """Put if the key was last changed at ``revision`` (0: if it is not there).

        The new revision; None where somebody else has changed it.  Raises LeaseGone.
        """
        put = {"key": _coded(key), "value": _coded(value), "lease": str(lease)}
        asked = {
            "compare": [
                {
                    "key": _coded(key),
                    "target": "MOD",
                    "result": "EQUAL",
                    "mod_revision": str(revision),
                }
            ],
            "success": [{"request_put": put}],
        }
        answer = self._call("kv/txn", asked)
        return int(answer["header"]["revision"]) if answer.get("succeeded") else None

    # -- leases

    def grant(self, seconds: int) -> int:
        return int(self._call("lease/grant", {"TTL": str(seconds)})["ID"])

    def keep_alive(self, lease: int) -> int:
        """Begin the lease anew; the seconds that it has.  Raises LeaseGone."""
        answer = self._call("lease/keepalive", {"ID": str(lease)})
        seconds = int(answer.get("result", {}).get("TTL", 0))
        if seconds <= 0:
            raise LeaseGone(f"etcd's lease {lease} has expired")
        return seconds

    def revoke(self, lease: int) -> None:
        """End it, and its keys.  One that is gone already is no error."""
        with contextlib.suppress(LeaseGone):
            self._call("lease/revoke", {"ID": str(lease)})

    # -- watching

    def watch(self, prefix: str, revision: int, idle: float = 60.0) -> Iterator[list[Change]]:
        """What happens under ``prefix`` from ``revision`` on; an empty list where nothing has.

        On a connection of its own, so that other calls go on meanwhile.  Ends after ``idle``
        seconds without a word.  Raises EtcdError, of it WatchEnded.
        """
        create = {
            "key": _coded(prefix),
            "range_end": _coded(_end_of(prefix)),
            "start_revision": str(revision),
        }
        for endpoint in list(self._endpoints):
            connection = endpoint.connect(self._context, idle)
            try:
                response = self._send(connection, "watch", {"create_request": create})
                if response.status != 200:
                    self._refused(response.status, response.read(_MOST_ANSWER))
                yield from _watched(response)
                return
            except TimeoutError:
                return
            except (OSError, http.client.HTTPException, ValueError) as error:
                failure = EtcdUnreachable(f"etcd at {endpoint} tells nothing more ({error})")
            finally:
                connection.close()
        raise failure

    # -- calls

    def _call(self, path: str, asked: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._asked_anywhere(path, asked)
        except _TokenIsStale:
            self._token = None
            try:
                return self._asked_anywhere(path, asked)
            except _TokenIsStale as error:
                raise EtcdError(f"etcd lets nobody in without a user: {error}") from None

    def _asked_anywhere(self, path: str, asked: dict[str, Any]) -> dict[str, Any]:
        last: Optional[Exception] = None
        for _ in range(len(self._endpoints)):
            was_open = self._connection is not None
            try:
                return self._ask(path, asked)
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.close()
                last = error
            if was_open and not isinstance(last, TimeoutError):
                # A connection that has been idle is closed by the other side at any time.
                try:
                    return self._ask(path, asked)
                except (OSError, http.client.HTTPException, ValueError) as error:
                    self.close()
                    last = error
            self._endpoints.append(self._endpoints.pop(0))
        names = ", ".join(map(str, self._endpoints))
        what = None
        if any(endpoint.is_tls for endpoint in self._endpoints):
            what = advice(last, "--etcd-ca", "--etcd-cert and --etcd-key")
        raise EtcdUnreachable(
            f"etcd at {names} does not answer ({_reason(last)}){f'; {what}' if what else ''}"
        ) from last

    def _ask(self, path: str, asked: dict[str, Any]) -> dict[str, Any]:
        if self._user is not None and self._token is None:
            self._authenticate()
        if self._connection is None:
            self._connection = self._endpoints[0].connect(self._context, self._timeout)
        response = self._send(self._connection, path, asked)
        body = response.read(_MOST_ANSWER + 1)
        if len(body) > _MOST_ANSWER:
            raise ValueError("a longer answer than etcd gives")
        if response.status != 200:
            self._refused(response.status, body)
        answer = json.loads(body)
        if not isinstance(answer, dict):
            raise ValueError("no JSON object")
        return answer

    def _authenticate(self) -> None:
        connection = self._endpoints[0].connect(self._context, self._timeout)
        with contextlib.closing(connection):
            asked = {"name": self._user, "password": self._password or ""}
            response = self._send(connection, "auth/authenticate", asked)
            body = response.read(_MOST_ANSWER)
        if response.status != 200:
            text = _error_in(body)[1]
            if "authentication is not enabled" in text:
                self._token = ""  # then nobody is asked for one
                return
            if text == ANONYMOUS:
                raise EtcdError(text)
            raise EtcdError(
                f"etcd does not let user {self._user} in ({text}); check --etcd-user and "
                f"--etcd-password-file"
            )
        self._token = str(json.loads(body)["token"])

    def _send(
        self, connection: http.client.HTTPConnection, path: str, asked: dict[str, Any]
    ) -> http.client.HTTPResponse:
        headers = {"Content-Type": "application/json"}
        if self._token and path != "auth/authenticate":
            headers["Authorization"] = self._token
        connection.request("POST", f"/v3/{path}", json.dumps(asked), headers)
        return connection.getresponse()

    def _refused(self, status: int, body: bytes) -> NoReturn:
        code, text = _error_in(body)
        if text == ANONYMOUS:
            raise EtcdError(text)
        if any(words in text for words in _STALE_TOKENS):
            if self._user is not None:
                raise _TokenIsStale(text)
            raise EtcdError(
                f"etcd wants a user and a password ({text}); give --etcd-user and "
                f"--etcd-password-file"
            )
        if code == _NOT_FOUND and "lease" in text:
            raise LeaseGone(text)
        if code == _DENIED:
            if self._user is None:
                raise EtcdError(
                    f"etcd wants a user who may have {PREFIX} ({text}); give --etcd-user and "
                    f"--etcd-password-file"
                )
            raise EtcdError(
                f"etcd does not allow that to user {self._user}: {text}; grant {PREFIX}"
            )
        raise EtcdError(f"etcd answers {status}: {text}")


class _TokenIsStale(Exception):
    """Authenticate again."""


class _Endpoint(NamedTuple):
    is_tls: bool
    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.is_tls else 'http'}://{host}:{self.port}"

    @classmethod
    def of(cls, url: str) -> _Endpoint:
        """
        >>> str(_Endpoint.of("https://one:1")), str(_Endpoint.of("http://[::1]"))
        ('https://one:1', 'http://[::1]:2379')
        """
        try:
            parts = urlsplit(url)
            port = parts.port or DEFAULT_PORT
        except ValueError as error:
            shown = without_user(url)
            why = f" ({error})" if shown == url else ""  # which may tell a part of a password
            raise EtcdError(f"{shown!r} is no endpoint of etcd{why}") from None
        if parts.username or parts.password:
            raise EtcdError("an endpoint of etcd has no user in it; give user and password apart")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise EtcdError(f"{without_user(url)!r} is no endpoint of etcd; give http://host:2379")
        return cls(parts.scheme == "https", parts.hostname, port)

    def connect(
        self, context: Optional[ssl.SSLContext], timeout: float
    ) -> http.client.HTTPConnection:
        if self.is_tls:
            return http.client.HTTPSConnection(
                self.host,
                self.port,
                timeout=timeout,
                context=context or ssl.create_default_context(),
            )
        return http.client.HTTPConnection(self.host, self.port, timeout=timeout)


def tls_context(
    ca: Optional[str] = None, certificate: Optional[str] = None, key: Optional[str] = None
) -> ssl.SSLContext:
    """For `Etcd`: PEM files.  Raises EtcdError."""
    try:
        context = ssl.create_default_context(cafile=ca)
        if certificate is not None:
            context.load_cert_chain(certificate, key)
    except OSError as error:
        raise EtcdError(
            f"the authorities or the certificate for etcd cannot be used ({error}); give PEM files"
        ) from error
    return context


def _watched(response: http.client.HTTPResponse) -> Iterator[list[Change]]:
    while line := response.readline(_MOST_LINE):
        answer = json.loads(line)
        if "error" in answer:
            raise EtcdError(f"etcd ends the watch: {answer['error'].get('message', answer)}")
        result = answer.get("result", {})
        if result.get("canceled"):
            raise WatchEnded(
                f"etcd ends the watch: {result.get('cancel_reason', 'what was asked for is gone')}"
            )
        yield [
            Change(
                _text(event["kv"]["key"]),
                None
                if event.get("type") == "DELETE"
                else base64.b64decode(event["kv"].get("value", "")),
                int(event["kv"].get("mod_revision", 0)),
            )
            for event in result.get("events", ())
        ]


def _coded(value: str | bytes) -> str:
    if isinstance(value, str):
        value = value.encode("utf-8", "surrogateescape")
    return base64.b64encode(value).decode("ascii")


def _text(coded: str) -> str:
    return base64.b64decode(coded).decode("utf-8", "surrogateescape")


def _value(raw: dict[str, Any]) -> Value:
    return Value(
        _text(raw["key"]),
        base64.b64decode(raw.get("value", "")),
        int(raw.get("mod_revision", 0)),
        int(raw.get("lease", 0)),
    )


def _end_of(prefix: str) -> bytes:
    """The first key after all that begin with ``prefix``.

    >>> _end_of("/a/")
    b'/a0'
    """
    data = prefix.encode()
    return data[:-1] + bytes([data[-1] + 1])


def _error_in(body: bytes) -> tuple[int, str]:
    if is_about_common_name(body):
        return 0, ANONYMOUS
    try:
        answer = json.loads(body)
        text = answer.get("error") or answer.get("message") or ""
        return int(answer.get("code", 0)), str(text)[:300]
    except (ValueError, AttributeError, TypeError):
        return 0, "an answer that is not etcd's"


def _reason(error: Optional[Exception]) -> str:
    if isinstance(error, TimeoutError):
        return "timed out"
    return str(error) or type(error).__name__
