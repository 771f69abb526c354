"""Whatever goes wrong on the hook's side, SGLang's call is what it is without the hook.

Each test wraps a fake runner's methods with the real patch core and breaks one thing; the
call must return the identical object, the log must say it once, and what is published must
parse.  ``tests/real_sglang`` has a real server under some of these.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_sglang import FakeRunner, walk_json

import sglang_weight_hook_patch_core as core
from sglang_weight_hook import reader
from sglang_weight_hook.layout import files

torch = pytest.importorskip("torch")

ANSWER = (True, "Succeeded to update model weights.")
LOADED = object()


class ModelRunner(FakeRunner):
    """A fake of SGLang's class, in the shape of 0.5.9."""

    during_update: Callable[[], None] = staticmethod(lambda: None)

    def load_model(self) -> object:
        return LOADED

    def update_weights_from_disk(self, model_path: str, load_format: str) -> tuple[bool, str]:
        self.during_update()
        return ANSWER

    def update_weights_from_tensor(self, named_tensors: Any) -> tuple[bool, str]:
        return ANSWER


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> ModelRunner:
    """A runner of a freshly patched class, not yet loaded."""
    sglang = types.ModuleType("sglang")
    sglang.__version__ = "0.5.9"  # type: ignore[attr-defined]
    sglang.__path__ = []
    monkeypatch.setitem(sys.modules, "sglang", sglang)
    # The other modules of a release are not there, and that is not what is tested here.
    monkeypatch.setattr(core, "_report_missing", lambda *arguments: None)
    module = types.ModuleType(core.RUNNER[0])
    module.ModelRunner = type("ModelRunner", (ModelRunner,), {})  # type: ignore[attr-defined]
    core.patch_module(module)
    made: ModelRunner = module.ModelRunner(torch.nn.Linear(4, 3))
    return made


def use(runner: ModelRunner, times: int = 3) -> None:
    """Load and update; every answer must be the original's own."""
    assert runner.load_model() is LOADED
    for _ in range(times):
        assert runner.update_weights_from_disk("path", load_format="auto") is ANSWER
        assert runner.update_weights_from_tensor([("a", None)]) is ANSWER


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno > logging.INFO]


def everything_parses(maps: Path) -> list[str]:
    """Names of the JSON files there, each of which is whole."""
    names = sorted(path.name for path in maps.glob("*.json"))
    for name in names:
        json.loads((maps / name).read_bytes())
    return names


def no_leftovers(maps: Path) -> bool:
    return not [path.name for path in maps.iterdir() if path.name.startswith(".")]


def unfinished(maps: Path) -> bool:
    """Whether the state file, if there is one, speaks of an event that is over as running."""
    path = maps / "weight_state_0.json"
    return path.exists() and json.loads(path.read_bytes())["event"]["finished_at"] is None


def test_without_any_fault_nothing_is_warned_of(
    runner: ModelRunner, maps: Path, caplog: pytest.LogCaptureFixture
) -> None:
    use(runner)
    assert warnings(caplog) == []
    assert len(everything_parses(maps)) == 6


# --- the output directory -----------------------------------------------------------------


def test_an_output_path_that_is_a_file(
    runner: ModelRunner, maps: Path, caplog: pytest.LogCaptureFixture
) -> None:
    maps.write_text("mine")
    use(runner)
    assert len(warnings(caplog)) == 1
    assert str(maps) in warnings(caplog)[0]
    assert maps.read_text() == "mine"


@pytest.mark.parametrize("path", ["/proc/no/such/place", "/dev/null/maps", "/sys/maps"])
def test_an_output_path_that_cannot_be_made(
    path: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("SGLANG_WEIGHT_HOOK_DIR", path)
    use(request.getfixturevalue("runner"))  # whose patching reads the settings
    assert len(warnings(caplog)) == 1
    assert path in warnings(caplog)[0]


def test_an_output_path_that_is_a_dangling_link(
    runner: ModelRunner, maps: Path, caplog: pytest.LogCaptureFixture
) -> None:
    maps.symlink_to("nowhere")
    use(runner)
    assert len(warnings(caplog)) == 1


def failing(code: int, flags: int) -> Callable[..., int]:
    """An os.open that fails with ``code`` wherever ``flags`` are wanted."""
    really = os.open

    def fail(path: Any, wanted: int, *arguments: Any, **more: Any) -> int:
        if wanted & flags:
            raise OSError(code, os.strerror(code), path)
        return really(path, wanted, *arguments, **more)

    return fail


def test_a_file_system_that_is_read_only_from_the_start(
    runner: ModelRunner,
    maps: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # The tests may run as root, whom no mode stops, so the answer of the kernel is a fake.
    monkeypatch.setattr(os, "open", failing(errno.EROFS, os.O_CREAT))
    use(runner)
    assert len(warnings(caplog)) == 1
    assert "Read-only" in warnings(caplog)[0]


def test_a_file_system_that_becomes_read_only_keeps_what_parses_and_says_it_once(
    runner: ModelRunner,
    maps: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    use(runner, times=1)
    before = everything_parses(maps)

    def read_only(*arguments: Any, **more: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", failing(errno.EROFS, os.O_CREAT))
        patch.setattr(os, "unlink", read_only)
        use(runner)
    assert everything_parses(maps) == before
    # That it cannot write, that an old file stays, that there is no lock: once each.
    assert len(warnings(caplog)) == len(set(warnings(caplog))) <= 3


def mounted(path: Path, kilobytes: int) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(path)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.fixture
def tiny_disk(maps: Path) -> Iterator[Path]:
    """The output directory as a file system of 64 KB of its own."""
    maps.mkdir()
    if os.geteuid() != 0 or not mounted(maps, 64):
        pytest.skip("cannot mount a tmpfs here")
    yield maps
    subprocess.run(["umount", "-l", str(maps)], check=True)


def fill(path: Path) -> None:
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    assert shutil.disk_usage(path).free == 0


def test_a_disk_that_is_really_full(
    runner: ModelRunner, tiny_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tiny_disk / "other")
    use(runner)
    everything_parses(tiny_disk)
    assert no_leftovers(tiny_disk)
    assert 1 <= len(warnings(caplog)) <= 2


def test_a_disk_that_fills_up_leaves_no_old_address_and_heals(
    runner: ModelRunner, tiny_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    use(runner, times=1)
    runner.model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(200)))
    use(runner)
    assert no_leftovers(tiny_disk)
    everything_parses(tiny_disk)
    live = {p.data_ptr() for p in runner.model.parameters()}
    for name in ("weight_layout_0.json", "weights_meta_0.json"):
        if (tiny_disk / name).exists():
            document = json.loads((tiny_disk / name).read_bytes())
            tensors = document.get("tensors", document)
            assert {entry["ptr"] for entry in tensors.values()} <= live
    assert len(warnings(caplog)) == len(set(warnings(caplog))) <= 2
    runner.model = torch.nn.Linear(4, 3)
    use(runner, times=1)
    assert reader.open_slot(str(tiny_disk), "0").read(timeout=0).state["problem"] is None


@pytest.mark.parametrize("broken", ["write", "rename"])
def test_a_full_disk_as_the_system_calls_tell_it(
    broken: str,
    runner: ModelRunner,
    maps: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    use(runner, times=1)

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, broken, full)
        use(runner)
    everything_parses(maps)
    assert no_leftovers(maps)
    assert len(warnings(caplog)) == 1
    use(runner, times=1)
    assert len(everything_parses(maps)) == 6


def test_a_short_write_is_continued(
    runner: ModelRunner, maps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: really(descriptor, data[:7]))
    use(runner, times=1)
    assert len(everything_parses(maps)) == 6


def test_a_directory_removed_while_the_server_runs_is_made_again(
    runner: ModelRunner, maps: Path, caplog: pytest.LogCaptureFixture
) -> None:
    use(runner, times=1)
    for path in maps.iterdir():
        path.unlink()
    maps.rmdir()
    assert runner.update_weights_from_disk("path", "auto") is ANSWER
    slot = reader.open_slot(str(maps), "0")
    assert slot.read(timeout=0).state["state"] == "ready"
    assert slot.owner_alive()


def test_files_removed_while_the_server_runs_are_made_again_and_stay_owned(
    runner: ModelRunner, maps: Path
) -> None:
    use(runner, times=1)
    for path in maps.iterdir():
        path.unlink()
    assert runner.update_weights_from_disk("path", "auto") is ANSWER
    slot = reader.open_slot(str(maps), "0")
    assert slot.read(timeout=0).state["state"] == "ready"
    assert slot.owner_alive()


def test_files_removed_while_the_server_runs_are_made_again_by_the_next_bucket(
    runner: ModelRunner, maps: Path
) -> None:
    use(runner, times=1)
    for path in maps.iterdir():
        path.unlink()
    assert runner.update_weights_from_tensor([]) is ANSWER
    assert reader.open_slot(str(maps), "0").read(timeout=0).tensors


# --- planted names ------------------------------------------------------------------------

NAMES = [name.format(0) for name in files.DOCUMENTS]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", ["victim", "nowhere"])
def test_a_link_at_a_documents_name_is_replaced_and_never_followed(
    name: str, target: str, runner: ModelRunner, maps: Path, tmp_path: Path
) -> None:
    maps.mkdir()
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (maps / name).symlink_to(tmp_path / target)
    use(runner)
    (maps / name).unlink()
    (maps / name).symlink_to(tmp_path / target)
    use(runner)
    assert victim.read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()
    assert not (maps / name).is_symlink()
    assert len(everything_parses(maps)) == 6


@pytest.mark.parametrize("lock", [files.SAVING_LOCK, files.OWNER_LOCK])
@pytest.mark.parametrize("kind", ["victim", "nowhere", "fifo", "directory"])
def test_something_else_at_a_locks_name(
    lock: str,
    kind: str,
    runner: ModelRunner,
    maps: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    maps.mkdir()
    path, victim = maps / lock.format(0), tmp_path / "victim"
    victim.write_text("precious")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / kind)
    use(runner)
    assert len(warnings(caplog)) == 1
    assert victim.read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()
    everything_parses(maps)
    if lock == files.SAVING_LOCK:
        state = json.loads((maps / "weight_state_0.json").read_bytes())
        assert state["lock"].startswith("unavailable")


@pytest.mark.parametrize("name", NAMES)
def test_a_directory_at_a_documents_name(
    name: str, runner: ModelRunner, maps: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (maps / name).mkdir(parents=True)
    use(runner)
    assert 1 <= len(warnings(caplog)) == len(set(warnings(caplog))) <= 2
    assert no_leftovers(maps)
    others = [path for path in maps.glob("*.json") if path.is_file()]
    for path in others:
        json.loads(path.read_bytes())
    assert len(others) == 5


def test_a_lock_held_by_someone_else(
    request: pytest.FixtureRequest,
    maps: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("SGLANG_WEIGHT_HOOK_LOCK_TIMEOUT", "0.01")
    maps.mkdir()
    with open(maps / "weight_saving_0.lock", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        use(request.getfixturevalue("runner"))
        assert json.loads((maps / "weight_state_0.json").read_bytes())["lock"] == "timeout"
    assert len(warnings(caplog)) == 1
    assert "weight_saving_0.lock" in warnings(caplog)[0]


# --- the model ----------------------------------------------------------------------------


def test_a_parameter_walk_that_raises_withdraws_the_map_and_says_it_once(
    runner: ModelRunner,
    maps: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    use(runner, times=1)

    def fail(*arguments: Any) -> Any:
        raise RuntimeError("dictionary changed size during iteration")

    with monkeypatch.context() as patch:
        patch.setattr("sglang_weight_hook.publisher.capture.walk_model", fail)
        use(runner)
    state = json.loads((maps / "weight_state_0.json").read_bytes())
    assert state["state"] == "failed"
    assert "changed size" in state["problem"]
    assert json.loads((maps / "weight_layout_0.json").read_bytes())["tensors"] == {}
    assert json.loads((maps / "weights_meta_0.json").read_bytes()) == {}
    assert len(warnings(caplog)) == 1
    use(runner, times=1)
    document = reader.open_slot(str(maps), "0").read(timeout=0)
    assert document.state["state"] == "ready"
    assert len(document.tensors) == 2


def test_a_map_that_was_withdrawn_has_no_old_summary_beside_it(
    runner: ModelRunner, maps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(runner, times=1)
    runner.model = None
    use(runner, times=1)
    summary = maps / "weight_update_summary_0.json"
    assert not summary.exists() or json.loads(summary.read_bytes())["total_weights"] == 0


def test_named_parameters_that_raise_do_not_leave_the_state_unfinished(
    runner: ModelRunner, maps: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Odd(torch.nn.Linear):  # type: ignore[misc, name-defined]
        def named_parameters(self, *arguments: Any, **more: Any) -> Any:
            raise NotImplementedError("ask somebody else")

    runner.model = Odd(2, 2)
    assert runner.load_model() is LOADED
    assert len(warnings(caplog)) <= 1
    assert not unfinished(maps)
    everything_parses(maps)


def test_an_identity_that_cannot_be_told_does_not_leave_the_state_unfinished(
    runner: ModelRunner, maps: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Config:
        @property
        def model_path(self) -> str:
            raise RuntimeError("not resolved yet")

    runner.model_config = Config()  # type: ignore[assignment]
    assert runner.load_model() is LOADED
    assert runner.update_weights_from_disk("path", "auto") is ANSWER
    assert len(warnings(caplog)) == 1
    assert not unfinished(maps)


@pytest.mark.parametrize("model", [None, torch.nn.Module(), object()])
def test_a_model_without_parameters(
    model: Any, runner: ModelRunner, maps: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runner.model = model
    use(runner)
    assert len(warnings(caplog)) <= 1
    assert json.loads((maps / "weights_meta_0.json").read_bytes()) == {}
    assert json.loads((maps / "weight_layout_0.json").read_bytes())["tensors"] == {}
    everything_parses(maps)


def test_names_that_are_not_ascii(
    runner: ModelRunner, maps: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["gewicht_ä", "重み", "\U0001f40d", "new\nline", 'quo"te', "lone\udc80surrogate", "\0"]
    for name in names:
        runner.model.register_parameter(name, torch.nn.Parameter(torch.zeros(2)))
    use(runner)
    assert warnings(caplog) == []
    assert len(everything_parses(maps)) == 6
    meta = json.loads((maps / "weights_meta_0.json").read_bytes())
    assert list(meta) == ["weight", "bias", *names]
    strings = {item for item in walk_json(meta) if isinstance(item, str)}
    assert set(names) <= strings


def test_a_runner_that_goes_without_a_device_or_an_identity(
    runner: ModelRunner, maps: Path, caplog: pytest.LogCaptureFixture
) -> None:
    del runner.device, runner.gpu_id, runner.is_draft_worker
    use(runner)
    assert warnings(caplog) == []
    layout = json.loads((maps / "weight_layout_0.json").read_bytes())
    weights = dict(runner.model.named_parameters())
    for name, entry in layout["tensors"].items():
        assert entry["ptr"] == weights[name].data_ptr()


# --- kill -9 ------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
sys.path.insert(0, {here!r})
import torch
from fake_sglang import FakeRunner, load, settle, update
runner = FakeRunner(torch.nn.Linear(4, 3))
load(runner); settle(); update(runner)
call, countdown = sys.argv[1], int(sys.argv[2])
really = getattr(os, call)
def kill(*arguments, **more):
    global countdown
    countdown -= 1
    if countdown == 0:
        if call == "write":
            really(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return really(*arguments, **more)
setattr(os, call, kill)
runner.model.weight.data = torch.zeros(3, 4)
update(runner)
sys.exit("was not killed")
"""


@pytest.mark.parametrize(
    ("call", "countdown"), [("write", 1), ("write", 2), ("rename", 3), ("rename", 7)]
)
def test_kill_9_while_publishing_leaves_files_that_parse_and_a_restart_clears_up(
    call: str,
    countdown: int,
    runner: ModelRunner,
    maps: Path,
    run_python: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    code = KILLED.format(here=str(Path(__file__).parent))
    done = run_python("-c", code, call, str(countdown), check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(everything_parses(maps)) == 6
    assert not no_leftovers(maps)
    assert not reader.open_slot(str(maps), "0").owner_alive()

    use(runner, times=1)
    assert warnings(caplog) == []
    assert no_leftovers(maps)
    document = reader.open_slot(str(maps), "0").read(timeout=0)
    assert document.state["pid"] == os.getpid()
    assert document.tensors["weight"]["ptr"] == runner.model.weight.data_ptr()
