"""Untrusted documents: the reader and every command answer, or refuse with one sentence."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import sglang_weight_hook as hook
from sglang_weight_hook import reader
from sglang_weight_hook.layout import files
from tests.stress import untrusted_documents
from tests.stress.processes import ROOT, ForkServer, copy_documents, environment

PHASES = (Phase.explicit, Phase.generate, Phase.shrink)  # nothing is stored between runs


@pytest.fixture(scope="session")
def folder(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With ``maps/``, a good directory as a dead process of the real recorder left it."""
    folder = tmp_path_factory.mktemp("untrusted")
    fork_server.run("successor", directory=str(folder / "maps"))
    return folder


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader.Slot.read, "__defaults__", (0.0,))


def test_a_changed_document_is_an_answer_or_one_documented_error(
    folder: Path, is_long: bool
) -> None:
    good, bad = folder / "maps", folder / "untrusted"
    every = untrusted_documents.commands(good, bad)
    for arguments in every:  # unchanged, all is well
        copy_documents(good, bad)
        untrusted_documents.check_command(arguments)
    examples = 0

    @settings(
        max_examples=2000 if is_long else 60,
        deadline=None,
        database=None,
        derandomize=not is_long,
        phases=PHASES,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def check(data: st.DataObject) -> None:
        nonlocal examples
        examples += 1

        def pick(count: int) -> int:
            return data.draw(st.integers(0, count - 1))

        untrusted_documents.spread(good, bad, pick)
        untrusted_documents.read_all(good, bad)
        for number in range(3 if is_long else 1):
            untrusted_documents.check_command(every[(examples + 7 * number) % len(every)])

    check()
    print(f"{examples} directories")


def test_changed_documents_found_by_coverage(folder: Path, is_long: bool) -> None:
    """atheris; where it is not installed, ATHERIS_PYTHON may name an interpreter that has it."""
    python = os.environ.get("ATHERIS_PYTHON", sys.executable)
    probe = [python, "-c", "import atheris, typer, rich"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("atheris is not installed; ATHERIS_PYTHON may name an interpreter that has it")
    seconds = 120 if is_long else 3
    done = subprocess.run(
        [python, "-m", "tests.stress.untrusted_documents", str(folder),
         f"-max_total_time={seconds}", "-rss_limit_mb=1500", "-timeout=30", "-max_len=256"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    (count,) = [line for line in done.stderr.splitlines() if line.startswith("Done ")]
    print(f"atheris: {count}")


# --- particular cases ------------------------------------------------------------------------


@pytest.fixture
def bad(folder: Path, tmp_path: Path) -> Path:
    copy_documents(folder / "maps", tmp_path / "bad")
    return tmp_path / "bad"


def refused(bad: Path) -> str:
    with pytest.raises(hook.HookError) as caught:
        hook.open_slot(str(bad), "0").read(timeout=0)
    for arguments in untrusted_documents.commands(bad, bad):
        untrusted_documents.check_command(arguments)
    return str(caught.value)


@pytest.mark.parametrize("document", [files.STATE, files.LAYOUT])
@pytest.mark.parametrize("device", ["/dev/zero", "/dev/full", "/dev/urandom", "pipe", "socket"])
def test_a_device_in_a_documents_place_is_not_read_for_ever(
    document: str, device: str, bad: Path
) -> None:
    path = bad / document.format("0")
    path.unlink()
    if device == "pipe":
        os.mkfifo(path)
    elif device == "socket":
        import socket

        with socket.socket(socket.AF_UNIX) as listening:
            before = os.getcwd()
            os.chdir(bad)  # the name of a socket must be short
            listening.bind(path.name)
            os.chdir(before)
            assert path.name in refused(bad)
            return
    else:
        path.symlink_to(device)
    assert "pipe or a device" in refused(bad)


@pytest.mark.parametrize("device", ["/dev/zero", "pipe"])
def test_the_c_example_refuses_a_device(device: str, bad: Path, print_regions: Path) -> None:
    path = bad / "weight_state_0.json"
    path.unlink()
    if device == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(device)
    with open(bad / "weight_owner_0.lock", "rb") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        command = [str(print_regions), str(bad), "0"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=2, check=False)
    assert done.returncode == 1
    assert "pipe or a device" in done.stderr


@pytest.mark.parametrize("document", [files.STATE, files.LAYOUT])
def test_a_huge_file_is_refused_before_it_is_read(document: str, bad: Path) -> None:
    os.truncate(bad / document.format("0"), 100 * 1024**3)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * 1024**3, hard))
    try:
        assert f"{100 * 1024**3} bytes" in refused(bad)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("dimensions", [[10**4000] * 10, [2**63] * 2000, [2**63] * 128])
def test_shapes_whose_product_no_memory_could_hold(dimensions: list[int], bad: Path) -> None:
    path = bad / files.LAYOUT.format("0")
    layout = json.loads(path.read_bytes())
    for tensor in layout["tensors"].values():
        tensor["shape"] = tensor["stride"] = dimensions
    path.write_text(json.dumps(layout))
    document = hook.open_slot(str(bad), "0").read(timeout=0)
    try:
        assert all(tensor.itemsize == 0 for tensor in document.iter_tensors())
    except hook.HookError:
        assert len(dimensions) != 128
    for arguments in untrusted_documents.commands(bad, bad):
        untrusted_documents.check_command(arguments)


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 10_000_000, "../0", "/", ".", "", "a\nb"])
def test_slots_and_directories_of_odd_names_are_refused_in_words(name: str, tmp_path: Path) -> None:
    calls: tuple[Callable[[str, str], Any], ...] = (
        lambda path, slot: hook.open_slot(path, slot).read_state(),
        lambda path, slot: hook.open_slot(path, slot).read(timeout=0),
        lambda path, slot: hook.open_slot(path, slot).weights_held(timeout=0).__enter__(),
        lambda path, slot: next(hook.open_slot(path, slot).generations(timeout=0)),
        lambda path, slot: hook.open_file(f"{path}/{slot}.json"),
    )
    for path, slot in ((str(tmp_path), name), (f"{tmp_path}/{name}", "0")):
        for call in calls:
            with pytest.raises(hook.HookError):
                call(path, slot)
        with contextlib.suppress(hook.HookError):
            assert hook.open_slot(path, slot).owner_alive() is False
        with contextlib.suppress(hook.HookError):
            assert hook.open_slot(path, slot).wait_for_change(timeout=0) is None
        with contextlib.suppress(hook.HookError):
            assert hook.open_directory(path).slots() == []
        with contextlib.suppress(hook.HookError):
            assert list(hook.open_directory(path).events(timeout=0)) == []


def test_a_file_name_that_only_looks_like_a_slots_is_no_slot(bad: Path) -> None:
    for name in ("weight_state_0.json\n", "xweight_state_1.json", "weight_state_.json"):
        shutil.copy(bad / "weight_state_0.json", bad / name)
    assert [slot.name for slot in hook.open_directory(str(bad)).slots()] == ["0"]
    # One with a newline inside is whoever's; commands show it without breaking their lines.
    for name in ("0\n0", "\udcff"):
        for document in files.DOCUMENTS:
            shutil.copy(bad / document.format("0"), bad / document.format(name))
    for arguments in untrusted_documents.commands(bad, bad):
        untrusted_documents.check_command(arguments)
