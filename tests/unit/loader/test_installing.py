"""Installing the loader: once, only where it is switched on, and at no cost.

The package ``sglang`` here is a fake with real files under the real names; ``tests/install``
has the hook in real environments, ``tests/real_sglang`` the real package.
"""

from __future__ import annotations

import sys

import pytest
from fake_package import INSTALL, PATCHED, RUNNER, RunPython

import sglang_patch_loader as loader
import sglang_weight_hook_patch_core as core


def test_the_loaders_targets_are_the_modules_of_the_cores_table() -> None:
    assert loader.TARGETS == core.TARGET_MODULES
    assert core.__name__ == loader.CORE


def test_installing_twice_leaves_one_finder() -> None:
    loader.install()
    loader.install()
    assert [type(finder).__name__ for finder in sys.meta_path].count("_Finder") == 1
    assert loader.is_installed()
    loader.uninstall()
    assert not loader.is_installed()


def test_a_reloaded_loader_does_not_install_a_second_finder(python: RunPython) -> None:
    done = python(
        INSTALL
        + """
import importlib, sys
importlib.reload(sglang_patch_loader).install()
print([type(finder).__name__ for finder in sys.meta_path].count("_Finder"))
"""
    )
    assert done.stdout == "1\n"


def test_the_off_switch_leaves_the_meta_path_and_the_imports_alone(python: RunPython) -> None:
    done = python(
        "import sys; before = list(sys.meta_path)\n"
        + INSTALL
        + "assert sys.meta_path == before\n"
        + f"from {RUNNER} import ModelRunner; print({PATCHED})\n"
        + "assert 'sglang_weight_hook_patch_core' not in sys.modules",
        SGLANG_WEIGHT_HOOK="0",
    )
    assert done.stdout == "False\n"


@pytest.mark.parametrize("value", ["1", "", "yes"])
def test_any_other_value_of_the_switch_leaves_it_on(value: str, python: RunPython) -> None:
    code = INSTALL + f"from {RUNNER} import ModelRunner; print({PATCHED})"
    assert python(code, SGLANG_WEIGHT_HOOK=value).stdout == "True\n"


def test_installing_imports_nothing_but_the_loader(run_python: RunPython) -> None:
    code = "import sys; before = set(sys.modules)\n%sprint(sorted(set(sys.modules) - before))"
    done = run_python("-c", code % INSTALL)
    assert done.stdout == "['sglang_patch_loader']\n"
    assert done.stderr == ""


def test_an_import_that_is_not_of_a_target_costs_no_import_of_the_core(python: RunPython) -> None:
    done = python(
        INSTALL
        + """
import sys, sglang.srt.model_executor, json, email
print([name for name in sys.modules if name.startswith("sglang_weight_hook")])
"""
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_an_installation_that_fails_never_raises(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loader, "_Finder", None)
    loader.install()
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv(loader.DEBUG_SWITCH, "1")
    loader.install()
    out, err = capsys.readouterr()
    assert out == ""
    assert "not installed" in err
