"""A process that publishes with today's recorder, and one that reads with the released 0.1."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sglang_weight_hook.reader import Document, open_slot

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WHEEL = HERE / "sglang_weight_hook-0.1.0-py3-none-any.whl"


def environment(*path: Path, **more: str) -> dict[str, str]:
    """For a child that finds what is on ``path`` and nothing of ours besides."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "SGLANG_WEIGHT_HOOK"))
    }
    return {**kept, "PYTHONPATH": os.pathsep.join(map(str, path)), **more}


# What has happened to a server, one after the other, and the state that comes of it.
LIFE: dict[str, tuple[tuple[str, ...], str]] = {
    "loaded": (("load",), "loading"),
    "settled": (("settle",), "ready"),
    "updated": (("update",), "ready"),
    "moved": (("move",), "ready"),
    "streamed": (("stream", "stream", "stream"), "ready"),
    "after sessions": (("session", "session"), "ready"),
    "failed": (("fail",), "failed"),
    "mended": (("update",), "ready"),
    "released": (("release",), "released"),
    "resumed": (("resume", "update"), "ready"),
}
STATES = {name: state for name, (_, state) in LIFE.items()}


class Moment(NamedTuple):
    """What was true and what was read at one moment of a server's life."""

    truth: dict[str, Any]  # torch's own word, by name of the tensor
    today: Document  # as today's reader reads it
    read: dict[str, Any]  # as 0.1 reads it, from inside its wheel
    verified: dict[str, Any]  # what 0.1's verify finds
    maps: Path  # a copy of the documents


class Publisher:
    """A process that takes steps (`publish_today.STEPS`) and tells torch's own word after each."""

    def __init__(self, maps: Path) -> None:
        self.maps = maps
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "publish_today.py")],
            env=environment(ROOT, ROOT / "tests" / "unit", SGLANG_WEIGHT_HOOK_DIR=str(maps)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def take(self, *steps: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        truth: dict[str, Any] = {}
        for step in steps:
            self._process.stdin.write(step + "\n")
            self._process.stdin.flush()
            truth = json.loads(self._process.stdout.readline())
        return truth

    def moment(self, steps: Sequence[str], copy: Path, release: Path) -> Moment:
        truth = self.take(*steps)
        slot = open_slot(str(self.maps), "0")
        deadline = time.monotonic() + 30
        while slot.read_state()["state"] == "updating":  # a stream ends by itself
            assert time.monotonic() < deadline, "the stream does not end"
            time.sleep(0.01)
        today = slot.read()
        read = ask_0_1("read", self.maps)
        verified = ask_0_1("verify", self.maps, release)
        shutil.copytree(self.maps, copy, ignore=shutil.ignore_patterns("*.sock"))
        return Moment(truth, today, read, verified, copy)

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()


def ask_0_1(what: str, maps: Path, release: Path = WHEEL) -> dict[str, Any]:
    """What 0.1, from its wheel or unpacked, says of the one slot in ``maps``."""
    done = subprocess.run(
        [sys.executable, str(HERE / "read_with_0_1.py"), what, str(maps)],
        env=environment(release),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    assert told["version"] == "0.1.0"
    assert told["reader"].startswith(str(release)), told["reader"]
    return told
