"""The examples, run against a process that publishes with the real recorder and updates.

The publisher's runner is a fake (`fake_sglang`), its model and tensors are torch's, the files
and locks are real.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_weight_hook.layout import files
from sglang_weight_hook.layout.header import Header, pack
from sglang_weight_hook.layout.states import STATES
from sglang_weight_hook.publisher.header import HeaderFile
from sglang_weight_hook.reader import Slot, open_slot

pytest.importorskip("torch")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

# Does what it is told on stdin, and says when it is done.
PUBLISHER = """
import sys
import torch
from fake_sglang import FakeRunner, event, load, settle, stream, update

runner = FakeRunner(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 32)))
load(runner)
settle()
pages = {"tags": None, "physical": True}
kept = []
def move():
    kept.append(runner.model[0].weight.data)  # so that its address is not given out again
    runner.model[0].weight.data = torch.zeros(64, 64)
def pause():
    print("updating", flush=True)
    sys.stdin.readline()
print("ready", flush=True)
for line in sys.stdin:
    what = line.strip()
    if what == "update":
        update(runner)
    elif what == "move":
        update(runner, during=move)
    elif what == "pause":
        update(runner, during=pause)
    elif what in ("release", "resume"):
        event(what + "_memory_occupation", what, [runner], details=pages)
    print("done", flush=True)
"""


class Publisher:
    def __init__(self, process: subprocess.Popen[str], maps: Path) -> None:
        self.process = process
        self.maps = maps
        self.slot = open_slot(str(maps), "0")
        assert self.answer() == "ready"

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, what: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self.answer()


@pytest.fixture
def publisher(start_python: Callable[..., subprocess.Popen[str]], maps: Path) -> Publisher:
    return Publisher(start_python(PUBLISHER), maps)


@pytest.fixture
def start_example(
    publisher: Publisher, tmp_path: Path
) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start an example on the publisher's slot; it and what it starts are ended at the end."""
    started = []

    def start(*command: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*command, str(publisher.maps), "0"],
            env={**os.environ, **environment},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


# --- C ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def print_regions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    program = tmp_path_factory.mktemp("c") / "print_regions"
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-O1", "-g"]
    source = str(EXAMPLES / "print_regions.c")
    sanitized = [*flags, "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    made = subprocess.run([compiler, *sanitized, "-o", str(program), source], check=False)
    if made.returncode:  # a compiler without the sanitizers' libraries
        subprocess.run([compiler, *flags, "-o", str(program), source], check=True)
    return program


def run_c(program: Path, directory: Path, slot: str = "0") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), str(directory), slot],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def expected_lines(publisher: Publisher) -> list[str]:
    fields = ("ptr", "size", "device", "allocation_ptr", "allocation_size")
    regions = publisher.slot.read().regions
    return [" ".join(str(region[field]) for field in fields) for region in regions]


def test_c_prints_every_region_before_and_after_one_moves(
    publisher: Publisher, print_regions: Path
) -> None:
    done = run_c(print_regions, publisher.maps)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == expected_lines(publisher)
    publisher.tell("move")
    again = run_c(print_regions, publisher.maps)
    assert again.stdout.splitlines() == expected_lines(publisher)
    assert again.stdout != done.stdout


def test_c_waits_for_the_update_under_way(publisher: Publisher, print_regions: Path) -> None:
    assert publisher.tell("pause") == "updating"
    reader = subprocess.Popen(
        [str(print_regions), str(publisher.maps), "0"], stdout=subprocess.PIPE, text=True
    )
    with pytest.raises(subprocess.TimeoutExpired):
        reader.wait(0.3)
    publisher.tell("go on")
    output, _ = reader.communicate(timeout=30)
    assert (reader.returncode, output.splitlines()) == (0, expected_lines(publisher))


def test_c_holds_no_lock_and_leaves_no_file_behind(
    publisher: Publisher, print_regions: Path
) -> None:
    before = sorted(os.listdir(publisher.maps))
    run_c(print_regions, publisher.maps)
    assert sorted(os.listdir(publisher.maps)) == before
    with open(publisher.slot.path(files.SAVING_LOCK), "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_c_says_when_the_map_is_not_to_be_used(publisher: Publisher, print_regions: Path) -> None:
    publisher.tell("release")
    done = run_c(print_regions, publisher.maps)
    assert (done.returncode, done.stdout) == (3, "")
    assert "slot 0 is released" in done.stderr
    publisher.process.kill()
    publisher.process.wait()
    done = run_c(print_regions, publisher.maps)
    assert (done.returncode, done.stdout) == (3, "")
    assert "is stale" in done.stderr


def test_c_refuses_a_wrong_directory_and_wrong_usage(print_regions: Path, tmp_path: Path) -> None:
    done = run_c(print_regions, tmp_path)
    assert done.returncode == 1
    assert "weight_saving_0.lock: No such file" in done.stderr
    assert subprocess.run([str(print_regions)], capture_output=True, check=False).returncode == 2


def run_header(program: Path, directory: Path, count: int = 1) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(program), f"--header={count}", str(directory), "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def expected_header(slot: Slot) -> list[str]:
    header = slot.header()
    numbers = (
        *(header.layout_generation, header.content_generation),
        *(header.physical_epoch, header.kv_physical_epoch, header.pid),
    )
    return [header.state, *map(str, numbers)]


def test_c_prints_the_header_and_its_changes(publisher: Publisher, print_regions: Path) -> None:
    reader = run_header(print_regions, publisher.maps, 3)
    assert reader.stdout is not None
    first = reader.stdout.readline().split()
    assert first[:6] == expected_header(publisher.slot)
    found = publisher.slot.header()
    assert first[8] == found.instance
    for told, wanted in zip(first[6:8], (found.updated_at, found.checked_at)):
        assert wanted is not None
        assert float(told) == pytest.approx(wanted, abs=1e-5)
    assert publisher.tell("pause") == "updating"
    assert reader.stdout.readline().split()[:6] == expected_header(publisher.slot)
    publisher.tell("go on")
    assert reader.stdout.readline().split()[:6] == expected_header(publisher.slot)
    _, said = reader.communicate(timeout=30)
    assert (reader.returncode, said) == (0, "")


def test_c_notices_that_the_header_was_replaced(
    print_regions: Path, maps: Path, tmp_path: Path
) -> None:
    maps.mkdir()
    path = str(maps / files.HEADER.format("0"))
    first = HeaderFile(path, A_HEADER)
    reader = run_header(print_regions, maps, 3)
    assert reader.stdout is not None
    assert reader.stdout.readline().startswith("ready 3 4 5 6 7 1.250000000 0.000000000 abab")
    second = HeaderFile(path, A_HEADER._replace(pid=8))
    assert reader.stdout.readline().split()[5] == "8"
    first.abandon()
    second.leave()
    assert reader.stdout.readline().split()[:2] == ["left", "3"]
    assert reader.wait(30) == 0
    reader.communicate()


A_HEADER = Header(2, 7, "ready", 11, "12" * 16, 3, 4, 5, 6, 1.25, None, "cd" * 16, "ab" * 8)


@pytest.mark.parametrize(
    ("data", "status", "says"),
    [
        (pack(A_HEADER)[:-1], 1, "not a file of 128 bytes"),
        (pack(A_HEADER) + b"x", 1, "not a file of 128 bytes"),
        (pack(A_HEADER._replace(sequence=3)), 3, "not consistent"),
        (pack(A_HEADER)[:-1] + b"?", 3, "not consistent"),
        (pack(A_HEADER)[:64] + pack(A_HEADER._replace(physical_epoch=9))[64:], 0, ""),
        (pack(A_HEADER)[:72] + pack(A_HEADER._replace(physical_epoch=9))[72:], 3, "consistent"),
        (b"?" * 128, 3, "not consistent"),
    ],
)
def test_c_refuses_what_is_no_whole_header(
    data: bytes, status: int, says: str, print_regions: Path, maps: Path
) -> None:
    maps.mkdir()
    (maps / files.HEADER.format("0")).write_bytes(data)
    reader = run_header(print_regions, maps)
    said, complained = reader.communicate(timeout=60)
    assert reader.returncode == status
    assert says in complained
    assert (said == "") == (status != 0)


@pytest.mark.parametrize("kind", ["nothing", "fifo", "link"])
def test_c_refuses_what_is_no_header_file(kind: str, print_regions: Path, maps: Path) -> None:
    maps.mkdir()
    path = maps / files.HEADER.format("0")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        (maps / "other").write_bytes(pack(A_HEADER))
        path.symlink_to(maps / "other")
    reader = run_header(print_regions, maps)
    assert reader.communicate(timeout=60)[0] == ""
    assert reader.returncode == 1


def test_c_never_prints_a_header_mixed_of_two(
    print_regions: Path, maps: Path, start_python: Callable[..., subprocess.Popen[str]]
) -> None:
    """Beside a process that rewrites it as fast as it can; all fields follow from the first."""
    maps.mkdir()
    writer = start_python(HEADER_WRITER, str(maps / files.HEADER.format("0")))
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n"
    reader = run_header(print_regions, maps, 20_000)
    said, complained = reader.communicate(timeout=120)
    assert (reader.returncode, complained) == (0, "")
    lines = [line.split() for line in said.splitlines()]
    assert len(lines) == 20_000
    for state, layout, content, epoch, kv_epoch, pid, updated, checked, instance in lines:
        n = int(layout)
        assert state == STATES[n % len(STATES)]
        assert (int(content), int(epoch), int(kv_epoch)) == (n * 7, n * 11, n * 13)
        assert (int(pid), int(instance, 16)) == (n % 1000 + 1, n * 19)
        assert (float(updated), float(checked)) == (n, 2 * n)
    assert len({line[1] for line in lines}) > 1000


HEADER_WRITER = """
import sys
from sglang_weight_hook.layout.header import Header
from sglang_weight_hook.layout.states import STATES
from sglang_weight_hook.publisher.header import HeaderFile

def at(n):
    return Header(
        2, n % 1000 + 1, STATES[n % len(STATES)], n, f"{n:032x}", n, n * 7, n * 11, n * 13,
        float(n), 2.0 * n, f"{n:032x}", f"{n * 19:016x}",
    )

header = HeaderFile(sys.argv[1], at(1))
print("ready", flush=True)
n = 1
while True:
    n += 1
    header.write(at(n))
"""


LAYOUT = (
    '{"schema": "sglang-weight-layout", "schema_version": 1, "layout_generation": 1, '
    '"identity": {"pid": 7, "x": {"pid": 8}}, "tensors": {"regions": [1], "\\"": "}"}, '
    '"regions": [{"tensors": ["]"], "ptr": 18446744073709551000, "size": 16, "device": "cuda:0", '
    '"allocation_ptr": 4096, "allocation_size": 8192}], "more": [true, null, -1.5e3]}'
)
STATE = (
    '{"schema": "sglang-weight-state", "schema_version": 1, "state": "ready", '
    '"layout_generation": 1, "pid": 7}'
)


@pytest.fixture
def by_hand(tmp_path: Path) -> Iterator[Callable[[str, str], Path]]:
    """A directory with documents as they are given, and a living owner."""
    folder = tmp_path / "by hand"
    folder.mkdir()
    (folder / "weight_saving_0.lock").touch()
    with open(folder / "weight_owner_0.lock", "wb") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)

        def write(layout: str, state: str) -> Path:
            (folder / "weight_layout_0.json").write_text(layout)
            (folder / "weight_state_0.json").write_text(state)
            return folder

        yield write


def test_c_reads_json_by_its_grammar_and_64_bits(
    by_hand: Callable[[str, str], Path], print_regions: Path
) -> None:
    done = run_c(print_regions, by_hand(LAYOUT, STATE))
    assert done.stdout == "18446744073709551000 16 cuda:0 4096 8192\n"
    assert done.returncode == 0, done.stderr


def test_c_takes_no_layout_of_another_instance(
    by_hand: Callable[[str, str], Path], print_regions: Path
) -> None:
    state = STATE.replace('"pid": 7', '"pid": 7, "instance": "aa"')
    layout = LAYOUT.replace('{"pid": 7, "x": {"pid": 8}}', '{"pid": 7}, "instance": "%s"')
    same = run_c(print_regions, by_hand(layout % "aa", state))
    assert (same.returncode, same.stderr) == (0, "")
    done = run_c(print_regions, by_hand(layout % "bb", state))
    assert (done.returncode, done.stdout) == (3, "")
    assert "no settled map" in done.stderr
    older = run_c(print_regions, by_hand(LAYOUT, state))  # release 0.1
    assert older.returncode == 0


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("18446744073709551000", "18446744073709551616"),
        ("18446744073709551000", "18446744073709551610"),  # wraps around with its size
        ("18446744073709551000", '"0x7f00"'),
        ("18446744073709551000", "1.5"),
        ('"size": 16', '"size": 0'),
        ('"regions"', '"areas"'),
        ('"device": "cuda:0", ', '"device": "cuda:0" '),
        ("sglang-weight-layout", "sglang-weight-state"),
        ('"schema_version": 1', '"schema_version": 2'),
        ("[true", "[" * 100_000),
        (LAYOUT, ""),
        (LAYOUT, "[]"),
        (LAYOUT, LAYOUT[:-20]),
        (LAYOUT, LAYOUT[:60] + '"'),
        (LAYOUT, "\\"),
    ],
)
def test_c_refuses_what_is_no_layout(
    old: str, new: str, by_hand: Callable[[str, str], Path], print_regions: Path
) -> None:
    done = run_c(print_regions, by_hand(LAYOUT.replace(old, new), STATE))
    assert done.returncode == 1
    assert done.stderr.startswith("print_regions: ")
    assert done.stdout == ""


# --- shell --------------------------------------------------------------------------------


@pytest.fixture(params=["inotify", "polling"])
def watch_environment(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """With inotifywait, and with a PATH on which it is not."""
    if request.param == "inotify":
        if shutil.which("inotifywait") is None:
            pytest.skip("no inotifywait (package inotify-tools); the polling case runs")
        return {"INTERVAL": "30"}  # events alone must do
    folder = tmp_path / "path"
    folder.mkdir()
    for tool in ("bash", "cat", "grep", "head", "sleep", "env"):
        found = shutil.which(tool)
        assert found is not None
        (folder / tool).symlink_to(found)
    return {"PATH": str(folder), "INTERVAL": "0.05"}


def test_the_shell_loop_prints_a_line_for_each_change(
    publisher: Publisher,
    start_example: Callable[..., subprocess.Popen[str]],
    watch_environment: dict[str, str],
) -> None:
    loop = start_example(str(EXAMPLES / "watch.sh"), **watch_environment)
    assert loop.stdout is not None

    def line() -> tuple[str, int, int]:
        assert loop.stdout is not None
        words = loop.stdout.readline().split()
        numbers = dict(word.split("=") for word in words[1:])
        return words[0], int(numbers["layout"]), int(numbers["content"])

    state, layout, content = line()
    assert state == "ready"
    publisher.tell("pause")
    assert line() == ("updating", layout, content)
    publisher.tell("go on")
    assert line() == ("ready", layout, content + 1)
    publisher.tell("move")
    seen = [line()]
    while seen[-1][0] == "updating":
        seen.append(line())
    assert seen[-1] == ("ready", layout + 1, content + 2)
    os.unlink(publisher.slot.path(files.STATE))
    assert loop.stdout.readline() == "absent\n"


def test_the_shell_loop_ends_with_what_it_started(
    publisher: Publisher, start_example: Callable[..., subprocess.Popen[str]]
) -> None:
    loop = start_example(str(EXAMPLES / "watch.sh"), INTERVAL="0.1")
    assert loop.stdout is not None
    loop.stdout.readline()
    loop.terminate()
    assert loop.wait(10) == 0
    assert loop.stdout.read() == ""  # nobody else has the pipe open


def test_the_shell_loop_refuses_a_directory_that_is_none(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(EXAMPLES / "watch.sh"), str(tmp_path / "nothing"), "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "is no directory" in done.stderr


# --- Python -------------------------------------------------------------------------------


def test_regions_are_registered_again_exactly_when_they_must_be(
    publisher: Publisher, start_example: Callable[..., subprocess.Popen[str]]
) -> None:
    regions = len(publisher.slot.read().regions)
    example = start_example(
        sys.executable, str(EXAMPLES / "register_regions.py"), "--interval", "0.02"
    )

    def line() -> dict[str, Any]:
        assert example.stdout is not None
        done: dict[str, Any] = json.loads(example.stdout.readline())
        return done

    def counts(done: dict[str, Any]) -> tuple[int, int, int]:
        return done["registered"], done["deregistered"], done["kept"]

    first = line()
    assert (first["why"], counts(first)) == ("first look", (regions, 0, 0))
    assert first["bytes"] == sum(region["size"] for region in publisher.slot.read().regions)

    publisher.tell("update")
    done = line()
    assert (done["why"], counts(done)) == ("new values", (0, 0, regions))

    publisher.tell("move")
    done = line()
    assert done["why"] == "another layout"
    assert done["registered"] >= 1
    assert done["registered"] + done["kept"] == len(publisher.slot.read().regions)

    publisher.tell("release")
    done = line()
    assert done["why"] == "the weights are released"
    assert counts(done) == (0, len(publisher.slot.read().regions), 0)
    publisher.tell("resume")
    done = line()
    assert counts(done) == (len(publisher.slot.read().regions), 0, 0)

    publisher.process.kill()
    publisher.process.wait()
    done = line()
    assert (done["why"], done["bytes"]) == ("the owner has exited", 0)


def test_other_pages_behind_the_same_addresses_are_registered_again(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand, since a release that a reader misses is a matter of luck."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import register_regions  # type: ignore[import-not-found, unused-ignore]

    library = register_regions.StandInLibrary()
    registrar = register_regions.Registrar(publisher.slot, library)
    assert registrar.look()["why"] == "first look"
    before = dict(library.regions)
    assert registrar.look() is None
    path = Path(publisher.slot.path(files.STATE))
    state = json.loads(path.read_bytes())
    path.write_text(json.dumps({**state, "physical_epoch": state.get("physical_epoch", 0) + 1}))
    done = registrar.look()
    assert (done["why"], done["kept"]) == ("other pages", 0)
    assert sorted(library.regions.values()) == sorted(before.values())
    assert not set(library.regions) & set(before)


def test_everything_is_forgotten_for_another_runner_of_the_same_process(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import register_regions  # type: ignore[import-not-found, unused-ignore]

    library = register_regions.StandInLibrary()
    registrar = register_regions.Registrar(publisher.slot, library)
    assert registrar.look()["why"] == "first look"
    before = dict(library.regions)
    for name in (files.STATE, files.LAYOUT):
        path = Path(publisher.slot.path(name))
        path.write_text(json.dumps({**json.loads(path.read_bytes()), "instance": "0" * 16}))
    done = registrar.look()
    assert (done["why"], done["kept"]) == ("another runner", 0)
    assert done["registered"] == done["deregistered"] == len(before)
    assert not set(library.regions) & set(before)
    assert registrar.look() is None


def test_the_python_example_says_what_is_wrong(publisher: Publisher) -> None:
    os.unlink(publisher.slot.path(files.STATE))
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "register_regions.py"), str(publisher.maps), "0"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "does not exist" in done.stderr
    assert "Traceback" not in done.stderr
