"""Interpreters of other kinds and starts: free-threaded, sub-interpreters, -P, -E -I together."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from .conftest import ENVIRONMENT, ROOT, SUPPORTED, Target, interpreter, make_target, tree

FREE_THREADED = ("3.13t", "3.14t")

#: As far as the loader and the core look: one target, with the methods that every release has.
TARGET = """
class ModelRunner:
    def load_model(self):
        pass
"""


def fake_sglang(purelib: Path) -> None:
    for name, text in {
        "__init__.py": "__version__ = '0.5.23'\n",
        "srt/__init__.py": "",
        "srt/model_executor/__init__.py": "",
        "srt/model_executor/model_runner.py": TARGET,
    }.items():
        path = purelib / "sglang" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


HOOKED = """
import sys
from sglang.srt.model_executor.model_runner import ModelRunner
hooked = hasattr(ModelRunner.load_model, "_sglang_weight_hook_entry")
finders = sum(type(f).__module__ == "sglang_patch_loader" for f in sys.meta_path)
"""


@pytest.fixture(scope="module", params=FREE_THREADED)
def free_threaded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Target:
    made = make_target(tmp_path_factory.mktemp("free-threaded-"), request.param)
    made.install()
    fake_sglang(made.purelib)
    return made


def test_a_free_threaded_python_is_hooked_and_stays_free_threaded(free_threaded: Target) -> None:
    code = f"{HOOKED}\nprint(hooked, finders, sys._is_gil_enabled())"
    done = free_threaded.run("-W", "ignore", "-c", code)
    assert (done.stdout, done.returncode) == ("True 1 False\n", 0)


def test_a_free_threaded_python_imports_a_target_from_many_threads(free_threaded: Target) -> None:
    code = (
        "import importlib, sys, threading\n"
        "name = 'sglang.srt.model_executor.model_runner'\n"
        "barrier, seen = threading.Barrier(16), []\n"
        "def work():\n"
        "    barrier.wait()\n"
        "    seen.append(importlib.import_module(name).ModelRunner.load_model)\n"
        "threads = [threading.Thread(target=work) for _ in range(16)]\n"
        "[t.start() for t in threads]; [t.join(30) for t in threads]\n"
        "print(len(seen), len(set(seen)), hasattr(seen[0], '_sglang_weight_hook_entry'))"
    )
    for _ in range(10):
        done = free_threaded.run("-W", "ignore", "-c", code)
        assert (done.stdout, done.returncode) == ("16 1 True\n", 0)


# Under each of these names one Python or another has it.
SUBINTERPRETER = """
import sys
legacy = {legacy}
code = '''{code}'''
try:
    import _interpreters as i
except ImportError:
    import _xxsubinterpreters as i
if sys.version_info >= (3, 13):
    made = i.create("legacy" if legacy else "isolated")
    failed = i.exec(made, code)
    if failed is not None:
        print(failed.formatted)
else:
    # isolated: no threads of its own, no fork; up to 3.11 that is all that it means.
    made = i.create(isolated=not legacy)
    i.run_string(made, code)
i.destroy(made)
"""


@pytest.mark.parametrize("legacy", [True, False])
def test_a_subinterpreter_has_a_hook_of_its_own(
    every_python: Target, tmp_path: Path, legacy: bool
) -> None:
    # Each one runs site, and with it the .pth, by itself.
    fake_sglang(tmp_path)
    inside = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{HOOKED}\n"
        "import json, os\n"
        "os.write(1, (json.dumps([hooked, finders]) + chr(10)).encode())\n"
    )
    path = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    around = SUBINTERPRETER.format(legacy=legacy, code=inside)
    done = every_python.run(
        "-W", "ignore", "-c", f"{around}\n{path}{HOOKED}\nimport os, json\n"
        "os.write(1, (json.dumps([hooked, finders]) + chr(10)).encode())",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [[True, 1], [True, 1]]


@pytest.mark.parametrize("flags", [("-E", "-I"), ("-E", "-I", "-P"), ("-P",), ("-I", "-s", "-B")])
def test_flags_together(every_python: Target, flags: tuple[str, ...]) -> None:
    if "-P" in flags and every_python.version in ("3.9", "3.10"):
        pytest.skip("Python 3.11 brought -P")
    assert every_python.finders(*flags) == 1
    done = every_python.run(*flags, "-c", "import sglang_weight_hook_patch_core")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_pythonsafepath(every_python: Target) -> None:
    assert every_python.finders(environment={"PYTHONSAFEPATH": "1"}) == 1


SAFE = {"PYTHONSAFEPATH": "1"}


@pytest.mark.parametrize("version", SUPPORTED)
def test_the_wrapper_hooks_a_launch_that_takes_nothing_from_its_directory(
    version: str, tmp_path: Path
) -> None:
    """What -P leaves out of sys.path is the script's directory; the wrapper's is on PYTHONPATH."""
    python = interpreter(version)
    if python is None:
        pytest.skip(f"there is no Python {version} here")
    fake_sglang(tmp_path)
    command = "import subprocess, sys\n" + HOOKED + CHILD
    (tmp_path / "asked.py").write_text(f"{command}print(hooked, finders, child)\n")
    ways: list[tuple[tuple[str, ...], dict[str, str]]] = [((), SAFE)]
    if version not in ("3.9", "3.10"):  # Python 3.11 brought -P
        ways += [(("-P",), {}), (("-P", "-X", "utf8"), SAFE)]
    for flags, environment in ways:
        done = subprocess.run(
            [python, *flags, ROOT / "launch_wrapper.py", "-m", "asked"],
            capture_output=True,
            text=True,
            cwd="/",
            env={**ENVIRONMENT, "PYTHONPATH": str(tmp_path), **environment},
            timeout=60,
            check=False,
        )
        assert (done.stdout, done.returncode) == ("True 1 True 1\n", 0), done.stderr


CHILD = f"""
code = {HOOKED + "print(hooked, finders)"!r}
done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
child = done.stdout.strip()
"""


@pytest.mark.parametrize("flags", [(), ("-E",), ("-I",)])
def test_installing_heeds_no_variable_of_the_shell(target: Target, flags: tuple[str, ...]) -> None:
    environment = {"PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONOPTIMIZE": "2"}
    done = target.script("install_sglang_hook_patch.sh", environment=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert target.finders(*flags) == 1
    done = target.script("uninstall_sglang_hook_patch.sh", environment=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert tree(target.purelib) == {}


def test_a_free_threaded_python_is_not_taken_for_the_usual_one() -> None:
    for version in FREE_THREADED:
        plain, free = interpreter(version[:-1]), interpreter(version)
        assert plain is None or plain != free
