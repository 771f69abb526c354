"""A broken core or a failing patch never fails an import.

The package ``sglang`` here is a fake with real files under the real names; ``tests/install``
has the hook in real environments, ``tests/real_sglang`` the real package.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from fake_package import INSTALL, RUNNER, UPDATER, RunPython

import sglang_patch_loader as loader

BROKEN_CORES = {
    "missing": None,
    "raising at import": "raise RuntimeError('half an upgrade')\n",
    "a syntax error": "def (\n",
    "raising": "def patch_module(module): raise RuntimeError('unknown release')\n",
    "empty": "",
}


@pytest.mark.parametrize("text", BROKEN_CORES.values(), ids=list(BROKEN_CORES))
@pytest.mark.parametrize("logs", [True, False], ids=["logging", "no logging"])
def test_a_broken_core_never_fails_the_import_and_is_said_once(
    text: str | None, logs: bool, run_python: RunPython, package: Path
) -> None:
    source = Path(loader.__file__).read_text()
    (package / "sglang_patch_loader.py").write_text(source)
    # Without the repository's root on the path: half of an installation.
    if text is not None:
        (package / "sglang_weight_hook_patch_core.py").write_text(text)
    code = f"""
import sys
sys.path[:] = [{str(package)!r}] + [p for p in sys.path if "lib/python" in p or "lib64" in p]
{"import logging; logging.basicConfig(format='LOGGED %(message)s')" if logs else ""}
{INSTALL}
import importlib, {RUNNER} as module
for _ in range(3):
    importlib.reload(module)
print(module.ModelRunner().load_model())
"""
    done = run_python("-c", textwrap.dedent(code), path=package)
    assert done.stdout == "loaded\n"
    lines = [line for line in done.stderr.splitlines() if RUNNER in line]
    assert len(lines) == 1
    assert "unpatched" in lines[0]
    assert lines[0].startswith("LOGGED ") == logs


def test_a_patch_that_fails_never_fails_the_import_and_is_said_once(
    python: RunPython, package: Path
) -> None:
    done = python(
        INSTALL
        + f"""
import sglang_weight_hook_patch_core as core
def patch_module(module): raise RuntimeError("unknown release")
core.patch_module = patch_module
import importlib, {RUNNER} as module
importlib.reload(module)
sglang_patch_loader.install()
print(module.ModelRunner().load_model())
"""
    )
    assert done.stdout == "loaded\n"
    (line,) = done.stderr.splitlines()
    assert RUNNER in line
    assert "unknown release" in line


def test_nothing_is_ever_written_to_stdout(python: RunPython) -> None:
    done = python(INSTALL + f"import {RUNNER}, {UPDATER}", SGLANG_WEIGHT_HOOK_DEBUG="1", check=True)
    assert done.stdout == ""
