"""What needs numpy says so in a sentence where the command was installed without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bytes_owner import started

pytest.importorskip("typer")
pytest.importorskip("torch")

WITHOUT = """
import sys
for name in ("numpy", "ml_dtypes", "safetensors"):
    sys.modules[name] = None
from sglang_weight_hook.commands.entry import main
sys.argv[0] = "sglang-weight-hook"
sys.exit(main())
"""


def test_it_is_a_sentence(
    start_python: Callable[..., Any], run_python: Callable[..., Any], maps: Path
) -> None:
    started(start_python, maps, "even")
    for command in (
        ["checksum"],
        ["scrub", "--once"],
        ["save", "0", "saved.safetensors"],
        ["compare", "0", "0"],
    ):
        done = run_python("-c", WITHOUT, *command, check=False)
        assert done.returncode == 1, command
        assert done.stdout == "", command
        assert done.stderr.count("\n") == 1, command
        assert "numpy, which is not installed here; pip install numpy" in done.stderr
    for command in (["slots"], ["show"], ["report"], ["verify"], ["history"]):
        assert run_python("-c", WITHOUT, *command).stdout, command
