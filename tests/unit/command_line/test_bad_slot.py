"""One slot that cannot be read keeps no command from the others; `plot` replaces its file whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ended_command import Run

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
    assert ended.status == 0
    assert [json.loads(line)["slot"] for line in ended.out.splitlines()] == ["0"]
    assert ended.err.count("schema version 999") == 1


@pytest.mark.usefixtures("bad")
def test_plot_draws_the_others(run: Run, tmp_path: Path) -> None:
    page = tmp_path / "map.html"
    ended = run("plot", "-o", page)
    assert ended.status == 0
    assert "1 slot" in ended.out
    assert "slot 1 is left out" in ended.err
    assert run("plot", "1", "-o", page).status == 1


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
