"""Published import hooks of other projects, in one environment with ours.

wrapt, autowrapt, ddtrace, coverage's start-up ``.pth``, beartype.claw, the finder of a
setuptools editable installation and numba-cuda's redirector.  Each behaves with the hook as
without, in either order, for threads that import at once and for a reload; and SGLang's methods
are wrapped.  The package ``sglang`` is a fake with real files under the real names,
installed in editable mode.

Fetches some 40 MB from the package registry; deselect with ``-m 'not registry'``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ENVIRONMENT, Target, make_target

pytestmark = pytest.mark.registry

#: With only those of their dependencies that these tests use.
PUBLISHED = (
    "wrapt==2.5.2", "autowrapt==2.0.0", "ddtrace==4.16.0", "bytecode", "envier",
    "coverage==7.17.3", "beartype==0.23.1", "numba-cuda==0.30.4", "setuptools>=77",
)  # fmt: skip

RUNNER = "sglang.srt.model_executor.model_runner"

MODEL_RUNNER = """
class ModelRunner:
    def load_model(self) -> str:
        return "loaded"

    def finalize_startup_weight_load(self) -> None:
        pass

    def alloc_memory_pool(self):
        pass
    def load_lora_adapter(self, lora_ref):
        pass
    def load_lora_adapter_from_tensors(self, lora_ref, tensors, config_dict):
        pass
    def unload_lora_adapter(self, lora_ref):
        pass

def wrongly_typed(count: int) -> int:
    return count
"""

# Editable, and with the sources under another name: setuptools then needs a finder.
PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "sglang"
version = "0.5.23"
[tool.setuptools]
packages = ["sglang", "sglang.srt", "sglang.srt.model_executor"]
package-dir = {"sglang" = "source"}
"""


def pip(target: Target, *arguments: str) -> None:
    # With the caller's own environment: it may name a registry and a proxy.
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(target.python), "install", "-q",
         "--disable-pip-version-check", "--no-deps", *arguments],
        check=True, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def shared_venv(tmp_path_factory: pytest.TempPathFactory) -> Target:
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    target = make_target(tmp_path_factory.mktemp("other-hooks-") / "venv", here)
    pip(target, "--only-binary=:all:", *PUBLISHED)

    project = tmp_path_factory.mktemp("project-")
    (project / "pyproject.toml").write_text(PROJECT)
    for name, text in {
        "__init__.py": "__version__ = '0.5.23'\n",
        "srt/__init__.py": "",
        "srt/model_executor/__init__.py": "",
        "srt/model_executor/model_runner.py": MODEL_RUNNER,
    }.items():
        path = project / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    pip(target, "--no-build-isolation", "-e", str(project))
    assert list(target.purelib.glob("__editable___sglang_*_finder.py"))

    # What autowrapt is told to hook, by an entry point of another package.
    (target.purelib / "somebody.py").write_text(
        "def hook(module):\n    print('autowrapt', module.__name__)\n"
    )
    information = target.purelib / "somebody-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: somebody\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(f"[somebody]\n{RUNNER} = somebody:hook\n")

    # numba-cuda's redirector looks for numba, which is a stub here; numba-cuda itself is real.
    for package in ("numba", "numba/cuda"):
        (target.purelib / package).mkdir()
        (target.purelib / package / "__init__.py").write_text("")
    target.install()
    return target


# Each activates itself for the module of the runner, and prints when it has run.
ACTIVATIONS = {
    "none": "",
    "wrapt": f"""
import wrapt
wrapt.register_post_import_hook(lambda module: print("wrapt", module.__name__), {RUNNER!r})
""",
    "autowrapt": "assert 'autowrapt' in sys.modules\n",
    "ddtrace": f"""
from ddtrace.internal.module import ModuleWatchdog
ModuleWatchdog.install()
ModuleWatchdog.register_module_hook({RUNNER!r}, lambda module: print("ddtrace", module.__name__))
""",
    "beartype": "from beartype.claw import beartype_package; beartype_package('sglang')\n",
    "numba-cuda": """
import importlib.util
print(importlib.util.find_spec("numba.cuda").origin.rpartition("site-packages")[2])
""",
}
ACTIVATIONS["all of them"] = "".join(ACTIVATIONS.values())

PROGRAM = """
import os, sys
{first}
{second}
import importlib, threading
barrier, seen, faults = threading.Barrier(8), [], []
def work():
    barrier.wait()
    try:
        seen.append(importlib.import_module({runner!r}))
    except BaseException as error:
        faults.append(error)
threads = [threading.Thread(target=work) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
module = seen[0]
print(len(seen), faults, all(other is module for other in seen))
def portrait():
    try:
        print(module.wrongly_typed("text"))
    except Exception as error:
        print(type(error).__name__)
    print(module.ModelRunner.load_model.__qualname__, module.__file__)
    print(type(module.__spec__.loader).__name__, type(module.__loader__).__name__)
portrait()
importlib.reload(module)
portrait()
mark = "_sglang_weight_hook_entry"
method = module.ModelRunner.load_model
once = hasattr(method, mark) and not hasattr(method.__wrapped__, mark)
print("WRAPPED", once, file=sys.stderr)
"""

OURS = """
del os.environ["SGLANG_WEIGHT_HOOK"]
import sglang_patch_loader
sglang_patch_loader.install()
"""


def run(target: Target, first: str, second: str, hook: bool) -> tuple[str, str]:
    """The output, and the line that says whether the method was wrapped."""
    done = target.run(
        "-W", "ignore", "-c", PROGRAM.format(first=first, second=second, runner=RUNNER),
        environment={
            "AUTOWRAPT_BOOTSTRAP": "somebody",
            **({} if hook else {"SGLANG_WEIGHT_HOOK": "0"}),
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *others, wrapped = done.stderr.splitlines()
    assert others == []
    return done.stdout, wrapped


@pytest.mark.parametrize("who", ACTIVATIONS)
def test_each_behaves_as_without_the_hook_in_either_order(shared_venv: Target, who: str) -> None:
    activation = ACTIVATIONS[who]
    without = run(shared_venv, activation, "", hook=False)
    assert without[1] == "WRAPPED False"
    assert "8 [] True" in without[0]
    for name in ("wrapt", "ddtrace", "autowrapt"):
        if name == who or name == "autowrapt" or who == "all of them":
            assert f"{name} {RUNNER}\n" in without[0]
    if who in ("beartype", "all of them"):
        assert "BeartypeCallHintParamViolation\n" in without[0]
    if who in ("numba-cuda", "all of them"):
        assert "/numba_cuda/numba/cuda/__init__.py\n" in without[0]
    ours_first = run(shared_venv, activation, "", hook=True)
    ours_last = run(shared_venv, activation, OURS, hook=False)
    assert ours_first == ours_last == (without[0], "WRAPPED True")


def test_start_up_imports_and_finders_are_theirs_alone(shared_venv: Target) -> None:
    code = "import sys; print(*sorted(sys.modules), sep='\\n')"
    finders = "import sys; print([type(f).__name__ for f in sys.meta_path])"
    off = {"SGLANG_WEIGHT_HOOK": "0"}
    assert shared_venv.run("-c", code).stdout == shared_venv.run("-c", code, environment=off).stdout
    assert shared_venv.run("-c", "pass").stderr == ""
    with_us = shared_venv.run("-c", finders).stdout.replace("'_Finder', ", "", 1)
    assert with_us == shared_venv.run("-c", finders, environment=off).stdout


def test_coverage_measures_the_same_lines(shared_venv: Target, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"from {RUNNER} import ModelRunner, wrongly_typed\nprint(ModelRunner.__name__)\n"
    )
    measured = []
    for switch in ("0", "1"):
        place = tmp_path / switch
        place.mkdir()
        (place / "coveragerc").write_text(
            f"[run]\nsource_pkgs = sglang\nbranch = true\ndata_file = {place}/data\n"
        )
        environment = {
            **ENVIRONMENT,
            "COVERAGE_PROCESS_START": str(place / "coveragerc"),
            "SGLANG_WEIGHT_HOOK": switch,
        }
        python = str(shared_venv.python)
        done = subprocess.run(
            [python, str(script)], env=environment, capture_output=True, text=True, check=True
        )
        assert (done.stdout, done.stderr) == ("ModelRunner\n", "")
        out = place / "report.json"
        del environment["COVERAGE_PROCESS_START"]
        data = [*place.glob("data*")]
        assert len(data) == 1
        subprocess.run(
            [python, "-m", "coverage", "json", "-q", "--rcfile", place / "coveragerc",
             "--data-file", data[0], "-o", out],
            env=environment, check=True,
        )  # fmt: skip
        files = json.loads(out.read_text())["files"]
        measured.append({os.path.basename(name): found for name, found in files.items()})
    assert measured[0]["model_runner.py"]["executed_lines"]
    assert measured[0] == measured[1]


def test_uninstalling_leaves_the_other_import_hooks(shared_venv: Target) -> None:
    shared_venv.uninstall()
    assert not list(shared_venv.purelib.glob("sglang_*"))
    done = shared_venv.run(
        "-c", f"import {RUNNER}", environment={"AUTOWRAPT_BOOTSTRAP": "somebody"}
    )
    assert (done.stdout, done.stderr) == (f"autowrapt {RUNNER}\n", "")
    shutil.rmtree(shared_venv.purelib)  # it is large
