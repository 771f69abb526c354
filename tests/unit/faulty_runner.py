"""A fake runner whose methods the real patch core has wrapped, and what must hold after a fault.

Each of the tests of faults breaks one thing: the call must return the identical object, the log
must say it once, and what is published must parse.  ``tests/real_sglang`` has a real server under
some of these faults.
"""

from __future__ import annotations

import json
import logging
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_sglang import FakeRunner

import sglang_weight_hook_patch_core as core

torch = pytest.importorskip("torch")


ANSWER = (True, "Succeeded to update model weights.")
LOADED = object()


class ModelRunner(FakeRunner):
    """A fake of SGLang's class, in the shape of 0.5.9."""

    during_update: Callable[[], None] = staticmethod(lambda: None)

    def load_model(self) -> object:
        return LOADED

    def update_weights_from_disk(self, model_path: str, load_format: str) -> tuple[bool, str]:
        self.during_update()
        return ANSWER

    def update_weights_from_tensor(self, named_tensors: Any) -> tuple[bool, str]:
        return ANSWER


def freshly_patched(monkeypatch: pytest.MonkeyPatch) -> ModelRunner:
    """A runner of a freshly patched class, not yet loaded."""
    sglang = types.ModuleType("sglang")
    sglang.__version__ = "0.5.9"  # type: ignore[attr-defined]
    sglang.__path__ = []
    monkeypatch.setitem(sys.modules, "sglang", sglang)
    # The other modules of a release are not there, and that is not what is tested here.
    monkeypatch.setattr(core, "_report_missing", lambda *arguments: None)
    module = types.ModuleType(core.RUNNER[0])
    module.ModelRunner = type("ModelRunner", (ModelRunner,), {})  # type: ignore[attr-defined]
    core.patch_module(module)
    made: ModelRunner = module.ModelRunner(torch.nn.Linear(4, 3))
    return made


def use(runner: ModelRunner, times: int = 3) -> None:
    """Load and update; every answer must be the original's own."""
    assert runner.load_model() is LOADED
    for _ in range(times):
        assert runner.update_weights_from_disk("path", load_format="auto") is ANSWER
        assert runner.update_weights_from_tensor([("a", None)]) is ANSWER


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno > logging.INFO]


def everything_parses(maps: Path) -> list[str]:
    """Names of the JSON files there, each of which is whole."""
    names = sorted(path.name for path in maps.glob("*.json"))
    for name in names:
        json.loads((maps / name).read_bytes())
    return names


def no_leftovers(maps: Path) -> bool:
    return not [path.name for path in maps.iterdir() if path.name.startswith(".")]


def unfinished(maps: Path) -> bool:
    """Whether the state file, if there is one, speaks of an event that is over as running."""
    path = maps / "weight_state_0.json"
    return path.exists() and json.loads(path.read_bytes())["event"]["finished_at"] is None
