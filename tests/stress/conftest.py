"""Fixtures of the stress tests; ``--long`` (or ``STRESS=long``) for their long forms."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stress.processes import ROOT, ForkServer

HERE = Path(__file__).resolve().parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="the long forms of tests/stress")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.stress)


@pytest.fixture(scope="session")
def is_long(request: pytest.FixtureRequest) -> bool:
    wanted = request.config.getoption("--long", default=False)
    return bool(wanted) or os.environ.get("STRESS") == "long"


@pytest.fixture(scope="session")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of faults.c, compiled."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler here")
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
    source = str(HERE / "faults.c")
    subprocess.run([compiler, *flags, "-o", str(library), source, "-ldl"], check=True)
    return library


@pytest.fixture(scope="session")
def print_regions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C example."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler here")
    program = tmp_path_factory.mktemp("c") / "print_regions"
    source = str(ROOT / "examples" / "print_regions.c")
    subprocess.run([compiler, "-std=c11", "-O2", "-o", str(program), source], check=True)
    return program


@pytest.fixture(scope="session")
def fork_server(faults: Path) -> Iterator[ForkServer]:
    """Scenarios with the fault library at hand."""
    pytest.importorskip("torch")
    found = ForkServer(faults)
    yield found
    found.close()


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For tests that publish themselves: nothing of it is left for the next one."""
    pytest.importorskip("torch")
    from tests.unit.fake_sglang import forget

    monkeypatch.setenv("SGLANG_WEIGHT_HOOK_DIR", "")
    monkeypatch.setenv("SGLANG_WEIGHT_HOOK_LOCK_TIMEOUT", "")
    yield
    forget()


@pytest.fixture
def maps(tmp_path: Path) -> Path:
    return tmp_path / "maps"
