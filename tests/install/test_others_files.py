"""Files at the hook's names that somebody else put there are neither written over nor removed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from .conftest import INSTALL, ROOT, UNINSTALL, Target, tree

LOADER = "sglang_patch_loader.py"


def fork(target: Target, checkout: Path, kind: str = "wheel") -> None:
    """Another distribution with files at our names, the same ones even, installed by pip."""
    names = ("sglang_injector.pth", "sglang_injector.start", LOADER,
             "sglang_weight_hook_patch_core.py")  # fmt: skip
    for name in names:
        shutil.copy2(checkout / name, target.purelib)
    package = target.purelib / "sglang_weight_hook"
    shutil.copytree(checkout / "sglang_weight_hook", package)
    listed = [*names, *(f"sglang_weight_hook/{path.name}" for path in package.iterdir())]
    if kind == "wheel":
        information = target.purelib / "acme_sglang_hook-3.1.dist-info"
        information.mkdir()
        # As pip may write them: relative, absolute, by a detour.
        listed[0] = str(target.purelib / listed[0])
        listed[1] = f"../site-packages/{listed[1]}"
        (information / "RECORD").write_text("".join(f'"{path}",,\n' for path in listed))
        (information / "INSTALLER").write_text("pip\n")
    else:
        information = target.purelib / "acme_sglang_hook-3.1.egg-info"
        information.mkdir()
        (information / "installed-files.txt").write_text("".join(f"../{path}\n" for path in listed))
    target.run("-c", "import sglang_weight_hook_patch_core")  # compiles


@pytest.mark.parametrize("kind", ["wheel", "egg"])
def test_a_fork_of_another_name_is_left_alone(target: Target, checkout: Path, kind: str) -> None:
    fork(target, checkout, kind)
    before = tree(target.purelib)
    for root in (ROOT, checkout):  # other contents, and the very same
        said = target.refused(INSTALL, root=root)
        assert "belongs to acme_sglang_hook-3.1, by its RECORD" in said
        assert "--force" in said
        done = target.script(UNINSTALL, root=root)
        assert (done.returncode, done.stderr) == (0, "")
        assert "is not installed" in done.stdout
        assert f"Left       {LOADER}, which belongs to acme_sglang_hook-3.1" in done.stdout
        assert tree(target.purelib) == before


def test_over_a_fork_by_force_and_out_again_by_force(target: Target, checkout: Path) -> None:
    fork(target, checkout)
    target.install("--force")
    assert target.finders() == 1
    done = target.script(INSTALL, "--check")
    assert done.returncode == 1
    assert "belongs to acme_sglang_hook-3.1" in done.stdout
    said = target.refused(UNINSTALL)
    assert "belongs to acme_sglang_hook-3.1 too" in said
    assert "--force" in said
    done = target.script(UNINSTALL, "--force")
    assert (done.returncode, done.stderr) == (0, "")
    left = {path for path, (kind, _, _) in tree(target.purelib).items() if kind.startswith("file")}
    assert left == {f"acme_sglang_hook-3.1.dist-info/{name}" for name in ("INSTALLER", "RECORD")}


@pytest.mark.parametrize(
    "name",
    [LOADER, "sglang_weight_hook_patch_core.py", "sglang_injector.pth", "sglang_injector.start",
     "sglang_weight_hook/__init__.py"],
)  # fmt: skip
def test_a_users_own_file_of_that_name_stays(target: Target, name: str) -> None:
    own = target.purelib / name
    own.parent.mkdir(exist_ok=True)
    own.write_text("# mine\n")
    if name.endswith(".py"):
        target.run("-c", f"import {own.stem if own.stem != '__init__' else own.parent.name}")
    before = tree(target.purelib)
    done = target.script(UNINSTALL)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"Left       {name}, which no record says is the hook's" in done.stdout
    assert tree(target.purelib) == before
    said = target.refused(INSTALL)
    assert str(own) in said
    assert "no record says that it is the hook's" in said
    target.install("--force")
    target.uninstall()
    assert {path for path in tree(target.purelib) if not path.startswith("sglang_weight_hook")} <= {
        "__pycache__"
    }


def test_directories_that_were_there_stay(target: Target) -> None:
    for name in ("sglang_weight_hook", "sglang_weight_hook/reader"):
        (target.purelib / name).mkdir()
    (target.purelib / "sglang_weight_hook" / "notes.txt").write_text("mine\n")
    before = tree(target.purelib)
    target.install()
    target.install()
    target.uninstall()
    assert tree(target.purelib) == before


def test_records_that_cannot_be_read_are_passed_over(target: Target) -> None:
    contents = (
        b"\0sglang_patch_loader.py",
        b'"sglang_weight_hook' + b"x" * 200_000,
        b"\xff,\n" * 9,
    )
    for number, data in enumerate(contents):
        information = target.purelib / f"odd{number}-1.dist-info"
        information.mkdir()
        (information / "RECORD").write_bytes(data)
    before = tree(target.purelib)
    target.install()
    target.uninstall()
    assert tree(target.purelib) == before


@pytest.mark.parametrize(
    ("installer", "advice"),
    [
        ("pip", "by pip; remove it with `pip uninstall sglang-weight-hook`."),
        ("uv", "by uv; remove it with `uv pip uninstall sglang-weight-hook`."),
        ("Poetry 1.8.2", "by Poetry 1.8.2; remove it with `poetry remove sglang-weight-hook`."),
        ("poetry 1.8.2", "by poetry 1.8.2; remove it with `poetry remove sglang-weight-hook`."),
        ("pdm", "by pdm; remove it with `pdm remove sglang-weight-hook`."),
        ("conda", "by conda; remove it with `conda remove sglang-weight-hook`."),
        ("bazel rules 3", "by bazel rules 3; remove it with that tool."),
        ("odd\x1b[31m\nname", "by odd[31m; remove it with that tool."),
    ],
)
def test_another_installer_is_named_with_the_command_that_it_has(
    target: Target, installer: str, advice: str
) -> None:
    information = target.purelib / "sglang_weight_hook-0.1.0.dist-info"
    information.mkdir()
    (information / "INSTALLER").write_text(installer + "\n")
    for script in (INSTALL, UNINSTALL):
        assert target.refused(script).endswith(advice + "\n")
