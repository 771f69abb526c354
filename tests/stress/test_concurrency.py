"""Threads, forks, two engines, reloads, the end of the interpreter, signals."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

import sglang_weight_hook as hook
from cpu_sglang.environment import ensure_environment
from tests.real_sglang.hooked import make_venv
from tests.stress.processes import ForkServer, whole_files


def test_two_engines_updated_by_threads_while_children_are_forked(
    fork_server: ForkServer, maps: Path, is_long: bool
) -> None:
    told = fork_server.run("threads_and_forks", directory=str(maps), rounds=300 if is_long else 20)
    assert told["errors"] == []
    assert told["statuses"] == [0]
    assert told["forks"] > 0
    assert told["calm"] == told["true"] == [True, True]
    assert told["slots"][0] == "0"
    assert told["slots"][1].startswith("0.")
    assert len(told["said"]) == 1
    print(f"{told['forks']} forks")


def test_a_child_that_outlives_its_parent_does_not_keep_the_slot(
    fork_server: ForkServer, maps: Path
) -> None:
    told = fork_server.run("fork_and_go_on", directory=str(maps))
    try:
        os.kill(told["child"], 0)  # it lives
        assert not hook.open_slot(str(maps), "0").owner_alive()
        assert fork_server.run("successor", directory=str(maps))["slot"] == "0"
    finally:
        os.kill(told["child"], signal.SIGKILL)


@pytest.mark.parametrize("how", ["at once", "at exit", "collected", "exception"])
def test_the_interpreter_ends_while_threads_publish(
    how: str, fork_server: ForkServer, tmp_path: Path, is_long: bool
) -> None:
    for number in range(40 if is_long else 3):
        maps = tmp_path / str(number)
        status, said = fork_server.wait(
            fork_server.start("leave_while_publishing", directory=str(maps), how=how)
        )
        assert (status, said) == (1 if how == "exception" else 0, ""), said
        whole_files(maps)
        assert not hook.open_slot(str(maps), "0").owner_alive()


def test_signals_all_the_time_change_nothing(
    fork_server: ForkServer, maps: Path, is_long: bool
) -> None:
    told = fork_server.run(
        "interrupted_often", directory=str(maps), updates=1000 if is_long else 50
    )
    assert told["true"]
    assert told["said"] == []
    assert told["signals"] > 10
    print(f"{told['signals']} signals")


def thrown_into(fork_server: ForkServer, tmp_path: Path, is_long: bool) -> list[dict[str, Any]]:
    """An exception out of a signal handler, once in each of the lines that an update executes."""
    line, told = 1, []
    while True:
        told.append(fork_server.run("thrown_into", directory=str(tmp_path / str(line)), line=line))
        if not told[-1]["thrown"] and not told[-1]["said"]:
            print(f"thrown into {len(told) - 1} of {line} lines")
            return told[:-1]
        line += 3 if is_long else 101


def test_an_exception_thrown_by_a_signal_handler_publishes_nothing_false(
    fork_server: ForkServer, tmp_path: Path, is_long: bool
) -> None:
    """Ctrl-C in a program that survives it."""
    assert not any(told["wrong"] for told in thrown_into(fork_server, tmp_path, is_long))


def test_an_exception_thrown_by_a_signal_handler_does_not_end_the_publishing(
    fork_server: ForkServer, tmp_path: Path, is_long: bool
) -> None:
    told = thrown_into(fork_server, tmp_path, is_long)
    lost = sum(not one["healed"] for one in told)
    print(f"the next updates are not published after {lost} of {len(told)}")
    assert lost == 0


RELOAD = """
import importlib, sys
import sglang_weight_hook_patch_core as core
names = [name for name in sorted(core.TARGET_MODULES) if core._exists_on_disk(name)]
done = {}
for name in names:
    try:
        module = importlib.import_module(name)
    except Exception as error:
        done[name] = f"cannot be imported here: {error!r:.60}"
        continue
    try:
        again = importlib.reload(module)
    except Exception as error:
        done[name] = f"cannot be reloaded, with or without the hook: {error!r:.60}"
        continue
    for entry in core.ENTRY_POINTS:
        if entry.module != name:
            continue
        owner = getattr(again, entry.site[1], None) if entry.site[1] else again
        method = getattr(owner, entry.method, None)
        if owner is not None and entry.method in vars(owner):
            assert hasattr(method, core._MARK), entry
            assert not hasattr(method.__wrapped__, core._MARK), entry
            done[name] = "wrapped once"
for name, what in done.items():
    print(name, what)
"""


def test_reloaded_modules_of_the_real_sglang_are_wrapped_once(
    tmp_path: Path, is_long: bool
) -> None:
    if not is_long:
        pytest.skip("imports all of SGLang; the long form does")
    environment = ensure_environment()
    python = make_venv(tmp_path / "venv", environment)
    done = subprocess.run(
        [python, "-c", RELOAD],
        cwd=tmp_path,
        env=environment.env(),
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    assert "wrapped once" in done.stdout
