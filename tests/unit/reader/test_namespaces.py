"""A directory that containers share: what is known of an owner in another pid namespace.

Real namespaces (`unshare`) and real owners.  That two owners with one pid keep apart is in
``tests/unit/test_recorder_two_owners.py``.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from owner_process import Owner

from sglang_weight_hook.layout import files
from sglang_weight_hook.reader import open_slot

pytest.importorskip("torch")

ROOT = Path(__file__).resolve().parents[3]
APART = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc")

READER = """
import sys
sys.path.insert(0, sys.argv[1])
from sglang_weight_hook.reader import open_slot
found = open_slot(sys.argv[2], "0").liveness()
print(found.alive, found.certain, found.why)
"""


@pytest.fixture
def apart() -> Callable[[Path], str]:
    """What a reader in a pid namespace of its own says of the owner."""
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare (util-linux)")
    tried = subprocess.run([*APART, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no pid namespaces of one's own here: {tried.stderr.strip()}")

    def read(maps: Path) -> str:
        command = [*APART, sys.executable, "-c", READER, str(ROOT), str(maps)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout

    return read


@pytest.fixture
def locked(maps: Path) -> Iterator[Callable[[], None]]:
    """Lock the owner's lock file from this namespace, as any reader may."""
    held: list[int] = []

    def lock() -> None:
        held.append(os.open(maps / files.OWNER_LOCK.format(0), os.O_RDONLY))
        fcntl.flock(held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)

    yield lock
    for descriptor in held:
        os.close(descriptor)


def test_from_another_pid_namespace_a_live_owner_is_alive_but_not_certain(
    owner: Owner, maps: Path, apart: Callable[[Path], str]
) -> None:
    assert open_slot(str(maps), "0").liveness()[:2] == (True, True)
    assert apart(maps).startswith("True False its lock is held, and its process is in another pid")


def test_from_another_pid_namespace_a_free_lock_is_a_certain_end(
    owner: Owner, maps: Path, apart: Callable[[Path], str]
) -> None:
    owner.process.kill()
    owner.process.wait()
    assert apart(maps).startswith("False True its lock is free")


def test_a_lock_that_a_stranger_holds_is_seen_through_from_the_owners_namespace_alone(
    owner: Owner, maps: Path, apart: Callable[[Path], str], locked: Callable[[], None]
) -> None:
    owner.process.kill()
    owner.process.wait()
    locked()
    assert open_slot(str(maps), "0").liveness()[:2] == (False, True)
    # From there the process cannot be told from one that is only out of sight.
    assert apart(maps).startswith("True False")


def test_a_process_there_with_the_owners_pid_is_not_the_owner(
    maps: Path, apart: Callable[[Path], str], start_python: Callable[..., Any]
) -> None:
    """The owner is process 1 of its namespace, and so is the reader of its own."""
    code = (
        "from fake_sglang import FakeRunner, load, settle\n"
        "import os, sys, torch\n"
        "runner = FakeRunner(torch.nn.Linear(4, 4))\n"
        "load(runner); settle()\n"
        "print(os.getpid(), flush=True); sys.stdin.readline()\n"
    )
    outer = start_python(
        "import os, subprocess, sys\n"
        f"sys.exit(subprocess.call([*{APART!r}, sys.executable, '-c', {code!r}]))"
    )
    assert outer.stdout.readline() == "1\n"
    assert apart(maps).startswith("True False its lock is held, and its process is in another pid")
    # Here process 1 is another one, too.
    assert open_slot(str(maps), "0").liveness()[:2] == (True, False)
    outer.stdin.write("\n")
    outer.stdin.flush()
    outer.wait(30)
    assert apart(maps).startswith("False True")
    assert not open_slot(str(maps), "0").owner_alive()
