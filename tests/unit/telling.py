"""A subscriber that notes what it is told, and can be made to fail."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from sglang_weight_hook.publisher.subscribers import Diff, Event


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
