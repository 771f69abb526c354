"""What the tests of the reader share: a small model that the real recorder has published."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_sglang import FakeRunner
from owner_process import OWNER, Owner

from sglang_weight_hook.reader import Document, open_slot


@pytest.fixture
def runner() -> FakeRunner:
    """A runner of the small model with everything that makes a map hard."""
    from small_model import a_runner  # imports torch, or skips the test where there is none

    return a_runner()


@pytest.fixture
def document(runner: FakeRunner, maps: Path) -> Document:
    return open_slot(str(maps), "0").read()


@pytest.fixture
def start_owner(
    start_python: Callable[..., subprocess.Popen[str]], maps: Path
) -> Callable[..., Owner]:
    """Start a process that publishes, and checks when it is asked."""

    def start(directory: Path = maps, **environment: str) -> Owner:
        settings = {
            "SGLANG_WEIGHT_HOOK_CHECK_SECONDS": "10000",
            "SGLANG_WEIGHT_HOOK_DIR": str(directory),
            **environment,
        }
        return Owner(start_python(OWNER, **settings), directory)

    return start


@pytest.fixture
def owner(start_owner: Callable[..., Owner]) -> Owner:
    return start_owner()
