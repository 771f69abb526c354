"""A missing, full or read-only output directory never reaches SGLang's call."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty_runner import (
    ANSWER,
    ModelRunner,
    everything_parses,
    no_leftovers,
    use,
    warnings,
)

from sglang_weight_hook import reader

torch = pytest.importorskip("torch")


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
