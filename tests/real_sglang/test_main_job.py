"""The main job on real servers over real HTTP routes: what CI runs.

SGLang 0.5.23 with tensor parallel 1 and 2, and 0.5.15.post1, the last line whose update
methods are on ModelRunner.  The whole list of releases is in test_matrix.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cpu_sglang.environment import ensure_environment
from tests.real_sglang import scenario

pytestmark = pytest.mark.real_sglang


@pytest.mark.parametrize(("release", "tp"), [("0.5.23", 2), ("0.5.15.post1", 1)])
def test_the_map_is_true_after_load_and_every_update(
    release: str,
    tp: int,
    hooked_python: Path,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    environment = ensure_environment(release)
    row = scenario.run(environment, hooked_python, checkpoint(1), checkpoint(2), tmp_path, tp)
    assert "update from tensor" in row.seen
    assert "update from distributed" in row.seen
