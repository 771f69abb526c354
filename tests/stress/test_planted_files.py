"""Every kind of file at every name of an output directory: each reader answers or refuses.

No reader waits, none takes much memory, no command ends with a traceback or another exit status
than the documented ones, nothing in a file reaches the terminal as a command.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from tests.stress.processes import ROOT, ForkServer, environment


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Where another user can look; pytest's own are closed to others."""
    path = Path(tempfile.mkdtemp(prefix="planted-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def seen(folder: Path, fork_server: ForkServer, is_long: bool) -> Any:
    """What `planted_files` has seen."""
    fork_server.run("successor", directory=str(folder / "good"))
    seed = random.randrange(2**32) if is_long else 1
    print(f"seed {seed}")
    command = [sys.executable, "-m", "tests.stress.planted_files"]
    done = subprocess.run(
        [*command, str(folder / "good"), str(folder), str(seed), *["--long"] * is_long],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=1800 if is_long else 300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])


def told(wrong: dict[str, list[str]]) -> str:
    return "\n".join(f"{where}: {problem}" for where, all_ in wrong.items() for problem in all_)


def test_without_anything_planted_every_call_and_command_succeeds(seen: Any) -> None:
    assert "nothing planted" not in seen["wrong"], told(seen["wrong"])


def test_every_kind_of_file_at_every_name(seen: Any) -> None:
    # 12 names, 13 kinds, of which one needs root's right to make devices.
    assert seen["cases"] >= 12 * (13 if os.geteuid() == 0 else 12)
    wrong = {where: found for where, found in seen["wrong"].items() if "swapped" not in where}
    assert not wrong, told(wrong)


def test_a_name_that_changes_its_kind_while_it_is_read(seen: Any) -> None:
    wrong = {where: found for where, found in seen["wrong"].items() if "swapped" in where}
    assert not wrong, told(wrong)
