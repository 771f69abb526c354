"""report, watch, verify, doctor and plot: what they answer of servers.

On documents of the real recorder; facts are asserted, not screens.  ``tests/real_sglang`` has a
real server.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ended_command import ROOT, Ended, Run, sentence
from fake_sglang import FakeRunner, event, update

from sglang_weight_hook.layout import files


def test_report_adds_up_several_directories(
    run: Run, layout: Any, maps: Path, tmp_path: Path, run_python: Any
) -> None:
    one = run("report", "--json").json
    memory = layout["memory"]
    assert one["total"]["weights_bytes"] == memory["weights_bytes"]
    assert one["total"]["kv_cache_bytes"] == memory["kv_cache_bytes"]
    assert one["total"]["rest_bytes"] is None
    assert one["total"]["gpus"] == 1
    assert not one["total"].keys() & {
        "hostname",
        "gpu_id",
        "gpu_uuid",
        "device",
    }  # those of one GPU
    (slot,) = one["slots"]
    assert slot["identity"]["model_class"] == "Model"
    other = tmp_path / "other"
    code = "from small_model import a_runner; kept = a_runner()"
    run_python("-c", code, SGLANG_WEIGHT_HOOK_DIR=str(other))
    both = run("report", "--json", "--dir", maps, "--dir", other, "--gone").json
    assert both["total"]["weights_bytes"] == 2 * memory["weights_bytes"]
    assert len(both["slots"]) == 2
    # Given twice, counted once; a dead one is not counted, and that is said.
    twice = run("report", "--json", "--dir", maps, "--dir", f"{maps}/.", "--dir", other).json
    assert twice["total"]["weights_bytes"] == memory["weights_bytes"]
    assert [slot["counted"] for slot in twice["slots"]] == [True, False]
    assert "left out: its owner has exited" in run("report", "--dir", maps, "--dir", other).err
    pattern = run("report", "--json", "--dir", f"{tmp_path}/[mo]*", "--gone").json
    assert pattern["total"] == both["total"]


def test_the_figures_of_report_have_the_names_of_the_format(run: Run, layout: Any) -> None:
    (gpu,) = run("report", "--json").json["gpus"]
    rows = list(csv.DictReader(io.StringIO(run("report", "-o", "csv").out)))
    assert list(rows[0].keys() ^ gpu.keys()) == []
    page = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
    own = {"slots", "released_bytes", "rest_bytes"}  # sums over slots, which no layout has
    assert own < gpu.keys()
    for name in gpu.keys() - own:
        assert f"| `{name}` |" in page, name
    assert gpu["weights_bytes"] == layout["memory"]["weights_bytes"]
    assert gpu["gpu_uuid"] is None


def test_report_of_named_slots_and_saved_layouts(
    run: Run, layout: Any, maps: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "before.json"
    shutil.copy(maps / files.LAYOUT.format(0), saved)
    whole = run("report", "--json").json
    for name in ("0", saved):
        assert (
            run("report", name, "--json").json["total"]["weights_bytes"]
            == (whole["total"]["weights_bytes"])
        )
    both = run("report", "0", saved, "--json").json
    assert [slot["slot"] for slot in both["slots"]] == ["before.json", "0"]
    # The same storages of the same process, twice.
    assert both["total"]["weights_bytes"] == whole["total"]["weights_bytes"]
    assert "there is no slot 7" in sentence(run("report", "7"), 1)
    assert "saved file" in sentence(run("report", saved, "--watch"), 2)
    for path in maps.glob("*_0.*"):
        path.unlink()
    assert run("report", saved).status == 0  # it needs no directory


def test_report_without_a_live_server_says_what_to_check(run: Run, maps: Path) -> None:
    maps.mkdir()
    assert "no live SGLang publishes" in sentence(run("report"), 1)
    assert "no directory matches" in sentence(run("report", "--dir", f"{maps}/no*"), 1)


WATCHED = """
import sys
from fake_sglang import update
from small_model import a_runner
runner = a_runner()
print("ready", flush=True)
for line in sys.stdin:
    update(runner)
"""


@pytest.fixture
def watching(maps: Path, tmp_path: Path) -> Any:
    """Start the command beside us, with its lines to read."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "sglang_weight_hook", "watch", *arguments],
            cwd=ROOT,
            env={**os.environ, "SGLANG_WEIGHT_HOOK_DIR": str(maps)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_watch_prints_a_line_for_each_event_until_ctrl_c(
    watching: Any, start_python: Any, maps: Path
) -> None:
    server = start_python(WATCHED)
    server.stdout.readline()
    watch = watching()
    first = watch.stdout.readline().split()
    assert first[1:4] == ["0", "ready", "scheduler_ready"]
    for content in (2, 3):
        server.stdin.write("update\n")
        server.stdin.flush()
        line = watch.stdout.readline()
        assert line.split()[1:5] == ["0", "ready", "update_weights_from_disk", "ok"]
        assert f"layout 1 content {content}" in line
    server.kill()
    server.wait()
    assert "has exited" in watch.stdout.readline()
    watch.send_signal(signal.SIGINT)
    out, err = watch.communicate(timeout=30)
    assert (watch.returncode, out, err) == (0, "", "")


def test_watch_waits_for_a_server_and_ends_after_a_count(
    watching: Any, start_python: Any, maps: Path
) -> None:
    watch = watching("--json", "--count", "1", "--timeout", "60")
    start_python(WATCHED)
    lines = [json.loads(line) for line in watch.communicate(timeout=90)[0].splitlines()]
    assert watch.returncode == 0
    assert [line["slot"] for line in lines] == ["0"] * len(lines)
    assert sum(not line["initial"] for line in lines) == 1
    assert lines[-1]["state"]["schema"] == "sglang-weight-state"


def test_watch_of_too_few_events_has_its_own_status(run: Run, layout: Any) -> None:
    assert run("watch", "--count", "1", "--timeout", "0.1").status == 3
    ended = run("watch", "--timeout", "0.1")
    assert ended.status == 0
    assert len(ended.out.splitlines()) == 1
    assert run("watch", "7", "--timeout", "0.1").out == ""


def test_watch_shows_beginnings_if_asked(run: Run, runner: FakeRunner) -> None:
    shown: list[Ended] = []
    update(runner, during=lambda: shown.append(run("watch", "--begins", "--timeout", "0")))
    assert "updating" in shown[0].out


def test_verify_says_ok_or_one_line_for_each_finding(
    run: Run, runner: FakeRunner, maps: Path
) -> None:
    good = run("verify")
    assert good.status == 0
    assert good.rows[0][:2] == ["ok", "0"]
    assert run("verify", maps / files.LAYOUT.format(0)).status == 0
    event("update_weights_from_disk", "update", [runner], result=(False, "no such directory"))
    warned = run("verify", "0")
    assert (warned.status, len(warned.rows)) == (0, 1)
    assert warned.rows[0][:2] == ["warning", "0"]
    assert run("verify", "--strict").status == 3
    (maps / files.MERGED.format(0)).write_text("[]")
    bad = run("verify", "--json")
    assert bad.status == 3
    assert bad.json["good"] is False
    checks = {(f["level"], f["check"]) for f in bad.json["slots"][0]["findings"]}
    assert checks == {("warning", "state"), ("error", "files")}


def test_doctor_ends_with_three_where_the_hook_is_not(run: Run, layout: Any) -> None:
    ended = run("doctor")
    assert ended.status == 3
    assert any(row[:2] == ["BAD", "Active"] for row in ended.rows)
    answer = run("doctor", "--json").json
    assert answer["good"] is False
    assert answer["interpreter"]["executable"] == sys.executable


def test_plot_writes_a_page(run: Run, layout: Any, maps: Path, tmp_path: Path) -> None:
    page = tmp_path / "map.html"
    before = maps / files.LAYOUT.format(0)
    assert run("plot", "-o", page).status == 0
    assert "</html>" in page.read_text()
    assert run("plot", "0", "--output", page, "--before", before).status == 0
    refused = sentence(run("plot", "-o", tmp_path / "no" / "map.html"), 1)
    assert "No such file or directory" in refused
