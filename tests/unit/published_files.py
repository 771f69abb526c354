"""What one slot's files say now, and a small model to publish: for the tests of the recorder."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest

from sglang_weight_hook.layout import files


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
