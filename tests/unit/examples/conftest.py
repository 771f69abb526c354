"""What the tests of the examples share: a publisher, an example on its slot, the C one compiled."""

from __future__ import annotations

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
