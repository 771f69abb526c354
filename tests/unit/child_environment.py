"""The environment of an interpreter that a unit test starts."""

from __future__ import annotations

import os
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def environment_for_children(path: Path | None, maps: Path, more: dict[str, str]) -> dict[str, str]:
    """It can import the hook and the tests' modules, and sglang from ``path``."""
    folders = [str(ROOT), str(HERE)]
    if path is not None:
        folders.insert(0, str(path))
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTHON")
    }
    environment["PYTHONPATH"] = os.pathsep.join(folders)
    environment["SGLANG_WEIGHT_HOOK_DIR"] = str(maps)
    environment.update(more)
    return environment
