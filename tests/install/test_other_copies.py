"""Another copy of the hook, in the user site: what this user's interpreters really load."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from .conftest import (
    CARRIED,
    INSTALL,
    ROOT,
    UNINSTALL,
    Target,
    hand_made,
    make_target,
    tree,
)


class Machine:
    """A Python with a user site (a virtual environment has none), and an old copy to put there."""

    def __init__(self, target: Target, old: Path, home: Path, root: Path) -> None:
        self.target = target
        self.root = root
        self.old = old
        self.environment = {"HOME": str(home)}
        version = f"python{target.version}"
        self.user_site = home / ".local" / "lib" / version / "site-packages"
        self.loader = self.user_site / "sglang_patch_loader.py"

    def script(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.target.script(name, *arguments, root=self.root, environment=self.environment)

    def refused(self, name: str) -> str:
        return self.target.refused(name, root=self.root, environment=self.environment)

    def shadow(self, *names: str) -> None:
        """Put the old copy, or these files of it, into the user site."""
        self.user_site.mkdir(parents=True, exist_ok=True)
        for path in self.old.iterdir():
            if not names or path.name in names:
                copy = shutil.copytree if path.is_dir() else shutil.copy2
                copy(path, self.user_site / path.name)

    def empty(self) -> None:
        self.target.empty()
        shutil.rmtree(self.user_site, ignore_errors=True)


@pytest.fixture(scope="module")
def _machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    place = tmp_path_factory.mktemp("machine-")
    target = hand_made(place / "python", "3.11")
    old = make_target(place / "old", "3.11")
    root = place / "checkout"  # a copy, because the checkout may be worked on meanwhile
    ignored = shutil.ignore_patterns("__pycache__")
    root.mkdir()
    for name in (*CARRIED, INSTALL, UNINSTALL):
        shutil.copy2(ROOT / name, root)
    for name in ("installer", "sglang_weight_hook"):
        shutil.copytree(ROOT / name, root / name, ignore=ignored)
    return Machine(target, old.purelib, place / "home", root)


@pytest.fixture
def machine(_machine: Machine, checkout: Path) -> Machine:
    _machine.empty()
    if not list(_machine.old.iterdir()):
        old = Target(_machine.old.parents[2] / "bin" / "python", _machine.old, "3.11")
        old.install(root=checkout)
    return _machine


def test_installing_behind_another_copy_is_refused(machine: Machine) -> None:
    machine.shadow()
    said = machine.refused(INSTALL)
    assert f"another copy is loaded instead, from {machine.loader}" in said
    assert "or --force" in said
    assert tree(machine.target.purelib) == {}
    done = machine.script(INSTALL, "--force")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Not live   in an interpreter as this user starts it (without -I) another copy is " in (
        done.stdout
    )
    assert str(machine.loader) in done.stdout


def test_a_copy_that_came_later_is_seen_by_all(machine: Machine) -> None:
    target, environment = machine.target, machine.environment
    target.install(root=machine.root)
    done = machine.script(INSTALL, "--check")
    assert done.returncode == 0, done.stdout
    machine.shadow()

    done = machine.script(INSTALL, "--check")
    assert done.returncode == 1
    assert f"another copy is loaded instead, from {machine.loader}" in done.stdout
    said = machine.refused(INSTALL)
    assert "every file is in place, but the hook is not live" in said
    doctor = target.run("-I", "-m", "sglang_weight_hook", "doctor", environment=environment)
    assert doctor.returncode == 3
    assert str(machine.loader) in doctor.stdout

    for text in ("Removed    ", "is not installed"):
        done = machine.script(UNINSTALL)
        assert (done.returncode, done.stderr) == (0, "")
        assert text in done.stdout
        assert f"Still live in this user's interpreters, from {machine.loader}" in done.stdout
    assert tree(target.purelib) == {}
    assert target.finders(environment=environment) == 1


def test_the_doctor_sees_a_loader_that_is_not_the_librarys(machine: Machine) -> None:
    target, environment = machine.target, machine.environment
    target.install(root=machine.root)
    machine.shadow("sglang_patch_loader.py")
    for flags in ((), ("-s",)):
        doctor = target.run(*flags, "-m", "sglang_weight_hook", "doctor", environment=environment)
        assert doctor.returncode == 3, doctor.stdout
        assert str(machine.loader) in doctor.stdout
    quiet = target.run("-m", "sglang_weight_hook", "doctor")
    assert "another copy" not in quiet.stdout


def test_a_library_of_another_copy_is_no_installation(machine: Machine) -> None:
    machine.shadow("sglang_weight_hook")
    said = machine.refused(INSTALL)
    assert "another copy of sglang_weight_hook is loaded instead" in said
    assert str(machine.user_site) in said


def test_after_a_removal_nothing_more_is_live(machine: Machine) -> None:
    machine.target.install(root=machine.root)
    done = machine.script(UNINSTALL)
    assert "Still live" not in done.stdout
    assert machine.target.finders(environment=machine.environment) == 0
