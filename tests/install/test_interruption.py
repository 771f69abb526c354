"""Killed at any change to the file system, or out of disk space there.

After a kill every interpreter starts silently, and the next run of either script finishes the
job.  After an error that the installer lives to see, site-packages is what it was.
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import ENVIRONMENT, INSTALL, UNINSTALL, Target, tree

DRIVER = Path(__file__).with_name("kill_at.py")

KILLED = -9


def run(
    target: Target, checkout: Path, fault: str, number: int, action: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [target.python, "-I", "-B", DRIVER, checkout, fault, str(number), action],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )


class Before:
    """A state of site-packages to begin with, kept as a copy because it is needed often."""

    def __init__(self, target: Target, checkout: Path, kind: str) -> None:
        self.target = target
        self.checkout = checkout
        self.copy = checkout.parent / "before"
        version = checkout / "sglang_weight_hook" / "__init__.py"
        extra = checkout / "sglang_weight_hook" / "gone_since.py"
        extra.write_text("")
        if kind in ("older", "same"):
            assert run(target, checkout, "kill", 0, "install").returncode == 0
        elif kind == "seed":
            for name in ("sglang_patch_loader.py", "sglang_weight_hook_patch_core.py"):
                (target.purelib / name).write_text("")
            (target.purelib / "sglang_injector.pth").write_text("import sglang_patch_loader\n")
        elif kind == "others":
            (target.purelib / "__pycache__").mkdir()
        if kind != "same":
            extra.unlink()
            version.write_text('__version__ = "0.1.0"\n')
        self.state = tree(target.purelib)
        shutil.copytree(target.purelib, self.copy, symlinks=True)

    def killed(self, fault: str, action: str) -> Iterator[int]:
        """For N = 1, 2, ...: the state from before; then the action was stopped at change N."""
        for number in itertools.count(1):
            self.target.empty()
            shutil.copytree(self.copy, self.target.purelib, symlinks=True, dirs_exist_ok=True)
            done = run(self.target, self.checkout, fault, number, action)
            if done.returncode == 0:
                assert number > 8, "the driver caught nothing"
                return
            assert done.returncode == (KILLED if fault == "kill" else 1), done.stderr
            # Without a .pth there is nothing that could speak.
            if (self.target.purelib / "sglang_injector.pth").exists():
                start = self.target.run("-B", "-c", "pass")
                assert (start.returncode, start.stdout, start.stderr) == (0, "", "")
            yield number


def finish(target: Target, checkout: Path, action: str) -> set[str]:
    done = run(target, checkout, "kill", 0, action)
    assert (done.returncode, done.stderr) == (0, "")
    return set(tree(target.purelib))


@pytest.mark.parametrize("kind", ["nothing", "older", "seed", "others"])
def test_an_installation_killed_anywhere_is_finished_or_removed(
    target: Target, checkout: Path, kind: str
) -> None:
    before = Before(target, checkout, kind)
    whole = finish(target, checkout, "install")
    for number in before.killed("kill", "install"):
        # In turn, because each takes its time: mended, mended and then removed, removed.
        if number % 4:
            assert finish(target, checkout, "install") == whole
        if number % 2 == 0:
            left = finish(target, checkout, "uninstall")
            assert left == ({"__pycache__"} if kind == "others" else set())


def test_a_removal_killed_anywhere_is_finished(target: Target, checkout: Path) -> None:
    before = Before(target, checkout, "same")
    for number in before.killed("kill", "uninstall"):
        if number % 3 == 0:
            assert finish(target, checkout, "install") == set(before.state)
        assert finish(target, checkout, "uninstall") == set()


@pytest.mark.parametrize("kind", ["nothing", "older"])
def test_an_error_anywhere_puts_everything_back(target: Target, checkout: Path, kind: str) -> None:
    before = Before(target, checkout, kind)
    for _ in before.killed("enospc", "install"):
        assert tree(target.purelib) == before.state


def test_the_real_scripts_finish_what_was_killed(target: Target, checkout: Path) -> None:
    Before(target, checkout, "older")
    assert run(target, checkout, "kill", 25, "install").returncode == KILLED
    done = target.script(INSTALL, "--check", root=checkout)
    assert done.returncode == 1
    assert "an installation was interrupted" in done.stdout
    target.install(root=checkout)
    assert target.script(INSTALL, "--check", root=checkout).returncode == 0
    assert target.script(UNINSTALL, root=checkout).returncode == 0
    assert tree(target.purelib) == {}
