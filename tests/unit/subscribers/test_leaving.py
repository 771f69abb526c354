"""A runner may be collected in any thread, also in one that is writing a transport document."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
from fake_sglang import FakeRunner, load, settle, update

from sglang_weight_hook.layout import files
from sglang_weight_hook.publisher import publish, recorder, transport

torch = pytest.importorskip("torch")

ENTRY = {"state": "registered"}


@pytest.fixture
def encoding(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What happens the next time that a document is encoded or has been written."""
    todo: list[Any] = []
    encode = publish.encode

    def encoded(document: Any, **more: Any) -> bytes:
        while todo and threading.current_thread().name == "engine":
            todo.pop()()
        return encode(document, **more)

    monkeypatch.setattr(transport.publish, "encode", encoded)
    return todo


def published(gpu_id: int) -> FakeRunner:
    runner = FakeRunner(torch.nn.Linear(4, 4), gpu_id=gpu_id)
    load(runner)
    settle()
    return runner


def in_an_engines_thread(call: Any) -> threading.Thread:
    thread = threading.Thread(target=call, name="engine", daemon=True)
    thread.start()
    thread.join(5)
    return thread


def test_a_runner_collected_while_an_entry_is_encoded_blocks_nobody(
    told: Any, maps: Path, encoding: list[Any]
) -> None:
    one, two = published(0), published(1)
    two.itself = two  # only the collector finds it
    del two
    encoding.append(gc.collect)
    thread = in_an_engines_thread(lambda: transport.publish_entry("0", "nixl", ENTRY))
    assert not thread.is_alive()
    assert (maps / files.TRANSPORT.format("0")).exists()
    done = threading.Event()
    threading.Thread(target=lambda: (update(one), done.set()), daemon=True).start()
    assert done.wait(5)
    assert len(recorder._tracked) == 1


def test_a_slot_left_while_its_entry_is_encoded_or_written_has_no_document(
    told: Any, maps: Path, encoding: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = maps / files.TRANSPORT.format("0")
    runner = published(0)
    encoding.append(lambda: transport.leave("0"))
    in_an_engines_thread(lambda: transport.publish_entry("0", "nixl", ENTRY))
    assert not path.exists()
    update(runner)
    write = publish.write_whole

    def leave_at_once(*arguments: Any, **more: Any) -> None:
        write(*arguments, **more)
        transport._places.clear()

    monkeypatch.setattr(transport.publish, "write_whole", leave_at_once)
    in_an_engines_thread(lambda: transport.publish_entry("0", "nixl", ENTRY))
    assert not path.exists()
