"""What one slot's files say now, and a small model to publish: for the tests of the recorder."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglang_weight_hook.layout import files, header


def a_model() -> Any:
    torch = pytest.importorskip("torch")
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))


def read(maps: Path, name: str, slot: str = "0") -> Any:
    return json.loads((maps / name.format(slot)).read_bytes())


def state_of(maps: Path, slot: str = "0") -> Any:
    return read(maps, files.STATE, slot)


def layout_of(maps: Path, slot: str = "0") -> Any:
    return read(maps, files.LAYOUT, slot)


def generations(maps: Path, slot: str = "0") -> tuple[int, int]:
    state = state_of(maps, slot)
    return state["layout_generation"], state["content_generation"]


def lock_is_free(maps: Path, slot: str = "0") -> bool:
    """Whether a reader could take the shared lock now."""
    with open(maps / files.SAVING_LOCK.format(slot), "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def layout_file(maps: Path) -> int:
    return os.stat(maps / "weight_layout_0.json").st_ino


def inodes(maps: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in maps.iterdir()}


def header_of(maps: Path, slot: str = "0") -> header.Header:
    deadline = time.monotonic() + 10.0
    while time.monotonic() < deadline:
        found = header.unpack((maps / files.HEADER.format(slot)).read_bytes())
        if found is not None:
            return found
        time.sleep(0.001)
    raise AssertionError("the header is being written for ever")


def eventually(holds: Callable[[], Any], seconds: float = 10.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (answer := holds()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return answer


def log_of(maps: Path, slot: str = "0") -> list[dict[str, Any]]:
    lines = (maps / files.EVENTS.format(slot)).read_text().splitlines()
    return [json.loads(line) for line in lines]
