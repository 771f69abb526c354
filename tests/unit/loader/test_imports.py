"""The loader sees every import of SGLang's modules, however it is made.

The package ``sglang`` here is a fake with real files under the real names; ``tests/install``
has the hook in real environments, ``tests/real_sglang`` the real package.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest
from fake_package import INSTALL, MODEL_RUNNER, ONCE, PATCHED, RUNNER, UPDATER, RunPython

import sglang_patch_loader as loader


@pytest.mark.parametrize(
    "statement",
    [
        f"from {RUNNER} import ModelRunner",
        f"import {RUNNER} as m; ModelRunner = m.ModelRunner",
        f"import importlib; ModelRunner = importlib.import_module({RUNNER!r}).ModelRunner",
        f"ModelRunner = __import__({RUNNER!r}, fromlist=['ModelRunner']).ModelRunner",
        "import importlib\n"
        "ModelRunner = importlib.import_module('.model_runner', "
        "'sglang.srt.model_executor').ModelRunner",
        "import importlib.util, sys\n"
        f"spec = importlib.util.find_spec({RUNNER!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module); ModelRunner = module.ModelRunner",
        "import importlib.util, sys\n"
        f"spec = importlib.util.find_spec({RUNNER!r})\n"
        "spec.loader = importlib.util.LazyLoader(spec.loader)\n"
        "module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module); ModelRunner = module.ModelRunner",
    ],
)
def test_a_target_is_patched_however_it_is_imported(statement: str, python: RunPython) -> None:
    done = python(INSTALL + statement + f"\nprint({PATCHED}, ModelRunner().load_model())")
    assert done.stdout == "True loaded\n"


def test_a_target_imported_before_the_hook_is_patched_at_once(python: RunPython) -> None:
    done = python(f"from {RUNNER} import ModelRunner\n" + INSTALL + f"print({PATCHED})")
    assert done.stdout == "True\n"


def test_a_target_that_installs_the_hook_while_it_executes_is_imported(
    python: RunPython, package: Path
) -> None:
    path = package / "sglang/srt/model_executor/model_runner.py"
    path.write_text(INSTALL + MODEL_RUNNER)
    done = python(f"from {RUNNER} import ModelRunner; print(ModelRunner().load_model())")
    assert (done.stdout, done.stderr) == ("loaded\n", "")


def test_a_reloaded_target_has_its_new_class_patched(python: RunPython) -> None:
    done = python(
        INSTALL
        + f"""
import importlib, {RUNNER} as module
old = module.ModelRunner
ModelRunner = importlib.reload(module).ModelRunner
print(ModelRunner is not old, {PATCHED}, type(module.__spec__.loader).__name__)
"""
    )
    assert done.stdout == "True True SourceFileLoader\n"


def test_a_first_import_that_fails_is_patched_when_it_is_retried(
    python: RunPython, package: Path
) -> None:
    path = package / "sglang/srt/model_executor/model_runner.py"
    path.write_text("import os\nif os.environ.pop('FAIL', 0): 1 / 0\n" + MODEL_RUNNER)
    done = python(
        INSTALL
        + f"""
import sys
try:
    import {RUNNER}
except ZeroDivisionError:
    print("failed", {RUNNER!r} in sys.modules)
from {RUNNER} import ModelRunner
print({PATCHED})
""",
        FAIL="1",
    )
    assert done.stdout == "failed False\nTrue\n"


def test_a_target_that_is_not_there_fails_as_without_the_hook(
    python: RunPython, package: Path
) -> None:
    (package / "sglang/srt/model_executor/model_runner.py").unlink()
    code = f"""
try:
    import {RUNNER}
except ModuleNotFoundError as error:
    print(error, error.name)
import importlib.util
print(importlib.util.find_spec({RUNNER!r}))
"""
    assert python(INSTALL + code).stdout == python(code).stdout


@pytest.mark.parametrize("hook", [True, False])
def test_python_m_of_a_target_runs_it(hook: bool, run_python: RunPython, package: Path) -> None:
    customize = package / "sitecustomize.py"
    customize.write_text(INSTALL)
    done = run_python(
        "-W", "error", "-m", RUNNER, "a", "b", path=package, SGLANG_WEIGHT_HOOK=str(int(hook))
    )
    assert (done.stdout, done.stderr) == (f"main {RUNNER} True ['a', 'b']\n", "")


def test_python_m_of_a_target_shows_it_its_own_loader(run_python: RunPython, package: Path) -> None:
    (package / "sitecustomize.py").write_text(INSTALL)
    path = package / "sglang/srt/model_executor/model_runner.py"
    path.write_text("print(type(__spec__.loader), __loader__ is __spec__.loader)\n")
    hooked, plain = (
        run_python("-m", RUNNER, path=package, SGLANG_WEIGHT_HOOK=switch).stdout for switch in "10"
    )
    assert hooked == plain
    assert "SourceFileLoader" in plain


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_the_children_of_multiprocessing_are_patched(
    method: str, run_python: RunPython, package: Path, tmp_path: Path
) -> None:
    (package / "sitecustomize.py").write_text(INSTALL)
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import multiprocessing, sys

def child():
    from {RUNNER} import ModelRunner
    print({PATCHED}, flush=True)

if __name__ == "__main__":
    process = multiprocessing.get_context(sys.argv[1]).Process(target=child)
    process.start()
    process.join()
    sys.exit(process.exitcode)
"""
    )
    assert run_python(str(script), method, path=package).stdout == "True\n"


def test_threads_that_import_at_once_get_one_patched_class_each_way(python: RunPython) -> None:
    done = python(
        INSTALL
        + f"""
import threading, importlib
import typing  # which SGLang has imported long before, and dataclasses look for in sys.modules
barrier, seen = threading.Barrier(8), []
names = [{RUNNER!r}, {UPDATER!r}]
def work(number):
    barrier.wait()
    seen.append(importlib.import_module(names[number % 2]))
threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
(a, b) = sorted(set(seen), key=lambda module: module.__name__)
ModelRunner = a.ModelRunner
print(len(seen), {PATCHED}, hasattr(b.WeightUpdater.update_weights_from_disk,
                                     "_sglang_weight_hook_entry"),
      hasattr(ModelRunner.load_model.__wrapped__, "__wrapped__"), sglang_patch_loader._walking)
"""
    )
    assert (done.stdout, done.stderr) == ("8 True True False set()\n", "")


def test_a_namespace_package_in_a_targets_place_is_imported_untouched(
    python: RunPython, package: Path
) -> None:
    path = package / "sglang/srt/model_executor/model_runner.py"
    path.unlink()
    path.with_suffix("").mkdir()
    code = f"import {RUNNER} as m; print(m.__name__, list(m.__path__), type(m.__spec__.loader))"
    assert python(INSTALL + code).stdout == python(code).stdout


def test_a_spec_without_a_loader_is_returned_untouched() -> None:
    from importlib.machinery import ModuleSpec

    spec = ModuleSpec(RUNNER, None, is_package=True)

    class Finder:
        def find_spec(self, *arguments: object) -> ModuleSpec:
            return spec

    sys.meta_path.insert(0, Finder())
    loader.install()
    ours = sys.meta_path[0]
    assert ours.find_spec(RUNNER, None) is spec
    assert spec.loader is None


def test_a_target_inside_a_zip_is_patched(python: RunPython, package: Path, tmp_path: Path) -> None:
    archive = tmp_path / "sglang.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(package.rglob("*.py")):
            file.write(path, path.relative_to(package))
            path.unlink()
    done = python(
        f"import sys; sys.path.insert(0, {str(archive)!r}); sys.path_importer_cache.clear()\n"
        f"sys.path.remove({str(package)!r})\n" + INSTALL + ONCE + "import inspect\n"
        f"print(inspect.getsource(sys.modules[{RUNNER!r}])[:18].strip())"
    )
    assert done.stdout == "True False zipimporter set()\nclass ModelRunner\n"


def test_the_finder_imports_nothing(python: RunPython) -> None:
    # The import system holds its global lock while finders are asked: to import the core there
    # waits for a thread that is importing it, which may wait for that very lock.
    code = (
        INSTALL
        + f"""
import sys
finder = sys.meta_path[0]
import sglang.srt.model_executor as package
before = set(sys.modules)
spec = finder.find_spec({RUNNER!r}, package.__path__)
print(spec is not None, sorted(set(sys.modules) - before))
"""
    )
    assert python(code).stdout == "True []\n"


def test_a_target_imported_while_another_thread_imports_the_core_ends_no_deadlock(
    python: RunPython,
) -> None:
    code = f"""
import faulthandler, importlib.machinery, sys, threading, time
faulthandler.dump_traceback_later(20, exit=True)
{INSTALL.strip()}
import sglang.srt.model_executor
sys.modules.pop("logging", None)  # so that the core has something left to import
begun = threading.Event()
execute = importlib.machinery.SourceFileLoader.exec_module
def slowly(self, module):
    if module.__name__ == "sglang_weight_hook_patch_core":
        begun.set()
        time.sleep(0.5)
    return execute(self, module)
importlib.machinery.SourceFileLoader.exec_module = slowly
core = threading.Thread(target=__import__, args=("sglang_weight_hook_patch_core",))
core.start()
begun.wait()
target = threading.Thread(target=__import__, args=({RUNNER!r},))
target.start()
core.join()
target.join()
ModelRunner = sys.modules[{RUNNER!r}].ModelRunner
print({PATCHED})
"""
    assert python(code).stdout == "True\n"
