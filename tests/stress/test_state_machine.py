"""Long sequences of events, held against the table of docs/architecture.md.

The same machine as in ``tests/unit/test_state_machine.py``, with more and longer examples.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as examples
from hypothesis.stateful import run_state_machine_as_test

UNIT = Path(__file__).resolve().parents[1] / "unit"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_long_sequences_of_events_are_published_as_the_table_says(
    is_long: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(sys, "path", [str(UNIT), *sys.path])
    machine: Any = importlib.import_module("state_machine").RecorderSequences
    run_state_machine_as_test(
        machine,
        settings=examples(
            max_examples=1000 if is_long else 60,
            stateful_step_count=60 if is_long else 40,
            deadline=None,
            derandomize=not is_long,
            suppress_health_check=list(HealthCheck),
        ),
    )
