"""What the tests of the node agent and of the registry share."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_process import Agent, Publisher
from etcd_process import EtcdServer


@pytest.fixture
def started() -> Iterator[list[Any]]:
    """What is to be ended with the test."""
    made: list[Any] = []
    yield made
    for one in reversed(made):
        one.process.kill()
        one.process.wait()
        for pipe in (one.process.stdin, one.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was not taken any more
                    pipe.close()


@pytest.fixture
def publish(started: list[Any], tmp_path: Path) -> Callable[..., Publisher]:
    def start(slots: int = 1, directory: Path = tmp_path / "maps") -> Publisher:
        started.append(Publisher(directory, slots))
        return started[-1]

    return start


@pytest.fixture
def serve(started: list[Any], tmp_path: Path) -> Callable[..., Agent]:
    """Start an agent over the test's ``maps``, or over the directories among its arguments."""

    def start(*arguments: object, **more: Any) -> Agent:
        where = () if "--dir" in arguments else ("--dir", tmp_path / "maps")
        started.append(Agent(tmp_path / "agent", *where, *arguments, **more))
        return started[-1]

    return start


@pytest.fixture
def etcd(started: list[Any], tmp_path: Path) -> EtcdServer:
    started.append(EtcdServer(tmp_path / "etcd"))
    return started[-1]


@pytest.fixture(autouse=True, scope="module")
def _sockets_of_cut_answers() -> Iterator[None]:
    """Conversations that a test has cut short leave a socket to the collector.

    It is to warn of those here, and not in whatever test runs when it comes by.
    """
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
