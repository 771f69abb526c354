"""What an engine is asked to register around each event, and what its transport document says.

With a fake engine; `test_engines.py` has the real ones.
"""

from __future__ import annotations

import gc
import json
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from fake_sglang import FakeRunner, event, load, settle, stream, update

import sglang_weight_hook
from sglang_weight_hook.layout import files, header
from sglang_weight_hook.publisher import publish, recorder, settings, subscription
from sglang_weight_hook.publisher.engines.registration import Span

torch = pytest.importorskip("torch")

PHYSICAL = {"tags": None, "physical": True}
SCHEMA = json.loads(
    (
        Path(sglang_weight_hook.__file__).parent / "layout/schema/weight_transport.schema.json"
    ).read_bytes()
)


def published(**more: Any) -> FakeRunner:
    runner = FakeRunner(torch.nn.Linear(64, 64), **more)
    load(runner)
    settle()
    return runner


def wait_until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def regions(maps: Path, slot: str = "0") -> set[Span]:
    document = json.loads((maps / files.LAYOUT.format(slot)).read_bytes())
    return {Span(one["ptr"], one["size"], one["device"]) for one in document["regions"]}


def header_span(transport: Any, slot: str = "0") -> Span:
    found = transport(slot)["header"]
    return Span(found["ptr"], found["size"])


def copied_header(span: Span) -> Any:
    import ctypes

    return header.unpack(ctypes.string_at(span.ptr, span.size))


def move(runner: FakeRunner) -> None:
    runner.model.weight.data = torch.ones(64, 64)


def test_regions_and_header_are_registered_once_the_engine_is_built(
    engine: Any, maps: Path, transport: Any
) -> None:
    runner = FakeRunner(torch.nn.Linear(64, 64))
    load(runner)
    assert engine.calls == []  # everything will move once more
    settle()
    assert engine.registered == regions(maps) | {header_span(transport)}
    assert len(engine.calls) == 1
    found = transport()
    assert (found["state"], found["problem"]) == ("registered", None)
    assert found["regions"] == len(regions(maps))
    assert found["bytes"] == sum(span.size for span in regions(maps))


def test_the_transport_document_is_valid_and_the_users_own(
    engine: Any, maps: Path, transport: Any
) -> None:
    runner = published()
    path = maps / files.TRANSPORT.format("0")
    document = json.loads(path.read_bytes())
    jsonschema.Draft202012Validator(SCHEMA).validate(document)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    state = json.loads((maps / files.STATE.format("0")).read_bytes())
    for field in ("instance", "pid", "process_start_ticks", "boot_id", "slot"):
        assert document[field] == state[field]
    for field in ("layout_generation", "content_generation", "physical_epoch"):
        assert transport()[field] == state[field]
    assert runner.model is not None


def test_the_header_in_memory_says_what_the_file_says(
    engine: Any, maps: Path, transport: Any
) -> None:
    runner = published()
    span = header_span(transport)
    seen: list[str] = []
    assert copied_header(span).state == "ready"
    update(runner, during=lambda: seen.append(copied_header(span).state))
    assert seen == ["updating"]
    in_file = header.unpack((maps / files.HEADER.format("0")).read_bytes())
    assert copied_header(span)._replace(sequence=0) == in_file._replace(sequence=0)  # type: ignore[union-attr]


@pytest.mark.parametrize("survives", [True, False])
def test_an_update_that_moved_nothing_costs_no_call(
    subscribed: Any, maps: Path, transport: Any, survives: bool
) -> None:
    engine = subscribed(survives=survives, fence=survives)
    runner = published()
    engine.calls.clear()
    update(runner, during=lambda: runner.model.weight.data.fill_(3))
    stream(runner)
    event("weight_update_session", "open", [runner])
    stream(runner)
    event("weight_update_session", "close", [runner])
    event("update_weights_from_disk", "update", [runner], error=ValueError("no such file"))
    assert engine.calls == []
    state = json.loads((maps / files.STATE.format("0")).read_bytes())
    assert transport()["content_generation"] == state["content_generation"]
    assert transport()["state"] == "registered"


def test_what_moved_is_exchanged_and_nothing_else(engine: Any, maps: Path) -> None:
    runner = published()
    before = regions(maps)
    kept = torch.zeros(64, 64)
    engine.calls.clear()
    update(runner, during=lambda: setattr(runner.model.weight, "data", kept))
    after = regions(maps)
    assert engine.calls == [("exchange", (sorted(before - after), sorted(after - before)))]


def test_an_engine_whose_deregistering_is_no_fence_keeps_what_it_registered_alive(
    subscribed: Any, maps: Path, transport: Any
) -> None:
    subscribed(survives=False, fence=False)
    runner = published()
    pattern = torch.full((64, 64), 7.0)
    runner.model.weight.data = pattern
    (tracked,) = recorder._tracked.values()
    recorder._Recorder.check(tracked, thoroughly=False)
    ptr = pattern.data_ptr()
    del pattern
    seen: list[Any] = []

    def replace() -> None:
        runner.model.weight.data = torch.ones(64, 64)
        gc.collect()
        # Were the storage freed, this would be given its memory.
        new = [torch.full((64, 64), 5.0) for _ in range(50)]
        import ctypes

        seen.append(ctypes.c_float.from_address(ptr).value)
        del new

    update(runner, during=replace)
    assert seen == [7.0]


def test_a_release_deregisters_before_the_pages_go_and_a_resume_registers_again(
    engine: Any, maps: Path, transport: Any
) -> None:
    runner = published()
    weights, page = regions(maps), header_span(transport)
    seen: list[Any] = []
    engine.calls.clear()
    event(
        "release_memory_occupation",
        "release",
        [runner],
        details=PHYSICAL,
        during=lambda: seen.append((set(engine.registered), transport()["state"])),
    )
    assert seen == [({page}, "withdrawn")]
    assert transport()["state"] == "withdrawn"
    assert transport()["regions"] == transport()["bytes"] == 0
    event("resume_memory_occupation", "resume", [runner], details=PHYSICAL)
    assert engine.registered == weights | {page}
    assert [kind for kind, _ in engine.calls] == ["exchange", "exchange"]
    assert transport()["state"] == "registered"
    assert transport()["physical_epoch"] == 1


def test_an_engine_without_a_fence_is_closed_before_a_release(
    subscribed: Any, maps: Path, transport: Any
) -> None:
    engine = subscribed(survives=False, fence=False)
    runner = published()
    session = transport()["session"]
    seen: list[Any] = []
    event(
        "release_memory_occupation",
        "release",
        [runner],
        details=PHYSICAL,
        during=lambda: seen.append((engine.is_open, transport().get("session"))),
    )
    assert seen == [(False, None)]
    event("resume_memory_occupation", "resume", [runner], details=PHYSICAL)
    assert transport()["state"] == "registered"
    assert transport()["session"] != session


def test_where_the_engine_is_reached_in_another_way_all_slots_say_so(
    subscribed: Any, maps: Path, transport: Any
) -> None:
    engine = subscribed(survives=False, fence=False)
    one, two = published(gpu_id=0), published(gpu_id=1)
    event("release_memory_occupation", "release", [one], details=PHYSICAL)
    event("resume_memory_occupation", "resume", [one], details=PHYSICAL)
    assert transport("0")["session"] == transport("1")["session"] == "here:2"
    assert regions(maps, "1") < engine.registered
    assert two.model is not None


def test_slots_that_share_memory_register_it_once(engine: Any, maps: Path, transport: Any) -> None:
    target = published()
    draft = FakeRunner(torch.nn.Linear(64, 64), draft=True, draft_index=0)
    draft.model.weight = target.model.weight
    load(draft)
    settle()
    spans = sorted(engine.registered)
    assert all(one.ptr + one.size <= two.ptr for one, two in zip(spans, spans[1:]))
    covered = sum(span.size for span in regions(maps) | regions(maps, "0_draft"))
    assert covered >= sum(span.size for span in spans if span.size != 128)
    # The target goes on being served when the draft is gone.
    del draft
    gc.collect()
    deadline = time.monotonic() + 5
    while (maps / files.TRANSPORT.format("0_draft")).exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    update(target)
    assert regions(maps) <= engine.registered


def test_a_failed_registration_is_told_and_tried_again(
    engine: Any, maps: Path, transport: Any
) -> None:
    engine.fails["exchange"] = "no more memory may be locked"
    runner = published()
    assert transport()["state"] == "failed"
    assert transport()["problem"] == "no more memory may be locked"
    state = json.loads((maps / files.STATE.format("0")).read_bytes())
    assert "no more memory may be locked" in state["subscribers"]["mooncake"]
    assert state["state"] == "ready"
    engine.fails.clear()
    update(runner)
    assert transport()["state"] == "registered"
    state = json.loads((maps / files.STATE.format("0")).read_bytes())
    assert state["subscribers"]["mooncake"] is None


def test_a_map_that_is_lost_is_deregistered(
    engine: Any, transport: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = published()

    def fail(*arguments: Any, **more: Any) -> None:
        raise RuntimeError("no")

    page = header_span(transport)
    monkeypatch.setattr("sglang_weight_hook.publisher.capture.capture", fail)
    update(runner)
    assert engine.registered == {page}
    assert transport()["state"] == "withdrawn"


def test_what_was_left_by_a_dead_owner_is_removed_by_the_next(maps: Path) -> None:
    maps.mkdir()
    (maps / files.TRANSPORT.format("0")).write_text("{}")
    slot = publish.Slot(str(maps), "0", 1.0)
    assert not (maps / files.TRANSPORT.format("0")).exists()
    slot.abandon()


def test_a_runner_that_is_gone_leaves_no_transport_document_and_a_header_that_says_so(
    engine: Any, maps: Path, transport: Any
) -> None:
    runner = published()
    span = header_span(transport)
    del runner
    gc.collect()
    assert not (maps / files.TRANSPORT.format("0")).exists()
    assert copied_header(span).state == "left"
    # Who comes too late writes nothing.
    time.sleep(0.1)
    assert not (maps / files.TRANSPORT.format("0")).exists()


def test_a_runner_made_again_is_registered_anew(engine: Any, maps: Path, transport: Any) -> None:
    runner = published()
    first = header_span(transport)
    del runner
    gc.collect()
    again = published()
    assert again.model is not None
    assert header_span(transport) != first
    assert regions(maps) <= engine.registered
    assert transport()["state"] == "registered"


def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regions say that they are on a GPU; their memory is the CPU's."""
    from sglang_weight_hook.publisher import document

    region = document._region
    monkeypatch.setattr(
        document, "_region", lambda *arguments: {**region(*arguments), "device": "cuda:3"}
    )


def test_memory_of_a_gpu_is_withdrawn_before_what_may_replace_it(
    engine: Any, maps: Path, transport: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_gpu(monkeypatch)
    runner = published()
    assert (transport()["memory"], transport()["device_id"]) == ("VRAM", 3)
    page = header_span(transport)
    assert page.device == "cpu"
    seen: list[Any] = []
    update(runner, during=lambda: seen.append(set(engine.registered)))
    assert seen == [{page}]
    assert transport()["state"] == "registered"
    engine.calls.clear()
    stream(runner)  # in place, as a rule
    assert engine.calls == []


def test_a_stream_of_buckets_costs_no_call(
    engine: Any, transport: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_WEIGHT_HOOK_QUIET_MS", "20")
    settings._settings = None
    runner = published()
    engine.calls.clear()
    before = transport()["content_generation"]
    for _ in range(20):
        stream(runner)
    deadline = time.monotonic() + 5
    while transport()["content_generation"] == before:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert engine.calls == []


def test_the_engine_and_its_thread_are_one_a_process(engine: Any) -> None:
    one, two = published(gpu_id=0), published(gpu_id=1)
    assert engine.opened == 1
    assert subscription.current is not None
    assert len(subscription.current._threads) == 1
    assert one.model is not None
    assert two.model is not None


def test_an_engine_closed_before_a_release_is_withdrawn_for_every_slot(
    subscribed: Any, maps: Path, transport: Any
) -> None:
    subscribed(survives=False, fence=False)
    one, two = published(gpu_id=0), published(gpu_id=1)
    seen: list[Any] = []
    event(
        "release_memory_occupation",
        "release",
        [one],
        details=PHYSICAL,
        during=lambda: seen.append((transport("0").get("session"), transport("1").get("session"))),
    )
    assert seen == [(None, None)]
    assert two.model is not None


@pytest.mark.parametrize("fence", [True, False])
def test_an_engine_that_is_late_at_a_release_withdraws_as_soon_as_it_is_back(
    subscribed: Any, transport: Any, monkeypatch: pytest.MonkeyPatch, fence: bool
) -> None:
    engine = subscribed(survives=fence, fence=fence)
    monkeypatch.setenv("SGLANG_WEIGHT_HOOK_SUBSCRIBER_TIMEOUT", "0.2")
    settings._settings = None
    runner = published()
    wait_until(lambda: transport()["state"] == "registered")
    was, entered, back = engine.exchange, threading.Event(), threading.Event()

    def exchange(old: list[Span], new: list[Span]) -> None:
        entered.set()
        assert back.wait(20)
        was(old, new)

    engine.exchange = exchange
    update(runner, during=lambda: move(runner))  # it hangs while it registers what has moved
    assert entered.is_set()
    engine.exchange = was
    engine.calls.clear()
    event("release_memory_occupation", "release", [runner], details=PHYSICAL)
    back.set()
    wait_until(lambda: transport()["state"] == "withdrawn")
    # What it was late with, and then the withdrawal, which it did not wait for `after` with.
    kinds = [kind for kind, _ in engine.calls]
    assert kinds[:2] == (["exchange", "exchange"] if fence else ["exchange", "close"])
    assert all(span.size <= 4096 for span in engine.registered)  # the header alone
    event("resume_memory_occupation", "resume", [runner], details=PHYSICAL)
    wait_until(lambda: transport()["state"] == "registered")
    assert transport()["physical_epoch"] == 1
