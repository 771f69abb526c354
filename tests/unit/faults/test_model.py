"""A model that cannot be walked or told never reaches SGLang's call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_sglang import walk_json
from faulty_runner import (
    ANSWER,
    LOADED,
    ModelRunner,
    everything_parses,
    unfinished,
    use,
    warnings,
)

from sglang_weight_hook import reader

torch = pytest.importorskip("torch")


def test_without_any_fault_nothing_is_warned_of(
    runner: ModelRunner, maps: Path, caplog: pytest.LogCaptureFixture
) -> None:
    use(runner)
    assert warnings(caplog) == []
    assert len(everything_parses(maps)) == 6


def test_a_parameter_walk_that_raises_invalidates_the_map_and_says_it_once(
    runner: ModelRunner,
    maps: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    use(runner, times=1)

    def fail(*arguments: Any, **more: Any) -> Any:
        raise RuntimeError("dictionary changed size during iteration")

    with monkeypatch.context() as patch:
        patch.setattr("sglang_weight_hook.publisher.capture.walk_model", fail)
        use(runner)
    state = json.loads((maps / "weight_state_0.json").read_bytes())
    assert state["state"] == "failed"
    assert "changed size" in state["problem"]
    assert json.loads((maps / "weight_layout_0.json").read_bytes())["tensors"] == {}
    assert json.loads((maps / "weights_meta_0.json").read_bytes()) == {}
    assert len(warnings(caplog)) == 1
    use(runner, times=1)
    document = reader.open_slot(str(maps), "0").read(timeout=0)
    assert document.state["state"] == "ready"
    assert len(document.tensors) == 2


def test_a_map_that_was_invalidated_has_no_old_summary_beside_it(
    runner: ModelRunner, maps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(runner, times=1)
    runner.model = None
    use(runner, times=1)
    summary = maps / "weight_update_summary_0.json"
    assert not summary.exists() or json.loads(summary.read_bytes())["total_weights"] == 0


def test_named_parameters_that_raise_do_not_leave_the_state_unfinished(
    runner: ModelRunner, maps: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Odd(torch.nn.Linear):  # type: ignore[misc, name-defined]
        def named_parameters(self, *arguments: Any, **more: Any) -> Any:
            raise NotImplementedError("ask somebody else")

    runner.model = Odd(2, 2)
    assert runner.load_model() is LOADED
    assert len(warnings(caplog)) <= 1
    assert not unfinished(maps)
    everything_parses(maps)


def test_an_identity_that_cannot_be_told_does_not_leave_the_state_unfinished(
    runner: ModelRunner, maps: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Config:
        @property
        def model_path(self) -> str:
            raise RuntimeError("not resolved yet")

    runner.model_config = Config()  # type: ignore[assignment]
    assert runner.load_model() is LOADED
    assert runner.update_weights_from_disk("path", "auto") is ANSWER
    assert len(warnings(caplog)) == 1
    assert not unfinished(maps)


@pytest.mark.parametrize("model", [None, torch.nn.Module(), object()])
def test_a_model_without_parameters(
    model: Any, runner: ModelRunner, maps: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runner.model = model
    use(runner)
    assert len(warnings(caplog)) <= 1
    assert json.loads((maps / "weights_meta_0.json").read_bytes()) == {}
    assert json.loads((maps / "weight_layout_0.json").read_bytes())["tensors"] == {}
    everything_parses(maps)


def test_names_that_are_not_ascii(
    runner: ModelRunner, maps: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["gewicht_ä", "重み", "\U0001f40d", "new\nline", 'quo"te', "lone\udc80surrogate", "\0"]
    for name in names:
        runner.model.register_parameter(name, torch.nn.Parameter(torch.zeros(2)))
    use(runner)
    assert warnings(caplog) == []
    assert len(everything_parses(maps)) == 6
    meta = json.loads((maps / "weights_meta_0.json").read_bytes())
    assert list(meta) == ["weight", "bias", *names]
    strings = {item for item in walk_json(meta) if isinstance(item, str)}
    assert set(names) <= strings


def test_a_runner_that_goes_without_a_device_or_an_identity(
    runner: ModelRunner, maps: Path, caplog: pytest.LogCaptureFixture
) -> None:
    del runner.device, runner.gpu_id, runner.is_draft_worker
    use(runner)
    assert warnings(caplog) == []
    layout = json.loads((maps / "weight_layout_0.json").read_bytes())
    weights = dict(runner.model.named_parameters())
    for name, entry in layout["tensors"].items():
        assert entry["ptr"] == weights[name].data_ptr()
