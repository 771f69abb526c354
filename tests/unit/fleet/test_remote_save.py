"""Weights of a slot that only a node agent is known for, through a real transfer engine."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from agent_process import ROOT, TOKEN, Agent
from engine_owner import needs, started

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors")

COMMAND = (sys.executable, "-m", "sglang_weight_hook")


def save(path: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, whose engine ends with it, and which knows no directory here."""
    return subprocess.run(
        [*COMMAND, "save", "0", str(path), *map(str, arguments)],
        cwd=path.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MC_LOG_LEVEL": "ERROR", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("engine", ["mooncake", "nixl"])
def test_save_by_the_url_of_an_agent_writes_what_is_written_on_the_slots_own_host(
    engine: str,
    start_python: Callable[..., Any],
    serve: Callable[..., Agent],
    tmp_path: Path,
) -> None:
    needs(engine)
    maps = tmp_path / "maps"
    maps.mkdir()
    owner = started(start_python, maps, engine, "odd")
    (tmp_path / "token").write_text(TOKEN)
    url = serve("--token-file", tmp_path / "token").url
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    here, there = (elsewhere / f"{name}.safetensors" for name in ("here", "there"))

    how = ["--dir", url, "--via", engine]
    how += ["--address", "127.0.0.1"] if engine == "mooncake" else []
    refused = save(there, *how)
    assert refused.returncode == 1
    assert "SGLANG_WEIGHT_HOOK_TOKEN" in refused.stderr
    assert not there.exists()

    done = save(there, *how, SGLANG_WEIGHT_HOOK_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    local = save(here, "--dir", maps)
    assert local.returncode == 0, local.stderr
    # To the last byte, but for the second in which it was written.
    times = [safetensors.safe_open(path, "pt").metadata()["saved_at"] for path in (here, there)]
    written, expected = there.read_bytes(), here.read_bytes()
    assert written.replace(times[1].encode(), times[0].encode(), 1) == expected
    assert there.stat().st_size > 100_000
    saved = safetensors.safe_open(there, "pt")
    data = saved.get_tensor("lm_head.weight").contiguous().view(-1).view(torch.uint8)
    assert hashlib.sha256(data.numpy().tobytes()).hexdigest() == owner.digest("lm_head.weight")
