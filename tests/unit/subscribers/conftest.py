"""Subscribers for tests: one that notes what it is told, and can be made to fail."""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parents[1]
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

from sglang_weight_hook.publisher import settings, subscription  # noqa: E402
from sglang_weight_hook.publisher.subscribers import Diff, Event  # noqa: E402


class Told:
    """Notes each call; ``does`` is what else happens in a call, by the method's name."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, Any]] = []
        self.diffs: list[Diff] = []
        self.documents: list[Any] = []
        self.threads: set[str] = set()
        self.does: dict[str, Callable[[], Any]] = {}

    def _note(self, method: str, slot: str, what: Any) -> None:
        self.threads.add(threading.current_thread().name)
        self.calls.append((method, slot, what))
        self.does.get(method, lambda: None)()

    def before(self, slot: str, event: Event) -> None:
        self._note("before", slot, event)

    def after(self, slot: str, document: Any, diff: Diff) -> None:
        self.diffs.append(diff)
        self.documents.append(document)
        self._note("after", slot, document["event"]["kind"])

    def gone(self, slot: str) -> None:
        self._note("gone", slot, None)

    def methods(self) -> list[tuple[str, str]]:
        return [call[:2] for call in self.calls]


class Subscribe:
    """Names subscribers to the hook before its first slot, as the environment would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def to(self, *names: str, timeout: float = 5.0) -> None:
        self._monkeypatch.setenv("SGLANG_WEIGHT_HOOK_SUBSCRIBERS", ",".join(names))
        self._monkeypatch.setenv("SGLANG_WEIGHT_HOOK_SUBSCRIBER_TIMEOUT", str(timeout))
        settings._settings = None

    def a_module(self, name: str, factory: Callable[[], Any]) -> None:
        module = types.ModuleType(name)
        module.make = factory  # type: ignore[attr-defined]
        self._monkeypatch.setitem(sys.modules, name, module)

    def told(self, timeout: float = 5.0) -> Told:
        """One that is subscribed and notes what it is told."""
        made = Told()
        self.a_module("a_subscriber", lambda: made)
        self.to("a_subscriber:make", timeout=timeout)
        return made


@pytest.fixture
def subscribe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Subscribe]:
    yield Subscribe(monkeypatch)
    subscription.current, subscription._forked = None, False


@pytest.fixture
def told(subscribe: Subscribe) -> Told:
    return subscribe.told()
