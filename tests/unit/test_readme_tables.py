"""The README's tables and lists name what there is: no more, and nothing is left out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_weight_hook.layout import files
from sglang_weight_hook.layout.header import CODES
from sglang_weight_hook.layout.states import STATES
from sglang_weight_hook.layout.variables import VARIABLES

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FORMAT = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")


def tables(text: str) -> list[list[list[str]]]:
    """Each table as its rows, the head first, each as its cells.

    >>> tables("| a | b |\\n|---|---|\\n| `x` | y \\\\| z |\\n")
    [[['a', 'b'], ['`x`', 'y | z']]]
    """
    found: list[list[list[str]]] = []
    before = ""
    for line in text.splitlines():
        if line.startswith("|"):
            if not before.startswith("|"):
                found.append([])
            cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
            row = [cell.strip().replace("\\|", "|") for cell in cells]
            if set(line) - set("|-: "):
                found[-1].append(row)
        before = line
    return found


def table(text: str, *head: str) -> list[list[str]]:
    (rows,) = (rows[1:] for rows in tables(text) if rows[0][: len(head)] == list(head))
    assert rows
    return rows


def named(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_every_variable_is_listed_with_its_default() -> None:
    rows = table(README, "variable", "default", "meaning")
    assert [named(row[0]) for row in rows] == [[variable.name] for variable in VARIABLES]
    for (_, default, meaning), variable in zip(rows, VARIABLES):
        number, _, unit = variable.default.partition(" ")
        assert default.strip("`") == number
        if unit:
            assert {"s": "seconds", "ms": "milliseconds"}[unit] in meaning


def test_every_command_is_listed() -> None:
    pytest.importorskip("typer")
    pytest.importorskip("rich")
    done = subprocess.run(
        [sys.executable, "-m", "sglang_weight_hook", "--help"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=True,
    )
    commands = re.findall(r"^  (\w+) {2,}", done.stdout.partition("\nCommands:\n")[2], re.MULTILINE)
    assert "show" in commands
    listed = [name for row in table(README, "command", "answers") for name in named(row[0])]
    assert sorted(listed) == sorted(commands)


def test_every_state_is_told_of() -> None:
    (paragraph,) = re.findall(r"^\*\*States\.\*\* (.*?)\n\n", README, re.MULTILINE | re.DOTALL)
    words = {word for word in named(paragraph) if "_" not in word}
    assert words == set(STATES)


def test_the_states_numbers_are_those_of_the_header() -> None:
    (line,) = re.findall(r"^The states, by number: (.*?)\.$", FORMAT, re.MULTILINE)
    numbers = {int(number): state for number, state in re.findall(r"(\d+) `(\w+)`", line)}
    assert numbers == dict(enumerate(CODES))
    assert set(CODES) - {"left"} == set(STATES)


def test_every_file_is_listed() -> None:
    names = {
        value.format("{slot}" if name != "CONTROL" else "{pid}")
        for name, value in vars(files).items()
        if name.isupper() and isinstance(value, str)
    }
    assert len(names) == 13
    before = files.EVENTS_BEFORE.format("{slot}")
    listed = [
        name
        for rows in tables(README)
        if rows[0][0] == "file" and any("weight_" in row[0] and "{" in row[0] for row in rows)
        for row in rows[1:]
        for name in named(row[0])
    ]
    assert len(listed) == len(set(listed))
    # The rotated log is on the page of the format alone.
    assert set(listed) | {before} == names
    for name in names:
        assert f"`{name}`" in FORMAT, name
