"""Reading the registry: which slots of which nodes live, as their agents have put it into etcd.

Through etcd's JSON gateway (``/v3/…``), with the standard library alone.  Nothing that is written
there is believed further than it has to be: a value says where to ask, the agent what is so.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Optional

from ..reader import HookError, Unreachable
from .access import ETCD_PASSWORD, ETCD_USER, Access
from .certificates import ANONYMOUS, is_about_common_name
from .identity import Identity
from .remote_agent import is_name
from .wire import Answer, Peer

PREFIX = "/sglang-weight-hook/v1/"
SCHEMA_NAME, SCHEMA_VERSION = "sglang-weight-slot", 1
MOST_VALUE = 4096  # bytes
PAGE = 1000  # keys of one answer
MOST_SLOTS = 1_000_000
TIMEOUT = 5.0  # seconds
_ANSWER_BYTES = 2 * PAGE * (MOST_VALUE + 1024)


class Registered(NamedTuple):
    """One key of the registry."""

    hostname: str
    id: str
    url: Optional[str]  # of the agent; None where the value is none of an agent
    problem: Optional[str]  # why it is none
    value: Mapping[str, Any]

    @property
    def name(self) -> str:
        """What the slot is called among those of all nodes."""
        return f"{self.hostname}:{self.id}"

    @property
    def identity(self) -> Identity:
        """Of the agent that has registered it."""
        agent = self.value.get("agent")
        return Identity.of(agent.get("id") if isinstance(agent, dict) else None, self.hostname)


class Registry:
    """The etcd servers of one cluster: the first that answers is asked.  Raises HookError."""

    def __init__(self, urls: Sequence[str], access: Access) -> None:
        self._peers = [Peer(url, access) for url in urls]
        self._access = access
        self._token: Optional[str] = None
        self._lock = threading.Lock()

    def slots(self) -> list[Registered]:
        """Every slot that is registered now, all of one revision."""
        end = PREFIX[:-1].encode() + b"0"  # "0" comes after "/"
        return [_registered(key, value) for key, value in self._rows(PREFIX.encode(), end)]

    def slot(self, hostname: str, id: str) -> Optional[Registered]:
        """One of them; None where it is not registered now."""
        wanted = f"{PREFIX}{hostname}/{id}".encode("utf-8", "surrogateescape")
        rows = self._rows(wanted, wanted + b"\0")
        return next((_registered(key, value) for key, value in rows), None)

    def _rows(self, first: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        revision, count = 0, 0
        while True:
            asked = {
                "key": _base64(first),
                "range_end": _base64(end),
                "limit": PAGE,
                **({"revision": revision} if revision else {}),
            }
            found = self._ask("/v3/kv/range", asked)
            rows = found.get("kvs", [])
            try:
                revision = int(found["header"]["revision"])
                pairs = [
                    (base64.b64decode(row["key"]), base64.b64decode(row.get("value", "")))
                    for row in rows
                ]
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise self._garbled(f"{type(error).__name__}: {error}") from error
            yield from pairs
            count += len(pairs)
            if not found.get("more") or not pairs:
                return
            if count > MOST_SLOTS or pairs[-1][0] < first:
                raise self._garbled(f"more than {MOST_SLOTS} keys, or keys in no order")
            first = pairs[-1][0] + b"\0"

    def _ask(self, path: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        """The answer of the first server that has one.  Raises Unreachable."""
        failures: list[str] = []
        for peer in list(self._peers):
            try:
                found = self._of_peer(peer, path, asked)
            except Unreachable as error:
                failures.append(str(error))
                continue
            with self._lock:  # the next time this one first
                self._peers.sort(key=lambda each: each is not peer)
            return found
        raise Unreachable("the registry cannot be read: " + "; ".join(failures))

    def _of_peer(self, peer: Peer, path: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        if self._access.user and self._token is None:
            self._token = self._authenticated(peer)
        answer = self._posted(peer, path, asked)
        if answer.status == 401 and self._access.user:  # the token has run out
            self._token = self._authenticated(peer)
            answer = self._posted(peer, path, asked)
        return _good(peer, answer)

    def _authenticated(self, peer: Peer) -> str:
        asked = {"name": self._access.user, "password": self._access.password or ""}
        self._token = None
        answer = self._posted(peer, "/v3/auth/authenticate", asked)
        _raise_if_named(peer, answer)
        if answer.status in (400, 401, 403):
            raise HookError(
                f"{peer.url} does not let user {self._access.user!r} in; check {ETCD_USER} and "
                f"{ETCD_PASSWORD}"
            )
        token = _good(peer, answer).get("token")
        if not isinstance(token, str):
            raise peer.unreachable("it has given no token")
        return token

    def _posted(self, peer: Peer, path: str, asked: Mapping[str, Any]) -> Answer:
        headers = {"Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = self._token
        return peer.ask(path, TIMEOUT, _ANSWER_BYTES, headers, json.dumps(asked).encode())

    def _garbled(self, why: str) -> Unreachable:
        return self._peers[0].unreachable(f"the answer is not etcd's: {why}")


def _raise_if_named(peer: Peer, answer: Answer) -> None:
    if answer.status == 400 and is_about_common_name(answer.body):
        raise HookError(f"{peer.url} does not let its registry be read: {ANONYMOUS}")


def _good(peer: Peer, answer: Answer) -> dict[str, Any]:
    _raise_if_named(peer, answer)
    try:
        found = json.loads(answer.body)
    except (ValueError, RecursionError) as error:
        raise peer.unreachable(f"status {answer.status}, and no JSON: is it etcd 3.4?") from error
    if answer.status in (400, 401, 403):
        said = str(found.get("error") if isinstance(found, dict) else "")[:200]
        raise HookError(
            f"{peer.url} does not let its registry be read ({said}); set {ETCD_USER} and "
            f"{ETCD_PASSWORD} to a user who may read {PREFIX}"
        )
    if answer.status != 200 or not isinstance(found, dict):
        raise peer.unreachable(f"status {answer.status}")
    return found


def _registered(key: bytes, data: bytes) -> Registered:
    """What a key and its value say; of another's the problem."""
    path = key.decode("utf-8", "replace").removeprefix(PREFIX)
    hostname, _, id = path.partition("/")
    if not is_name(hostname) or not is_name(id):
        shown = path.replace("/", "_")[:100] or "_"
        return Registered("?", shown, None, "its key is none of an agent", {})
    try:
        if len(data) > MOST_VALUE:
            raise ValueError(f"{len(data)} bytes")
        value = json.loads(data)
        if value["schema"] != SCHEMA_NAME or value["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema {value['schema']!r:.40}")
        url = value["agent"]["url"]
        if not isinstance(url, str) or value["hostname"] != hostname or value["id"] != id:
            raise ValueError("it names another slot, or no agent")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return Registered(hostname, id, None, f"what is registered is no agent's: {error!r}", {})
    return Registered(hostname, id, url, None, value)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
