"""The runner of every test of faults: its methods are wrapped, and nothing is loaded yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from faulty_runner import ModelRunner


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> ModelRunner:
    from faulty_runner import freshly_patched  # imports torch, or skips the test

    return freshly_patched(monkeypatch)
