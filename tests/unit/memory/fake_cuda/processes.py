"""The processes of the tests of GPU memory: an owner and readers, over a stand-in for the driver.

There is no GPU in them: `libcuda.c` is built as ``libcuda.so.1`` and found by LD_LIBRARY_PATH, so
that the hook has no switch for tests.  With a real driver the same is tested in ``tests/gpu``.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from bytes_owner import BytesOwner

HERE = Path(__file__).resolve().parent
UNIT, ROOT = HERE.parents[1], HERE.parents[3]
UUID = "00112233445566778899aabbccddeeff"

# What each reader begins with.
PREAMBLE = """
import contextlib, ctypes, hashlib, os, sys, time, warnings
import sglang_weight_hook as hook
from sglang_weight_hook import Changed, HookError, NotReadable
driver = ctypes.CDLL("libcuda.so.1")
slot = hook.open_slot(os.environ["SGLANG_WEIGHT_HOOK_DIR"], "0")
KINDS = "ipc mapped handles reserved streams events pinned registered contexts pushed".split()
def open_here():
    return {kind: driver.fake_cuda_open(kind.encode()) for kind in KINDS}
NOTHING = dict.fromkeys(KINDS, 0)
def descriptors():
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # of the listing itself
            found.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return sorted(found)
def sha(data):
    return hashlib.sha256(bytes(data)).hexdigest()
def pause(*said):
    print(*said, flush=True)
    return sys.stdin.readline().strip()
@contextlib.contextmanager
def refused(kind, says):
    import re
    try:
        yield
    except HookError as error:
        assert type(error) is kind, repr(error)
        assert re.search(says, str(error)), str(error)
        assert str(error).count("\\n") == 0
    else:
        raise AssertionError("nothing was refused")
"""


@functools.cache
def built() -> Path:
    """The folder with the stand-in's libcuda.so.1."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("the stand-in for the CUDA driver needs a C compiler")
    folder = Path(tempfile.mkdtemp(prefix="fake-cuda-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", "-pthread"]
    subprocess.run(
        [*command, "-o", str(folder / "libcuda.so.1"), str(HERE / "libcuda.c")], check=True
    )
    return folder


class Reader:
    """A process that runs `PREAMBLE` and some code, and stops at each ``pause``."""

    def __init__(self, code: str, environment: dict[str, str], folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", PREAMBLE + code],
            env=environment,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def said(self) -> str:
        """What it said with its next ``pause``."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            assert self.process.stderr is not None
            raise AssertionError(self.process.stderr.read())
        return line.strip()

    def go(self, said: str = "") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(said + "\n")
        self.process.stdin.flush()

    def ends(self) -> str:
        """Its last words; whatever it asserted held."""
        out, error = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, error
        return out


class Gpu:
    """A machine with the stand-in's GPU: what its processes are started with."""

    def __init__(self, folder: Path, maps: Path) -> None:
        self.folder, self.maps = folder, maps
        self.shared = folder / "fake_cuda"
        self.shared.mkdir()
        self.processes: list[subprocess.Popen[str]] = []

    def environment(self, **more: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return {
            **kept,
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(UNIT))),
            "LD_LIBRARY_PATH": str(built()),
            "FAKE_CUDA_DIR": str(self.shared),
            "FAKE_CUDA_UUIDS": UUID,
            "SGLANG_WEIGHT_HOOK_DIR": str(self.maps),
            **more,
        }

    def owner(self, **more: str) -> BytesOwner:
        settings = {
            "SGLANG_WEIGHT_HOOK_CHECK_SECONDS": "10000",
            "SGLANG_WEIGHT_HOOK_SHARE": "1",
            **more,
        }
        process = subprocess.Popen(
            [sys.executable, str(HERE / "owner.py")],
            env=self.environment(**settings),
            cwd=self.folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        return BytesOwner(process, self.maps)

    def reader(self, code: str, **more: str) -> Reader:
        found = Reader(code, self.environment(**more), self.folder)
        self.processes.append(found.process)
        return found

    def read(self, code: str, **more: str) -> str:
        """Run a reader to its end."""
        return self.reader(code, **more).ends()


@pytest.fixture
def gpu(tmp_path: Path, maps: Path) -> Iterator[Gpu]:
    found = Gpu(tmp_path, maps)
    yield found
    for process in found.processes:
        process.kill()
        process.communicate()


def digests(owner: BytesOwner) -> dict[str, str]:
    """What every tensor's values hash to, as the owner has them."""
    return {name: owner.digest(name) for name in owner.names()}


def descriptors_settle(owner: BytesOwner, before: list[str]) -> None:
    """The owner closes its end of a connection as soon as it looks."""
    for _ in range(300):
        with contextlib.suppress(FileNotFoundError):  # closed in the middle of the look
            if owner.descriptors() == before:
                break
        owner.tell("names")
    assert owner.descriptors() == before
