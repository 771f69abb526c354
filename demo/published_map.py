"""The demo's view of what the hook publishes: the one place that calls its reader."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import sglang_weight_hook

SLOT = "0"
DIRECTORY = "weights_metadata"  # the hook's default, below the server's working directory


class PublishedMap:
    """One slot's documents, below the directory in which a server was started."""

    def __init__(self, server_directory: Path) -> None:
        self._slot = sglang_weight_hook.open_slot(str(server_directory / DIRECTORY), SLOT)

    def layout(self) -> dict[str, Any]:
        return self._slot.read().raw

    def state(self) -> dict[str, Any]:
        return self._slot.read_state()

    def settled_layout(self, timeout: float = 30.0) -> dict[str, Any]:
        """The layout once the engine is built: until then drafts may re-bind weights."""
        deadline = time.monotonic() + timeout
        while True:
            layout = self.layout()
            if layout["state"] != "loading":
                return layout
            if time.monotonic() > deadline:
                raise RuntimeError(f"the published state is still loading after {timeout:.0f} s")
            time.sleep(0.1)


class StateHistory:
    """The states that another process sees in the state file while something happens."""

    def __init__(self, published: PublishedMap) -> None:
        self.states: list[str] = []
        self._published = published
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> StateHistory:
        self._look()
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._watcher.join()
        self._look()

    def __str__(self) -> str:
        return " -> ".join(self.states)

    def _watch(self) -> None:
        # The file is under 2 KB and replaced by rename: looking costs microseconds.
        while not self._ended.wait(0.001):
            self._look()

    def _look(self) -> None:
        state = str(self._published.state()["state"])
        if not self.states or self.states[-1] != state:
            self.states.append(state)
