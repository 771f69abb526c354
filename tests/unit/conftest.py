"""What the unit tests share: a clean hook for every test, and an output directory of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
for folder in (ROOT, HERE):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from child_environment import environment_for_children  # noqa: E402
from fake_sglang import FakeRunner, forget, load, settle  # noqa: E402
from memory_saver import FakeMemorySaver, scheduler_with  # noqa: E402
from patched_methods import Recorded  # noqa: E402
from published_files import a_model  # noqa: E402

import sglang_weight_hook_patch_core as core  # noqa: E402
from sglang_weight_hook.publisher import capture as capture_module  # noqa: E402
from sglang_weight_hook.publisher import recorder, settings  # noqa: E402
from sglang_weight_hook.publisher.devices import cuda_driver  # noqa: E402

if TYPE_CHECKING:
    from ended_command import Run
    from tmux_terminal import Terminal


def forget_everything() -> None:
    """Put the hook's state for this process back to that of a fresh process."""
    forget()
    core._wrapped.clear()
    core._missing.clear()
    core._logged.clear()


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
    # Without the thread, unless a test is about it: every bucket ends its own stream.
    monkeypatch.setenv("SGLANG_WEIGHT_HOOK_CHECK_SECONDS", "0")
    monkeypatch.setenv("SGLANG_WEIGHT_HOOK_QUIET_MS", "0")
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
    runner = FakeRunner(a_model())
    load(runner)
    settle()
    return runner


@pytest.fixture
def saver() -> FakeMemorySaver:
    return FakeMemorySaver(enabled=True)


@pytest.fixture
def scheduler(saver: FakeMemorySaver) -> Any:
    return scheduler_with(saver)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[tuple[int, int]]]:
    """What a fake CUDA driver knows, by storage; its "cuda" is the CPU."""
    known: dict[int, list[tuple[int, int]]] = {}
    monkeypatch.setattr(cuda_driver, "is_initialised", lambda: True)
    monkeypatch.setattr(cuda_driver, "allocations_under", lambda ptr, size: known.get(ptr, []))
    monkeypatch.setattr(
        cuda_driver,
        "allocation_kind",
        lambda base: "vmm" if any((base,) == p[0][:1] for p in known.values()) else None,
    )
    row = capture_module.row_of
    monkeypatch.setattr(
        capture_module,
        "row_of",
        lambda kind, tensor, device: row(kind, tensor, "cpu")._replace(device="cuda:0"),
    )
    monkeypatch.setattr(
        "sglang_weight_hook.publisher.memory.device", lambda device_type, index: None
    )
    return known


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What reaches the recorder, in the place of the recorder."""
    seen: list[Any] = []

    def begin(
        kind: str, effect: str, runners: Any = (), details: Any = None, missing: Any = ()
    ) -> str:
        seen.append(Recorded(kind, effect, list(runners), details))
        return f"the event of {kind}"

    def finish(event: Any, result: Any, error: Any) -> None:
        seen.append((event, result, error))

    monkeypatch.setattr(recorder, "begin", begin)
    monkeypatch.setattr(recorder, "finish", finish)
    return seen


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend that a release of SGLang is the imported one."""

    def pretend(version: str) -> None:
        fake = types.ModuleType("sglang")
        fake.__version__ = version  # type: ignore[attr-defined]
        fake.__path__ = []
        monkeypatch.setitem(sys.modules, "sglang", fake)

    pretend("0.5.23")
    return pretend


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command as its entry point runs it, in this process."""
    from ended_command import Ended

    from sglang_weight_hook.commands import entry

    def run(*arguments: object) -> Ended:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["sglang-weight-hook", *map(str, arguments)])
        status = entry.main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Ended(status, captured.out, captured.err)

    return run


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    from tmux_terminal import Terminal

    if shutil.which("tmux") is None:
        pytest.skip("needs the Debian package tmux")
    started = Terminal(tmp_path / "tmux")
    started("new-session", "-d", "-x", "160", "-y", "24", "env", "PS1=$ ", "sh")
    yield started
    started("kill-server")


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


@pytest.fixture
def checking(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Set the period of the checks, before the first runner is published."""

    def set_it(seconds: float) -> None:
        monkeypatch.setenv("SGLANG_WEIGHT_HOOK_CHECK_SECONDS", str(seconds))
        settings._settings = None

    return set_it


@pytest.fixture
def asked(checking: Callable[[float], None], maps: Path) -> FakeRunner:
    """A runner whose periodic checks are far apart."""
    checking(1000)
    made = FakeRunner(a_model())
    load(made)
    settle()
    return made
