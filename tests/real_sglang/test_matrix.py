"""Every SGLang line that a CPU can serve: one real server each (`make test-matrix`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cpu_sglang.environment import ensure_environment
from cpu_sglang.releases import RELEASES
from tests.real_sglang import scenario

ROWS: list[tuple[str, int, str]] = []

pytestmark = [pytest.mark.real_sglang, pytest.mark.matrix]


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    """Print one row a release, and write them where MATRIX_TABLE says."""
    yield
    lines = ["| SGLang | tp | tested | tensors | start (s) |", "|---|---|---|---|---|"]
    lines += [text for _, _, text in ROWS]
    print("\n" + "\n".join(lines))
    path = os.environ.get("MATRIX_TABLE")
    if path:
        Path(path).write_text("\n".join(lines) + "\n")


# Tensor parallel 2 on the newest line, the last with methods on ModelRunner, and the oldest.
CASES = [(name, 1) for name in RELEASES] + [(n, 2) for n in ("0.5.23", "0.5.15.post1", "0.4.7")]


@pytest.mark.parametrize(("release", "tp"), CASES)
def test_the_map_is_true_on_every_release_line(
    release: str,
    tp: int,
    hooked_python: Path,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    environment = ensure_environment(release)
    try:
        row = scenario.run(environment, hooked_python, checkpoint(1), checkpoint(2), tmp_path, tp)
    except BaseException as error:
        what = str(error).splitlines()[0][:100]
        ROWS.append((release, tp, f"| {release} | {tp} | not: {what} | | |"))
        raise
    seen = ", ".join(row.seen)
    ROWS.append(
        (release, tp, f"| {release} | {tp} | {seen} | {row.tensors} | {row.startup_seconds:.0f} |")
    )
