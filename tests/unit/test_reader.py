"""Reading: one consistent document or one sentence that says what to do."""

from __future__ import annotations

import doctest
import fcntl
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sglang_weight_hook
from sglang_weight_hook import reader
from sglang_weight_hook.layout import files, process
from sglang_weight_hook.publisher import publish
from sglang_weight_hook.reader import HookError, open_directory, open_slot

IDENTITY = process.identity()


def a_layout(generation: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "schema": "sglang-weight-layout",
        "schema_version": 1,
        "layout_generation": generation,
        "content_generation": generation,
        "state": "ready",
        "identity": IDENTITY,
        "regions": [],
        "tensors": {"w": {"ptr": generation}},
        **more,
    }


def a_state(generation: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "schema": "sglang-weight-state",
        "schema_version": 1,
        "state": "ready",
        "layout_generation": generation,
        "content_generation": generation,
        **{key: IDENTITY[key] for key in ("pid", "process_start_ticks", "boot_id", "hostname")},
        **more,
    }


@pytest.fixture
def put(maps: Path) -> Callable[..., Path]:
    """Put documents into the directory as they are given."""

    def put(layout: Any = None, state: Any = None) -> Path:
        maps.mkdir(exist_ok=True)
        for name, content in ((files.LAYOUT, layout), (files.STATE, state)):
            if content is not None:
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                (maps / name.format(0)).write_bytes(data)
        return maps

    return put


Put = Callable[..., Path]


# --- one consistent document --------------------------------------------------------------


def test_a_document_of_one_generation_is_read(put: Put) -> None:
    document = open_slot(str(put(a_layout(3), a_state(3))), "0").read(timeout=0)
    assert document.layout_generation == document.content_generation == 3
    assert document.tensors == {"w": {"ptr": 3}}
    assert document.regions == []
    assert repr(document) == "<Document slot='0' state='ready' layout=3 content=3>"


def test_the_content_generation_is_the_states(put: Put) -> None:
    maps = put(a_layout(1), a_state(1, content_generation=9))
    assert open_slot(str(maps), "0").read(timeout=0).content_generation == 9


@pytest.mark.parametrize(
    "state",
    [a_state(2), a_state(1, pid=1), a_state(1, process_start_ticks=7), a_state(1, boot_id="x")],
    ids=["another generation", "another process", "a reused pid", "another boot"],
)
def test_a_layout_and_a_state_that_do_not_belong_together_are_refused(
    state: dict[str, Any], put: Put
) -> None:
    slot = open_slot(str(put(a_layout(1), state)), "0")
    with pytest.raises(HookError, match=r"slot 0 has no settled document .* log say which"):
        slot.read(timeout=0)


def test_a_layout_that_changes_between_two_looks_at_the_state_is_read_again(
    put: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = put(a_layout(1), a_state(2))
    monkeypatch.setattr("time.sleep", lambda seconds: put(a_layout(2)))
    assert open_slot(str(maps), "0").read(timeout=60).layout_generation == 2


WRITER = """
import os, sys
from sglang_weight_hook.layout import files, process
from sglang_weight_hook.publisher import publish
who = process.identity()
slot = publish.Slot(os.environ["SGLANG_WEIGHT_HOOK_DIR"], "0", 1.0)
generation = 0
while True:
    generation += 1
    state = {"schema": "sglang-weight-state", "schema_version": 1, "state": "updating",
             "layout_generation": generation - 1, "content_generation": generation - 1, **who}
    slot.write(files.STATE, state)
    slot.write(files.LAYOUT, {
        "schema": "sglang-weight-layout", "schema_version": 1, "layout_generation": generation,
        "content_generation": generation, "state": "ready", "identity": who, "regions": [],
        "tensors": {f"w{i}": {"ptr": generation} for i in range(200)}})
    slot.write(files.STATE, {**state, "state": "ready", "layout_generation": generation,
                               "content_generation": generation})
    if generation == 1:
        print("ready", flush=True)
"""


def test_readers_never_mix_generations_while_a_writer_replaces_them(
    maps: Path, start_python: Callable[..., subprocess.Popen[str]]
) -> None:
    writer = start_python(WRITER)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n"
    slot = open_slot(str(maps), "0")
    seen: list[int] = []
    deadline = time.monotonic() + 60
    while len(seen) < 150 or len(set(seen)) < 10:
        assert time.monotonic() < deadline, f"the writer got no further than {seen[-1:]}"
        document = slot.read(timeout=60)
        assert {entry["ptr"] for entry in document.tensors.values()} == {document.layout_generation}
        assert len(document.tensors) == 200
        assert document.state["layout_generation"] == document.layout_generation
        seen.append(document.layout_generation)
    assert seen == sorted(seen)


# --- the owner ----------------------------------------------------------------------------


def test_an_owner_is_alive_until_it_is_killed(
    maps: Path, start_python: Callable[..., subprocess.Popen[str]]
) -> None:
    writer = start_python(WRITER)
    assert writer.stdout is not None
    writer.stdout.readline()
    slot = open_slot(str(maps), "0")
    assert slot.owner_alive()
    writer.kill()
    writer.wait()
    assert not slot.owner_alive()
    assert slot.read_state()["pid"] == writer.pid


def test_without_an_owner_file_nobody_owns_the_slot(put: Put) -> None:
    assert not open_slot(str(put(a_layout(), a_state())), "0").owner_alive()


def test_asking_for_the_owner_makes_and_changes_no_file(put: Put) -> None:
    maps = put(a_layout(), a_state())
    (maps / "weight_owner_0.lock").touch()
    before = sorted((path.name, path.stat().st_mtime_ns) for path in maps.iterdir())
    open_slot(str(maps), "0").owner_alive()
    assert sorted((path.name, path.stat().st_mtime_ns) for path in maps.iterdir()) == before


@pytest.mark.parametrize(
    ("state", "alive"),
    [
        (a_state(), True),
        (a_state(process_start_ticks=1), False),
        (a_state(pid=2**22 + 1), False),
        (a_state(hostname="elsewhere", pid=2**22 + 1), True),
        (a_state(boot_id="before", pid=2**22 + 1), True),
    ],
    ids=["this process", "a reused pid", "a dead pid", "another host", "another boot"],
)
def test_where_the_owner_file_cannot_be_locked_the_process_decides(
    state: dict[str, Any], alive: bool, put: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = put(a_layout(), state)
    (maps / "weight_owner_0.lock").touch()

    def no_locks(*arguments: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert open_slot(str(maps), "0").owner_alive() == alive


# --- holding the weights ------------------------------------------------------------------


def test_while_the_weights_are_held_no_update_gets_the_lock(
    put: Put,
) -> None:
    maps = put(a_layout(), a_state())
    writer = publish.Slot(str(maps), "0", 0.01)
    writer.lock()
    writer.unlock()
    put(a_layout(), a_state())  # who takes a slot over removes what was there
    with open_slot(str(maps), "0").weights_held(timeout=0, allow=("stale",)):
        writer.lock()
        assert writer.lock_status == "timeout"
    writer.lock()
    assert writer.lock_status == "held"
    held = open_slot(str(maps), "0").weights_held(timeout=0)
    with pytest.raises(HookError, match=r"an update of slot 0 .* try again"), held:
        pytest.fail("held twice")
    writer.abandon()


def test_two_readers_hold_the_weights_together(
    put: Put,
) -> None:
    maps = put(a_layout(), a_state())
    writer = publish.Slot(str(maps), "0", 0.01)
    writer.lock()
    writer.unlock()
    put(a_layout(), a_state())
    slot = open_slot(str(maps), "0")
    allow = ("stale",)
    with slot.weights_held(0, allow=allow), slot.weights_held(0, allow=allow):
        pass
    writer.abandon()


def test_holding_the_weights_of_nobody_is_an_error(maps: Path) -> None:
    held = open_slot(str(maps), "0").weights_held()
    with pytest.raises(HookError, match=r"weight_saving_0\.lock"), held:
        pytest.fail("held nothing")


# --- what is no document ------------------------------------------------------------------


def test_an_absent_directory_is_an_error_that_names_the_variable(maps: Path) -> None:
    with pytest.raises(HookError, match="SGLANG_WEIGHT_HOOK_DIR"):
        open_directory(str(maps)).slots()


def test_an_absent_slot_is_an_error_that_says_what_to_check(maps: Path) -> None:
    maps.mkdir()
    assert open_directory(str(maps)).slots() == []
    with pytest.raises(HookError, match="no hooked SGLang publishes slot 7 here; check"):
        open_slot(str(maps), "7").read(timeout=0)


GARBAGE: dict[str, Any] = {
    "nothing": b"",
    "half": json.dumps(a_state()).encode()[:40],
    "binary": b"\x80\x81\x00",
    "a list": b"[]",
    "a number": b"7",
    "deep": b"[" * 100_000,
    "foreign": b'{"name": "package.json"}',
    "another schema": {**a_state(), "schema": "sglang-weight-layout-backup"},
    "a newer version": {**a_state(), "schema_version": 2},
    "a version that is text": {**a_state(), "schema_version": "1"},
    "a schema and nothing else": {"schema": "sglang-weight-state", "schema_version": 1},
    "generations that are no numbers": {**a_state(), "layout_generation": [1]},
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=list(GARBAGE))
def test_a_state_that_is_garbage_is_one_error_with_a_sentence(content: Any, put: Put) -> None:
    with pytest.raises(HookError, match=r"\w+ \w+ \w+"):
        open_slot(str(put(a_layout(), content)), "0").read(timeout=0)


@pytest.mark.parametrize("content", GARBAGE.values(), ids=list(GARBAGE))
def test_a_layout_that_is_garbage_is_one_error_with_a_sentence(content: Any, put: Put) -> None:
    if isinstance(content, dict) and content["schema"] == "sglang-weight-state":
        content = {
            **a_layout(),
            "schema_version": content["schema_version"],
            "layout_generation": content.get("layout_generation", None),
        }
        if content["layout_generation"] is None:
            content = {"schema": "sglang-weight-layout", "schema_version": 1}
    with pytest.raises(HookError, match=r"\w+ \w+ \w+"):
        open_slot(str(put(content, a_state(1))), "0").read(timeout=0)


def test_a_newer_version_is_refused_with_the_advice_to_upgrade(put: Put) -> None:
    maps = put(a_layout(), a_state(schema_version=2))
    with pytest.raises(HookError, match=r"schema version 2.*install the hook's newer release"):
        open_slot(str(maps), "0").read(timeout=0)


def test_fields_that_a_later_release_adds_are_no_obstacle(put: Put) -> None:
    maps = put(a_layout(new_field={}), a_state(another=[1]))
    assert open_slot(str(maps), "0").read(timeout=0).raw["new_field"] == {}


def test_a_directory_in_a_documents_place_is_an_error(put: Put) -> None:
    maps = put(a_layout())
    (maps / "weight_state_0.json").mkdir()
    with pytest.raises(HookError, match="cannot be read"):
        open_slot(str(maps), "0").read(timeout=0)


# --- slots and ways to open one ------------------------------------------------------------


def test_the_slots_of_a_directory_are_those_with_a_state_file(put: Put) -> None:
    maps = put(a_layout(), a_state())
    for name in ("weight_state_0_draft1.json", "weight_state_1.host-77.json"):
        (maps / name).write_text("{}")
    for name in (".weight_state_9.json.tmp-1", "weight_layout_8.json", "weight_state_.json"):
        (maps / name).write_text("{}")
    assert [slot.name for slot in open_directory(str(maps)).slots()] == [
        "0",
        "0_draft1",
        "1.host-77",
    ]


def test_the_directory_is_the_argument_then_the_variable_then_the_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SGLANG_WEIGHT_HOOK_DIR", "/from/variable")
    assert open_directory("/given").path == "/given"
    assert open_directory().path == "/from/variable"
    monkeypatch.delenv("SGLANG_WEIGHT_HOOK_DIR")
    assert open_directory().path == str(tmp_path / "weights_metadata")


def test_the_reading_names_are_the_packages_own() -> None:
    for name in sglang_weight_hook.__all__:
        assert getattr(sglang_weight_hook, name) is not None
    assert sglang_weight_hook.open_slot is reader.open_slot
    with pytest.raises(AttributeError, match="no_such_name"):
        sglang_weight_hook.no_such_name  # noqa: B018


def test_reading_imports_neither_torch_nor_sglang(run_python: Any, put: Put) -> None:
    maps = put(a_layout(), a_state())
    code = (
        "import sys, sglang_weight_hook as hook\n"
        f"assert hook.open_slot({str(maps)!r}, '0').read(timeout=0).tensors\n"
        "print([name for name in ('torch', 'sglang', 'numpy', 'orjson', 'sglang_patch_loader')"
        " if name in sys.modules])"
    )
    assert run_python("-c", code, SGLANG_WEIGHT_HOOK="0").stdout == "[]\n"


def test_the_example_of_the_module_holds(put: Put) -> None:
    found = doctest.DocTestFinder().find(
        reader, "reader", extraglobs={"EXAMPLE": str(put(a_layout(), a_state()))}
    )
    results = [doctest.DocTestRunner().run(test) for test in found if test.examples]
    assert results
    assert sum(result.failed for result in results) == 0
