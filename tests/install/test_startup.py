"""What every interpreter of an environment with the hook is like, on each supported Python."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from .conftest import UNINSTALL, Target, make_target, tree

MODULES = "import sys; print('\\n'.join(sorted(sys.modules)))"


def test_the_interpreter_imports_one_extra_module(every_python: Target, tmp_path: Path) -> None:
    bare = make_target(tmp_path / "bare", every_python.version)
    # To read any .pth file at all, Python 3.9 imports _bootlocale and _locale, and 3.13
    # encodings.utf_8_sig: an environment without a single one is not the measure.
    (bare.purelib / "inert.pth").write_text("# nothing\n")
    # And 3.15 imports pkgutil, with all that it needs, for any .start file with a line in it.
    (bare.purelib / "inert.start").write_text("sys:getrecursionlimit\n")
    without = bare.run("-c", MODULES).stdout.split()
    assert every_python.run("-c", MODULES).stdout.split() == sorted(
        [*without, "sglang_patch_loader"]
    )


@pytest.mark.parametrize(
    "flags", [(), ("-I",), ("-E",), ("-s",), ("-S",), ("-O",), ("-W", "error")]
)
def test_it_is_silent(every_python: Target, flags: tuple[str, ...]) -> None:
    done = every_python.run(*flags, "-c", "pass")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("flags", [(), ("-I",), ("-E",), ("-O",)])
def test_the_hook_is_live(every_python: Target, flags: tuple[str, ...]) -> None:
    assert every_python.finders(*flags) == 1


def test_without_site_there_is_no_hook(every_python: Target) -> None:
    assert every_python.finders("-S") == 0


@pytest.mark.parametrize("flags", [(), ("-I",), ("-E",)])
def test_the_switch_adds_no_finder(every_python: Target, flags: tuple[str, ...]) -> None:
    assert every_python.finders(*flags, environment={"SGLANG_WEIGHT_HOOK": "0"}) == 0


def test_processing_the_pth_again_adds_no_finder(every_python: Target) -> None:
    again = f"import site; [site.addsitedir({str(every_python.purelib)!r}, set()) for _ in 'ab']"
    done = every_python.run(
        "-c",
        f"{again}; import sys; "
        "print(sum(type(f).__module__ == 'sglang_patch_loader' for f in sys.meta_path))",
    )
    assert (done.stdout, done.stderr) == ("1\n", "")


def test_starting_writes_nothing_to_site_packages(every_python: Target) -> None:
    # Also holds that the compiled files that were installed are those this Python looks for.
    before = tree(every_python.purelib, times=True)
    every_python.run("-c", "import sglang_patch_loader, sglang_weight_hook_patch_core")
    assert tree(every_python.purelib, times=True) == before


def test_the_library_and_the_core_import_without_torch(every_python: Target) -> None:
    done = every_python.run(
        "-W",
        "error",
        "-c",
        "import sglang_weight_hook, sglang_weight_hook_patch_core, sys\n"
        "print('torch' in sys.modules)",
    )
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_the_metadata_is_that_of_an_installed_package(every_python: Target) -> None:
    done = every_python.run(
        "-c",
        "from importlib import metadata as m\n"
        "d = m.distribution('sglang-weight-hook')\n"
        "print(d.metadata['Name'], d.version == m.version('sglang_weight_hook'))\n"
        "print(all(f.locate().exists() for f in d.files))\n"
        "print([(e.group, e.name, e.value) for e in d.entry_points])\n",
    )
    assert done.stdout.splitlines() == [
        "sglang-weight-hook True",
        "True",
        "[('sglang.srt.plugins', 'sglang_weight_hook', 'sglang_patch_loader:install')]",
    ]


@pytest.mark.parametrize(
    "lost",
    [
        "sglang_weight_hook",
        "sglang_weight_hook/__init__.py",
        "sglang_weight_hook_patch_core.py",
        "__pycache__",
        "sglang_injector.start",
        "sglang_injector.pth",
        "sglang_weight_hook-*.dist-info",
        "sglang_weight_hook-*.dist-info/RECORD",
        "sglang_weight_hook-*.dist-info/METADATA",
    ],
)
def test_without_one_of_its_parts_it_is_silent_and_can_be_removed(
    target: Target, lost: str
) -> None:
    # The loader is not among them: that file's absence under its .pth is what Python itself
    # complains about, so neither script ever leaves it (test_interruption.py).
    target.install()
    (path,) = target.purelib.glob(lost)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    done = target.run("-c", "pass")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = target.script(UNINSTALL)
    assert (done.returncode, done.stderr) == (0, "")
    assert tree(target.purelib) == {}
