"""Installers that run at once, what holds them up and what does not; and version numbers."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import ENVIRONMENT, INSTALL, UNINSTALL, Target, tree

LOCK = ".sglang-weight-hook.lock"


def test_a_reader_of_site_packages_holds_nobody_up(target: Target, checkout: Path) -> None:
    # Any user who may read the directory can lock it, as `flock -s` does.
    descriptor = os.open(target.purelib, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        begun = time.monotonic()
        target.install(root=checkout)
        assert target.script(INSTALL, "--check", root=checkout).returncode == 0
        target.uninstall(root=checkout)
        assert time.monotonic() - begun < 50
    finally:
        os.close(descriptor)
    assert tree(target.purelib) == {}


@pytest.fixture
def busy(target: Target, checkout: Path) -> Iterator[subprocess.Popen[bytes]]:
    """An installation that waits, with its lock, until it is told to end."""
    loader = checkout / "sglang_patch_loader.py"
    whole = loader.read_text()
    loader.write_text(
        f"{whole}import time\nif os.environ.get('HOLD_UP') == '1':\n    time.sleep(60)\n"
    )
    running = subprocess.Popen(
        [checkout / INSTALL, "--python", target.python],
        env={**ENVIRONMENT, "HOLD_UP": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while not (target.purelib / "sglang_injector.pth").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    loader.write_text(whole)
    yield running
    with contextlib.suppress(ProcessLookupError):
        os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert running.stderr is not None
    running.stderr.close()


def test_only_who_may_write_there_can_open_the_lock(
    target: Target, busy: subprocess.Popen[bytes]
) -> None:
    status = (target.purelib / LOCK).lstat()
    assert stat.S_ISREG(status.st_mode)
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_uid == os.geteuid()


def test_the_lock_of_a_killed_installation_is_taken_over(
    target: Target, checkout: Path, busy: subprocess.Popen[bytes]
) -> None:
    os.killpg(busy.pid, signal.SIGKILL)
    busy.wait()
    assert (target.purelib / LOCK).exists()
    target.install(root=checkout)
    assert not (target.purelib / LOCK).exists()
    target.uninstall(root=checkout)
    (target.purelib / LOCK).write_text("")  # killed before it wrote anything
    target.uninstall(root=checkout)
    assert tree(target.purelib) == {}


def test_a_removal_waits_for_an_installation(
    target: Target, checkout: Path, busy: subprocess.Popen[bytes]
) -> None:
    waiting = subprocess.Popen(
        [checkout / UNINSTALL, "--python", target.python],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    time.sleep(1.5)
    assert waiting.poll() is None
    busy.send_signal(signal.SIGTERM)
    assert b"interrupted" in busy.communicate(timeout=20)[1]
    said = waiting.communicate(timeout=20)
    assert (waiting.returncode, said[1]) == (0, b"")
    assert tree(target.purelib) == {}


@pytest.mark.parametrize("kind", ["directory", "link", "fifo"])
def test_what_is_no_lock_is_refused(target: Target, tmp_path: Path, kind: str) -> None:
    place = target.purelib / LOCK
    if kind == "directory":
        place.mkdir()
    elif kind == "link":
        place.symlink_to(tmp_path / "victim")
    else:
        os.mkfifo(place)
    done = target.script(INSTALL)
    assert done.returncode == 1
    assert done.stderr == f"{INSTALL}: {place} is not a file; remove it first.\n"
    assert not (tmp_path / "victim").exists()
    assert [path.name for path in target.purelib.iterdir()] == [LOCK]


@pytest.mark.parametrize(
    ("written", "normal"),
    [
        ("0.2.0-rc1", "0.2.0rc1"),
        ("0.2.0rc1", "0.2.0rc1"),
        ("0.2.0-alpha.2", "0.2.0a2"),
        ("1.0.dev3", "1.0.dev3"),
        ("1.0-dev", "1.0.dev0"),
        ("1.0-1", "1.0.post1"),
        ("v1!2.0.post1+Local-7", "1!2.0.post1+local.7"),
    ],
)
def test_every_version_number_can_be_installed(
    target: Target, checkout: Path, written: str, normal: str
) -> None:
    version = checkout / "sglang_weight_hook" / "__init__.py"
    target.install(root=checkout)
    version.write_text(f'__version__ = "{written}"\n')
    done = target.script(INSTALL, root=checkout)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"sglang-weight-hook {normal}, " in done.stdout
    asked = target.run("-c", "from importlib.metadata import version as v; "
                             "print(v('sglang-weight-hook'))")  # fmt: skip
    assert asked.stdout == f"{normal}\n"
    done = target.script(INSTALL, "--check", root=checkout)
    assert done.returncode == 0, done.stdout
    target.uninstall(root=checkout)
    assert tree(target.purelib) == {}


def test_what_is_no_version_number_is_refused(target: Target, checkout: Path) -> None:
    version = checkout / "sglang_weight_hook" / "__init__.py"
    version.write_text('__version__ = "next/../one"\n')
    assert re.search("'next/../one', which is none", target.refused(INSTALL, root=checkout))
