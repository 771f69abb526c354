"""One slot that cannot be read keeps no command from the others; `plot` replaces its file whole."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from ended_command import Run, sentence
from fake_sglang import FakeRunner

from sglang_weight_hook.layout import files


@pytest.fixture
def bad(layout: Any, maps: Path) -> None:
    """A second slot, of a later release."""
    for name in (files.STATE, files.LAYOUT):
        document = json.loads((maps / name.format(0)).read_bytes())
        (maps / name.format("1")).write_text(json.dumps({**document, "schema_version": 999}))
    (maps / files.OWNER_LOCK.format("1")).touch()


@pytest.mark.usefixtures("bad")
def test_watch_tells_of_the_others_and_says_what_is_wrong_once(run: Run) -> None:
    ended = run("watch", "--timeout", "1.5", "--json")
    assert ended.status == 3
    assert [json.loads(line)["slot"] for line in ended.out.splitlines()] == ["0"]
    assert ended.err.count("schema version 999") == 1


@pytest.mark.usefixtures("bad")
def test_plot_draws_the_others(run: Run, tmp_path: Path) -> None:
    page = tmp_path / "map.html"
    ended = run("plot", "-o", page)
    assert ended.status == 3
    assert "1 slot" in ended.out
    assert "slot 1 is left out" in ended.err
    assert run("plot", "1", "-o", page).status == 1


def later_release(maps: Path) -> None:
    path = maps / files.STATE.format("1")
    state = json.loads(path.read_bytes())
    path.write_text(json.dumps({**state, "schema_version": 2}))


def no_json(maps: Path) -> None:
    (maps / files.STATE.format("1")).write_bytes(b"\xff\x00\x80 none")


def cut_off(maps: Path) -> None:
    path = maps / files.LAYOUT.format("1")
    path.write_bytes(path.read_bytes()[:-100])


def a_folder(maps: Path) -> None:
    (maps / files.STATE.format("1")).unlink()
    (maps / files.STATE.format("1")).mkdir()


def no_tensor(maps: Path) -> None:
    path = maps / files.LAYOUT.format("1")
    layout = json.loads(path.read_bytes())
    path.write_text(json.dumps({**layout, "tensors": {"w": {"ptr": "here"}}}))


def no_figure(maps: Path) -> None:
    path = maps / files.LAYOUT.format("1")
    layout = json.loads(path.read_bytes())
    path.write_text(json.dumps({**layout, "memory": {"device_free_bytes": "all"}}))


BROKEN = [later_release, no_json, cut_off, a_folder, no_tensor, no_figure]


@pytest.fixture
def alone(run: Run, layout: Any) -> Any:
    """What report says of the first slot, while it is the only one."""
    return run("report", "--json").json


@pytest.fixture(params=BROKEN, ids=lambda broken: broken.__name__)
def broken(request: pytest.FixtureRequest, alone: Any, maps: Path) -> None:
    """A second slot of the same process, with something that makes it unreadable."""
    for name in (files.STATE, files.LAYOUT):
        shutil.copy(maps / name.format(0), maps / name.format("1"))
    # Linked, so that its lock is held as long as the first one's is.
    os.link(maps / files.OWNER_LOCK.format(0), maps / files.OWNER_LOCK.format("1"))
    request.param(maps)


@pytest.mark.usefixtures("broken")
def test_report_adds_up_the_others(run: Run, alone: Any) -> None:
    ended = run("report", "--json")
    assert ended.status == 3
    assert "slot 1 in" in ended.err
    assert ended.err.count("\n") == 1
    assert ended.json["total"] == alone["total"]
    first, second = ended.json["slots"]
    assert first == alone["slots"][0]
    assert (second["slot"], second["counted"]) == ("1", False)
    assert second["problem"] in ended.err
    ended = run("report")
    assert ended.status == 3
    assert " 0\n" in ended.out  # the column of slots
    # Not something that --allow-stale is about.
    assert run("report", "--allow-stale").status == 3


@pytest.mark.usefixtures("broken")
def test_report_without_another_slot_has_no_answer(
    run: Run, maps: Path, request: pytest.FixtureRequest
) -> None:
    for path in (maps / name.format(0) for name in (files.STATE, files.LAYOUT)):
        path.unlink()
    if "no_tensor" in request.node.callspec.id:
        # No other slot of its process has storages in common with it, so its own sums are used.
        assert run("report", "--json").json["slots"][0]["slot"] == "1"
        return
    for more in ([], ["--json"]):
        assert "slot 1 in" in sentence(run("report", *more), 1)


def test_report_goes_on_after_a_directory_that_is_not_there(
    run: Run, layout: Any, maps: Path, tmp_path: Path
) -> None:
    ended = run("report", "--dir", tmp_path / "none", "--dir", maps)
    assert ended.status == 3
    assert str(tmp_path / "none") in ended.err
    assert " 0\n" in ended.out


def test_plot_names_the_place_that_it_was_given(
    run: Run, runner: FakeRunner, tmp_path: Path
) -> None:
    place = tmp_path / "none" / "map.html"
    assert f"({place})" in sentence(run("plot", "--output", place), 1)


@pytest.mark.usefixtures("layout")
def test_plot_writes_through_no_link_and_leaves_no_part_behind(run: Run, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    folder = tmp_path / "pages"
    folder.mkdir()
    page = folder / "map.html"
    page.symlink_to(precious)
    assert run("plot", "-o", page).status == 1
    assert precious.read_text() == "mine"
    page.unlink()
    for _ in range(2):
        assert run("plot", "-o", page).status == 0
    assert page.read_text(encoding="utf-8").startswith("<!")
    assert [path.name for path in folder.iterdir()] == ["map.html"]
    assert run("plot", "-o", folder).status == 1
