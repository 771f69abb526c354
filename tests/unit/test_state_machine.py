"""Any sequence of events leaves each slot as docs/architecture.md says ("States and events")."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as examples
from hypothesis.stateful import run_state_machine_as_test

pytest.importorskip("torch")

from state_machine import RecorderSequences
from state_table import rendered

ARCHITECTURE = Path(__file__).resolve().parents[2] / "docs" / "architecture.md"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_any_sequence_of_events_is_published_as_the_table_says() -> None:
    run_state_machine_as_test(
        RecorderSequences,
        settings=examples(
            max_examples=60,
            derandomize=True,  # the same sequences each time here, new ones in `make stress`
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_the_page_has_the_table_that_the_sequences_are_held_against() -> None:
    page = ARCHITECTURE.read_text()
    begin, end = "<!-- begin generated: states and events -->", "<!-- end generated -->"
    found = page.split(begin)[1].split(end)[0].strip()
    assert found == rendered(), "python tests/unit/state_table.py prints it"
