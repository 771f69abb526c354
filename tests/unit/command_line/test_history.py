"""`history`, what `watch` says of events, `verify --live`, and volatile tensors in `lookup`."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ended_command import Run, sentence
from fake_sglang import FakeRunner, event, load, settle, update

from sglang_weight_hook.layout import files
from sglang_weight_hook.publisher.event_log import EventLog


def put(maps: Path, where: str, at: float, kind: str, **more: Any) -> None:
    maps.mkdir(exist_ok=True)
    line = {"kind": kind, "success": True, "state": "ready", "updated_at": at, **more}
    EventLog(str(maps), where).append(line)


# --- history ------------------------------------------------------------------------------


def test_history_lists_what_has_happened(run: Run, runner: FakeRunner) -> None:
    update(runner)
    event("update_weights_from_disk", "update", [runner], result=(False, "no such directory"))
    ended = run("history")
    assert (ended.status, ended.err) == (0, "")
    last = ended.out.splitlines()[-1]
    assert last.split()[2:6] == ["0", "failed", "update_weights_from_disk", "failed"]
    assert last.endswith("content 3: no such directory")
    assert last.startswith(time.strftime("%Y-%m-%d "))
    assert len(ended.rows) == 4


def test_history_goes_without_state_and_owner(run: Run, maps: Path) -> None:
    put(maps, "0", time.time(), "load_model")
    assert sorted(os.listdir(maps)) == [files.EVENTS.format("0")]
    assert run("history").rows[0][2:5] == ["0", "ready", "load_model"]
    assert run("history", "0").rows[0][2:5] == ["0", "ready", "load_model"]


def test_history_merges_all_slots_by_time_and_has_json_lines(run: Run, maps: Path) -> None:
    for at, slot in ((3.0, "0"), (5.0, "0"), (1.0, "1"), (4.0, "1"), (2.0, "0_draft")):
        put(maps, slot, at, "update", slot="elsewhere", extra=[1])
    lines = [json.loads(line) for line in run("history", "--json").out.splitlines()]
    assert [(line["updated_at"], line["slot"]) for line in lines] == [
        *((1.0, "1"), (2.0, "0_draft"), (3.0, "0"), (4.0, "1"), (5.0, "0")),
    ]
    assert {json.dumps(line["extra"]) for line in lines} == {"[1]"}
    only = [json.loads(line) for line in run("history", "1", "--json").out.splitlines()]
    assert [line["updated_at"] for line in only] == [1.0, 4.0]


def test_history_since_and_kind(run: Run, maps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    try:
        now = time.time()
        for age, kind in ((4 * 86400, "load_model"), (7200, "update_a"), (60, "update_b")):
            put(maps, "0", now - age, kind)

        def found(*arguments: str) -> list[str]:
            ended = run("history", "--json", *arguments)
            assert (ended.status, ended.err) == (0, "")
            return [json.loads(line)["kind"] for line in ended.out.splitlines()]

        def clock(age: float, form: str) -> str:
            return time.strftime(form, time.gmtime(now - age))

        assert found("--since", "1w") == ["load_model", "update_a", "update_b"]
        assert found("--since", "3d") == ["update_a", "update_b"]
        assert found("--since", "2.5h") == ["update_a", "update_b"]
        assert found("--since", "90m") == ["update_b"]
        assert found("--since", "90s") == ["update_b"]
        assert found("--since", "10s") == []
        assert found("--since", str(now - 100)) == ["update_b"]
        assert found("--since", clock(3600, "%Y-%m-%dT%H:%M")) == ["update_b"]
        assert found("--since", clock(3600, "%Y-%m-%dT%H:%M:%SZ")) == ["update_b"]
        assert found("--since", clock(3600, "%Y-%m-%d %H:%M:%S+00:00")) == ["update_b"]
        assert found("--since", clock(10 * 86400, "%Y-%m-%d")) == [
            *("load_model", "update_a", "update_b"),
        ]
        assert found("--kind", "update_*") == ["update_a", "update_b"]
        assert found("--kind", "update_*", "--since", "90m") == ["update_b"]
        assert found("--kind", "nothing") == []
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("text", ["yesterday", "", "2x", "-1", "2026-13-01", "1e400", "inf"])
def test_history_refuses_what_is_no_time(text: str, run: Run, maps: Path) -> None:
    put(maps, "0", 1.0, "load_model")
    assert "is no time; give an age" in sentence(run("history", "--since", text), 2)


def test_history_says_where_there_is_none(run: Run, maps: Path) -> None:
    assert "No such file or directory" in sentence(run("history"), 1)
    maps.mkdir()
    assert "no event was logged" in sentence(run("history"), 1)
    assert "check the directory and the slot's name" in sentence(run("history", "0"), 1)


def test_a_log_that_cannot_be_read_stops_none_of_the_others(
    run: Run, runner: FakeRunner, maps: Path
) -> None:
    (maps / "weight_events_1.jsonl").mkdir()
    ended = run("history")
    assert ended.status == 3
    assert "load_model" in ended.out
    assert "slot 1 is left out" in ended.err


def test_history_says_how_many_lines_it_has_left_out(run: Run, maps: Path) -> None:
    put(maps, "0", 1.0, "load_model")
    with open(maps / files.EVENTS.format("0"), "ab") as file:
        file.write(b'nonsense\n{"half')
    ended = run("history")
    assert ended.status == 0
    assert len(ended.rows) == 1
    assert "slot 0: 2 lines of the log are no events" in ended.err


def test_nothing_in_a_log_is_obeyed_by_a_terminal(run: Run, maps: Path) -> None:
    nasty = "\x1b]0;owned\x07\u202e"
    put(
        maps,
        "0",
        1e300,
        nasty,
        state=nasty,
        success=False,
        message=nasty,
        started_at=10**400,
        finished_at=1.0,
        moved=nasty,
        layout_generation=nasty,
    )
    put(maps, "0", 2e300, "x", tensors=[nasty, {"a": nasty}], answered=False, state=[nasty])
    ended = run("history")
    assert ended.status == 0
    assert ended.out.isascii()
    assert "\x1b" not in ended.out
    assert run("history", "--json").status == 0


# --- watch --------------------------------------------------------------------------------


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRunner]:
    """A published runner with the background thread, which looks when it is asked."""
    from small_model import a_runner

    from sglang_weight_hook.publisher import background, settings

    monkeypatch.setenv("SGLANG_WEIGHT_HOOK_CHECK_SECONDS", "10000")
    monkeypatch.setattr(background, "DELAYS", (10_000.0,))
    settings._settings = None
    yield a_runner()
    background.stop()


def test_watch_and_history_name_what_moved_without_a_call(
    run: Run, checked: FakeRunner, maps: Path
) -> None:
    import torch

    from sglang_weight_hook.reader import open_slot

    kept = checked.model.layers[0].mlp.weight.data
    checked.model.layers[0].mlp.weight.data = torch.zeros(6, 6)
    assert open_slot(str(maps), "0").check(timeout=30).published
    for arguments in (["watch", "--timeout", "0"], ["history"]):
        line = run(*arguments).out.splitlines()[-1]
        assert "unannounced_change" in line
        assert line.endswith("moved 1: layers.0.mlp.weight")
    assert kept is not checked.model.layers[0].mlp.weight.data


def test_watch_and_history_tell_a_refusal_though_weights_were_written(
    run: Run, runner: FakeRunner
) -> None:
    from sglang_weight_hook.publisher import recorder

    request = recorder.begin_request({})
    update(runner)
    recorder.finish_request(request, (False, "the cache was not flushed"), None)
    for arguments in (["watch", "--timeout", "0"], ["history"]):
        line = run(*arguments).out.splitlines()[-1]
        assert "  ok " in line
        assert line.endswith("answered: no: the cache was not flushed")


# --- verify --live ------------------------------------------------------------------------


def test_verify_live_asks_and_is_content(run: Run, checked: FakeRunner) -> None:
    ended = run("verify", "--live")
    assert (ended.status, ended.rows[0][:2]) == (0, ["ok", "0"])


def test_verify_live_finds_what_has_moved(run: Run, checked: FakeRunner) -> None:
    import torch

    kept = checked.model.layers[1].mlp.bias.data
    checked.model.layers[1].mlp.bias.data = torch.zeros(6)
    assert run("verify").status == 0  # the documents alone cannot tell
    found = run("verify", "0", "--live", "--json")
    assert found.status == 3
    (finding,) = found.json["slots"][0]["findings"]
    assert (finding["level"], finding["check"]) == ("error", "live")
    assert "layers.1.mlp.bias" in finding["message"]
    assert "has been published" in finding["message"]
    assert run("verify", "--live").status == 0
    assert kept is not checked.model.layers[1].mlp.bias.data


def test_verify_live_warns_where_nobody_can_be_asked(run: Run, runner: FakeRunner) -> None:
    ended = run("verify", "--live", "--json")
    assert ended.status == 0
    (finding,) = ended.json["slots"][0]["findings"]
    assert (finding["level"], finding["check"]) == ("warning", "live")
    assert "SGLANG_WEIGHT_HOOK_CHECK_SECONDS=0" in finding["message"]
    assert run("verify", "--live", "--strict").status == 3


def test_verify_live_of_a_saved_file_is_wrong_usage(run: Run, layout: Any, maps: Path) -> None:
    saved = maps / files.LAYOUT.format(0)
    assert "a saved file has none" in sentence(run("verify", saved, "--live"), 2)


OWNER = "from small_model import a_runner; kept = a_runner(); print('ready', flush=True); input()"


def test_verify_live_of_a_dead_owner_is_an_error(
    run: Run, start_python: Callable[..., subprocess.Popen[str]]
) -> None:
    owner = start_python(OWNER, SGLANG_WEIGHT_HOOK_CHECK_SECONDS="10")
    assert owner.stdout is not None
    owner.stdout.readline()
    owner.kill()
    owner.wait()
    ended = run("verify", "--live", "--json")
    assert ended.status == 3
    found = [(f["level"], f["check"]) for f in ended.json["slots"][0]["findings"]]
    assert found == [("error", "owner"), ("warning", "live")]


# --- volatile tensors and other runners ---------------------------------------------------


def test_lookup_and_show_tell_volatile_tensors(run: Run, layout: Any, maps: Path) -> None:
    from sglang_weight_hook.reader import open_slot

    name = "layers.0.mlp.weight"
    layout["tensors"][name]["volatile"] = True
    (maps / files.LAYOUT.format(0)).write_text(json.dumps(layout))
    address = layout["tensors"][name]["ptr"]
    (what,) = [line for line in run("lookup", address).out.splitlines() if "  what" in line]
    assert what.endswith(", volatile")
    assert run("lookup", address, "--json").json["tensors"][0]["tensor"]["volatile"] is True
    shown = run("show", "--json").json["tensors"]
    expected = {name, "offloaded"}
    assert {name for name, tensor in shown.items() if tensor.get("volatile")} == expected
    document = open_slot(str(maps), "0").read()
    assert {tensor.name for tensor in document.iter_tensors() if tensor.volatile} == expected


def test_diff_of_another_runner_of_the_same_process_says_register_again(
    run: Run, layout: Any, tmp_path: Path
) -> None:
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    before.write_text(json.dumps(layout))
    after.write_text(json.dumps({**layout, "instance": "0" * 16}))
    ended = run("diff", before, after)
    assert ended.status == 3
    assert "register again: another runner; contents changed" in ended.out
    found = run("diff", before, after, "--json").json
    assert (found["other_process"], found["other_instance"]) == (False, True)
    assert found["must_register_again"] is True
    del layout["instance"]  # release 0.1 had none
    before.write_text(json.dumps(layout))
    assert run("diff", before, after).status == 0


def test_another_runner_in_the_slot_is_another_map(run: Run, maps: Path) -> None:
    from small_model import a_runner

    from sglang_weight_hook.reader import open_slot

    runner = a_runner()
    slot = open_slot(str(maps), "0")
    document = slot.read()
    del runner
    import gc

    gc.collect()
    runner = a_runner()
    again = slot.read()
    assert again.instance != document.instance
    assert not document.owner_alive()
    assert again.owner_alive()
    assert again.changes_since(document).must_register_again
    found = slot.generations(timeout=5)
    assert next(found).instance == again.instance
    del runner
    gc.collect()
    runner = FakeRunner(a_runner().model)
    load(runner)
    settle()


def test_a_message_ends_with_one_full_stop() -> None:
    """SGLang 0.5.23 puts one behind the error that it quotes: `... if needed..`."""
    from sglang_weight_hook.commands.render.event import event_parts

    for message, shown in (("a path..", "a path."), ("cut short...", "cut short..."), ("x", "x")):
        event = {"kind": "update", "success": False, "message": message}
        assert event_parts(event, {"state": "failed"})[-1] == f": {shown}"
