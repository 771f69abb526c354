"""Whose event it is: which runners an event concerns, and the slot of each.

The runners are fakes (`fake_sglang`), their models are real torch modules, the files are real.
``tests/real_sglang`` has the same events from a real SGLang.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fake_sglang import FakeRunner, event, load, settle, update
from published_files import a_model, generations, inodes, layout_of, lock_is_free, state_of

from sglang_weight_hook.publisher import document


def test_slots_are_named_after_gpu_and_draft(maps: Path) -> None:
    runners = [
        FakeRunner(a_model(), gpu_id=3),
        FakeRunner(a_model(), gpu_id=3, draft=True),
        FakeRunner(a_model(), gpu_id=3, draft=True),
        FakeRunner(a_model(), gpu_id=4, draft=True, draft_index=0),
        FakeRunner(a_model(), gpu_id=4, draft=True, draft_index=2),
    ]
    for runner in runners:
        load(runner)
    slots = sorted(path.name[13:-5] for path in maps.glob("weight_state_*.json"))
    assert slots == ["3", "3_draft", "3_draft1", "4_draft", "4_draft2"]


def test_an_update_concerns_its_own_runner_alone(runner: FakeRunner, maps: Path) -> None:
    draft = FakeRunner(a_model(), draft=True)
    load(draft)
    before = inodes(maps)["weight_state_0_draft.json"]
    update(runner)
    assert inodes(maps)["weight_state_0_draft.json"] == before
    assert generations(maps, "0_draft") == (1, 1)


def test_a_draft_that_shares_a_weight_is_updated_and_locked_with_its_target(maps: Path) -> None:
    target, draft = FakeRunner(a_model()), FakeRunner(a_model(), draft=True)
    load(target)
    load(draft)
    draft.model[0].weight = target.model[0].weight
    settle()
    seen: list[Any] = []
    update(
        target,
        during=lambda: seen.append(
            (state_of(maps, "0_draft")["state"], lock_is_free(maps, "0_draft"))
        ),
    )
    assert seen == [("updating", False)]
    assert generations(maps, "0_draft") == (2, 2)
    assert state_of(maps, "0_draft")["state"] == "ready"


def test_an_event_of_the_whole_process_concerns_every_runner(
    runner: FakeRunner, maps: Path
) -> None:
    draft = FakeRunner(a_model(), draft=True)
    load(draft)
    settle()
    event("expert_location_update", "update")
    assert generations(maps) == generations(maps, "0_draft") == (1, 2)


def test_a_model_stands_for_its_runner(runner: FakeRunner, maps: Path) -> None:
    event("reset_tensors", "update", [runner.model])
    assert state_of(maps)["event"]["kind"] == "reset_tensors"
    assert generations(maps) == (1, 2)


def test_a_model_of_no_known_runner_is_an_event_of_no_slot(runner: FakeRunner, maps: Path) -> None:
    event("reset_tensors", "update", [a_model()])
    assert generations(maps) == (1, 1)
    assert len(list(maps.glob("weight_state_*.json"))) == 1


def test_a_second_target_in_one_process_gets_a_slot_of_its_own(
    runner: FakeRunner, maps: Path
) -> None:
    second = FakeRunner(a_model())
    load(second)
    (own,) = (path.name for path in maps.glob("weight_state_0.*-*.json"))
    assert own.endswith(f"-{os.getpid()}.json")
    first, other = layout_of(maps), layout_of(maps, own[13:-5])
    assert first["tensors"]["0.weight"]["ptr"] == runner.model[0].weight.data_ptr()
    assert other["tensors"]["0.weight"]["ptr"] == second.model[0].weight.data_ptr()


def test_the_identity_is_that_of_this_process(runner: FakeRunner, maps: Path) -> None:
    identity = layout_of(maps)["identity"]
    assert identity["pid"] == state_of(maps)["pid"] == os.getpid()
    assert identity["model_class"] == "Sequential"
    assert identity["role"] == "target"
    assert layout_of(maps)["schema"] == document.SCHEMA
