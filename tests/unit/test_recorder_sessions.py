"""Nested calls are one event, and so is a session of weight updates.

The runners are fakes (`fake_sglang`), their models are real torch modules, the files are real.
``tests/real_sglang`` has the same events from a real SGLang.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fake_sglang import FakeRunner, event, load, settle, stream, update
from published_files import (
    a_model,
    generations,
    layout_file,
    layout_of,
    lock_is_free,
    read,
    state_of,
)

from sglang_weight_hook.layout import files, variables
from sglang_weight_hook.publisher import settings

torch = pytest.importorskip("torch")


def test_a_nested_update_is_one_event_named_after_the_outer_one(
    runner: FakeRunner, maps: Path
) -> None:
    event(
        "expert_location_update",
        "update",
        during=lambda: update(runner, during=lambda: update(runner)),
    )
    assert generations(maps) == (1, 2)
    assert state_of(maps)["event"]["kind"] == "expert_location_update"
    assert state_of(maps)["event"]["calls"] == 3


def test_a_nested_call_does_not_end_the_event(runner: FakeRunner, maps: Path) -> None:
    seen: list[tuple[str, bool]] = []

    def inside() -> None:
        update(runner)
        seen.append((state_of(maps)["state"], lock_is_free(maps)))

    update(runner, during=inside)
    assert seen == [("updating", False)]
    assert lock_is_free(maps)


def test_a_failure_inside_a_nested_call_is_the_failure_of_the_event(
    runner: FakeRunner, maps: Path
) -> None:
    event(
        "expert_location_update",
        "update",
        [runner],
        during=lambda: event(
            "update_weights_from_disk", "update", [runner], result=(False, "rolled back")
        ),
    )
    state = state_of(maps)
    assert (state["state"], state["event"]["message"]) == ("failed", "rolled back")


def test_a_session_is_one_event(runner: FakeRunner, maps: Path) -> None:
    event("weight_update_session", "open", [runner])
    assert state_of(maps)["state"] == "updating"
    assert not lock_is_free(maps)
    for _ in range(3):
        stream(runner, during=lambda: runner.model[0].weight.data.fill_(2.0))
        assert state_of(maps)["state"] == "updating"
        assert not lock_is_free(maps)
    runner.model[0].weight.data = torch.zeros(3, 4)
    event("weight_update_session", "close", [runner])
    state = state_of(maps)
    assert (state["state"], state["event"]["kind"]) == ("ready", "weight_update_session")
    assert state["event"]["calls"] == 5
    assert state["event"]["moved"] == 1
    assert generations(maps) == (2, 2)
    assert lock_is_free(maps)


def a_session(runner: FakeRunner, during: Callable[[], object] = lambda: None) -> None:
    event("weight_update_session", "open", [runner])
    stream(runner, during=during)
    event("weight_update_session", "close", [runner])


def test_a_session_after_which_all_is_where_it_was_rewrites_only_the_state(
    runner: FakeRunner, maps: Path
) -> None:
    a_session(runner)  # the first one marks the weights as updated
    assert read(maps, files.WEIGHTS_META)["0.weight"]["updated"]
    before, content = layout_file(maps), state_of(maps)["content_generation"]
    a_session(runner, lambda: runner.model[0].weight.data.fill_(2.0))
    assert layout_file(maps) == before
    assert state_of(maps)["content_generation"] == content + 1
    assert state_of(maps)["state"] == "ready"


def test_a_session_renews_the_time_of_the_last_update(runner: FakeRunner, maps: Path) -> None:
    a_session(runner)
    first = read(maps, files.SUMMARY)
    a_session(runner)
    second = read(maps, files.SUMMARY)
    assert second["update_timestamp"] > first["update_timestamp"]
    assert second.keys() == first.keys()
    assert second["total_weights"] == first["total_weights"]


def test_a_session_that_leaves_a_tensor_where_none_was_publishes_it(
    runner: FakeRunner, maps: Path
) -> None:
    a_session(runner)

    def keep_scales() -> None:
        runner.model[0].scales = torch.ones(3)

    a_session(runner, keep_scales)
    assert "0.scales" in layout_of(maps)["tensors"]
    assert state_of(maps)["event"]["added"] == 1


def test_a_session_renews_the_checksums_where_they_are_asked_for(
    runner: FakeRunner, maps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variables.CHECKSUM, "1")
    settings._settings = None
    for _ in range(2):
        a_session(runner, lambda: runner.model[0].weight.data.add_(1.0))
        layout = layout_of(maps)
        assert layout["checksums"]["content_generation"] == layout["content_generation"]


def test_two_sessions_in_a_row_are_two_events(runner: FakeRunner, maps: Path) -> None:
    for _ in range(2):
        event("weight_update_session", "open", [runner])
        event("weight_update_session", "close", [runner])
    assert generations(maps) == (1, 3)
    assert lock_is_free(maps)


def test_a_session_opened_twice_ends_with_one_close(runner: FakeRunner, maps: Path) -> None:
    event("weight_update_session", "open", [runner])
    event("weight_update_session", "open", [runner])
    event("weight_update_session", "close", [runner])
    assert state_of(maps)["state"] == "ready"
    assert lock_is_free(maps)


@pytest.mark.parametrize("effect", ["open", "close"])
def test_an_end_of_a_session_that_fails_ends_it(
    effect: str, runner: FakeRunner, maps: Path
) -> None:
    if effect == "close":
        event("weight_update_session", "open", [runner])
    event("weight_update_session", effect, [runner], error=RuntimeError("repacking failed"))
    assert state_of(maps)["state"] == "failed"
    assert lock_is_free(maps)
    update(runner)
    assert state_of(maps)["state"] == "ready"


def test_a_close_without_an_open_is_an_update(runner: FakeRunner, maps: Path) -> None:
    event("weight_update_session", "close", [runner])
    assert state_of(maps)["state"] == "ready"
    assert generations(maps) == (1, 2)


def test_a_shared_draft_is_done_when_the_sessions_of_both_runners_are(maps: Path) -> None:
    target, draft = FakeRunner(a_model()), FakeRunner(a_model(), draft=True)
    load(target)
    load(draft)
    draft.model[0].weight = target.model[0].weight
    settle()
    seen = []
    for effect in ("open", "close"):
        for runner in (target, draft):
            event("weight_update_session", effect, [runner])
            seen.append(state_of(maps, "0_draft")["state"])
    assert seen == ["updating", "updating", "updating", "ready"]
    assert lock_is_free(maps)
    assert lock_is_free(maps, "0_draft")
