"""What the tests of the command share: a published slot to ask it about.

What needs torch is imported by the fixtures, so that a test is skipped where there is none.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_sglang import FakeRunner

from sglang_weight_hook.layout import files


@pytest.fixture
def runner() -> FakeRunner:
    """A runner of the small model with everything that makes a map hard."""
    from small_model import a_runner

    return a_runner()


@pytest.fixture
def layout(runner: FakeRunner, maps: Path) -> Any:
    return json.loads((maps / files.LAYOUT.format(0)).read_bytes())
