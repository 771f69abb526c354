"""Weights read under a server that updates without pause: no wrong byte, whatever the way.

The owner's model holds one number all over each tensor, another one after each update.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_weight_hook import Changed
from tests.stress.processes import ROOT
from tests.unit.bytes_owner import OWNER, BytesOwner

numpy = pytest.importorskip("numpy")
pytest.importorskip("torch")


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[BytesOwner]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "unit")]),
        "SGLANG_WEIGHT_HOOK_DIR": str(tmp_path / "maps"),
        "SGLANG_WEIGHT_HOOK_SHARE": "1",
    }
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, "even"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield BytesOwner(process, tmp_path / "maps")
        process.kill()


@pytest.mark.parametrize("way", ["process", "owner"])
def test_no_read_is_wrong(owner: BytesOwner, way: str, is_long: bool) -> None:
    reads = (10_000 if way == "process" else 2_000) if is_long else 500
    owner.tell("spin 0.002")
    whole = changed = 0
    deadline = time.monotonic() + (600 if is_long else 60)
    buffer = numpy.empty(3023, numpy.int32)
    while whole < reads and time.monotonic() < deadline:
        try:
            with owner.read().open_memory(via=way) as memory:
                first = memory.array("part0")[0]
                for n in range(24):
                    count = memory.read_into(f"part{n}", buffer) // 4
                    assert numpy.all(buffer[:count] == first), (n, first)
                    whole += 1
        except Changed:
            changed += 1
    updates = int(owner.tell("rest"))
    print(f"\n{way}: {whole} reads of one generation, {changed} refused, {updates} updates")
    assert whole >= reads
    assert changed > 0
