"""No text of a document reaches a terminal as a command, whichever field it stands in."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from ended_command import Run
from fake_sglang import FakeRunner, update

from sglang_weight_hook.commands.render.table import Column, print_table
from sglang_weight_hook.commands.render.text import print_item, print_line
from sglang_weight_hook.layout import files

# A title, a clipboard (OSC 52), a colour, a carriage return, an 8-bit CSI, a right-to-left mark.
HOSTILE = "\x1b]0;owned\x07\x1b]52;c;b3duZWQ=\x07\x1b[31m\r\x9b2J\u202e"
BAD = ("\x1b", "\x07", "\r", "\x9b", "\u202e")
# What must stay for a document to be read at all.
KEPT = {"schema", "schema_version", "pid", "process_start_ticks", "boot_id", "instance", "control"}

COMMANDS = (
    ("show",),
    ("regions",),
    ("lookup", "4096"),
    ("report",),
    ("verify",),
    ("history",),
    ("watch", "--all-events", "--timeout", "0"),
)


def hostile(value: Any) -> Any:
    """The same document, with every text and every name in it extended."""
    if isinstance(value, str):
        return value + HOSTILE
    if isinstance(value, list):
        return [hostile(item) for item in value]
    if isinstance(value, dict):
        return {key: item if key in KEPT else hostile(item) for key, item in value.items()}
    return value


@pytest.mark.parametrize("what", ["texts", "names"])
def test_no_field_of_any_document_reaches_the_terminal_as_a_command(
    what: str, run: Run, runner: FakeRunner, maps: Path, tmp_path: Path
) -> None:
    update(runner)
    saved = tmp_path / "saved.json"
    layout = json.loads((maps / files.LAYOUT.format(0)).read_bytes())
    saved.write_text(json.dumps(layout))
    for name in (files.LAYOUT, files.STATE, files.WEIGHTS_META):
        path = maps / name.format(0)
        document = json.loads(path.read_bytes())
        changed = hostile(copy.deepcopy(document))
        if what == "names" and "tensors" in changed:
            changed["tensors"] = {key + HOSTILE: raw for key, raw in changed["tensors"].items()}
        path.write_text(json.dumps(changed))
    path = maps / files.EVENTS.format(0)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(hostile(line)) + "\n" for line in lines))
    address = str(next(raw["ptr"] for raw in layout["tensors"].values() if raw["ptr"]))
    seen = 0
    for command in (*COMMANDS, ("lookup", address), ("diff", str(saved), "0", "--all")):
        ended = run(*command)
        assert not any(mark in ended.out + ended.err for mark in BAD), command
        seen += r"\x1b]0;owned" in ended.out
    assert seen > 3


def test_lines_and_cells_are_printable_wherever_they_come_from(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_line(HOSTILE, (HOSTILE, "bold"))
    print_item((HOSTILE, "bold"), HOSTILE, HOSTILE)
    print_table([Column("one"), Column("two")], [[HOSTILE, HOSTILE]])
    out = capsys.readouterr().out
    assert not any(mark in out for mark in BAD)
    assert out.count("owned") == 7
