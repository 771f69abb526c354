"""The examples that read through a transfer engine, beside real engines in real processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bytes_owner import BytesOwner
from engine_owner import needs, started
from example_programs import EXAMPLES

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

Start = Callable[..., BytesOwner]
NOISE = re.compile(r"WARNING: Logging before InitGoogleLogging|E\d{4} .*descriptor not found")


@pytest.fixture
def start(start_python: Callable[..., subprocess.Popen[str]]) -> Start:
    def start_it(engine: str, directory: Path, kind: str) -> BytesOwner:
        needs(engine)
        directory.mkdir(exist_ok=True)
        return started(start_python, directory, engine, kind)

    return start_it


def run(name: str, *arguments: object) -> Any:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *map(str, arguments)],
        env={**os.environ, "PYTHONWARNINGS": "ignore"},  # that it could do without an engine
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    # Mooncake says two lines when it starts, whatever it is told.
    said = [line for line in done.stderr.splitlines() if not NOISE.match(line)]
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout, "\n".join(said))


def copied(owner: BytesOwner, to: Path) -> Path:
    to.mkdir()
    for path in Path(owner.slot.directory).glob("*.json"):
        shutil.copy(path, to)
    return to


@pytest.mark.parametrize("engine", ["mooncake", "nixl"])
def test_a_fresh_model_holds_the_servers_weights_name_by_name(
    start: Start, tmp_path: Path, engine: str
) -> None:
    owner = start(engine, tmp_path / "server", "odd")
    copy = copied(owner, tmp_path / "copy")
    done = run("pull_weights.py", copy, "0", "--via", engine, "--save", tmp_path / "model.pt")
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    assert said["only_in_the_model"] == []
    # SGLang's module has attributes that are no parameters: the model is not made of those.
    assert "columns" in said["only_on_the_server"]
    state = torch.load(tmp_path / "model.pt")
    assert len(state) > 12
    document = owner.read()
    with document.open_memory(via="process") as memory:
        for name, tensor in state.items():
            assert memory.read(name) == bytes_of(tensor), name
    assert state["embed.weight"].data_ptr() == state["lm_head.weight"].data_ptr()
    owner.tell("fill")
    again = run("pull_weights.py", copy, "0", "--via", engine, "--attempts", "1")
    assert (again.returncode, again.stdout) == (1, "")
    assert "content generation" in again.stderr


def test_replicas_are_compared_while_one_goes_on_updating(start: Start, tmp_path: Path) -> None:
    one = start("mooncake", tmp_path / "one", "even")
    other = start("mooncake", tmp_path / "other", "even")
    directories = [Path(owner.slot.directory) for owner in (one, other)]
    equal = run("compare_replicas.py", *directories, "--via", "mooncake")
    assert (equal.returncode, equal.stdout, equal.stderr.strip()) == (0, "", "equal")
    other.tell("flip part7 5 3")
    different = run("compare_replicas.py", *directories, "--via", "mooncake")
    (finding,) = [json.loads(line) for line in different.stdout.splitlines()]
    assert (different.returncode, finding["name"], finding["first"]) == (3, "part7", [1])
    other.tell("fill")
    other.tell("pause")
    late = run("compare_replicas.py", *directories, "--via", "mooncake", "--attempts", "1")
    assert late.returncode == 1
    assert "is updating" in late.stderr
    other.tell("go on")


def bytes_of(tensor: Any) -> bytes:
    flat = tensor.contiguous().view(-1)
    return bytes(flat.view(torch.uint8).numpy().data) if flat.numel() else b""
