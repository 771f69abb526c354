"""The shell loop prints a line for each change, in dash and in bash.

The publisher's runner is a fake (`fake_sglang`), its model and tensors are torch's, the files and
locks are real.
"""

from __future__ import annotations

import os
import random
import selectors
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from documents_by_hand import STATE
from example_programs import EXAMPLES, Publisher

from sglang_weight_hook.layout import files


@pytest.fixture(params=["dash", "bash"])
def shell(request: pytest.FixtureRequest) -> str:
    if shutil.which(request.param) is None:
        pytest.skip(f"no {request.param} here")
    return str(request.param)


@pytest.fixture(params=["inotify", "polling"])
def watch_environment(request: pytest.FixtureRequest, shell: str, tmp_path: Path) -> dict[str, str]:
    """With inotifywait, and with a PATH on which it is not."""
    if request.param == "inotify":
        if shutil.which("inotifywait") is None:
            pytest.skip("no inotifywait (package inotify-tools); the polling case runs")
        return {"INTERVAL": "30"}  # events alone must do
    folder = tmp_path / "path"
    folder.mkdir()
    for tool in ("cat", "dd", "env", "mkfifo", "mktemp", "rm", "sh", "sleep", "timeout", shell):
        found = shutil.which(tool)
        assert found is not None
        (folder / tool).symlink_to(found)
    return {"PATH": str(folder), "INTERVAL": "0.05"}


def test_the_shell_loop_prints_a_line_for_each_change(
    publisher: Publisher,
    start_example: Callable[..., subprocess.Popen[str]],
    shell: str,
    watch_environment: dict[str, str],
) -> None:
    loop = start_example(shell, str(EXAMPLES / "watch.sh"), **watch_environment)
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
    publisher: Publisher, shell: str, start_example: Callable[..., subprocess.Popen[str]]
) -> None:
    loop = start_example(shell, str(EXAMPLES / "watch.sh"), INTERVAL="0.1")
    assert loop.stdout is not None
    loop.stdout.readline()
    loop.terminate()
    assert loop.wait(10) == 0
    assert loop.stdout.read() == ""  # nobody else has the pipe open


def test_the_shell_loop_refuses_a_directory_that_is_none(shell: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [shell, str(EXAMPLES / "watch.sh"), str(tmp_path / "nothing"), "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "is no directory" in done.stderr


# --- a directory of others' ----------------------------------------------------------------------

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "-m8"
    folder.mkdir()
    (folder / "weight_state_0.json").write_text(STATE)
    return folder


@pytest.fixture
def start_loop(shell: str, folder: Path, tmp_path: Path) -> Iterator[Start]:
    """Start the loop beside the directory; its tools are those of ``tools/`` first."""
    tools = tmp_path / "tools"
    tools.mkdir()
    started = []

    def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [shell, str(EXAMPLES / "watch.sh"), *(arguments or (str(folder), "0"))],
            env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", **environment},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def line_of(loop: subprocess.Popen[str], timeout: float = 10) -> str:
    """The next line, the only one that there is; empty where none comes."""
    assert loop.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(loop.stdout, selectors.EVENT_READ)
        return loop.stdout.readline() if selector.select(timeout) else ""


def instead_of_reading(tmp_path: Path, script: str) -> None:
    """A script in place of the programs that may read the state."""
    for name in ("dd", "head"):
        tool = tmp_path / "tools" / name
        tool.write_text(f'#!/bin/sh\n{script}\nexec {shutil.which(name)} "$@"\n')
        tool.chmod(0o755)


READY = "ready layout=1 content=1 physical=?\n"


def test_a_directory_whose_name_looks_like_an_option(folder: Path, start_loop: Start) -> None:
    loop = start_loop(folder.name, "0", INTERVAL="0.1")
    assert line_of(loop) == READY
    (folder / "weight_state_0.json").unlink()
    assert line_of(loop) == "absent\n"


@pytest.mark.parametrize("other", ["mkfifo", "ln -s /dev/zero", "mkdir"])
def test_what_is_put_in_place_of_the_file_just_before_it_is_opened(
    other: str, folder: Path, start_loop: Start, tmp_path: Path
) -> None:
    state = folder / "weight_state_0.json"
    instead_of_reading(tmp_path, f"rm -rf '{state}'; {other} '{state}'")
    loop = start_loop(INTERVAL="0.1")
    lines = [line_of(loop)]
    if other.startswith("ln"):
        assert loop.poll() is None
    assert lines == ["absent\n"]
    instead_of_reading(tmp_path, "")
    if state.is_dir():
        state.rmdir()
    (folder / "new").write_text(STATE)
    os.replace(folder / "new", state)
    assert line_of(loop) == READY


def test_a_signal_ends_the_loop_while_a_tool_of_its_takes_long(
    start_loop: Start, tmp_path: Path
) -> None:
    begun = tmp_path / "begun"
    instead_of_reading(tmp_path, f"touch '{begun}'; exec sleep 20")
    loop = start_loop(INTERVAL="0.1")
    for _ in range(1000):
        if begun.exists():
            break
        time.sleep(0.01)
    assert begun.exists()
    loop.terminate()
    assert loop.wait(4) == 0


def test_a_signal_ends_the_loop_at_any_moment(start_loop: Start) -> None:
    for _ in range(12):
        loop = start_loop(INTERVAL="0.02")
        assert line_of(loop) == READY
        time.sleep(random.uniform(0, 0.2))
        loop.terminate()
        assert loop.wait(5) == 0
        assert loop.communicate(timeout=5) == ("", "")  # nobody has the pipes open any more


def test_the_loop_ends_with_the_one_who_reads_its_lines(folder: Path, start_loop: Start) -> None:
    loop = start_loop(INTERVAL="0.05")
    assert line_of(loop) == READY
    assert loop.stdout is not None
    loop.stdout.close()
    (folder / "weight_state_0.json").unlink()
    loop.wait(10)
    assert loop.stderr is not None
    loop.stderr.read()  # until those it has started have ended, too
    loop.stdout = None


def test_the_loop_ends_when_the_directory_is_removed(folder: Path, start_loop: Start) -> None:
    loop = start_loop(INTERVAL="0.05")
    assert line_of(loop) == READY
    shutil.rmtree(folder)
    assert loop.wait(10) == 1


@pytest.mark.parametrize("interval", ["x", "-1", "1s", "1.2.3", "."])
def test_an_interval_that_is_no_number(interval: str, start_loop: Start) -> None:
    loop = start_loop(INTERVAL=interval)
    assert loop.wait(10) == 2
