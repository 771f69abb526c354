"""A fake ``sglang`` on a path of its own, and interpreters that can import it."""

from __future__ import annotations

import subprocess
import textwrap
from pathlib import Path

import pytest
from fake_package import MODEL_RUNNER, WEIGHT_UPDATER, RunPython


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder for sys.path with a fake sglang in it."""
    folder = tmp_path / "site"
    for name, text in {
        "sglang/__init__.py": "__version__ = '0.5.23'\n",
        "sglang/srt/__init__.py": "",
        "sglang/srt/model_executor/__init__.py": "",
        "sglang/srt/model_executor/model_runner.py": MODEL_RUNNER,
        "sglang/srt/model_executor/config.json": "{}",
        "sglang/srt/model_executor/model_runner_components/__init__.py": "",
        "sglang/srt/model_executor/model_runner_components/weight_updater.py": WEIGHT_UPDATER,
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture
def python(run_python: RunPython, package: Path) -> RunPython:
    """Run code where the fake sglang is importable; the hook is not installed by itself."""

    def run(
        code: str, *arguments: str, check: bool = True, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return run_python(
            "-c", textwrap.dedent(code), *arguments, path=package, check=check, **environment
        )

    return run
