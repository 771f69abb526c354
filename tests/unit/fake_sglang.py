"""Fakes of the few things of SGLang's that the hook touches.

They have the names, the signatures and the return values of SGLang's own, and nothing else.
That the real ones behave so is shown in ``tests/real_sglang``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from sglang_weight_hook.publisher import background, once, recorder, settings


class FakeConfig:
    model_path = "fake/model"
    quantization = None


class FakeRunner:
    """A fake of ``ModelRunner``: a model, a device and a place among the GPUs."""

    def __init__(
        self,
        model: Any = None,
        *,
        gpu_id: int = 0,
        device: str = "cpu",
        draft: bool = False,
        draft_index: int | None = None,
    ) -> None:
        self.model = model
        self.gpu_id = gpu_id
        self.device = device
        self.is_draft_worker = draft
        if draft_index is not None:
            self.draft_model_idx = draft_index
        self.model_config = FakeConfig()


def forget() -> None:
    """Put the publisher's state for this process back to that of a fresh process."""
    background.stop()
    recorder._after_fork_in_child()
    once._said.clear()
    settings._base = settings._settings = None


def event(
    kind: str,
    effect: str,
    runners: Any = (),
    *,
    result: Any = None,
    error: BaseException | None = None,
    details: dict[str, Any] | None = None,
    during: Callable[[], Any] = lambda: None,
    missing: Any = (),
) -> None:
    """One call of SGLang's as the recorder sees it, with ``during`` in its middle."""
    begun = recorder.begin(kind, effect, runners, details, missing)
    assert begun is not None
    during()
    recorder.finish(begun, result, error)


def load(runner: Any) -> None:
    event("load_model", "load", [runner])


def settle() -> None:
    event("scheduler_ready", "settle")


def update(runner: Any, **more: Any) -> None:
    event("update_weights_from_disk", "update", [runner], result=(True, "ok"), **more)


def stream(runner: Any, **more: Any) -> None:
    event("update_weights_from_tensor", "stream", [runner], result=(True, "ok"), **more)


def walk_json(value: Any) -> Iterator[Any]:
    """Every value inside a JSON document."""
    yield value
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from walk_json(item)
    elif isinstance(value, list):
        for item in value:
            yield from walk_json(item)
