"""Pulls through real transfer engines under a server that updates without pause: no wrong byte.

The server's side is the hook's own subscriber, the engine Mooncake or NIXL itself.  The model holds
one number all over each tensor, another one after each update.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from sglang_weight_hook import Changed, NotReady
from sglang_weight_hook.memory.errors import TransferWarning
from sglang_weight_hook.memory.pull import pull
from tests.stress.processes import ROOT
from tests.unit.bytes_owner import OWNER, BytesOwner

numpy = pytest.importorskip("numpy")
pytest.importorskip("torch")


@pytest.mark.parametrize(("engine", "module"), [("mooncake", "mooncake"), ("nixl", "nixl_cu12")])
def test_no_pull_is_mixed(engine: str, module: str, tmp_path: Path, is_long: bool) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{engine} is not installed")
    pulls = 1000 if is_long else 50
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "unit")]),
        "SGLANG_WEIGHT_HOOK_DIR": str(tmp_path / "maps"),
        "SGLANG_WEIGHT_HOOK_SUBSCRIBERS": engine,
        "MC_LOG_LEVEL": "ERROR",
    }
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, "even"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            owner = BytesOwner(process, tmp_path / "maps")
            whole, overtaken, numbers = _pulled(owner, engine, pulls, 1800 if is_long else 120)
        finally:
            process.kill()
    assert whole >= pulls
    assert overtaken > pulls // 20, "it was not tried"
    assert numbers > pulls // 20, "it was the same update all along"


def _pulled(owner: BytesOwner, engine: str, pulls: int, seconds: float) -> tuple[int, int, int]:
    """How many were whole, how many an update overtook, and how many updates were seen."""
    owner.tell("fill")
    owner.tell("spin 0.02")
    whole = overtaken = 0
    seen = set()
    deadline = time.monotonic() + seconds
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TransferWarning)
        while whole < pulls and time.monotonic() < deadline:
            try:
                pulled = pull(owner.slot, attempts=1, via=engine)
            except (Changed, NotReady):  # and nothing else: the server lives
                overtaken += 1
                continue
            values = {int(n) for name in pulled for n in numpy.unique(pulled.array(name))}
            assert len(values) == 1, values
            assert len(pulled) == 24
            seen |= values
            whole += 1
    owner.tell("rest")
    sys.stdout.write(f"{engine}: {whole} whole, {overtaken} overtaken, {len(seen)} updates seen\n")
    return whole, overtaken, len(seen)
