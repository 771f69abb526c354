"""Uninstalling leaves site-packages as it was, byte for byte."""

from __future__ import annotations

import shutil
from pathlib import Path

from .conftest import INSTALL, UNINSTALL, Target, interpreter, tree


def test_site_packages_is_what_it_was(target: Target) -> None:
    other = target.purelib / "somebody"
    other.mkdir()
    (other / "__init__.py").write_text("")
    (target.purelib / "somebody-1.0.dist-info").mkdir()
    (target.purelib / "somebody.pth").write_text("# nothing\n")
    (target.purelib / "link").symlink_to("somebody.pth")
    before = tree(target.purelib)
    target.install()
    target.run("-c", "import sglang_weight_hook_patch_core")
    target.uninstall()
    assert tree(target.purelib) == before


def test_compiled_files_of_every_python_and_level_go(target: Target) -> None:
    target.install()
    imports = "import sglang_weight_hook, sglang_weight_hook_patch_core, sglang_patch_loader"
    for level in ("-O", "-OO"):
        target.run(level, "-c", imports)
    for version in ("3.9", "3.13"):
        base = interpreter(version)
        if base is not None:
            Target(base, target.purelib, version).run(
                "-c", imports, environment={"PYTHONPATH": str(target.purelib)}
            )
    # An interpreter that was killed while it wrote one.
    (target.purelib / "__pycache__" / "sglang_patch_loader.cpython-311.pyc.140012").write_text("")
    assert any(".opt-2.pyc" in path for path in tree(target.purelib))
    target.uninstall()
    assert tree(target.purelib) == {}


def test_a_pycache_that_was_there_stays(target: Target) -> None:
    cache = target.purelib / "__pycache__"
    cache.mkdir()
    for _ in range(2):  # empty, then with somebody's file
        before = tree(target.purelib)
        target.install()
        target.install()
        target.uninstall()
        assert tree(target.purelib) == before
        (cache / "six.cpython-311.pyc").write_bytes(b"not ours")
        (cache / "sglang_patch_loader_too.cpython-311.pyc").write_bytes(b"nor this")


def test_the_record_of_the_state_before_survives_upgrades(target: Target, checkout: Path) -> None:
    for existed in (False, True):
        target.empty()
        if existed:
            (target.purelib / "__pycache__").mkdir()
        before = tree(target.purelib)
        target.install(root=checkout)
        target.install()
        target.uninstall()
        assert tree(target.purelib) == before


def test_a_users_own_file_in_the_package_stays_and_is_named(target: Target) -> None:
    target.install()
    notes = target.purelib / "sglang_weight_hook" / "notes.txt"
    notes.write_text("mine\n")
    done = target.script(UNINSTALL)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Left       sglang_weight_hook, which holds files" in done.stdout
    assert set(tree(target.purelib)) == {"sglang_weight_hook", "sglang_weight_hook/notes.txt"}


def test_nothing_installed_is_said_and_is_no_error(target: Target) -> None:
    done = target.script(UNINSTALL)
    assert (done.returncode, done.stderr) == (0, "")
    assert "is not installed" in done.stdout


def test_another_version_can_be_removed(target: Target, checkout: Path) -> None:
    (checkout / "sglang_weight_hook" / "gone_since.py").write_text("")
    target.install(root=checkout)
    target.uninstall()
    assert tree(target.purelib) == {}


def test_a_record_that_points_outside_purelib_is_not_believed(
    target: Target, tmp_path: Path
) -> None:
    target.install()
    (target.purelib / "six.py").write_text("")
    precious = tmp_path / "precious"
    precious.write_text("")
    (record,) = target.purelib.glob("*.dist-info/RECORD")
    with record.open("a") as stream:
        stream.write(
            f"six.py,,\n{precious},,\nsglang_weight_hook/../six.py,,\n../../../pyvenv.cfg,,\n"
        )
    target.uninstall()
    assert set(tree(target.purelib)) == {"six.py"}
    assert precious.exists()
    assert (target.python.parent.parent / "pyvenv.cfg").exists()


def test_a_link_to_the_checkout_is_not_emptied(target: Target, checkout: Path) -> None:
    target.install()
    shutil.rmtree(target.purelib / "sglang_weight_hook")
    (target.purelib / "sglang_weight_hook").symlink_to(checkout / "sglang_weight_hook")
    before = tree(checkout)
    assert "is a symbolic link" in target.refused(UNINSTALL)
    assert "is a symbolic link" in target.refused(INSTALL)
    assert tree(checkout) == before
