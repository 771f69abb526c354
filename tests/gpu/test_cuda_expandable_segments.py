"""All of the CUDA tests once more, in a child process with torch's expandable segments."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.cuda_model import IN_CHILD, ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("maps"),
]


def test_all_of_this_holds_with_expandable_segments(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        IN_CHILD: "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    here = Path(__file__).resolve()
    tests = sorted(str(path) for path in here.parent.glob("test_cuda_*.py") if path != here)
    finished = subprocess.run(
        [*command, f"--basetemp={tmp_path / 'child'}", *tests],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-20000:] + finished.stderr[-4000:]
    assert " passed" in finished.stdout, finished.stdout[-4000:]
