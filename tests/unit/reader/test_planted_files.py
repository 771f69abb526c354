"""What others put into an output directory keeps no reader waiting and takes no memory."""

from __future__ import annotations

import ast
import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sglang_weight_hook import commands, reader
from sglang_weight_hook.layout import files
from sglang_weight_hook.reader import HookError, open_slot, verify
from sglang_weight_hook.reader.files import MAX_DOCUMENT_BYTES

pytest.importorskip("torch")

LOCKS = (files.OWNER_LOCK, files.SAVING_LOCK)
EVERY = (*files.DOCUMENTS, *LOCKS, files.HEADER, files.EVENTS, files.EVENTS_BEFORE)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 100 * 1024**3)  # sparse


def loop(path: Path) -> None:
    path.symlink_to(path.name)


PLANTED = [os.mkfifo, device, huge, loop, os.mkdir]


@pytest.mark.parametrize("plant", PLANTED, ids=["fifo", "zero", "huge", "loop", "folder"])
@pytest.mark.parametrize("name", EVERY)
def test_whatever_is_planted_no_reader_waits_for_it(
    name: str, plant: Callable[[Path], None], runner: object, maps: Path
) -> None:
    path = maps / name.format("0")
    path.unlink(missing_ok=True)
    plant(path)
    slot = open_slot(str(maps), "0")
    started = time.monotonic()
    uses: list[Callable[[], object]] = [
        slot.owner_alive,
        lambda: slot.read(timeout=0),
        lambda: slot.wait_for_change(timeout=0),
        lambda: list(slot.generations(timeout=0)),
        lambda: list(slot.history()),
        slot.header,
        lambda: slot.weights_held(timeout=0.1).__enter__(),
        lambda: list(reader.open_directory(str(maps)).events(timeout=0)),
    ]
    for use in uses:
        with contextlib.suppress(HookError):
            use()
    verdict = verify.verify_slot(slot, timeout=0)
    if name in files.DOCUMENTS or plant is not huge:
        # A lock file may be of any size; the log is not verify's.
        assert not verdict.good or name in (*LOCKS, files.HEADER, files.EVENTS, files.EVENTS_BEFORE)
    assert time.monotonic() - started < 5


def test_a_lock_file_that_is_none_says_so(runner: object, maps: Path) -> None:
    path = maps / files.SAVING_LOCK.format(0)
    path.unlink()
    os.mkfifo(path)
    with (
        pytest.raises(HookError, match="a pipe or a device"),
        open_slot(str(maps), "0").weights_held(),
    ):
        pytest.fail("held a pipe")


def test_a_document_is_refused_one_byte_above_the_limit(runner: object, maps: Path) -> None:
    path = maps / files.WEIGHTS_META.format(0)
    os.truncate(path, MAX_DOCUMENT_BYTES + 1)
    found = verify.verify_slot(open_slot(str(maps), "0"))
    assert any(str(MAX_DOCUMENT_BYTES + 1) in finding.message for finding in found.findings)


# What opens something that is not in an output directory.
ELSEWHERE = {
    ("conversation.py", "_address"),  # the directory itself
    ("app.py", "command"),  # /dev/null
    ("app.py", "register"),
    ("app.py", "run"),
    ("sglang_sources.py", "_parse"),  # SGLang's installation
    ("torch_devices.py", "_stated"),  # torch's
}


def test_there_is_one_way_to_open_a_file_of_an_output_directory() -> None:
    found = set()
    for room in (reader, commands):
        assert room.__file__
        for path in Path(room.__file__).parent.rglob("*.py"):
            for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(function, ast.FunctionDef):
                    continue
                for node in ast.walk(function):
                    if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                        "open",
                        "os.open",
                        "io.open",
                    ):
                        found.add((path.name, function.name))
    assert ("files.py", "open_regular") in found
    assert found - ELSEWHERE == {("files.py", "open_regular")}
