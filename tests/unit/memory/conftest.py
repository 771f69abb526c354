"""What the tests of the bytes share: processes that publish weights and tell their bytes."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from bytes_owner import BytesOwner, started


@pytest.fixture
def start_owner(
    start_python: Callable[..., subprocess.Popen[str]], maps: Path
) -> Callable[..., BytesOwner]:
    """Start an owner; ``kind``: ``odd`` (every dtype and stride) or ``even`` (one value each)."""

    def start(kind: str = "odd", directory: Path = maps, **environment: str) -> BytesOwner:
        return started(start_python, directory, kind, **environment)

    return start


@pytest.fixture
def owner(start_owner: Callable[..., BytesOwner]) -> BytesOwner:
    return start_owner()
