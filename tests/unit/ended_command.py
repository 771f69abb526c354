"""The command as it is run by a test, and what it said when it ended."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = (
    *("slots", "show", "regions", "lookup", "diff", "report"),
    *("watch", "history", "verify", "doctor", "plot"),
    *("top", "save", "compare", "checksum", "scrub", "serve"),
)


class Ended(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def complaints(self) -> list[str]:
        """What is wrong; a line on stderr without the command's name only adds up."""
        return [line for line in self.err.splitlines() if line.startswith("sglang-weight-hook: ")]

    @property
    def rows(self) -> list[list[str]]:
        return [line.split() for line in self.out.splitlines()]


Run = Callable[..., Ended]


def sentence(ended: Ended, status: int) -> str:
    """The one sentence of a refusal."""
    assert ended.status == status
    assert ended.out == ""
    assert ended.err.startswith("sglang-weight-hook: ")
    assert ended.err.count("\n") == 1
    return ended.err
