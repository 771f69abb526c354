"""What the tests of the examples share: a publisher, an example on its slot, the C one compiled."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from example_programs import EXAMPLES, PUBLISHER, Publisher


@pytest.fixture
def publisher(start_python: Callable[..., subprocess.Popen[str]], maps: Path) -> Publisher:
    pytest.importorskip("torch")
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


@pytest.fixture(scope="session")
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


@pytest.fixture
def by_hand(tmp_path: Path) -> Iterator[Callable[[str, str], Path]]:
    """A directory with documents as they are given; the owner lock is held by this process."""
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


@pytest.fixture
def run_c(print_regions: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the C example on a slot, in little memory and not for long."""

    def run(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(print_regions), *options, str(directory), "0"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )

    return run
