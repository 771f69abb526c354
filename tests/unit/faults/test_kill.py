"""Killed while publishing: what was left parses, and a restart clears it up."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faulty_runner import (
    ModelRunner,
    everything_parses,
    no_leftovers,
    use,
    warnings,
)

from sglang_weight_hook import reader

KILLED = """
import os, signal, sys
sys.path.insert(0, {here!r})
import torch
from fake_sglang import FakeRunner, load, settle, update
runner = FakeRunner(torch.nn.Linear(4, 3))
load(runner); settle(); update(runner)
call, countdown = sys.argv[1], int(sys.argv[2])
really = getattr(os, call)
def kill(*arguments, **more):
    global countdown
    countdown -= 1
    if countdown == 0:
        if call == "write":
            really(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return really(*arguments, **more)
setattr(os, call, kill)
runner.model.weight.data = torch.zeros(3, 4)
update(runner)
sys.exit("was not killed")
"""


@pytest.mark.parametrize(
    ("call", "countdown"), [("write", 1), ("write", 2), ("rename", 3), ("rename", 7)]
)
def test_kill_9_while_publishing_leaves_files_that_parse_and_a_restart_clears_up(
    call: str,
    countdown: int,
    runner: ModelRunner,
    maps: Path,
    run_python: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    code = KILLED.format(here=str(Path(__file__).parents[1]))
    done = run_python("-c", code, call, str(countdown), check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(everything_parses(maps)) == 6
    assert not no_leftovers(maps)
    assert not reader.open_slot(str(maps), "0").owner_alive()

    use(runner, times=1)
    assert warnings(caplog) == []
    assert no_leftovers(maps)
    document = reader.open_slot(str(maps), "0").read(timeout=0)
    assert document.state["pid"] == os.getpid()
    assert document.tensors["weight"]["ptr"] == runner.model.weight.data_ptr()
