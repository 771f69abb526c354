"""What the tests of the command share: the command itself, and a published slot to ask it about.

What needs torch or the command's extra is imported by the fixtures, so that a test is skipped
where there is none.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fake_sglang import FakeRunner

from sglang_weight_hook.layout import files

if TYPE_CHECKING:
    from ended_command import Ended, Run


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    from ended_command import Ended

    from sglang_weight_hook.commands import entry

    def run(*arguments: object) -> Ended:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["sglang-weight-hook", *map(str, arguments)])
        status = entry.main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Ended(status, captured.out, captured.err)

    return run


@pytest.fixture
def runner() -> FakeRunner:
    """A runner of the small model with everything that makes a map hard."""
    from small_model import a_runner

    return a_runner()


@pytest.fixture
def layout(runner: FakeRunner, maps: Path) -> Any:
    return json.loads((maps / files.LAYOUT.format(0)).read_bytes())
