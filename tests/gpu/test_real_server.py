"""A real SGLang on this machine's GPU: ``SGLANG_PYTHON=… pytest -m gpu tests/gpu``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.gpu import real_server

PYTHON = os.environ.get("SGLANG_PYTHON")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not PYTHON, reason="SGLANG_PYTHON names no environment with SGLang"),
]


@pytest.mark.parametrize("name", real_server.ON_ONE_GPU)
def test_every_check_holds_on_a_real_server(name: str) -> None:
    report = real_server.run(Path(PYTHON or ""), [name])
    assert report.rows
    assert not [row for row in report.rows if not row["held"]]
