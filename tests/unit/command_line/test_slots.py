"""slots: one line a slot, in the order of their numbers; a dead one is stale, not a complaint."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ended_command import ROOT, Run, sentence
from fake_sglang import FakeRunner, update

from sglang_weight_hook.layout import files
from sglang_weight_hook.reader import Directory, HookError, open_slot
from sglang_weight_hook.reader.layout_start import start_of_layout

MANY = ["0", "0_draft", "1", "2", "10"]


def copied(maps: Path, place: Path, names: list[str]) -> Path:
    """A directory with copies of slot 0, whose lock nobody holds."""
    place.mkdir()
    for name in names:
        for path in maps.glob("*_0.*"):
            shutil.copy(path, place / path.name.replace("_0.", f"_{name}."))
    return place


def lines(out: str) -> list[list[str]]:
    return [line.split() for line in out.splitlines()]


def test_a_slot_has_a_line(run: Run, runner: FakeRunner) -> None:
    update(runner)
    ended = run("slots")
    assert ended.status == 0
    heading, row = lines(ended.out)
    assert heading[:4] == ["slot", "host", "gpu", "model"]
    assert row[0] == "0"
    assert row[2:5] == ["0", "model", "target"]
    assert {"ready", "1.2", "update_weights_from_disk", "alive"} <= set(row)
    assert ended.err == "1 slot: 1 ready\n"


def test_as_json_it_has_whole_values(run: Run, runner: FakeRunner, maps: Path) -> None:
    ended = run("slots", "--json")
    (slot,) = ended.json["slots"]
    identity = json.loads((maps / files.LAYOUT.format(0)).read_bytes())["identity"]
    state = json.loads((maps / files.STATE.format(0)).read_bytes())
    assert slot["model"] == identity["model_path"]
    assert (slot["host"], slot["pid"]) == (identity["hostname"], identity["pid"])
    assert (slot["event"], slot["event_at"]) == (
        "scheduler_ready",
        state["event"]["finished_at"],
    )
    assert slot["checked_at"] == open_slot(str(maps), "0").header().checked_at
    assert slot["owner_alive"] is True
    assert slot["memory"]["weights"] > 0


def test_dead_slots_are_stale_in_the_table_and_in_the_order_of_their_numbers(
    run: Run, runner: FakeRunner, maps: Path, tmp_path: Path
) -> None:
    place = copied(maps, tmp_path / "dead", MANY)
    ended = run("slots", "--dir", place)
    assert ended.status == 3
    rows = lines(ended.out)[1:]
    assert [row[0] for row in rows] == MANY
    assert all("stale" in row and "exited" in row for row in rows)
    assert ended.err == "5 slots: 5 stale\n"
    assert run("slots", "--dir", place, "--allow-stale").status == 0
    both = run("slots", "--dir", f"{tmp_path}/[dm]*", "--json")
    assert [slot["state"] for slot in both.json["slots"]] == ["stale"] * 5 + ["ready"]
    assert both.status == 3


def test_the_reader_has_the_same_order(runner: FakeRunner, maps: Path, tmp_path: Path) -> None:
    place = copied(maps, tmp_path / "dead", MANY)
    assert [slot.name for slot in Directory(str(place)).slots()] == MANY
    assert [one.slot for one in Directory(str(place)).histories()] == MANY


def test_a_slot_that_cannot_be_read_is_named_and_stops_no_other(
    run: Run, runner: FakeRunner, maps: Path, tmp_path: Path
) -> None:
    (maps / files.STATE.format(1)).write_text("{")
    ended = run("slots")
    assert ended.status == 3
    assert "ready" in lines(ended.out)[1]
    assert "slot 1" in ended.err
    assert "not JSON" in ended.err


def test_without_slots_it_says_what_to_check(run: Run, maps: Path) -> None:
    maps.mkdir()
    assert "no slot is published" in sentence(run("slots"), 1)
    assert "No such file" in sentence(run("slots", "--dir", maps / "none"), 1)


@pytest.mark.parametrize("given", [["--nonsense"], ["-o", "xml"], ["--json", "-o", "csv"], ["x"]])
def test_wrong_usage_is_two(given: list[str], run: Run, runner: FakeRunner) -> None:
    ended = run("slots", *given)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err


def test_with_and_without_typer_it_is_the_same(run: Run, runner: FakeRunner) -> None:
    from sglang_weight_hook.commands import slots

    plain = run("slots", "-o", "tsv")
    assert slots.plainly(["--help"]) is None
    assert slots.plainly(["--dir"]) is None
    whole = run("slots", "-otsv")  # only typer knows that spelling
    assert plain.status == whole.status == 0
    assert plain.out == whole.out


def test_64_slots_take_a_quarter_of_a_second(
    runner: FakeRunner, maps: Path, tmp_path: Path
) -> None:
    place = copied(maps, tmp_path / "many", [str(number) for number in range(64)])
    for path in place.glob("weight_layout_*"):  # as long as those of a model of 70 GB
        layout = json.loads(path.read_bytes())
        tensor = layout["tensors"].pop("layers.0.mlp.weight", None) or {"ptr": 1}
        layout["tensors"] = {f"{name}.weight": tensor for name in range(2000)}
        path.write_text(json.dumps(layout))
    taken = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", "sglang_weight_hook", "slots", "--dir", str(place)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 3
        assert done.stdout.count("\n") == 65
        taken.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(taken) <= 0.25, taken


def test_the_start_of_a_layout_is_that_of_the_whole(runner: FakeRunner, maps: Path) -> None:
    slot = open_slot(str(maps), "0")
    path = maps / files.LAYOUT.format(0)
    whole = json.loads(path.read_bytes())
    start = start_of_layout(slot)
    assert start == {key: whole[key] for key in whole if key not in ("regions", "tensors")}
    # In another order, and with other spaces, it is read whole.
    turned: dict[str, Any] = dict(reversed(list(whole.items())))
    path.write_text(json.dumps(turned, indent=1))
    assert start_of_layout(slot)["identity"] == whole["identity"]
    path.write_text(json.dumps(whole, indent=3))
    assert start_of_layout(slot) == start
    path.write_text('{"schema": "another", "tensors": {}}')
    with pytest.raises(HookError):
        start_of_layout(slot)
    path.unlink()
    assert start_of_layout(slot) == {}
