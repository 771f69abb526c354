"""The real engines in a process that publishes: what they register, and what ends them."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglang_weight_hook.layout import files

pytest.importorskip("torch")

MODULES = {"mooncake": "mooncake.engine", "nixl": "nixl_cu12._bindings"}
PACKAGES = {"mooncake": "mooncake-transfer-engine-non-cuda", "nixl": "nixl-cu12"}

OWNER = """
import gc, json, os, sys, threading
import torch
from fake_sglang import FakeRunner, event, load, settle, stream, update
from sglang_weight_hook.publisher import subscription
calls = []
runner = FakeRunner(torch.nn.Linear(256, 256))
load(runner)
settle()
engine = subscription.current._threads[0].subscriber._engine
exchange = engine.exchange
engine.exchange = lambda old, new: (calls.append((len(old), len(new))), exchange(old, new))[1]
details = {"tags": None, "physical": True}
"""


@pytest.fixture(params=["mooncake", "nixl"])
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    try:
        importlib.import_module(MODULES[name])
    except ImportError as error:
        pytest.skip(f"{PACKAGES[name]} is not installed, or a Debian package it needs: {error}")
    return name


@pytest.fixture
def owner(engine: str, run_python: Callable[..., Any], tmp_path: Path) -> Callable[[str], Any]:
    def run(code: str) -> Any:
        said = tmp_path / "said"
        done = run_python(
            "-c",
            f"{OWNER}\nsaid = open({str(said)!r}, 'w')\n{code}\nsaid.close()\n",
            SGLANG_WEIGHT_HOOK_SUBSCRIBERS=engine,
            SGLANG_WEIGHT_HOOK_SUBSCRIBER_TIMEOUT="40",
            SGLANG_WEIGHT_HOOK_CHECK_SECONDS="0",
            SGLANG_WEIGHT_HOOK_QUIET_MS="0",
        )
        assert "sglang" not in done.stdout
        return said.read_text()

    return run


def test_each_event_costs_the_calls_that_it_needs(owner: Any, maps: Path, engine: str) -> None:
    said = owner(
        f"""
path = {str(maps / files.TRANSPORT.format("0"))!r}
def entry():
    return json.load(open(path))["engines"][{engine!r}]
assert entry()["state"] == "registered", entry()
assert entry()["regions"] >= 1 and entry()["header"]["size"] == 128
first = entry()
update(runner, during=lambda: runner.model.weight.data.fill_(3))
stream(runner)
assert calls == [], calls
update(runner, during=lambda: setattr(runner.model.weight, "data", torch.ones(256, 256)))
assert len(calls) == 1, calls
assert entry()["state"] == "registered"
event("release_memory_occupation", "release", [runner], details=details)
assert entry()["state"] == "withdrawn" and entry()["regions"] == 0
event("resume_memory_occupation", "resume", [runner], details=details)
assert entry()["state"] == "registered", entry()
said.write(json.dumps([first, entry()]))
"""
    )
    first, last = json.loads(said)
    if engine == "mooncake":
        assert first["session"] == last["session"]
        assert first["session"].startswith("127.0.0.1:")
        assert first["protocol"] == "tcp"
    else:  # a new agent is the fence
        assert first["agent"] != last["agent"]
        assert first["metadata"] != last["metadata"]
        assert (first["backend"], first["module"]) == ("UCX", "nixl_cu12")
    # At the end of the process the slot's transport document went with it.
    assert not (maps / files.TRANSPORT.format("0")).exists()


def test_a_forked_child_ends_and_its_parent_goes_on(owner: Any) -> None:
    said = owner(
        """
for ends in (sys.exit, os._exit):
    child = os.fork()
    if child == 0:
        ends(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
update(runner, during=lambda: setattr(runner.model.weight, "data", torch.ones(256, 256)))
assert calls, "the parent's engine is not asked any more"
said.write("went on")
"""
    )
    assert said == "went on"


def test_an_engine_that_is_missing_is_named(
    run_python: Callable[..., Any], maps: Path, tmp_path: Path
) -> None:
    for name in ("mooncake", "nixl_cu12", "nixl_cu13"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ModuleNotFoundError('no ' + __name__)")
    code = """
import torch
from fake_sglang import FakeRunner, load, settle
runner = FakeRunner(torch.nn.Linear(4, 4))
load(runner); settle()
import os; os._exit(0)
"""
    run_python("-c", code, path=tmp_path, SGLANG_WEIGHT_HOOK_SUBSCRIBERS="mooncake,nixl")
    engines = json.loads((maps / files.TRANSPORT.format("0")).read_bytes())["engines"]
    assert {entry["state"] for entry in engines.values()} == {"failed"}
    assert engines["mooncake"]["problem"].startswith("mooncake is not installed: pip install")
    assert engines["nixl"]["problem"].startswith("nixl cannot be imported (pip install nixl-cu12")
    assert os.stat(maps / files.TRANSPORT.format("0")).st_mode & 0o777 == 0o600
