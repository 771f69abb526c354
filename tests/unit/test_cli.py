"""Every command on documents of the real recorder: what it answers and how it ends.

Facts are asserted, not screens.  ``tests/real_sglang/test_cli.py`` has a real server.
"""

from __future__ import annotations

import copy
import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from fake_sglang import FakeRunner, event, update
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from small_model import a_runner, torch

from sglang_weight_hook import reader
from sglang_weight_hook.commands import entry as cli
from sglang_weight_hook.commands.render.text import size_text
from sglang_weight_hook.layout import files
from sglang_weight_hook.reader import open_slot

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("show", "regions", "lookup", "diff", "report", "watch", "verify", "doctor", "plot")


class Ended(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def rows(self) -> list[list[str]]:
        return [line.split() for line in self.out.splitlines()]


Run = Callable[..., Ended]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> Ended:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["sglang-weight-hook", *map(str, arguments)])
        status = cli.main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Ended(status, captured.out, captured.err)

    return run


@pytest.fixture
def runner() -> FakeRunner:
    return a_runner()


@pytest.fixture
def layout(runner: FakeRunner, maps: Path) -> Any:
    return json.loads((maps / files.LAYOUT.format(0)).read_bytes())


def sentence(ended: Ended, status: int) -> str:
    """The one sentence of a refusal."""
    assert ended.status == status
    assert ended.out == ""
    assert ended.err.startswith("sglang-weight-hook: ")
    assert ended.err.count("\n") == 1
    return ended.err


# --- show and regions -----------------------------------------------------------------------


def test_show_lists_every_tensor_in_the_models_order(run: Run, layout: Any) -> None:
    ended = run("show")
    assert ended.status == 0
    rows = ended.rows
    assert rows[0] == ["address", "size", "type", "shape", "name"]
    names = list(layout["tensors"])
    assert [row[5] for row in rows[1:-1]] == names
    by_name = {row[5]: row for row in rows[1:-1]}
    tensor = layout["tensors"]["layers.0.mlp.weight"]
    assert by_name["layers.0.mlp.weight"][:5] == [hex(tensor["ptr"]), "144", "B", "float32", "6x6"]
    assert f"{len(names)} tensors" in ended.out.splitlines()[-1]
    assert "slot 0 ready, layout 1, content 1" in ended.out


def test_show_as_json_is_exact(run: Run, layout: Any) -> None:
    answer = run("show", "0", "--json").json
    for name, raw in layout["tensors"].items():
        shown = answer["tensors"][name]
        assert {key: shown[key] for key in raw} == raw
    assert answer["tensors"]["layers.1.self_attn.w_kc"]["layer"] == 1
    assert answer["tensors"]["layers.1.self_attn.w_kc"]["role"] == "attention"
    assert answer["owner_alive"] is True
    assert answer["total"]["bytes"] == sum(raw["size"] for raw in layout["tensors"].values())
    assert answer["total"]["storage_bytes"] == layout["totals"]["cpu"]["storage_bytes"]


@pytest.mark.parametrize(
    ("sort", "key"),
    [
        ("name", lambda name, raw: name),
        ("address", lambda name, raw: (raw["ptr"], name)),
        ("size", lambda name, raw: (-raw["size"], name)),
    ],
)
def test_show_sorts(sort: str, key: Any, run: Run, layout: Any) -> None:
    shown = list(run("show", "--sort", sort, "--json").json["tensors"])
    assert shown == sorted(layout["tensors"], key=lambda name: key(name, layout["tensors"][name]))
    assert list(run("show", "--sort", sort, "--top", "3", "--json").json["tensors"]) == shown[:3]


def test_show_filters_by_name_alias_role_and_layer(run: Run, layout: Any) -> None:
    def names(*arguments: str) -> set[str]:
        return set(run("show", "--json", *arguments).json["tensors"])

    assert names("--match", "layers.1.*") == {n for n in layout["tensors"] if "layers.1." in n}
    assert names("--match", "lm_head*") == {"embed_tokens.weight"}
    assert names("--layer", "0") == {n for n in layout["tensors"] if "layers.0." in n}
    assert names("--role", "norm") == {n for n in layout["tensors"] if "norm" in n}
    assert names("--match", "nothing") == set()
    assert "0 of" in run("show", "--match", "nothing").out


def test_regions_are_those_of_the_layout(run: Run, layout: Any) -> None:
    assert run("regions", "--json").json["regions"] == layout["regions"]
    rows = run("regions").rows[1:-1]
    assert [row[0] for row in rows] == [hex(region["ptr"]) for region in layout["regions"]]


# --- lookup ---------------------------------------------------------------------------------


def test_lookup_names_the_element_in_hexadecimal_and_decimal(run: Run, runner: FakeRunner) -> None:
    address = runner.model.layers[1].mlp.weight[2, 3].data_ptr() + 1
    for text in (hex(address), hex(address).upper().replace("X", "x"), str(address)):
        ended = run("lookup", text, "--json")
        assert ended.status == 0
        (hit,) = ended.json["tensors"]
        assert (hit["name"], hit["element"], hit["byte"]) == ("layers.1.mlp.weight", [2, 3], 1)
        assert ended.json["region"]["tensors"] == ["layers.1.mlp.weight"]
    out = run("lookup", hex(address)).out
    assert "layers.1.mlp.weight" in out
    assert "[2, 3], byte 1 of 4" in out


def test_lookup_finds_the_kv_cache(run: Run, runner: FakeRunner) -> None:
    pool = runner.token_to_kv_pool  # type: ignore[attr-defined]
    ended = run("lookup", pool.v_buffer[0].data_ptr() + 8, "--json")
    assert ended.status == 0
    assert ended.json["tensors"] == []
    assert [buffer["name"] for buffer in ended.json["kv_cache"]] == ["v_buffer.0"]
    assert "KV cache v_buffer.0" in run("lookup", pool.v_buffer[0].data_ptr()).out


def test_lookup_of_nothing_says_what_is_near(run: Run, layout: Any) -> None:
    ended = run("lookup", "0x10")
    assert ended.status == 3
    assert "nothing that is published lies at 0x10" in ended.out
    assert hex(layout["regions"][0]["ptr"]) in ended.out
    assert run("lookup", "0x10", "--json").status == 3


@pytest.mark.parametrize("text", ["", "zebra", "deadbeef", "0xg", "-5", "1.5", "0x" + "f" * 17])
def test_what_is_no_address_is_wrong_usage(text: str, run: Run, layout: Any) -> None:
    err = sentence(run("lookup", "--", text), 2)
    assert "address" in err
    assert ("0xdeadbeef" in err) == (text == "deadbeef")


# --- diff -----------------------------------------------------------------------------------


def test_diff_tells_by_its_status_whether_to_register_again(
    run: Run, runner: FakeRunner, maps: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "before.json"
    shutil.copy(maps / files.LAYOUT.format(0), saved)
    same = run("diff", saved, "0")
    assert same.status == 0
    assert "registrations hold; contents are the same" in same.out
    update(runner)
    written = run("diff", saved, "0", "--json")
    assert written.status == 0
    assert written.json["content_changed"] is True
    assert written.json["must_register_again"] is False
    kept = runner.model.layers[0].mlp.weight.data
    runner.model.layers[0].mlp.weight.data = torch.zeros(6, 6)
    update(runner)
    moved = run("diff", saved, "0")
    assert moved.status == 3
    assert "register again" in moved.out
    new = runner.model.layers[0].mlp.weight.data_ptr()
    assert f"{kept.data_ptr():#x} -> {new:#x}  layers.0.mlp.weight" in moved.out
    answer = run("diff", saved, "0", "--json").json
    assert answer["moved"] == ["layers.0.mlp.weight"]
    assert answer["old"]["owner_alive"] is None
    assert answer["new"]["owner_alive"] is True
    assert run("diff", saved, saved).status == 0


def test_diff_lists_ten_names_unless_all_are_asked_for(
    run: Run, runner: FakeRunner, maps: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "before.json"
    shutil.copy(maps / files.LAYOUT.format(0), saved)
    kept = [parameter.data for parameter in runner.model.parameters()]
    for parameter in runner.model.parameters():
        parameter.data = parameter.data.clone()
    update(runner)
    count = run("diff", saved, "0").out.count(" -> ")
    every = run("diff", saved, "0", "--all").out.count(" -> ")
    assert (count, every) == (10, len(run("diff", saved, "0", "--json").json["moved"]))
    assert every > count
    del kept


# --- report ---------------------------------------------------------------------------------


def test_report_adds_up_several_directories(
    run: Run, layout: Any, maps: Path, tmp_path: Path, run_python: Any
) -> None:
    one = run("report", "--json").json
    memory = layout["memory"]
    assert one["total"]["weights"] == memory["weights_bytes"]
    assert one["total"]["kv_cache"] == memory["kv_cache_bytes"]
    assert one["total"]["rest"] is None
    (slot,) = one["slots"]
    assert slot["identity"]["model_class"] == "Model"
    other = tmp_path / "other"
    code = "from small_model import a_runner; kept = a_runner()"
    run_python("-c", code, SGLANG_WEIGHT_HOOK_DIR=str(other))
    both = run("report", "--json", "--dir", maps, "--dir", other, "--gone").json
    assert both["total"]["weights"] == 2 * memory["weights_bytes"]
    assert len(both["slots"]) == 2
    # Given twice, counted once; a dead one is not counted, and that is said.
    twice = run("report", "--json", "--dir", maps, "--dir", f"{maps}/.", "--dir", other).json
    assert twice["total"]["weights"] == memory["weights_bytes"]
    assert [slot["counted"] for slot in twice["slots"]] == [True, False]
    assert "left out: its process is gone" in run("report", "--dir", maps, "--dir", other).err
    pattern = run("report", "--json", "--dir", f"{tmp_path}/[mo]*", "--gone").json
    assert pattern["total"] == both["total"]


def test_report_without_a_live_server_says_what_to_check(run: Run, maps: Path) -> None:
    maps.mkdir()
    assert "no live SGLang publishes" in sentence(run("report"), 1)
    assert "no directory is like" in sentence(run("report", "--dir", f"{maps}/no*"), 1)


# --- watch ----------------------------------------------------------------------------------

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
    assert "has ended" in watch.stdout.readline()
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


# --- verify, doctor, plot -------------------------------------------------------------------


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


# --- which slot -----------------------------------------------------------------------------


def test_with_several_slots_one_must_be_named(run: Run, runner: FakeRunner, maps: Path) -> None:
    second = a_runner(gpu_id=1)
    for command in (["show"], ["regions"], ["lookup", "0x10"]):
        err = sentence(run(*command), 2)
        assert "there are slots 0, 1 in" in err
    assert run("show", "1").status == 0
    assert run("verify").status == 0
    assert len(run("report", "--json").json["slots"]) == 2
    del second


@pytest.mark.parametrize("command", [["show"], ["regions"], ["lookup", "0x10"], ["verify"]])
def test_a_slot_that_is_not_there_is_one_sentence(
    command: list[str], run: Run, layout: Any
) -> None:
    ended = run(*command, "7")
    if command == ["verify"]:
        assert ended.status == 3
        assert "readable" in ended.out
    else:
        assert "there is no slot 7" in sentence(ended, 1)


@pytest.mark.parametrize(
    "command", [["show"], ["regions"], ["lookup", "1"], ["diff", "0", "1"], ["report"], ["verify"]]
)
def test_a_directory_that_is_not_there_is_one_sentence(
    command: list[str], run: Run, maps: Path
) -> None:
    assert "SGLANG_WEIGHT_HOOK_DIR" in sentence(run(*command), 1)
    maps.mkdir()
    sentence(run(*command), 1)


def test_a_saved_copy_stands_for_a_slot(run: Run, layout: Any, maps: Path, tmp_path: Path) -> None:
    saved = tmp_path / "copy.json"
    shutil.copy(maps / files.LAYOUT.format(0), saved)
    ended = run("show", saved, "--json", "--dir", "/nowhere")
    assert ended.json["tensors"].keys() == layout["tensors"].keys()
    assert ended.json["owner_alive"] is None
    assert "does not exist" in sentence(run("show", tmp_path / "no.json"), 1)
    saved.write_text("{}")
    assert "not written by the hook" in sentence(run("show", saved), 1)


def test_a_dead_owner_is_told_on_stderr(run: Run, maps: Path, run_python: Any) -> None:
    run_python("-c", "from small_model import a_runner; kept = a_runner(); import os; os._exit(0)")
    ended = run("show")
    assert ended.status == 0
    assert "is gone: these addresses are nobody's" in ended.err
    assert run("show", "--json").json["owner_alive"] is False


# --- names and terminals --------------------------------------------------------------------


def test_nothing_in_a_name_reaches_the_terminal_as_a_command(
    run: Run, maps: Path, layout: Any
) -> None:
    path = maps / files.LAYOUT.format(0)
    raw = layout["tensors"].pop("layers.0.mlp.weight")
    layout["tensors"]["\x1b[2J[red]\ud800\u202e\n"] = raw
    path.write_text(json.dumps(layout))
    ended = run("show")
    assert ended.status == 0
    assert "\x1b" not in ended.out
    assert r"\x1b[2J[red]\ud800\u202e\n" in ended.out
    assert run("lookup", raw["ptr"]).status == 0


def child(*arguments: str, **environment: str) -> list[str]:
    return [
        *("env", f"PYTHONPATH={ROOT}"),
        *(f"{name}={value}" for name, value in environment.items()),
        *(sys.executable, "-m", "sglang_weight_hook", *arguments),
    ]


def on_a_terminal(columns: int, command: list[str]) -> str:
    """What a terminal of that width shows."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    environment["TERM"] = "xterm"
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while data := os.read(ours, 65536):
            shown += data
    except OSError:  # EIO: the other end is closed
        pass
    os.close(ours)
    process.wait(60)
    return shown.decode()


@pytest.mark.parametrize("command", ["show", "regions", "report", "verify", "doctor"])
def test_a_terminal_of_80_columns_is_enough(command: str, layout: Any, maps: Path) -> None:
    shown = on_a_terminal(80, child(command, NO_COLOR="1", SGLANG_WEIGHT_HOOK_DIR=str(maps)))
    assert "\x1b[3" not in shown
    # A path cannot be broken anywhere but in its middle, so doctor may run over with one.
    lines = [line for line in re.sub("\x1b[^m]*m", "", shown).splitlines() if "/" not in line]
    assert lines
    assert max(len(line) for line in lines) <= 80


def test_colours_are_for_terminals_and_not_with_no_color(layout: Any, maps: Path) -> None:
    plain = child("verify", SGLANG_WEIGHT_HOOK_DIR=str(maps))
    assert "\x1b[32m" in on_a_terminal(80, plain)
    without = child("verify", SGLANG_WEIGHT_HOOK_DIR=str(maps), NO_COLOR="1")
    assert "\x1b[32m" not in on_a_terminal(80, without)
    assert "\x1b" not in subprocess.run(plain, capture_output=True, text=True, check=True).stdout


def test_a_pipe_gets_whole_names_and_one_that_closes_is_no_error(maps: Path) -> None:
    name = "a_module_with_quite_a_long_name_indeed" * 3
    runner = a_runner(
        torch.nn.ModuleDict({f"{name}{n}": torch.nn.Linear(2, 2) for n in range(800)})
    )
    command = child("show", SGLANG_WEIGHT_HOOK_DIR=str(maps))
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f" {name}799.bias\n" in done.stdout
    pipe = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert pipe.stdout is not None
    assert pipe.stderr is not None
    pipe.stdout.readline()
    pipe.stdout.close()
    assert pipe.stderr.read() == ""
    pipe.stderr.close()
    assert pipe.wait(60) == 0
    del runner


# --- garbage ----------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            found += places(item, (*path, key))
    return found


def test_whatever_stands_in_the_files_no_command_fails_with_a_traceback(
    run: Run, runner: FakeRunner, maps: Path, tmp_path: Path
) -> None:
    update(runner)
    names = [name.format(0) for name in files.DOCUMENTS]
    good = {name: json.loads((maps / name).read_bytes()) for name in names}
    saved = tmp_path / "saved.json"
    page = tmp_path / "map.html"

    @settings(deadline=None, max_examples=30, phases=[Phase.generate])
    @given(st.data())
    def garble(data: st.DataObject) -> None:
        contents = copy.deepcopy(good)
        for _ in range(data.draw(st.integers(1, 3))):
            name = data.draw(st.sampled_from(names[-2:] * 3 + names))
            path = data.draw(st.sampled_from(places(contents[name])[1:] or [()]))
            inside: Any = contents[name]
            for key in path[:-1]:
                inside = inside[key]
            if path:
                inside[path[-1]] = data.draw(JSON)
        for name, content in contents.items():
            (maps / name).write_text(json.dumps(content))
        shutil.copy(maps / files.LAYOUT.format(0), saved)
        for source in ("0", saved):
            for command in (["show"], ["regions"], ["lookup", "4096"], ["verify"]):
                for more in ([], ["--json"]):
                    assert run(*command, source, *more).status in (0, 1, 3)
        assert run("diff", saved, "0").status in (0, 1, 3)
        assert run("report").status in (0, 1)
        assert run("watch", "--begins", "--timeout", "0").status in (0, 1)
        assert run("plot", saved, "-o", page).status in (0, 1)

    original, reader.Slot.read = reader.Slot.read, impatient  # type: ignore[method-assign]
    try:
        garble()
    finally:
        reader.Slot.read = original  # type: ignore[method-assign]


def impatient(slot: Any, timeout: float = 0, read: Any = reader.Slot.read) -> Any:
    return read(slot, 0)


# --- without typer, help, versions ----------------------------------------------------------


@pytest.mark.parametrize("name", ["typer", "rich"])
def test_without_the_extra_one_sentence_tells_what_to_install(name: str, run_python: Any) -> None:
    code = f"import sys; sys.modules[{name!r}] = None; import runpy; runpy.run_module("
    code += "'sglang_weight_hook', run_name='__main__')"
    done = run_python("-c", code, check=False)
    assert done.returncode == 2
    assert "pip install 'sglang-weight-hook[cli]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_reading_from_python_needs_neither_typer_nor_rich(run_python: Any) -> None:
    code = (
        "import sys, sglang_weight_hook as hook, sglang_weight_hook.__main__;"
        "from sglang_weight_hook.commands import diagnosis;"
        "from sglang_weight_hook.reader import totals, verify;"
        "hook.open_slot('x', '0');"
        "assert not [n for n in ('typer', 'rich', 'click', 'torch') if n in sys.modules]"
    )
    run_python("-c", code)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command: str, run: Run) -> None:
    ended = run(command, "--help")
    assert ended.status == 0
    assert "Examples:" in ended.out
    assert "sglang-weight-hook " + command in ended.out or command == "diff"
    assert max(len(line) for line in ended.out.splitlines()) <= 80
    assert ("--json" in ended.out) == (command != "plot")
    assert "--dir" in ended.out


def test_the_command_itself_lists_all_and_tells_its_version(run: Run) -> None:
    ended = run("--help")
    for command in COMMANDS:
        assert f"  {command}" in ended.out
    listed = ended.out.partition("Commands:")[2].partition("Exit status")[0]
    assert "..." not in listed  # what it does is told whole
    from sglang_weight_hook import __version__

    assert run("--version").out == f"sglang-weight-hook {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["show", "--nonsense"], ["show", "--sort", "colour"], ["show", "--top", "0"]],
)
def test_wrong_usage_is_two(arguments: list[str], run: Run) -> None:
    ended = run(*arguments)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err


def test_sizes_are_for_people() -> None:
    assert [size_text(value) for value in (0, 1023, 1024, 15 << 30, 3 << 40, 5 << 50, None)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "15.0 GiB",
        "3.0 TiB",
        "5120.0 TiB",
        "-",
    ]


def test_the_slot_is_readable_all_the_while(run: Run, layout: Any, maps: Path) -> None:
    """No command holds the lock or leaves anything behind."""
    before = sorted(path.name for path in maps.iterdir())
    for command in (["show"], ["regions"], ["lookup", "1"], ["report"], ["verify"], ["doctor"]):
        run(*command)
    assert sorted(path.name for path in maps.iterdir()) == before
    with open_slot(str(maps), "0").weights_held(timeout=0):
        pass
