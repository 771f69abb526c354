"""Which leases are begun anew, whatever fails beside them; etcd's part is played."""

from __future__ import annotations

from typing import Any

import pytest
from agent_process import eventually

from sglang_weight_hook.fleet import registration as module
from sglang_weight_hook.fleet.entry import Entry
from sglang_weight_hook.fleet.etcd import Etcd, EtcdError, Value
from sglang_weight_hook.fleet.registration import Registration
from sglang_weight_hook.layout import process
from sglang_weight_hook.reader import Slot


class Played(Etcd):
    """Grants and puts everything, but for what a test has refused."""

    def __init__(self) -> None:
        super().__init__(["http://127.0.0.1:9"])
        self.rows: dict[str, tuple[int, int]] = {}  # revision and lease
        self.kept: list[int] = []
        self.revoked: list[int] = []
        self.refused: set[str] = set()
        self._number = 0

    def _next(self) -> int:
        self._number += 1
        return self._number

    def grant(self, seconds: int) -> int:
        return self._next()

    def put_if(self, key: str, value: bytes, lease: int, revision: int) -> int | None:
        if key.rpartition("/")[2] in self.refused:
            raise EtcdError("etcd answers 500: no space")
        self.rows[key] = self._next(), lease
        return self.rows[key][0]

    def keep_alive(self, lease: int) -> int:
        self.kept.append(lease)
        return 10

    def revoke(self, lease: int) -> None:
        self.revoked.append(lease)
        self.rows = {key: row for key, row in self.rows.items() if row[1] != lease}

    def under(self, prefix: str, keys_only: bool = False) -> tuple[list[Value], int]:
        return [Value(key, b"", row[0], row[1]) for key, row in self.rows.items()], 1


def an_entry(id: str, **state: Any) -> Entry:
    content = {
        "id": id,
        "slot": id,
        "directory": "/maps",
        "owner_alive": True,
        "state": {"state": "ready", "boot_id": process.boot_id(), **state},
        "summary": {},
        "layout": None,
    }
    return Entry(Slot("/maps", id), None, content, b"")


@pytest.fixture
def etcd() -> Played:
    return Played()


def registering(etcd: Etcd, *entries: Entry, ttl: int = 1) -> Registration:
    made = Registration(etcd, "http://a:1", "node", ttl)
    for entry in entries:
        made.told(entry, entry.id)
    return made


def test_a_put_that_fails_lets_no_other_lease_run_out(
    etcd: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PAUSE", 0.05)
    etcd.refused = {"0", "1"}
    made = registering(etcd, an_entry("0"), an_entry("1"), an_entry("2"))
    made.start()
    eventually(lambda: etcd.rows)
    [(_, lease)] = etcd.rows.values()
    eventually(lambda: etcd.kept.count(lease) >= 2, 2.0)
    assert made.figures()["registry_failures_total"] > 0
    assert made.figures()["registered_slots"] == 1
    etcd.refused = set()
    eventually(lambda: len(etcd.rows) == 3, 2.0)
    made.stop()


def test_a_lease_that_was_not_begun_anew_counts_no_longer(etcd: Played) -> None:
    made = registering(etcd, an_entry("0"), ttl=10)
    made._settle()
    assert made.figures()["registered_slots"] == 1
    made._held["0"] = made._held["0"]._replace(kept=made._held["0"].kept - 11)
    assert made.figures()["registered_slots"] == 0


def test_a_slot_that_nobody_could_look_at_is_withdrawn(etcd: Played) -> None:
    made = registering(etcd, an_entry("0"), an_entry("1"))
    made._settle()
    asked: list[float] = []
    made.not_looked_at = lambda seconds: asked.append(seconds) or {"1"}  # type: ignore[func-returns-value]
    made._settle()
    assert [key[-1] for key in etcd.rows] == ["0"]
    assert asked == [1]
    made.not_looked_at = lambda seconds: ()
    made._settle()
    assert len(etcd.rows) == 2


def test_a_slot_of_another_machine_is_left_to_that_ones_agent_and_said_once(
    etcd: Played, caplog: pytest.LogCaptureFixture
) -> None:
    made = registering(etcd, an_entry("0"), an_entry("1", boot_id="another"))
    made._settle()
    made._settle()
    assert [key[-1] for key in etcd.rows] == ["0"]
    [record] = caplog.records
    assert "slot 1 is of a server on another machine" in record.getMessage()
