"""The example that runs a layer computes with the values that the process has."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from bytes_owner import BytesOwner, started
from example_programs import EXAMPLES

torch = pytest.importorskip("torch")


@pytest.fixture
def owner(start_python: Callable[..., subprocess.Popen[str]], maps: Path) -> BytesOwner:
    return started(start_python, maps, "odd")


def run(owner: BytesOwner, name: str) -> subprocess.CompletedProcess[str]:
    arguments = [str(EXAMPLES / "run_layer.py"), owner.slot.directory, "0", name]
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_the_layer_runs_on_the_servers_values(owner: BytesOwner) -> None:
    owner.tell("fill")  # with ones
    done = run(owner, "lm_head.weight")
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert (found["via"], found["shape"], found["content_generation"]) == ("process", [700, 300], 2)
    assert found["sum"] == 700 * 300
    assert found["largest"] == 300
    owner.tell("fill")  # with twos
    assert json.loads(run(owner, "lm_head.weight").stdout)["sum"] == 2 * 700 * 300


def test_what_it_cannot_do_is_a_sentence(owner: BytesOwner) -> None:
    done = run(owner, "windows_of_nothing")
    assert (done.returncode, done.stdout) == (1, "")
    assert "give a matrix" in run(owner, "scalar").stderr
    assert "has no tensor 'windows_of_nothing'" in done.stderr
    owner.kill()
    assert "Traceback" not in run(owner, "lm_head.weight").stderr
