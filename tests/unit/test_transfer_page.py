"""docs/transfer.md: its Python runs against real engines, its commands beside copied files."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bytes_owner import BytesOwner
from engine_owner import needs, started

from tests.code_blocks import ROOT, blocks_of, commands_of

numpy = pytest.importorskip("numpy")
pytest.importorskip("torch")
pytest.importorskip("safetensors")
pytest.importorskip("typer")

PAGE = (ROOT / "docs" / "transfer.md").read_text(encoding="utf-8")
BLOCKS = blocks_of(PAGE, "docs/transfer.md")


@pytest.fixture
def serve(start_python: Callable[..., Any], tmp_path: Path) -> Callable[[str], BytesOwner]:
    def start(engine: str) -> BytesOwner:
        needs(engine)
        directory = tmp_path / f"server-{engine}"
        directory.mkdir()
        return started(start_python, directory, engine, "even")

    return start


def test_the_functions_read_what_the_server_holds(serve: Callable[[str], BytesOwner]) -> None:
    (block,) = (each for each in BLOCKS if each.language == "python")
    page: dict[str, Any] = {}
    exec(compile(block.text, str(block), "exec"), page)
    owner = serve("mooncake")
    owner.tell("fill")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it could do without
        assert (page["one_tensor"](owner.slot.directory, "part3", "mooncake") == 1).all()
        found = page["everything"](owner.slot.directory, "mooncake")
    assert len(found) == 24
    assert all((tensor == 1).all() for tensor in found.values())


def test_the_commands_do_what_they_say(serve: Callable[[str], BytesOwner], tmp_path: Path) -> None:
    """In the page's order, with copies of the files and none of the locks."""
    owners = {engine: serve(engine) for engine in ("mooncake", "nixl")}
    commands = [
        shlex.split(command.text)[1:]
        for block in BLOCKS
        for command in commands_of(block.text)
        if command.text.startswith("sglang-weight-hook ") and "--via" in command.text
    ]
    assert len(commands) == 5
    for words in commands:
        owner = owners[words[words.index("--via") + 1]]
        for name in ("weights_metadata", "one", "other", "."):
            target = tmp_path / "copy" / name
            target.mkdir(parents=True, exist_ok=True)
            for path in Path(owner.slot.directory).glob("*.json"):
                shutil.copy(path, target)
        done = subprocess.run(
            [sys.executable, "-m", "sglang_weight_hook", *words],
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        assert "on this machine" in done.stderr  # which is said before
        assert "Traceback" not in done.stderr
