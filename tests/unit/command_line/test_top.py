"""top: the live view, by Textual's pilot and in a real terminal (tmux)."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from ended_command import ROOT, Run, sentence
from fake_sglang import FakeRunner, update
from tmux_terminal import Terminal

pytest.importorskip("textual")

from textual.widgets import DataTable, Static

from sglang_weight_hook.commands.polling import SlotPolling
from sglang_weight_hook.commands.render import live
from sglang_weight_hook.reader import open_directory


def copied(maps: Path, place: Path, names: list[str]) -> Path:
    """A directory with copies of slot 0, whose lock nobody holds."""
    place.mkdir()
    for name in names:
        for path in maps.glob("*_0.*"):
            shutil.copy(path, place / path.name.replace("_0.", f"_{name}."))
    return place


def viewed(view: Callable[[live.LiveView, Any], Coroutine[Any, Any, None]], *places: Path) -> None:
    """Run ``view`` with a pilot in a terminal of 200 x 50."""

    async def run() -> None:
        polling = SlotPolling([open_directory(str(place)) for place in places])
        app = live.LiveView(polling, 0.05)
        async with app.run_test(size=(200, 50)) as pilot:
            await until(pilot, lambda: bool(app.overviews))
            await view(app, pilot)
        polling.close()

    asyncio.run(run())


async def until(pilot: Any, holds: Callable[[], Any], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        await pilot.pause(0.02)


def column(app: live.LiveView, name: str) -> list[str]:
    table = app.screen_stack[0].query_one("#slots", DataTable)
    return [str(cell) for cell in table.get_column(name)]


def test_a_line_a_slot_and_an_update_changes_it(runner: FakeRunner, maps: Path) -> None:
    async def view(app: live.LiveView, pilot: Any) -> None:
        assert column(app, "slot") == ["0"]
        assert column(app, "state") == ["ready"]
        assert column(app, "gen") == ["1.1"]
        update(runner)
        await until(pilot, lambda: column(app, "gen") == ["1.2"])
        assert column(app, "last event") == ["update_weights_from_disk"]

    viewed(view, maps)


def test_documents_are_read_again_only_after_a_change(runner: FakeRunner, maps: Path) -> None:
    polling = SlotPolling([open_directory(str(maps))])
    first = polling.poll()
    for _ in range(5):
        assert polling.poll() == first
    assert polling.documents_read == 1
    update(runner)
    ((_, overview),) = polling.poll().items()
    assert overview.content_generation == 2
    assert polling.documents_read == 2
    polling.close()


def test_a_dead_owner_turns_red_and_stays_known(
    runner: FakeRunner, maps: Path, tmp_path: Path
) -> None:
    place = copied(maps, tmp_path / "dead", ["0", "1", "2", "10"])
    polling = SlotPolling([open_directory(str(place))])
    assert [slot for _, slot in polling.poll()] == ["0", "1", "2", "10"]
    polling.poll()
    assert polling.documents_read == 4
    polling.close()

    async def view(app: live.LiveView, pilot: Any) -> None:
        assert column(app, "state") == ["stale"] * 4 + ["ready"]
        cell = app.query_one("#slots", DataTable).get_row_at(0)[live.COLUMNS.index("state")]
        assert any("red" in str(span.style) for span in cell.spans)
        assert "4 stale" in str(app.query_one("#summary", Static).render())

    viewed(view, place, maps)


def test_an_owner_that_dies_is_seen(maps: Path, tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            "import sys; from small_model import a_runner; kept = a_runner(); "
            "print('ready', flush=True); sys.stdin.read()",
        ],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests/unit"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdin is not None
    assert owner.stdout is not None
    try:
        assert owner.stdout.readline() == "ready\n"
        polling = SlotPolling([open_directory(str(maps))])
        assert [one.state for one in polling.poll().values()] == ["ready"]
        owner.send_signal(signal.SIGKILL)
        owner.wait(10)
        assert [one.state for one in polling.poll().values()] == ["stale"]
        polling.close()
    finally:
        owner.kill()
        owner.wait(10)
        owner.stdin.close()
        owner.stdout.close()


def test_keys_sort_reverse_and_filter(runner: FakeRunner, maps: Path, tmp_path: Path) -> None:
    place = copied(maps, tmp_path / "dead", ["0", "2", "10"])

    async def view(app: live.LiveView, pilot: Any) -> None:
        assert column(app, "slot") == ["0", "2", "10", "0"]
        for _ in range(1 + live.COLUMNS.index("state")):
            await pilot.press("s")
        assert app.sort_column == "state"
        assert column(app, "state") == ["ready", "stale", "stale", "stale"]
        await pilot.press("i")
        assert column(app, "state") == ["stale", "stale", "stale", "ready"]
        await pilot.press("i", "slash", *"STALE")
        await until(pilot, lambda: column(app, "state") == ["stale"] * 3)
        await pilot.press("escape")
        await until(pilot, lambda: len(column(app, "state")) == 4)

    viewed(view, place, maps)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("enter", "layers.0.mlp.weight"),
        ("t", "layers.0.mlp.weight"),
        ("r", "0x"),
        ("h", "scheduler_ready"),
    ],
)
def test_a_slot_is_opened_and_left(key: str, said: str, maps: Path) -> None:
    from small_model import a_runner

    kept = a_runner()

    async def view(app: live.LiveView, pilot: Any) -> None:
        await pilot.press(key)
        await until(pilot, lambda: isinstance(app.screen, live.Listing) and app.screen.is_mounted)
        await pilot.pause()
        table = app.screen.query_one("#list", DataTable)
        told = [" ".join(map(str, table.get_row_at(row))) for row in range(table.row_count)]
        assert any(said in line for line in told)
        await pilot.press("escape")
        assert not isinstance(app.screen, live.Listing)

    viewed(view, maps)
    del kept


def test_help_names_every_key(runner: FakeRunner, maps: Path) -> None:
    async def view(app: live.LiveView, pilot: Any) -> None:
        await pilot.press("question_mark")
        assert isinstance(app.screen, live.Help)
        text = str(app.screen.query_one("#help", Static).render())
        for word in ("tensors", "history", "regions", "filter", "sort", "quit"):
            assert word in text
        await pilot.press("escape")
        assert not isinstance(app.screen, live.Help)

    viewed(view, maps)


def test_the_bar_shows_every_part_that_there_is() -> None:
    memory = {"weights": 60, "kv_cache": 20, "lora": 1, "other": 9, "free": 10, "total": 100}
    text = live.bar(memory)
    assert len(text.plain) == live.BAR
    assert len({span.style for span in text.spans if span.end > span.start}) == 5
    assert live.bar(dict.fromkeys(memory)).plain == "-"


def test_64_slots_are_polled_in_no_time(runner: FakeRunner, maps: Path, tmp_path: Path) -> None:
    place = copied(maps, tmp_path / "many", [str(number) for number in range(64)])
    polling = SlotPolling([open_directory(str(place)), open_directory(str(maps))])
    assert len(polling.poll()) == 65
    began = time.process_time()
    for _ in range(10):
        polling.poll()
    assert (time.process_time() - began) / 10 < 0.05
    assert polling.documents_read == 65
    polling.close()


def test_without_a_terminal_or_textual_one_sentence_tells(
    run: Run, runner: FakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "needs a terminal" in sentence(run("top"), 2)
    monkeypatch.setitem(sys.modules, "textual", None)
    monkeypatch.setitem(sys.modules, "textual.app", None)
    monkeypatch.delitem(sys.modules, "sglang_weight_hook.commands.render.live")
    monkeypatch.delattr("sglang_weight_hook.commands.render.live", raising=False)
    assert "pip install textual" in sentence(run("top"), 2)


@pytest.mark.parametrize("end", ["q", "C-c", "TERM"])
def test_in_a_real_terminal_it_shows_and_gives_it_back(
    end: str, terminal: Terminal, runner: FakeRunner, maps: Path, tmp_path: Path
) -> None:
    place = copied(maps, tmp_path / "dead", ["1"])
    command = [sys.executable, "-m", "sglang_weight_hook", "top"]
    command += ["--dir", str(maps), "--dir", str(place)]
    told = tmp_path / "pid"
    terminal.start(f"env PYTHONPATH={ROOT} {shlex.join(command)}", told)
    shown = terminal.until("stale")
    assert re.search(r"\b0 +model +target .*ready", shown)
    assert "memory: " in shown
    coloured = terminal.shown("-e")
    assert re.search(r"\x1b\[[0-9;]*(31|91|38)[0-9;]*m[^\x1b]*stale", coloured)
    if end == "TERM":
        os.kill(int(told.read_text()), signal.SIGTERM)
    else:
        terminal("send-keys", end)
    shown = terminal.until("ended 0")
    assert "target" not in shown
    terminal("send-keys", "echo typed", "Enter")  # the terminal echoes, as before
    terminal.until("typed\ntyped")
