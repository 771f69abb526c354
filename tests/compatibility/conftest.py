"""Fixtures: today's recorder in a process of its own, and the released 0.1, unpacked."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tests.compatibility.processes import LIFE, WHEEL, Moment, Publisher


@pytest.fixture(scope="session")
def release_0_1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 0.1 wheel, unpacked: from inside the zip its verify would not find its schemas."""
    folder = tmp_path_factory.mktemp("release")
    with zipfile.ZipFile(WHEEL) as wheel:
        wheel.extractall(folder)
    return folder


@pytest.fixture(scope="session")
def life(tmp_path_factory: pytest.TempPathFactory, release_0_1: Path) -> dict[str, Moment]:
    """The life of a server that today's recorder publishes, and what 0.1 said at each moment."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("life")
    publisher = Publisher(folder / "maps")
    try:
        return {
            name: publisher.moment(steps, folder / name, release_0_1)
            for name, (steps, _) in LIFE.items()
        }
    finally:
        publisher.stop()
