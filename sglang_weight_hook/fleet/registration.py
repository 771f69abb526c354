"""Live slots in etcd, each under a lease of its own.

What is registered is true or about to go: the lease ends with the agent, the agent ends the lease
with the slot's owner, and a key that another agent has is left alone (compare and put), so that two
agents never both speak for a slot.  etcd may be away for as long as it likes; the agent goes on.
"""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple, Optional

from ..layout import process
from .entry import Entry
from .etcd import PREFIX, Etcd, EtcdError, EtcdUnreachable, LeaseGone
from .identity import Identity

SCHEMA, SCHEMA_VERSION = "sglang-weight-slot", 1
TTL = 10  # seconds; etcd itself grants no less than a few
MAX_VALUE = 4096  # bytes

_IDENTITY = (
    *("model_path", "model_class", "quantization", "role", "draft_index", "device", "gpu_id"),
    *("gpu_uuid", "pci_bus_id", "tp_rank", "tp_size", "pp_rank", "pp_size", "dp_rank", "dp_size"),
    *("ep_rank", "ep_size", "node_rank", "sglang_version", "hook_version"),
)
_STATE = ("state", "layout_generation", "content_generation", "physical_epoch", "updated_at")
_LONGEST = 300  # characters of one text
_PAUSE = 0.5  # seconds after a failure
_LAST_WORDS = 3.0  # seconds for what is withdrawn when the agent ends

_log = logging.getLogger(__name__)


class _Held(NamedTuple):
    """A slot's lease, and what was put under it."""

    lease: int
    revision: int  # 0: nothing yet
    value: bytes
    kept: float  # when it was granted or begun anew


class Registration:
    """Keeps etcd told, in a thread of its own."""

    def __init__(self, etcd: Etcd, url: str, node: Optional[str] = None, ttl: int = TTL) -> None:
        """``url``: where readers find this agent.  ``node``: under which name (host name)."""
        self.agent = {"url": url, "id": secrets.token_hex(8)}
        self.node = node or socket.gethostname()
        self.identity = Identity(self.agent["id"], self.node)
        self._etcd = etcd
        self._ttl = ttl
        self._lock = threading.Lock()
        self._seen: dict[str, Entry] = {}  # by id
        self._held: dict[str, _Held] = {}
        self._contested: dict[str, float] = {}  # when to look again
        self._kept_at = float("-inf")
        self._failures = 0
        self._failed: Optional[EtcdError] = None  # of one slot, while the others went on
        self._elsewhere: set[str] = set()  # slots of another machine, which were said
        # Slots of which nothing is known for so many seconds: `Views.not_looked_at`.
        self.not_looked_at: Callable[[float], Collection[str]] = lambda seconds: ()
        self._boot_id = process.boot_id()
        self._said: Optional[str] = None
        self._wake = threading.Event()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="registration", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Withdraw everything, if etcd answers."""
        self._stopped = True
        self._wake.set()
        self._thread.join(_LAST_WORDS)

    def told(self, entry: Optional[Entry], id: str) -> None:
        """A slot is new, another one, or (None) gone; called in any thread."""
        with self._lock:
            if entry is None:
                self._seen.pop(id, None)
            else:
                self._seen[id] = entry
        self._wake.set()

    def figures(self) -> dict[str, float]:
        """For the agent's metrics."""
        since = time.monotonic() - self._ttl
        held = list(self._held.values())
        return {
            "registered_slots": float(sum(one.revision > 0 and one.kept > since for one in held)),
            "registry_failures_total": float(self._failures),
            "registry_contested_slots": float(len(self._contested)),
        }

    def key(self, id: str) -> str:
        return f"{PREFIX}{self.node}/{id}"

    # -- the thread

    def _run(self) -> None:
        while not self._stopped:
            self._wake.clear()
            pause = self._ttl / 3
            try:
                self._failed = None
                # First what is registered already: it is not to run out for what fails then.
                if time.monotonic() >= self._kept_at + self._ttl / 3:
                    self._keep()
                self._settle()
                if self._failed is not None:
                    raise self._failed
                self._said = None
                pause = max(self._kept_at + self._ttl / 3 - time.monotonic(), 0.0)
                if self._contested:
                    pause = min(pause, max(min(self._contested.values()) - time.monotonic(), 0.05))
            except EtcdError as error:
                self._say(str(error))
                self._failures += 1
                pause = _PAUSE
            except Exception:  # a thread that ended would let every lease run out
                _log.exception("slots cannot be registered")
                pause = _PAUSE
            self._wake.wait(pause)
        self._withdraw_all()

    def _settle(self) -> None:
        """Make etcd say what is true now."""
        with self._lock:
            seen = dict(self._seen)
        unknown = self.not_looked_at(self._ttl)
        live = {
            id: self._value(entry)
            for id, entry in seen.items()
            if _is_live(entry) and id not in unknown and self._is_of_this_machine(id, entry)
        }
        for id in list(self._held.keys() - live.keys()):
            with self._apart():
                self._etcd.revoke(self._held[id].lease)  # and its key with it
                del self._held[id]
        for id in list(self._contested.keys() - live.keys()):
            del self._contested[id]
        for id, value in live.items():
            held = self._held.get(id)
            if held is None or held.value != value:
                with self._apart():
                    self._put(id, value)

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        """What etcd refuses for one slot keeps no other from its turn."""
        try:
            yield
        except EtcdUnreachable:
            raise
        except EtcdError as error:
            self._failed = self._failed or error

    def _is_of_this_machine(self, id: str, entry: Entry) -> bool:
        """Whether its owner runs here: in a shared directory each machine's agent has its own."""
        boot_id = entry.content["state"].get("boot_id")
        if boot_id is None or self._boot_id is None or boot_id == self._boot_id:
            return True
        if id not in self._elsewhere:
            self._elsewhere.add(id)
            _log.warning(
                "slot %s is of a server on another machine (or before this one was started anew), "
                "and is not registered here",
                id,
            )
        return False

    def _put(self, id: str, value: bytes) -> None:
        if self._contested.get(id, 0.0) > time.monotonic():
            return
        held = self._held.get(id)
        if held is None:
            granted_at = time.monotonic()
            held = self._held[id] = _Held(self._etcd.grant(self._ttl), 0, b"", granted_at)
        try:
            done = self._etcd.put_if(self.key(id), value, held.lease, held.revision)
            if done is None:
                done = self._put_again(id, value, held)
        except LeaseGone:
            del self._held[id]
            self._wake.set()  # at once again, with another lease
            return
        if done is None:
            self._held.pop(id, None)
            self._etcd.revoke(held.lease)
            return
        self._contested.pop(id, None)
        self._held[id] = held._replace(revision=done, value=value)

    def _put_again(self, id: str, value: bytes, held: _Held) -> Optional[int]:
        """The key is another one than was thought; its new revision, None if it is not ours."""
        found = self._etcd.get(self.key(id))
        if found is None:
            return self._etcd.put_if(self.key(id), value, held.lease, 0)
        if _agent_of(found.value) == self.agent["id"]:  # put by us, and the answer was lost
            return self._etcd.put_if(self.key(id), value, held.lease, found.revision)
        if id not in self._contested:
            _log.warning(
                "slot %s is registered by another agent as %s, perhaps this agent's last run; "
                "waiting until that one's lease ends (two on purpose? give each agent a --node of "
                "its own)",
                id,
                self.key(id),
            )
        self._contested[id] = time.monotonic() + self._ttl / 4
        return None

    def _keep(self) -> None:
        """Begin every lease anew, and see that its key is still there."""
        kept_at = time.monotonic()
        for id, held in list(self._held.items()):
            try:
                self._etcd.keep_alive(held.lease)
                self._held[id] = held._replace(kept=kept_at)
            except LeaseGone:
                del self._held[id]
                self._wake.set()
            except EtcdUnreachable:
                raise
            except EtcdError as error:
                self._failed = error
        self._kept_at = kept_at
        if not self._held:
            return
        with self._apart():
            there = {
                one.key: one.revision
                for one in self._etcd.under(f"{PREFIX}{self.node}/", keys_only=True)[0]
            }
            for id, held in list(self._held.items()):
                if there.get(self.key(id)) != held.revision:
                    self._held[id] = held._replace(value=b"")  # put it again
                    self._wake.set()

    def _withdraw_all(self) -> None:
        with contextlib.suppress(EtcdError):
            for held in self._held.values():
                self._etcd.revoke(held.lease)
            self._held.clear()
        self._etcd.close()

    def _say(self, problem: str) -> None:
        """Once, until it is over."""
        if self._said != problem:
            self._said = problem
            _log.warning("slots cannot be registered now: %s", problem)

    def _value(self, entry: Entry) -> bytes:
        """What is registered, in less than `MAX_VALUE` bytes."""
        content = entry.content
        state: Mapping[str, Any] = content["state"] or {}
        value: dict[str, Any] = {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "hostname": self.node,
            "slot": _short(content["slot"]),
            "id": _short(content["id"]),
            "directory": _short(content["directory"]),
            "instance": _short(state.get("instance")),
            "agent": self.agent,
            "identity": {name: _short(content["summary"].get(name)) for name in _IDENTITY},
            **{name: _short(state.get(name)) for name in _STATE},
            "digest": None if content["layout"] is None else content["layout"]["etag"],
        }
        data = _encoded(value)
        if len(data) >= MAX_VALUE:
            value["identity"] = {}
            data = _encoded(value)
        if len(data) >= MAX_VALUE:
            value["directory"] = None
            data = _encoded(value)
        return data


def _is_live(entry: Entry) -> bool:
    return bool(entry.content["owner_alive"]) and entry.content["state"] is not None


def _short(value: Any) -> Any:
    """A text of a document, cut; nothing that is nested."""
    if isinstance(value, str):
        return value[:_LONGEST]
    return value if isinstance(value, (int, float)) else None


def _encoded(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _agent_of(value: bytes) -> Optional[str]:
    try:
        return str(json.loads(value)["agent"]["id"])
    except (ValueError, KeyError, TypeError):
        return None
