"""What a reader asks one node agent, and what of its answers it believes.

An answer is JSON from another machine: bounded in size, checked for its schema, and every name in
it as the name of a file is.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Optional
from urllib.parse import quote, urlencode

from ..layout.documents import SCHEMA, STATE_SCHEMA
from ..reader import HookError, Unreachable
from ..reader.files import MAX_DOCUMENT_BYTES, check_schema, file_name
from .access import TOKEN, Access, TokenInClear
from .identity import Identity, Speaker
from .wire import Answer, Peer, Stop

SCHEMA_NAME, SCHEMA_VERSION = "sglang-weight-agent", 1

# Seconds for which what a listing said of a slot is taken for what is so now.
FRESH = 1.0
LISTING_TIMEOUT = 10.0
# Of an agent that did not answer the last time: it is not to keep the others waiting, but for one
# attempt in so many seconds, for it may be slow and not gone.
SECOND_TIMEOUT = 1.0
PATIENT_AGAIN = 15.0
REQUEST_TIMEOUT = 10.0
LOOKUP_TIMEOUT = 30.0  # the agent may have to read every layout

MOST_SLOTS = 10_000
_LISTING_BYTES = 64 * 1024**2
_ENTRY_BYTES = 1024**2
_STATE_BYTES = 64 * 1024
_ANSWER_BYTES = 64 * 1024**2
_MOST_EVENTS = 10_000  # as many as an agent hands out; the last ones
_CACHE_BYTES = 64 * 1024**2  # of layouts, of all agents together

_ETAG = re.compile(r'(W/)?"[\x21\x23-\x7e]*"\Z')


class Listing(NamedTuple):
    """Every slot of an agent by its id, as the agent described it at one moment."""

    at: float  # time.monotonic() when it was complete
    hostname: Optional[str]
    entries: Mapping[str, Mapping[str, Any]]
    problems: tuple[str, ...]  # of directories that the agent cannot read
    identity: Identity


class _Layouts:
    """Layouts as they came, by agent and slot, as many as have room; for `If-None-Match`."""

    def __init__(self) -> None:
        self._found: OrderedDict[tuple[str, str], tuple[str, bytes]] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def get(self, key: tuple[str, str]) -> Optional[tuple[str, bytes]]:
        with self._lock:
            found = self._found.get(key)
            if found is not None:
                self._found.move_to_end(key)
            return found

    def put(self, key: tuple[str, str], etag: str, data: bytes) -> None:
        with self._lock:
            before = self._found.pop(key, None)
            self._size += len(data) - (len(before[1]) if before else 0)
            self._found[key] = etag, data
            while self._size > _CACHE_BYTES and self._found:
                _, (_, dropped) = self._found.popitem(last=False)
                self._size -= len(dropped)


_layouts = _Layouts()


class RemoteAgent:
    """One agent.  Safe in several threads.  Every method raises HookError, mostly `Unreachable`."""

    def __init__(self, url: str, access: Access, is_named_by_registry: bool = False) -> None:
        """``is_named_by_registry``: nobody has typed the URL, so the token goes to it by TLS only.

        Whoever can write into the registry could have it sent to himself.
        """
        self._peer = peer = Peer(url, access)
        self.is_named_by_registry = is_named_by_registry
        self.identity: Optional[Identity] = None  # as it was told last; None: not asked yet
        self.url = peer.url
        self._token = access.token
        self._is_withheld = False
        if access.token and not peer.is_encrypted and not peer.is_loopback:
            if is_named_by_registry:
                self._token, self._is_withheld = None, True
            else:
                warnings.warn(
                    f"the token is sent to {self.url} without TLS, where everybody on the way can "
                    f"read it; serve over https",
                    TokenInClear,
                    stacklevel=2,
                )
        self._listing: Optional[Listing] = None
        self._down: Optional[tuple[float, Unreachable]] = None
        self._patient_at = 0.0  # when its whole time was last waited for

    # -- slots

    def listing(self, max_age: float = 0.0) -> Listing:
        """Every slot; the last listing where that is no older than ``max_age`` seconds."""
        known = self._listing
        if known is not None and time.monotonic() - known.at <= max_age:
            return known
        timeout = LISTING_TIMEOUT
        if self._down is not None and time.monotonic() - self._patient_at < PATIENT_AGAIN:
            timeout = SECOND_TIMEOUT
        else:
            self._patient_at = time.monotonic()
        try:
            found = self._json("/slots", timeout, _LISTING_BYTES)
            self._listing = listing = self._checked(found)
            self.identity = listing.identity
        except Unreachable as error:
            self._down = time.monotonic(), error
            raise
        self._down = None
        return listing

    def entry(
        self, id: str, max_age: float = FRESH, speaker: Optional[Speaker] = None
    ) -> Optional[Mapping[str, Any]]:
        """What the agent says of one slot; None where it has no such slot."""
        known = self._listing
        if known is not None and time.monotonic() - known.at <= max_age:
            if speaker is not None:
                speaker.check(known.identity)
            return known.entries.get(id)
        path = self._of(id)
        found = self._json(path, REQUEST_TIMEOUT, _ENTRY_BYTES, True, speaker)
        return None if found is None else self.checked_entry(found)

    def state(
        self, id: str, speaker: Optional[Speaker] = None
    ) -> Optional[tuple[dict[str, Any], int]]:
        """The state document as it is now, and its size as published."""
        path = self._of(id, "/state")
        answer = self._ask(path, REQUEST_TIMEOUT, _STATE_BYTES, speaker=speaker)
        if answer.status == 404:
            return None
        state = self._object(self._good(answer))
        check_schema(state, STATE_SCHEMA, self._of_slot(id, "the state document"))
        return state, len(answer.body)

    def layout(self, id: str, speaker: Optional[Speaker] = None) -> Optional[dict[str, Any]]:
        """The layout document as it is now; fetched only where it has changed."""
        key = self.url, id
        known = _layouts.get(key)
        headers = {"If-None-Match": known[0]} if known else {}
        path = self._of(id, "/layout")
        answer = self._ask(path, REQUEST_TIMEOUT, MAX_DOCUMENT_BYTES, headers, speaker)
        if answer.status == 404:
            return None
        if answer.status == 304 and known:
            data = known[1]
        else:
            data = self._good(answer).body
            etag = answer.headers.get("etag", "")
            if _ETAG.match(etag):
                _layouts.put(key, etag, data)
        layout = self._object(answer._replace(body=data))
        check_schema(layout, SCHEMA, self._of_slot(id, "the layout"))
        return layout

    def transport(self, id: str, speaker: Optional[Speaker] = None) -> Optional[dict[str, Any]]:
        """What transfer engines have registered, unchecked; None where none runs."""
        path = self._of(id, "/transport")
        found = self._json(path, REQUEST_TIMEOUT, _ENTRY_BYTES, True, speaker)
        return None if found is None else dict(found)

    def history(
        self,
        id: str,
        since: Optional[float],
        kind: Optional[str],
        speaker: Optional[Speaker] = None,
    ) -> list[Any]:
        """The events of a slot's log, unchecked."""
        asked = {"since": since, "kind": kind, "limit": _MOST_EVENTS}
        query = urlencode({name: value for name, value in asked.items() if value is not None})
        path = self._of(id, f"/history?{query}")
        found = self._json(path, REQUEST_TIMEOUT, _ANSWER_BYTES, True, speaker)
        if found is None:
            raise HookError(f"{self._of_slot(id, 'no event')} was logged; check the slot's name")
        events = found.get("events")
        if not isinstance(events, list):
            raise self.garbled("the history has no events")
        return events

    def ids_at(self, address: int, speaker: Optional[Speaker] = None) -> dict[str, Optional[str]]:
        """The slots that have something at an address; with a problem, where that is unknown."""
        path = f"/lookup/{address:#x}"
        found = self._json(path, LOOKUP_TIMEOUT, _ANSWER_BYTES, speaker=speaker)
        ids: dict[str, Optional[str]] = {}
        for one in _objects(found, "addresses"):
            ids.update(
                (hit["id"], None) for hit in _objects(one, "slots") if is_name(hit.get("id"))
            )
        for one in _objects(found, "problems"):
            if is_name(one.get("id")):
                ids[one["id"]] = str(one.get("problem"))[:500]
        return ids

    @contextlib.contextmanager
    def events(
        self,
        silence: float,
        until: Optional[float],
        stop: Stop,
        last_id: Optional[str] = None,
        id: Optional[str] = None,
    ) -> Iterator[Iterator[bytes]]:
        """The lines of the stream of changes, of one slot or of all, until that time at most."""
        path = "/events" + (f"?slot={quote(id, safe='')}" if id is not None else "")
        headers = {"Accept": "text/event-stream", **self._authorization()}
        if last_id is not None:
            headers["Last-Event-ID"] = last_id
        with self._peer.stream(path, REQUEST_TIMEOUT, silence, headers, until, stop) as told:
            status, lines = told
            self._good(Answer(status, {}, b""))
            yield lines

    # -- requests

    def _json(
        self,
        path: str,
        timeout: float,
        limit: int,
        may_miss: bool = False,
        speaker: Optional[Speaker] = None,
    ) -> Any:
        answer = self._ask(path, timeout, limit, speaker=speaker)
        if may_miss and answer.status == 404:
            return None
        return self._object(self._good(answer))

    def _ask(
        self,
        path: str,
        timeout: float,
        limit: int,
        headers: Optional[Mapping[str, str]] = None,
        speaker: Optional[Speaker] = None,
    ) -> Answer:
        """``speaker``: who is to answer; another one is not believed, nor that it knows nothing."""
        down = self._down
        if down is not None and path != "/slots" and time.monotonic() - down[0] <= FRESH:
            raise down[1]
        try:
            answer = self._peer.ask(
                path, timeout, limit, {**self._authorization(), **(headers or {})}
            )
        except Unreachable as error:
            self._down = time.monotonic(), error
            raise
        if speaker is not None and answer.status in (200, 206, 304, 404):
            speaker.check(Identity.in_headers(answer.headers))
        return answer

    def _authorization(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._token}"} if self._token else {}

    def _good(self, answer: Answer) -> Answer:
        """Raises Unreachable, which says what the status means."""
        status = answer.status
        if status in (200, 206):
            return answer
        if status == 401:
            raise Unreachable(self._unauthorized())
        if 300 <= status < 400:
            raise Unreachable(
                f"{self.url} sends its readers elsewhere ({status}), which is not followed: the "
                f"token could go astray; give the agent's own address"
            )
        said = ""
        with contextlib.suppress(ValueError, RecursionError, AttributeError):
            said = str(json.loads(answer.body[:_STATE_BYTES]).get("error") or "")[:200]
        raise Unreachable(
            f"{self.url} answers {status}{f' ({said})' if said else ''}, so nothing is known of "
            f"what it has; ask again, and look at its log"
        )

    def _unauthorized(self) -> str:
        if self._is_withheld:
            return (
                f"{self.url} wants a token, which is not sent without TLS to an address that only "
                f"the registry names; serve over https, or name the agent itself in --dir"
            )
        if self._token:
            return f"{self.url} does not take this token; check {TOKEN} or {TOKEN}_FILE"
        return f"{self.url} wants a token; set {TOKEN}, or {TOKEN}_FILE to a file that holds it"

    def _object(self, answer: Answer) -> dict[str, Any]:
        try:
            found = json.loads(answer.body)
        except (ValueError, RecursionError) as error:
            raise self.garbled(f"it is not JSON ({str(error)[:80]})") from error
        if not isinstance(found, dict):
            raise self.garbled("it is no JSON object")
        return found

    # -- what is believed

    def _checked(self, found: Mapping[str, Any]) -> Listing:
        if found.get("schema") != SCHEMA_NAME:
            raise self.garbled(f"it is no {SCHEMA_NAME} document")
        version = found.get("schema_version")
        if version != SCHEMA_VERSION:
            raise Unreachable(
                f"{self.url} answers in schema version {version!r:.20}, this reader knows "
                f"{SCHEMA_VERSION}; install the hook's newer release where you read"
            )
        slots = found.get("slots")
        if not isinstance(slots, list) or len(slots) > MOST_SLOTS:
            raise self.garbled(f"it has no list of slots, {MOST_SLOTS} at most")
        entries: dict[str, Mapping[str, Any]] = {}
        for slot in slots:
            entry = self.checked_entry(slot)
            if entry["id"] in entries:
                raise self.garbled(f"slot {entry['id']!r} is in it twice")
            entries[entry["id"]] = entry
        problems = []
        directories = found.get("directories")
        for one in directories if isinstance(directories, list) else []:
            if isinstance(one, dict) and isinstance(one.get("problem"), str):
                problems.append(f"{self.url}: {one['problem'][:500]}")
        hostname = found.get("hostname")
        return Listing(
            time.monotonic(),
            hostname if isinstance(hostname, str) else None,
            entries,
            tuple(problems),
            Identity.told(found.get("agent")),
        )

    def checked_entry(self, found: Any) -> Mapping[str, Any]:
        if not isinstance(found, dict) or not is_name(found.get("id")):
            raise self.garbled("a slot in it has no valid id")
        kinds = (
            ("owner_alive", bool),
            ("certain", bool),
            ("why", str),
            ("problem", (str, type(None))),
            ("state", (dict, type(None))),
            ("summary", (dict, type(None))),
            ("checked_at", (int, float, type(None))),
        )
        for field, kind in kinds:
            if not isinstance(found.get(field), kind):
                raise self.garbled(f"slot {found['id']!r} has no valid {field!r}")
        return found

    def garbled(self, why: str) -> Unreachable:
        return self._peer.unreachable(f"the answer is not an agent's: {why}")

    def _of(self, id: str, rest: str = "") -> str:
        return f"/slots/{quote(id, safe='')}{rest}"

    def _of_slot(self, id: str, what: str) -> str:
        return f"{what} of slot {id} at {self.url}"


def is_name(value: Any) -> bool:
    """Whether a slot can be called so: as a file can that holds it.

    >>> is_name("0_draft"), is_name("../0"), is_name(""), is_name(0)
    (True, False, False, False)
    """
    if not isinstance(value, str) or not 0 < len(value) <= 255 or value in (".", ".."):
        return False
    try:
        return "/" not in file_name(value)
    except HookError:
        return False


def _objects(found: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The objects in a list of an answer; none where it is no list."""
    inner = found.get(name)
    return [one for one in inner if isinstance(one, dict)] if isinstance(inner, list) else []


class NoAgent(RemoteAgent):
    """Stands for the agent of a registration that names none: whatever is asked fails."""

    def __init__(self, where: str, why: str) -> None:
        super().__init__("http://127.0.0.1:1", Access(), True)
        self.url = where
        self._why = why

    def _ask(
        self,
        path: str,
        timeout: float,
        limit: int,
        headers: Optional[Mapping[str, str]] = None,
        speaker: Optional[Speaker] = None,
    ) -> Answer:
        raise HookError(self._why)
