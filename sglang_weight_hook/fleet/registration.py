"""Live slots in etcd, each under a lease of its own."""

from __future__ import annotations

from typing import Optional

from .entry import Entry


class Registration:
    def told(self, entry: Optional[Entry], id: str) -> None: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...
    def figures(self) -> dict[str, float]:
        return {}
