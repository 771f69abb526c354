"""Installing the wheel with pip: the same files in the same places as by script.

Builds the wheel, for which pip fetches hatchling from the package registry; deselect with
``-m 'not registry'``.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import ENVIRONMENT, INSTALL, UNINSTALL, Target, tree

pytestmark = pytest.mark.registry


@pytest.fixture(scope="module")
def with_pip(tmp_path_factory: pytest.TempPathFactory) -> Target:
    place = tmp_path_factory.mktemp("pip-") / "venv"
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    purelib = sysconfig.get_path("purelib", vars={"base": str(place)})
    return Target(place / "bin" / "python", Path(purelib), "")


@pytest.fixture
def environment(with_pip: Target) -> Iterator[Target]:
    before = tree(with_pip.purelib)
    yield with_pip
    pip(with_pip, "uninstall", "-y", "sglang-weight-hook")
    with_pip.script(UNINSTALL)
    assert {path for path in tree(with_pip.purelib) if "sglang" in path} == set()
    assert {path for path in before if "sglang" in path} == set()


def pip(target: Target, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [target.python, "-m", "pip", "--disable-pip-version-check", *arguments],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=120,
        check=False,
    )


def own_files(found: set[str]) -> set[str]:
    return {
        path
        for path in found
        if "sglang" in path and "dist-info" not in path and not path.endswith("__pycache__")
    }


def test_the_wheel_puts_the_same_files_in_the_same_places(environment: Target, wheel: Path) -> None:
    environment.install()
    by_script = own_files(set(tree(environment.purelib)))
    environment.uninstall()
    done = pip(environment, "install", "--no-index", str(wheel))
    assert done.returncode == 0, done.stderr
    assert own_files(set(tree(environment.purelib))) == by_script
    assert environment.finders() == 1
    command = subprocess.run(
        [environment.python.with_name("sglang-weight-hook"), "--help"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )
    # Its output needs the extra `cli`.
    assert command.returncode == 2
    assert "pip install typer rich" in command.stderr


def test_script_and_wheel_write_the_same_metadata(environment: Target, wheel: Path) -> None:
    environment.install()
    (record,) = environment.purelib.glob("sglang_weight_hook-*.dist-info")
    ours = (record / "entry_points.txt").read_text()
    licence = (record / "LICENSE").read_bytes()
    metadata = (record / "METADATA").read_text().splitlines()
    with zipfile.ZipFile(wheel) as archive:
        place = record.name
        theirs = archive.read(f"{place}/entry_points.txt").decode()
        assert archive.read(f"{place}/licenses/LICENSE") == licence
        for line in archive.read(f"{place}/METADATA").decode().splitlines():
            if line.startswith(("Name:", "Version:", "Summary:", "Requires-Python:")):
                assert line in metadata
    # The wheel also has the console script, which lies outside purelib.
    assert set(ours.split("\n")) < set(theirs.split("\n"))


def test_pip_uninstall_leaves_nothing(environment: Target, wheel: Path) -> None:
    before = tree(environment.purelib)
    assert pip(environment, "install", "--no-index", str(wheel)).returncode == 0
    environment.run("-c", "import sglang_weight_hook_patch_core")
    assert pip(environment, "uninstall", "-y", "sglang-weight-hook").returncode == 0
    after = tree(environment.purelib)
    # pip compiles files of its own while it runs, and leaves the directory in which it put
    # the compiled files of top-level modules.
    assert {
        path for path in set(after) ^ set(before) if not path.startswith(("pip/", "setuptools/"))
    } <= {"__pycache__"}
    assert not list(environment.python.parent.glob("sglang*"))


def test_the_scripts_leave_what_pip_installed_to_pip(environment: Target, wheel: Path) -> None:
    assert pip(environment, "install", "--no-index", str(wheel)).returncode == 0
    for script in (INSTALL, UNINSTALL):
        said = environment.refused(script)
        assert "was installed here by pip; remove it with `pip uninstall" in said
    done = environment.script(INSTALL, "--check")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "by pip" in done.stdout


def test_pip_sees_and_removes_what_the_script_installed(environment: Target) -> None:
    environment.install()
    assert "sglang-weight-hook 0.1.0" in " ".join(pip(environment, "list").stdout.split())
    assert pip(environment, "check").returncode == 0
    done = pip(environment, "uninstall", "-y", "sglang-weight-hook")
    assert "Successfully uninstalled sglang-weight-hook-0.1.0" in done.stdout
    assert environment.finders() == 0
    assert own_files(set(tree(environment.purelib))) == set()


def test_pip_replaces_what_the_script_installed(environment: Target, wheel: Path) -> None:
    environment.install()
    done = pip(environment, "install", "--no-index", "--force-reinstall", str(wheel))
    assert done.returncode == 0, done.stderr
    done = environment.script(INSTALL, "--check")
    assert done.returncode == 0, done.stdout
    assert "by pip" in done.stdout


def test_an_editable_installation_is_live_and_follows_the_checkout(
    environment: Target, source: Path
) -> None:
    # With the caller's own environment, for the registry: pip builds it anew.
    subprocess.run(
        [environment.python, "-m", "pip", "install", "-q", "--no-deps", "-e", source],
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    assert environment.finders() == 1
    done = environment.run("-c", "import sglang_weight_hook as h; print(h.__file__)")
    assert done.stdout == f"{source / 'sglang_weight_hook' / '__init__.py'}\n"
    for script in (INSTALL, UNINSTALL):
        assert "was installed here by pip" in environment.refused(script)
    done = environment.script(INSTALL, "--check")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert pip(environment, "uninstall", "-y", "sglang-weight-hook").returncode == 0
    assert not [path for path in tree(environment.purelib) if "sglang" in path]
    assert environment.finders() == 0


def test_the_reader_alone_needs_neither_sglang_nor_torch(
    environment: Target, wheel: Path, tmp_path: Path
) -> None:
    subprocess.run(
        [environment.python, "-m", "pip", "install", "-q", f"{wheel}[cli]"],
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    command = [str(environment.python.with_name("sglang-weight-hook"))]
    for arguments in (["--help"], ["show", "--help"]):
        done = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, env=ENVIRONMENT, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
    done = environment.run(
        "-c",
        "import sglang_weight_hook, sys\n"
        f"print(sglang_weight_hook.open_directory({str(tmp_path)!r}).slots())\n"
        "print('torch' in sys.modules, 'sglang' in sys.modules)",
    )
    assert (done.stdout, done.stderr) == ("[]\nFalse False\n", "")
