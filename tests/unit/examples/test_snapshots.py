"""The examples that save and compare weights, beside processes that publish and change them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bytes_owner import BytesOwner, started
from example_programs import EXAMPLES

safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture
def owner(start_python: Callable[..., subprocess.Popen[str]], maps: Path) -> BytesOwner:
    return started(start_python, maps, "odd")


def run(name: str, *arguments: object) -> Any:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_snapshot_is_taken_when_the_weights_have_changed(
    owner: BytesOwner, tmp_path: Path
) -> None:
    target = tmp_path / "snapshots"
    first = run("snapshot_weights.py", owner.slot.directory, target, "--keep", "1")
    assert (first.returncode, first.stderr) == (0, "")
    (file,) = json.loads(first.stdout)["files"]
    assert len(safetensors.load_file(file)) == len(owner.read().tensors)
    again = run("snapshot_weights.py", owner.slot.directory, target)
    assert json.loads(again.stdout)["unchanged"] is True
    owner.tell("fill")
    time.sleep(1.1)  # another second, another name
    run("snapshot_weights.py", owner.slot.directory, target, "--keep", "1")
    (kept,) = target.iterdir()
    assert (safetensors.load_file(kept / "0.safetensors")["of_int32"] == 1).all()
    owner.kill()
    done = run("snapshot_weights.py", owner.slot.directory, target)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no server publishes" in done.stderr


def test_two_replicas_are_equal_until_one_has_a_flipped_bit(
    owner: BytesOwner,
    start_python: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
) -> None:
    replica = started(start_python, tmp_path / "replica", "odd")
    places = owner.slot.directory, replica.slot.directory
    done = run("compare_replicas.py", *places)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "equal\n")
    replica.tell("flip packed 5 3")
    done = run("compare_replicas.py", *places)
    found = json.loads(done.stdout)
    assert (done.returncode, found["name"], found["elements"]) == (3, "packed", 1)
    assert found["first"] == [0, 1]
