"""What becomes of the owner when a reader asks for memory that is not there any more.

These are facts about the engines that `publisher/engines/registration.py` rests on.  UCX goes over
TCP here, as between two machines without RDMA.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
MODULES = {"mooncake": "mooncake.engine", "nixl": "nixl_cu12._bindings"}
PACKAGES = {"mooncake": "mooncake-transfer-engine-non-cuda", "nixl": "nixl-cu12"}


def need(engine: str) -> None:
    try:
        importlib.import_module(MODULES[engine])
    except ImportError as error:
        pytest.skip(f"{PACKAGES[engine]} is not installed, or a Debian package it needs: {error}")


class Ended(Exception):
    """The process has ended; the argument is its exit status."""


class Process:
    """A process that answers each line with one line of JSON or a word, on ``answers``."""

    def __init__(self, script: str, argument: str, answers: str) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / script), argument],
            env={**environment, "PYTHONPATH": str(ROOT), "UCX_TLS": "tcp"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if answers == "stdout" else subprocess.DEVNULL,
            stderr=subprocess.PIPE if answers == "stderr" else subprocess.DEVNULL,
            text=True,
        )
        self._answers = self.process.stdout if answers == "stdout" else self.process.stderr

    def read_line(self) -> str:
        assert self._answers is not None
        for line in self._answers:
            word = line.strip()
            if word == "done" or word.startswith(('{"', '"')) or word.isdigit():
                return word
        raise Ended(self.process.wait(30))

    def ask(self, word: str) -> str:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(word + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Ended(self.process.wait(30)) from None
        return self.read_line()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def pair() -> Iterator[Callable[[str], tuple[Process, Process]]]:
    started: list[Process] = []

    def start(engine: str) -> tuple[Process, Process]:
        need(engine)
        owner = Process("stale_owner.py", engine, "stdout")
        started.append(owner)
        reader = Process("stale_reader.py", owner.read_line(), "stderr")
        started.append(reader)
        assert json.loads(reader.ask("read")) == 7
        return owner, reader

    yield start
    for process in started:
        process.end()


def read(reader: Process) -> Any:
    return json.loads(reader.ask("read"))


def test_mooncake_refuses_what_was_deregistered(pair: Any) -> None:
    owner, reader = pair("mooncake")
    owner.ask("deregister")
    assert read(reader) == "refused"
    assert owner.ask("live?") == "done"


def test_mooncake_survives_the_reading_of_what_is_registered_and_unmapped(pair: Any) -> None:
    owner, reader = pair("mooncake")
    owner.ask("unmap")
    assert read(reader) == "refused"
    assert read(reader) == "refused"
    assert owner.ask("live?") == "done"


def test_nixl_goes_on_serving_what_was_deregistered(pair: Any) -> None:
    owner, reader = pair("nixl")
    owner.ask("deregister")
    assert read(reader) == 7


def test_nixl_ends_the_owner_where_what_it_serves_is_unmapped(pair: Any) -> None:
    """Should this fail one day, storages need not be kept alive, nor agents closed, any more."""
    owner, reader = pair("nixl")
    owner.ask("deregister")
    owner.ask("unmap")
    assert read(reader) != 7
    assert owner.process.wait(30) == -signal.SIGSEGV


def test_nobody_reaches_an_agent_that_was_closed(pair: Any) -> None:
    owner, reader = pair("nixl")
    owner.ask("close")
    owner.ask("unmap")
    for _ in range(3):
        assert read(reader) != 7
    assert owner.ask("live?") == "done"
