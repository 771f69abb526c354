"""Remote readers are told `ready` when the device has written what an update has given it."""

from __future__ import annotations

import ctypes
import time
from typing import Any, Optional

import pytest
from fake_sglang import FakeRunner, load, settle, update

from sglang_weight_hook.layout import header
from sglang_weight_hook.publisher import settings, transport
from sglang_weight_hook.publisher.devices import cuda_order
from sglang_weight_hook.publisher.devices.cpu import Cpu

torch = pytest.importorskip("torch")


def state_in_memory() -> str:
    found = header.unpack(ctypes.string_at(*transport.header_of("0")))
    assert found is not None
    return found.state


def test_the_header_in_memory_is_not_ready_before_the_device_has_written(
    engine: Any, maps: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: dict[str, Any] = {"why": None}

    def why_not_done(self: Any) -> Optional[str]:
        if isinstance(answers["why"], OSError):
            raise answers["why"]
        return answers["why"]  # type: ignore[no-any-return]

    monkeypatch.setattr(Cpu, "why_not_done", why_not_done)
    runner = FakeRunner(torch.nn.Linear(8, 8))
    load(runner)
    settle()
    assert state_in_memory() == "ready"
    answers["why"] = "the device is still writing"
    update(runner)
    time.sleep(0.05)
    assert state_in_memory() == "updating"
    answers["why"] = OSError(5, "the driver answers with an error")
    time.sleep(0.05)
    assert state_in_memory() == "updating"
    answers["why"] = None
    deadline = time.monotonic() + 5
    while state_in_memory() != "ready":
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_calls_are_marked_where_an_engine_is_subscribed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(cuda_order.cuda_driver, "is_initialised", lambda: asked.append(True))
    plain = settings.parse({}, "/")
    for configured in (plain, plain._replace(subscribers=("nixl",))):
        monkeypatch.setattr(settings, "_settings", configured)
        monkeypatch.setattr(settings, "_pid", cuda_order.os.getpid())
        cuda_order.mark()
    assert asked == [True]
