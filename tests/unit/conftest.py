"""What the unit tests share: a clean hook for every test, and an output directory of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
for folder in (ROOT, HERE):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from fake_sglang import FakeRunner, load, settle  # noqa: E402

import sglang_weight_hook_patch_core as core  # noqa: E402
from sglang_weight_hook.publisher import once, recorder, settings  # noqa: E402


def forget_everything() -> None:
    """Put the hook's state for this process back to that of a fresh process."""
    recorder._after_fork_in_child()
    once._said.clear()
    core._wrapped.clear()
    core._missing.clear()
    core._logged.clear()
    settings._base = settings._settings = None


@pytest.fixture
def maps(tmp_path: Path) -> Path:
    """The output directory of this test; the hook makes it when it first publishes."""
    return tmp_path / "maps"


@pytest.fixture(autouse=True)
def clean_hook(monkeypatch: pytest.MonkeyPatch, maps: Path) -> Iterator[None]:
    for name in list(os.environ):
        if name.startswith("SGLANG_WEIGHT_HOOK"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SGLANG_WEIGHT_HOOK_DIR", str(maps))
    meta_path, modules = list(sys.meta_path), set(sys.modules)
    forget_everything()
    yield
    forget_everything()
    sys.meta_path[:] = meta_path
    for name in set(sys.modules) - modules:
        if name.split(".")[0] == "sglang":
            del sys.modules[name]


@pytest.fixture
def runner() -> FakeRunner:
    """A runner that is loaded and settled, so published in slot 0."""
    from published_files import a_model  # imports torch, or skips the test where there is none

    runner = FakeRunner(a_model())
    load(runner)
    settle()
    return runner


@pytest.fixture
def run_python(tmp_path: Path, maps: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run code in a new interpreter that can import the hook (and sglang from ``path``)."""

    def run(
        *arguments: str, path: Path | None = None, check: bool = True, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, *arguments],
            env=environment_for_children(path, maps, environment),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if check:
            assert done.returncode == 0, done.stderr
        return done

    return run


@pytest.fixture
def start_python(tmp_path: Path, maps: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start code in a new interpreter, with pipes to talk to it; killed at the end."""
    started: list[subprocess.Popen[str]] = []

    def start(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env=environment_for_children(None, maps, environment),
            cwd=tmp_path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def environment_for_children(path: Path | None, maps: Path, more: dict[str, str]) -> dict[str, str]:
    folders = [str(ROOT), str(HERE)]
    if path is not None:
        folders.insert(0, str(path))
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTHON")
    }
    environment["PYTHONPATH"] = os.pathsep.join(folders)
    environment["SGLANG_WEIGHT_HOOK_DIR"] = str(maps)
    environment.update(more)
    return environment
