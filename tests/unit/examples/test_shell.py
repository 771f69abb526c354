"""The shell loop prints a line for each change.

The publisher's runner is a fake (`fake_sglang`), its model and tensors are torch's, the files and
locks are real.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from example_programs import EXAMPLES, Publisher

from sglang_weight_hook.layout import files


@pytest.fixture(params=["inotify", "polling"])
def watch_environment(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """With inotifywait, and with a PATH on which it is not."""
    if request.param == "inotify":
        if shutil.which("inotifywait") is None:
            pytest.skip("no inotifywait (package inotify-tools); the polling case runs")
        return {"INTERVAL": "30"}  # events alone must do
    folder = tmp_path / "path"
    folder.mkdir()
    for tool in ("bash", "cat", "dd", "grep", "head", "sleep", "env"):
        found = shutil.which(tool)
        assert found is not None
        (folder / tool).symlink_to(found)
    return {"PATH": str(folder), "INTERVAL": "0.05"}


def test_the_shell_loop_prints_a_line_for_each_change(
    publisher: Publisher,
    start_example: Callable[..., subprocess.Popen[str]],
    watch_environment: dict[str, str],
) -> None:
    loop = start_example(str(EXAMPLES / "watch.sh"), **watch_environment)
    assert loop.stdout is not None

    def line() -> tuple[str, int, int]:
        assert loop.stdout is not None
        words = loop.stdout.readline().split()
        numbers = dict(word.split("=") for word in words[1:])
        return words[0], int(numbers["layout"]), int(numbers["content"])

    state, layout, content = line()
    assert state == "ready"
    publisher.tell("pause")
    assert line() == ("updating", layout, content)
    publisher.tell("go on")
    assert line() == ("ready", layout, content + 1)
    publisher.tell("move")
    seen = [line()]
    while seen[-1][0] == "updating":
        seen.append(line())
    assert seen[-1] == ("ready", layout + 1, content + 2)
    os.unlink(publisher.slot.path(files.STATE))
    assert loop.stdout.readline() == "absent\n"


def test_the_shell_loop_ends_with_what_it_started(
    publisher: Publisher, start_example: Callable[..., subprocess.Popen[str]]
) -> None:
    loop = start_example(str(EXAMPLES / "watch.sh"), INTERVAL="0.1")
    assert loop.stdout is not None
    loop.stdout.readline()
    loop.terminate()
    assert loop.wait(10) == 0
    assert loop.stdout.read() == ""  # nobody else has the pipe open


def test_the_shell_loop_refuses_a_directory_that_is_none(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(EXAMPLES / "watch.sh"), str(tmp_path / "nothing"), "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "is no directory" in done.stderr
