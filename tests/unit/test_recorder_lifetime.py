"""The end of a runner, and what a forked child may touch.

The runners are fakes (`fake_sglang`), their models are real torch modules, the files are real.
``tests/real_sglang`` has the same events from a real SGLang.
"""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path

import pytest
from fake_sglang import FakeRunner, event, load, settle, update
from published_files import a_model, generations

from sglang_weight_hook.publisher import recorder
from sglang_weight_hook.reader import open_slot


def test_a_runner_that_is_collected_takes_its_documents_with_it(maps: Path) -> None:
    runner = FakeRunner(a_model())
    load(runner)
    update(runner)
    assert (maps / "weight_update_summary_0.json").exists()
    del runner
    gc.collect()
    settle()  # the next event, of anybody's: the garbage collector itself does nothing
    assert sorted(path.name for path in maps.iterdir()) == [
        "weight_events_0.jsonl",
        "weight_owner_0.lock",
        "weight_saving_0.lock",
    ]
    assert recorder._tracked == {}
    successor = FakeRunner(a_model())
    load(successor)
    assert generations(maps) == (1, 1)


def test_no_model_and_no_tensor_is_kept_alive(runner: FakeRunner) -> None:
    held = [weakref.ref(runner.model), weakref.ref(runner.model[0].weight)]
    update(runner)
    runner.model = None
    gc.collect()
    assert [reference() for reference in held] == [None, None]


def test_a_runner_collected_while_an_event_runs_publishes_nothing_any_more(maps: Path) -> None:
    runners = [FakeRunner(a_model())]
    load(runners[0])

    def drop() -> None:
        runners.clear()
        gc.collect()

    event("expert_location_update", "update", during=drop)
    settle()
    assert sorted(path.suffix for path in maps.iterdir()) == [".jsonl", ".lock", ".lock"]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_publishes_nothing_in_its_parents_slot(
    runner: FakeRunner, maps: Path
) -> None:
    before = (maps / "weight_state_0.json").read_bytes()
    child = os.fork()
    if child == 0:
        try:
            update(runner)
            os._exit(0)
        except BaseException:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert (maps / "weight_state_0.json").read_bytes() == before
    assert open_slot(str(maps), "0").owner_alive()
    update(runner)
    assert generations(maps) == (1, 2)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_that_collects_an_inherited_runner_removes_nothing(maps: Path) -> None:
    runners = [FakeRunner(a_model())]
    load(runners[0])
    before = sorted(path.name for path in maps.iterdir())
    child = os.fork()
    if child == 0:
        try:
            runners.clear()
            gc.collect()
            settle()
            os._exit(0)
        except BaseException:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert sorted(path.name for path in maps.iterdir()) == before
