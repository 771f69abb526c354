"""What the tests of the reader share: a small model that the real recorder has published."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_sglang import FakeRunner

from sglang_weight_hook.reader import Document, open_slot


@pytest.fixture
def runner() -> FakeRunner:
    """A runner of the small model with everything that makes a map hard."""
    from small_model import a_runner  # imports torch, or skips the test where there is none

    return a_runner()


@pytest.fixture
def document(runner: FakeRunner, maps: Path) -> Document:
    return open_slot(str(maps), "0").read()
