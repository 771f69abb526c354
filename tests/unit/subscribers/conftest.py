"""Subscribers for tests, named to the hook as the environment would."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parents[1]
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

from telling import Told  # noqa: E402

from sglang_weight_hook.publisher import settings, subscription  # noqa: E402


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
