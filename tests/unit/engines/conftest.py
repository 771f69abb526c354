"""Engines in this process, and what a reader of another process would see."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

for folder in (
    Path(__file__).resolve().parents[1],
    Path(__file__).resolve().parents[1] / "subscribers",
):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from sglang_weight_hook.layout import files  # noqa: E402
from sglang_weight_hook.publisher import engines, settings, subscription  # noqa: E402
from sglang_weight_hook.publisher.engines import registration  # noqa: E402

Span = registration.Span


class FakeEngine:
    """Notes what it is asked to do; what is registered is a set."""

    def __init__(self, *, survives: bool = True, fence: bool = True) -> None:
        self.name = "mooncake"
        self.survives = {"DRAM": survives, "VRAM": False}
        self.deregistering_is_fence = fence
        self.calls: list[tuple[str, Any]] = []
        self.registered: set[Span] = set()
        self.is_open = False
        self.opened = 0
        self.fails: dict[str, str] = {}

    def _may_fail(self, what: str) -> None:
        if what in self.fails:
            raise registration.EngineFailed(self.fails[what])

    def open(self) -> None:
        self._may_fail("open")
        if not self.is_open:
            self.is_open = True
            self.opened += 1

    def exchange(self, old: list[Span], new: list[Span]) -> None:
        self._may_fail("exchange")
        assert self.is_open
        assert set(old) <= self.registered
        self.calls.append(("exchange", (sorted(old), sorted(new))))
        self.registered -= set(old)
        self.registered |= set(new)

    def close(self) -> None:
        self.calls.append(("close", None))
        self.registered.clear()
        self.is_open = False

    def fields(self) -> dict[str, Any]:
        return {"session": f"here:{self.opened}", "protocol": "tcp"} if self.is_open else {}

    def facts(self) -> dict[str, Any]:
        return {"rdma": False, "cuda": False, "devices": [], "peer_memory": False}


@pytest.fixture
def subscribed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FakeEngine]]:
    """Have the hook use a fake engine under the name ``mooncake``."""

    def make(**more: bool) -> FakeEngine:
        fake = FakeEngine(**more)
        monkeypatch.setattr(engines, "make", lambda name: registration.Registration(fake))
        monkeypatch.setenv("SGLANG_WEIGHT_HOOK_SUBSCRIBERS", "mooncake")
        monkeypatch.setenv("SGLANG_WEIGHT_HOOK_SUBSCRIBER_TIMEOUT", "20")
        settings._settings = None
        return fake

    yield make
    subscription.current, subscription._forked = None, False


@pytest.fixture
def engine(subscribed: Callable[..., FakeEngine]) -> FakeEngine:
    return subscribed()


@pytest.fixture
def transport(maps: Path) -> Callable[..., Any]:
    def read(slot: str = "0", name: str = "mooncake") -> Any:
        document = json.loads((maps / files.TRANSPORT.format(slot)).read_bytes())
        return document["engines"][name]

    return read
