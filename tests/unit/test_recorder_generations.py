"""When the two generations rise, and what is counted as moved, added and removed.

The runners are fakes (`fake_sglang`), their models are real torch modules, the files are real.
``tests/real_sglang`` has the same events from a real SGLang.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_sglang import FakeRunner, load, settle, update
from published_files import a_model, generations, layout_of, read, state_of

from sglang_weight_hook.layout import files

torch = pytest.importorskip("torch")


def test_settling_without_a_change_keeps_both_generations(maps: Path) -> None:
    runner = FakeRunner(a_model())
    load(runner)
    assert generations(maps) == (1, 1)
    settle()
    assert generations(maps) == (1, 1)


def test_an_update_in_place_raises_only_the_content_generation(
    runner: FakeRunner, maps: Path
) -> None:
    update(runner, during=lambda: runner.model[0].weight.data.fill_(1.0))
    assert generations(maps) == (1, 2)
    assert layout_of(maps)["event"]["moved"] == 0


def test_a_draft_that_rebinds_the_targets_embedding_is_captured_when_settled(maps: Path) -> None:
    target, draft = FakeRunner(a_model()), FakeRunner(a_model(), draft=True)
    load(target)
    load(draft)
    draft.model[0].weight = target.model[0].weight
    settle()
    assert generations(maps, "0_draft") == (2, 1)
    assert (
        layout_of(maps, "0_draft")["tensors"]["0.weight"]["ptr"]
        == layout_of(maps)["tensors"]["0.weight"]["ptr"]
    )


def test_moved_added_and_removed_are_counted(runner: FakeRunner, maps: Path) -> None:
    def change() -> None:
        runner.model[0].weight.data = torch.zeros(3, 4)
        runner.model[0].bias = None
        runner.model[1].register_buffer("scale", torch.ones(2))

    update(runner, during=change)
    counted = layout_of(maps)["event"]
    assert (counted["moved"], counted["added"], counted["removed"]) == (1, 1, 1)
    assert state_of(maps)["event"] == counted
    assert generations(maps) == (2, 2)


def test_state_and_layout_always_agree_on_the_layout_generation(
    runner: FakeRunner, maps: Path
) -> None:
    for round_ in range(5):
        if round_ % 2:
            runner.model[0].weight.data = torch.zeros(3, 4)
        update(runner)
        assert layout_of(maps)["layout_generation"] == state_of(maps)["layout_generation"]
        assert layout_of(maps)["content_generation"] == state_of(maps)["content_generation"]


def test_parameters_are_marked_as_updated_only_after_an_update(
    runner: FakeRunner, maps: Path
) -> None:
    assert "updated" not in read(maps, files.WEIGHTS_META)["0.weight"]
    assert not (maps / "weight_update_summary_0.json").exists()
    update(runner)
    assert all(entry["updated"] is True for entry in read(maps, files.WEIGHTS_META).values())
    assert read(maps, files.SUMMARY)["total_weights"] == 4
