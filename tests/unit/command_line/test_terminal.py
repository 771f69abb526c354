"""Names that are no commands to a terminal, widths, colours and pipes.

On documents of the real recorder; facts are asserted, not screens.  ``tests/real_sglang`` has a
real server.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
from ended_command import ROOT, Run
from small_model import a_runner, torch

from sglang_weight_hook.layout import files


def test_nothing_in_a_name_reaches_the_terminal_as_a_command(
    run: Run, maps: Path, layout: Any
) -> None:
    path = maps / files.LAYOUT.format(0)
    raw = layout["tensors"].pop("layers.0.mlp.weight")
    layout["tensors"]["\x1b[2J[red]\ud800\u202e\n"] = raw
    path.write_text(json.dumps(layout))
    ended = run("show")
    assert ended.status == 0
    assert "\x1b" not in ended.out
    assert r"\x1b[2J[red]\ud800\u202e\n" in ended.out
    assert run("lookup", raw["ptr"]).status == 0


def child(*arguments: str, **environment: str) -> list[str]:
    return [
        *("env", f"PYTHONPATH={ROOT}"),
        *(f"{name}={value}" for name, value in environment.items()),
        *(sys.executable, "-m", "sglang_weight_hook", *arguments),
    ]


def on_a_terminal(columns: int, command: list[str]) -> str:
    """What a terminal of that width shows."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    environment["TERM"] = "xterm"
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while data := os.read(ours, 65536):
            shown += data
    except OSError:  # EIO: the other end is closed
        pass
    os.close(ours)
    process.wait(60)
    return shown.decode()


@pytest.mark.parametrize("command", ["show", "regions", "report", "verify", "doctor"])
def test_a_terminal_of_80_columns_is_enough(command: str, layout: Any, maps: Path) -> None:
    shown = on_a_terminal(80, child(command, NO_COLOR="1", SGLANG_WEIGHT_HOOK_DIR=str(maps)))
    assert "\x1b[3" not in shown
    # A path cannot be broken anywhere but in its middle, so doctor may run over with one.
    lines = [line for line in re.sub("\x1b[^m]*m", "", shown).splitlines() if "/" not in line]
    assert lines
    assert max(len(line) for line in lines) <= 80


def test_colours_are_for_terminals_and_not_with_no_color(layout: Any, maps: Path) -> None:
    plain = child("verify", SGLANG_WEIGHT_HOOK_DIR=str(maps))
    assert "\x1b[32m" in on_a_terminal(80, plain)
    without = child("verify", SGLANG_WEIGHT_HOOK_DIR=str(maps), NO_COLOR="1")
    assert "\x1b[32m" not in on_a_terminal(80, without)
    assert "\x1b" not in subprocess.run(plain, capture_output=True, text=True, check=True).stdout


def test_a_pipe_gets_whole_names_and_one_that_closes_is_no_error(maps: Path) -> None:
    name = "a_module_with_quite_a_long_name_indeed" * 3
    runner = a_runner(
        torch.nn.ModuleDict({f"{name}{n}": torch.nn.Linear(2, 2) for n in range(800)})
    )
    command = child("show", SGLANG_WEIGHT_HOOK_DIR=str(maps))
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f" {name}799.bias\n" in done.stdout
    pipe = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert pipe.stdout is not None
    assert pipe.stderr is not None
    pipe.stdout.readline()
    pipe.stdout.close()
    assert pipe.stderr.read() == ""
    pipe.stderr.close()
    assert pipe.wait(60) == 0
    del runner
